"""What is measured after every epoch, and its picture."""

import io
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from coterie.files import write_bytes
from training.encoders import ImageEncoder

__all__ = ["draw_curves", "embed", "features_of", "knn_top1"]


@torch.inference_mode()
def features_of(encoder: ImageEncoder, pixels: Tensor, batch_size: int = 512) -> Tensor:
    """Features (n, dim) of uint8 images (n, h, w, 3), with the encoder in evaluation mode."""
    was_training = encoder.training
    encoder.eval()
    parts = [encoder(part.permute(0, 3, 1, 2).float().div(255)).float() for part in pixels.split(batch_size)]
    encoder.train(was_training)
    return torch.cat(parts)


def embed(encoder: ImageEncoder, pixels: Tensor) -> Tensor:
    """Unit-length embeddings (n, dim) of uint8 images (n, h, w, 3)."""
    return F.normalize(features_of(encoder, pixels))


@torch.inference_mode()
def knn_top1(
    gallery: Tensor, labels: Tensor, queries: Tensor, query_labels: Tensor, *, k: int = 20, temperature: float = 0.07
) -> float:
    """Top-1 of the vote of the k nearest, weighted by exp(similarity / T), as in DINO's evaluation (arXiv 2104.14294).

    Args:
        gallery, queries: unit-length (n, dim) and (m, dim).
        labels, query_labels: int64 (n,) and (m,).
    """
    classes = int(labels.max()) + 1
    right = 0
    for part, truth in zip(queries.split(1024), query_labels.split(1024), strict=True):
        similarities, rows = (part @ gallery.T).topk(min(k, len(gallery)), dim=1)
        weights = ((similarities - 1) / temperature).exp()
        votes = weights.new_zeros(len(part), classes).scatter_add_(1, labels[rows], weights)
        right += int((votes.argmax(1) == truth).sum())
    return right / len(queries)


def draw_curves(rows: list[dict[str, float]], path: Path) -> None:
    """Write loss, k-NN accuracy, alignment and uniformity over epochs as one PNG."""
    from matplotlib.figure import Figure  # the object interface: no global state, no display

    figure = Figure(figsize=(10, 6), layout="constrained")
    panels = {"loss": "loss", "knn_top1": "k-NN top-1, held out", "alignment": "alignment", "uniformity": "uniformity"}
    for axes, (key, title) in zip(figure.subplots(2, 2).flat, panels.items(), strict=True):
        points = [(row["epoch"], row[key]) for row in rows if key in row]
        axes.plot(*zip(*points, strict=True)) if points else None
        axes.set(title=title, xlabel="epoch")
        axes.grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120, format="png")
    write_bytes(path, buffer.getvalue())
