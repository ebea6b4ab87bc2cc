"""The model card: what a person who is handed a bundle wants to know."""

from coterie.bundle import Manifest

__all__ = ["model_card"]


def model_card(manifest: Manifest) -> str:
    """Markdown with Hugging Face's front matter. Everything in it stands in the manifest too."""
    card, calibration = manifest.encoder, manifest.calibration
    height, width = card.input_size
    classes = ", ".join(f"`{name}`" for name in manifest.classes[:50])
    more = f" and {len(manifest.classes) - 50} more" if len(manifest.classes) > 50 else ""
    limits = "\n".join(f"| {float(rate):.0%} | {limit:.3f} |" for rate, limit in calibration.limits.items())
    return f"""---
library_name: coterie
pipeline_tag: image-feature-extraction
tags: [supervised-contrastive-learning, image-classification, open-set-recognition, onnx]
---

# {manifest.name}

An image encoder with a labelled gallery of {manifest.gallery_size:,} images in {len(manifest.classes)} classes:
{classes}{more}.

| | |
|---|---|
| input | RGB, {height} × {width}, uint8; {card.resize}, {card.interpolation} |
| embedding | {card.embedding_dim} dimensions, unit length, {card.precision} |
| architecture | {manifest.provenance.get("architecture", "unknown")} |
| top-1 on {int(manifest.accuracy["held_out_images"])} held-out images | {manifest.accuracy["held_out_top1"]:.4f} |

## Saying "unknown"

A query is refused when the logarithm of its gap to the winning cluster, in units of the cluster's radius, is above the
limit for the false-reject rate asked for. The limits were drawn from {calibration.images} held-out images and keep
their rate with {calibration.confidence:.0%} confidence.

| false-reject rate | limit |
|---|---|
{limits}

## Use

```
coterie serve PATH
curl --data-binary @image.png http://127.0.0.1:3000/v1/classify
```

```python
from coterie import Bundle
Bundle.open("PATH").classify(["image.png"])
```
"""
