"""Blur; see evaluation.corruptions. Images are float (h, w, 3) from 0 to 1, severities 1 to 5."""

import math
from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

__all__ = ["defocus_blur", "glass_blur", "motion_blur", "smeared", "zoom_blur", "zoomed"]

Image = NDArray[np.float64]

# Radius of the disk, and deviation of the blur that smooths its rim.
DISKS = ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1.0, 0.2), (1.5, 0.1))
# Deviation of the blur before and after, farthest step, rounds.
GLASS = ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2))
# Radius and deviation of the one-sided normal kernel along the motion.
MOTIONS = ((6, 1.0), (6, 1.5), (6, 2.0), (8, 2.0), (9, 2.5))
MOST_ZOOM = (1.06, 1.11, 1.16, 1.21, 1.26)


def defocus_blur(image: Image, severity: int, rng: np.random.Generator) -> Image:
    """A disk with a soft rim."""
    return ndimage.correlate(image, _disk(*DISKS[severity - 1])[:, :, None], mode="mirror")


def glass_blur(image: Image, severity: int, rng: np.random.Generator) -> Image:
    """Pixels take the place of near ones, between two slight blurs.

    The paper speaks of exchanging two pixels. The published code, and so the data, copies one over the other, from the
    last pixel to the first; so does this.
    """
    deviation, reach, rounds = GLASS[severity - 1]
    height, width = image.shape[:2]
    blurred = np.floor(_normal_blur(image, deviation) * 255) / 255
    rows, columns = range(height - reach, reach, -1), range(width - reach, reach, -1)
    places = [row * width + column for row in rows for column in columns]
    order = list(range(height * width))
    for _ in range(rounds):
        steps = rng.integers(-reach, reach, size=(len(places), 2))
        sources = np.asarray(places) + steps[:, 1] * width + steps[:, 0]
        for place, source in zip(places, sources.tolist(), strict=True):
            order[place] = order[source]
    return _normal_blur(blurred.reshape(-1, 3)[order].reshape(image.shape), deviation)


def motion_blur(image: Image, severity: int, rng: np.random.Generator) -> Image:
    """Smeared along a line within 45° of level."""
    return smeared(image, *MOTIONS[severity - 1], angle=rng.uniform(-45, 45))


def zoom_blur(image: Image, severity: int, rng: np.random.Generator) -> Image:
    """The mean of the image and of it zoomed in by one percent after another."""
    zooms = np.arange(1, MOST_ZOOM[severity - 1], 0.01)
    total = image.copy()
    for zoom in zooms:
        total += zoomed(image, float(zoom))
    return total / (len(zooms) + 1)


def smeared(image: NDArray[np.float64], radius: float, deviation: float, *, angle: float) -> NDArray[np.float64]:
    """Motion blur as ImageMagick has it: a normal kernel to one side, of whole steps along `angle` degrees.

    The image (h, w, …) goes on beyond its edge as it ends there.
    """
    steps = np.arange(2 * math.ceil(radius) + 1)
    weights = np.exp(-(steps**2) / (2 * deviation**2))
    height, width = image.shape[:2]
    down = np.ceil(steps * math.sin(math.radians(angle)) - 0.5).astype(np.int64)
    across = np.ceil(steps * math.cos(math.radians(angle)) - 0.5).astype(np.int64)
    rows = np.clip(np.arange(height) + down[:, None], 0, height - 1)
    columns = np.clip(np.arange(width) + across[:, None], 0, width - 1)
    total = np.zeros_like(image)
    for weight, row, column in zip(weights / weights.sum(), rows, columns, strict=True):
        total += weight * image[row][:, column]
    return total


def zoomed(image: NDArray[np.float64], zoom: float) -> NDArray[np.float64]:
    """The middle of an image (h, w, c), linearly interpolated to the whole size."""
    down, across = _stretch(image.shape[0], zoom), _stretch(image.shape[1], zoom)
    return across @ (down @ image.reshape(len(image), -1)).reshape(image.shape)  # the second for each row


@cache
def _stretch(side: int, zoom: float) -> NDArray[np.float64]:
    """What `zoomed` does to a side, as a matrix (side, side)."""
    kept = math.ceil(side / zoom)
    first = (side - kept) // 2
    middle = np.zeros((kept, side))
    middle[np.arange(kept), first + np.arange(kept)] = 1
    stretched = ndimage.zoom(middle, (zoom, 1), order=1)
    trimmed = (len(stretched) - side) // 2
    return np.asarray(stretched[trimmed : trimmed + side])


@cache
def _disk(radius: float, deviation: float) -> NDArray[np.float64]:
    line = np.arange(-math.ceil(radius) - 1, math.ceil(radius) + 2)
    disk = (line[:, None] ** 2 + line**2 <= radius**2).astype(np.float64)
    taps = np.exp(-(np.arange(-1, 2) ** 2) / (2 * deviation**2))
    taps /= taps.sum()
    return np.asarray(ndimage.convolve(disk / disk.sum(), np.outer(taps, taps), mode="constant"))


def _normal_blur(image: Image, deviation: float) -> Image:
    return ndimage.gaussian_filter(image, (deviation, deviation, 0), mode="nearest")
