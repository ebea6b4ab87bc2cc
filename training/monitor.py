"""What is measured after an epoch, and its picture."""

import io
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from coterie.files import write_bytes
from training.encoders import ImageEncoder
from training.losses import batch_diagnostics

__all__ = ["centre", "draw_curves", "embed", "features_of", "knn_predictions", "knn_top1", "linear_top1", "measure"]

CHUNK = 512


@torch.inference_mode()
def features_of(encoder: ImageEncoder, batches: Tensor | Iterable[Tensor]) -> Tensor:
    """Features (n, dim) of uint8 images (n, h, w, 3), given at once or in batches; in evaluation mode."""
    was_training = encoder.training
    encoder.eval()
    parts = batches.split(CHUNK) if isinstance(batches, Tensor) else batches
    features = [encoder(part.permute(0, 3, 1, 2).float().div(255)).float() for part in parts]
    encoder.train(was_training)
    return torch.cat(features)


def embed(encoder: ImageEncoder, batches: Tensor | Iterable[Tensor]) -> Tensor:
    """Unit-length embeddings (n, dim) of uint8 images (n, h, w, 3)."""
    return F.normalize(features_of(encoder, batches))


def centre(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Images (n, h, w, 3) shrunk to the input size, for monitoring (serving and evaluation decode anew)."""
    if tuple(pixels.shape[1:3]) == size:
        return pixels
    images = pixels.permute(0, 3, 1, 2).float()
    return F.interpolate(images, size, mode="bilinear", antialias=True).round_().byte().permute(0, 2, 3, 1)


def measure(gallery: Tensor, labels: Tensor, queries: Tensor, query_labels: Tensor, n_classes: int) -> dict[str, float]:
    """k-NN and linear top-1, alignment and uniformity of held-out features, whose labels are query_labels.

    Args:
        gallery, queries: features (n, dim) and (m, dim), of any length.
        labels, query_labels: int64 (n,) and (m,).
    """
    spread = batch_diagnostics(queries, query_labels)
    return {
        "knn_top1": knn_top1(F.normalize(gallery), labels, F.normalize(queries), query_labels),
        "linear_top1": linear_top1(gallery, labels, queries, query_labels, n_classes),
        "alignment": spread.alignment.item(),
        "uniformity": spread.uniformity.item(),
    }


@torch.inference_mode()
def knn_top1(
    gallery: Tensor, labels: Tensor, queries: Tensor, query_labels: Tensor, *, k: int = 20, temperature: float = 0.07
) -> float:
    """Top-1 of the vote of the k nearest, weighted by exp(similarity / T), as in DINO's evaluation (arXiv 2104.14294).

    Args:
        gallery, queries: unit-length (n, dim) and (m, dim).
        labels, query_labels: int64 (n,) and (m,).
    """
    predicted = knn_predictions(gallery, labels, queries, k=k, temperature=temperature)
    return float((predicted == query_labels).double().mean())


@torch.inference_mode()
def knn_predictions(
    gallery: Tensor, labels: Tensor, queries: Tensor, *, k: int = 20, temperature: float = 0.07
) -> Tensor:
    """The label (m,) that `knn_top1` compares with the truth."""
    classes = int(labels.max()) + 1
    predicted = []
    for part in queries.split(1024):
        similarities, rows = (part @ gallery.T).topk(min(k, len(gallery)), dim=1)
        weights = ((similarities - 1) / temperature).exp()
        votes = weights.new_zeros(len(part), classes).scatter_add_(1, labels[rows], weights)
        predicted.append(votes.argmax(1))
    return torch.cat(predicted)


@torch.inference_mode()
def linear_top1(
    gallery: Tensor, labels: Tensor, queries: Tensor, query_labels: Tensor, n_classes: int, *, ridge: float = 1e-3
) -> float:
    """Top-1 of a linear classifier fitted to the gallery's features by least squares on one-hot labels.

    With centred features X and targets Y, W = (XᵀX/n + λs I)⁻¹ XᵀY/n, where s is the features' mean variance. Fitted
    in closed form it has no rate to choose, no state to resume, and costs O(n·dim² + dim³).

    Args:
        gallery, queries: features (n, dim) and (m, dim).
        ridge: λ.
    """
    x, mean = gallery.double(), gallery.double().mean(0)
    x = x - mean
    targets = F.one_hot(labels, n_classes).double()
    shares = targets.mean(0)
    covariance = x.T @ x / len(x)
    damping = ridge * covariance.diagonal().mean().clamp(min=1e-12)
    covariance.diagonal().add_(damping)
    weights = torch.cholesky_solve(x.T @ (targets - shares) / len(x), torch.linalg.cholesky(covariance))
    predicted = ((queries.double() - mean) @ weights + shares).argmax(1)
    return float((predicted == query_labels).double().mean())


PANELS = {
    "loss": "loss",
    "knn_top1": "k-NN top-1, held out",
    "linear_top1": "linear top-1, held out",
    "alignment": "alignment",
    "uniformity": "uniformity",
    "images_per_second": "images per second",
}


def draw_curves(rows: list[dict[str, float]], path: Path) -> None:
    """Write what was measured over epochs as one PNG."""
    from matplotlib.figure import Figure  # the object interface: no global state, no display

    figure = Figure(figsize=(12, 6), layout="constrained")
    for axes, (key, title) in zip(figure.subplots(2, 3).flat, PANELS.items(), strict=True):
        points = [(row["epoch"], row[key]) for row in rows if key in row]
        axes.plot(*zip(*points, strict=True), marker="." if len(points) < 20 else "") if points else None
        axes.set(title=title, xlabel="epoch")
        axes.grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120, format="png")
    write_bytes(path, buffer.getvalue())
