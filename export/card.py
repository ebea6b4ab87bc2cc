"""The model card: what a person who is handed a bundle wants to know, in the form of Hugging Face's cards."""

import math

from scipy.stats import beta

from coterie.bundle import EncoderCard, Manifest
from coterie.classifier import Calibration

__all__ = ["model_card"]

SHOWN_CLASSES = 50
ORIGINS = {"weights": "weights", "dataset": "trained on", "gallery": "gallery"}
MEASURES = {
    "held_out_top1": "top-1, rejection ignored",
    "ece": "expected calibration error of the probabilities, 15 bins",
    "ece_of_vote": "the same of the neighbours' plain vote",
    "knn_top1": "k-NN top-1",
    "knn_top1_fp32": "k-NN top-1 in fp32",
    "min_cosine_to_fp32": "smallest cosine to the embedding in fp32, gallery included",
    "mean_cosine_to_fp32": "mean cosine to the embedding in fp32, gallery included",
}


def model_card(manifest: Manifest) -> str:
    """Markdown with YAML front matter. It says nothing that the manifest does not."""
    card, calibration = manifest.encoder, manifest.calibration
    return f"""---
{_front_matter(manifest)}
---

# {manifest.name}

An image encoder ({manifest.provenance.get("architecture", "of unknown architecture")}) with a labelled gallery of
{manifest.gallery_size:,} images. It gives images embeddings, names their class or calls them unknown, and learns a new
class from a few examples without training. {_training(manifest)}

## Classes

{_classes(manifest.classes)}

## Measured

{_measured(manifest)}

`coterie evaluate BUNDLE DATA --unknown OTHERS --report report.html`
measures the bundle on labelled images of yours.

## Preprocessing

{_preprocessing(card)}

## Use

```python
from coterie import Bundle

bundle = Bundle.open("BUNDLE")
bundle.embed(["image.png"])  # float32 (1, {card.embedding_dim}), unit length
bundle.classify(["image.png"], false_reject=0.05)
```

```
coterie serve BUNDLE
curl --data-binary @image.png -H "Content-Type: image/png" http://127.0.0.1:3000/v1/classify
curl --data-binary @image.png -H "Content-Type: image/png" http://127.0.0.1:3000/v1/embeddings
```

## Intended use and limits

For images like those of the gallery. Other cameras, light or framing than the gallery's are not covered by the numbers
above: measure on images from where the bundle is to be used, and do so again when these change.

An image is called unknown when it lies too far from {_nearness(calibration)} of its most probable class:
when the logarithm of its gap, in units of what is typical of that class, is above the limit for the false-reject rate
asked for. That rate is the share of images of known classes that are refused in error; how many images of unknown
classes get a label is for `coterie evaluate --unknown` to say.

{_rates(calibration)}

The bundle holds thumbnails of the gallery's images and their file names: who gets it, gets these.

## Origin

| | |
|---|---|
{_origin(manifest)}
"""


def _training(manifest: Manifest) -> str:
    recipe, objective = manifest.provenance.get("recipe"), manifest.provenance.get("objective")
    if recipe:
        return f"It was trained\nby the recipe `{recipe}` with the objective `{objective}`."
    return (
        "Its weights\nare pretrained; its last step, which whitens features within classes, was fitted to the gallery."
    )


def _front_matter(manifest: Manifest) -> str:
    weights, licence = manifest.provenance.get("weights", ""), manifest.provenance.get("license")
    return "\n".join(
        [
            "library_name: coterie",
            "pipeline_tag: image-feature-extraction",
            *([f"license: {licence}"] if licence else []),
            *([f"base_model: {weights}"] if "/" in weights else []),
            "tags:",
            *(f"- {tag}" for tag in ("image-classification", "open-set-recognition", "k-nn", "onnx")),
            *(["- supervised-contrastive-learning"] if manifest.provenance.get("objective") == "supcon" else []),
        ]
    )


def _classes(classes: tuple[str, ...]) -> str:
    shown = ", ".join(f"`{name.replace('`', chr(39))}`" for name in classes[:SHOWN_CLASSES])
    more = f" and {len(classes) - SHOWN_CLASSES} more" if len(classes) > SHOWN_CLASSES else ""
    return f"{len(classes)}: {shown}{more}."


def _measured(manifest: Manifest) -> str:
    calibration, images = manifest.calibration, manifest.calibration.images
    accuracy = manifest.accuracy and manifest.accuracy | {
        "ece": calibration.ece,
        "ece_of_vote": calibration.ece_of_vote,
    }
    rows = [f"| {text} | {accuracy[key]:.4f} |" for key, text in MEASURES.items() if key in accuracy]
    if not rows:
        return "Not measured since enrolled images became part of the gallery."
    by = "export" if "merged" not in manifest.provenance else "gallery merge"
    return "\n".join(
        [
            f"On {images} images that `coterie {by}` held out of the gallery, in {manifest.encoder.precision}:",
            "",
            "| measure | value |",
            "|---|---|",
            *rows,
            "",
            "`coterie bundle info BUNDLE` prints these numbers.",
        ]
    )


def _preprocessing(card: EncoderCard) -> str:
    height, width = card.input_size
    resize = {
        "crop": f"cropped to the central {card.crop_fraction:.4g} of the largest rectangle of the input's shape,\n"
        f"and scaled to {height} × {width} with a {card.interpolation} filter",
        "stretch": f"stretched to {height} × {width} with a {card.interpolation} filter",
        "pad": f"scaled with a {card.interpolation} filter to fit {height} × {width}, and padded",
    }[card.resize]
    return (
        f"An image is turned upright by its EXIF data, laid over RGB {card.background} where it is transparent,\n"
        f"{resize}.\nThe model takes the uint8 pixels (n, {height}, {width}, 3); mean {_triple(card.mean)} and\n"
        f"standard deviation {_triple(card.std)} are in its graph.\n"
        f"It gives float32 embeddings of unit length, and computes in {card.precision}."
    )


def _triple(values: tuple[float, float, float]) -> str:
    return f"({', '.join(f'{value:g}' for value in values)})"


def _nearness(calibration: Calibration) -> str:
    named = {0.0: "the cluster", 1.0: "the nearest item"}
    return named.get(calibration.neighbor_share, "the cluster and the nearest item")


def _rates(calibration: Calibration) -> str:
    """The limits, and in what range the rate of new images will be: with m of n above, Beta(m, n + 1 − m)."""
    n = calibration.images
    rows = ["| false-reject rate | limit | of new images, in nine bundles of ten |", "|---|---|---|"]
    for rate, limit in calibration.limits.items():
        above = math.floor((n + 1) * float(rate) + 1e-9)
        low, high = beta.ppf([0.05, 0.95], max(above, 1), n + 1 - max(above, 1))
        note = f"{low:.1%} to {high:.1%}" if above else f"up to {high:.1%}: too few images to promise {float(rate):.0%}"
        rows.append(f"| {float(rate):.0%} | {limit:.3f} | {note} |")
    return "\n".join(rows)


def _origin(manifest: Manifest) -> str:
    entries = [(text, manifest.provenance.get(key)) for key, text in ORIGINS.items()]
    entries += sorted(manifest.provenance.get("versions", {}).items())
    return "\n".join(f"| {text} | {value} |" for text, value in entries if value)
