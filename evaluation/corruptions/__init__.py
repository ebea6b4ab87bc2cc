"""The 15 corruptions of CIFAR-10-C at five severities (Hendrycks & Dietterich, arXiv 1903.12261), regenerated.

Constants are those published for CIFAR, which presume 32 × 32 pixels. They are applied at the encoder's input size:
defocus, glass and motion blur and snow reach as many pixels far as at 32 and so harm a larger image less, while what is
a share of the side (elastic, zoom, pixelate, fog, frost) grows with it. Frost was made with photographs of it and is
drawn from noise here, so its figures cannot be laid beside published ones. Those of the others can, but not to the last
tenth: the random numbers are others.

An image's corruption follows from the seed, its number, the corruption and the severity alone.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from evaluation.corruptions import blur, digital, noise, weather

__all__ = ["CORRUPTIONS", "SEVERITIES", "corrupt"]

Image = NDArray[np.float64]

SEVERITIES = (1, 2, 3, 4, 5)
CORRUPTIONS: dict[str, Callable[[Image, int, np.random.Generator], Image]] = {
    "gaussian_noise": noise.gaussian_noise,
    "shot_noise": noise.shot_noise,
    "impulse_noise": noise.impulse_noise,
    "defocus_blur": blur.defocus_blur,
    "glass_blur": blur.glass_blur,
    "motion_blur": blur.motion_blur,
    "zoom_blur": blur.zoom_blur,
    "snow": weather.snow,
    "frost": weather.frost,
    "fog": weather.fog,
    "brightness": weather.brightness,
    "contrast": digital.contrast,
    "elastic_transform": digital.elastic_transform,
    "pixelate": digital.pixelate,
    "jpeg_compression": digital.jpeg_compression,
}
_NUMBERS = {name: number for number, name in enumerate(CORRUPTIONS)}


def corrupt(pixels: NDArray[np.uint8], name: str, severity: int, *, seed: int, index: int) -> NDArray[np.uint8]:
    """One image (h, w, 3), corrupted; as the published ones, values are cut off to whole ones.

    Args:
        name: one of CORRUPTIONS.
        severity: 1 to 5.
        index: the image's number in its set.
    """
    rng = np.random.default_rng([seed, index, _NUMBERS[name], severity])
    corrupted = CORRUPTIONS[name](pixels / 255.0, severity, rng)
    return (np.clip(corrupted, 0, 1) * 255 + 1e-6).astype(np.uint8)
