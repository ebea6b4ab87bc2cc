"""Contrast, warps and compression; see evaluation.corruptions. Images are float (h, w, 3) from 0 to 1."""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pillow
from scipy import ndimage

__all__ = ["contrast", "elastic_transform", "jpeg_compression", "pixelate"]

Image = NDArray[np.float64]

CONTRASTS = (0.75, 0.5, 0.4, 0.3, 0.15)
# As shares of the side: how far pixels move, how smoothly, and how far the three corners of the affine map do.
ELASTIC = ((0.0, 0.0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03))
PIXELS = (0.95, 0.9, 0.85, 0.75, 0.65)
QUALITIES = (80, 65, 58, 50, 40)


def contrast(image: Image, severity: int, rng: np.random.Generator) -> Image:
    """Each channel drawn to its mean."""
    means = image.mean(axis=(0, 1))
    return (image - means) * CONTRASTS[severity - 1] + means


def elastic_transform(image: Image, severity: int, rng: np.random.Generator) -> Image:
    """An affine map that moves three points at random, then a smooth field that moves every pixel."""
    height, width = image.shape[:2]
    side = min(height, width)
    strength, smooth, corners = (share * side for share in ELASTIC[severity - 1])
    middle, reach = np.asarray([width, height]) // 2, side // 3
    points = np.asarray(
        [middle + reach, middle + np.asarray([reach, -reach]), middle - reach], dtype=np.float64
    )  # (x, y) each
    moved = points + rng.uniform(-corners, corners, size=points.shape)
    rows, columns = np.mgrid[:height, :width].astype(np.float64)
    back = np.linalg.solve(np.column_stack([moved, np.ones(3)]), points)  # (3, 2): from where each pixel comes
    x, y = np.moveaxis(np.stack([columns, rows, np.ones_like(rows)], axis=-1) @ back, -1, 0)
    warped = _sampled(image, y, x, mode="mirror")
    if not strength:
        return warped
    across, down = (
        strength * ndimage.gaussian_filter(rng.uniform(-1, 1, (height, width)), smooth, mode="reflect", truncate=3)
        for _ in range(2)
    )
    return _sampled(warped, rows + down, columns + across, mode="reflect")


def pixelate(image: Image, severity: int, rng: np.random.Generator) -> Image:
    """Averaged to fewer pixels, and those spread again."""
    share = PIXELS[severity - 1]
    picture = _picture(image)
    small = picture.resize((int(picture.width * share), int(picture.height * share)), Pillow.Resampling.BOX)
    return np.asarray(small.resize(picture.size, Pillow.Resampling.BOX)) / 255


def jpeg_compression(image: Image, severity: int, rng: np.random.Generator) -> Image:
    """Saved and read again."""
    file = io.BytesIO()
    _picture(image).save(file, "JPEG", quality=QUALITIES[severity - 1])
    return np.asarray(Pillow.open(file)) / 255


def _picture(image: Image) -> Pillow.Image:
    return Pillow.fromarray(np.rint(image * 255).astype(np.uint8))


def _sampled(image: Image, rows: NDArray[np.float64], columns: NDArray[np.float64], *, mode: str) -> Image:
    """The image between its pixels at (h, w) places, linearly."""
    channels = [ndimage.map_coordinates(image[:, :, c], [rows, columns], order=1, mode=mode) for c in range(3)]
    return np.stack(channels, axis=2)
