"""Noise of each pixel; see evaluation.corruptions. Images are float (h, w, 3) from 0 to 1, severities 1 to 5."""

import numpy as np
from numpy.typing import NDArray

__all__ = ["gaussian_noise", "impulse_noise", "shot_noise"]

Image = NDArray[np.float64]

DEVIATIONS = (0.04, 0.06, 0.08, 0.09, 0.10)
PHOTONS = (500, 250, 100, 75, 50)
IMPULSES = (0.01, 0.02, 0.03, 0.05, 0.07)


def gaussian_noise(image: Image, severity: int, rng: np.random.Generator) -> Image:
    """Normal noise of one deviation."""
    return image + rng.normal(scale=DEVIATIONS[severity - 1], size=image.shape)


def shot_noise(image: Image, severity: int, rng: np.random.Generator) -> Image:
    """Poisson noise of so many photons at full brightness."""
    photons = PHOTONS[severity - 1]
    return rng.poisson(image * photons) / photons


def impulse_noise(image: Image, severity: int, rng: np.random.Generator) -> Image:
    """Salt and pepper: a share of the values becomes 0 or 1."""
    hit = rng.random(image.shape) < IMPULSES[severity - 1]
    return np.where(hit, rng.integers(2, size=image.shape), image)
