"""Weather and light; see evaluation.corruptions. Images are float (h, w, 3) from 0 to 1, severities 1 to 5."""

import numpy as np
from numpy.typing import NDArray

from evaluation.corruptions.blur import smeared, zoomed

__all__ = ["brightness", "fog", "frost", "snow"]

Image = NDArray[np.float64]

# Mean and deviation of the flakes, their zoom and the least that is seen; radius and deviation of their fall; what is
# left of the image's own colours.
SNOW = (
    (0.1, 0.2, 1.0, 0.6, 8, 3, 0.95),
    (0.1, 0.2, 1.0, 0.5, 10, 4, 0.9),
    (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
    (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
    (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
)
# The image's share and the frost's.
FROST = ((1.0, 0.2), (1.0, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45))
FROST_DECAY, FROST_TINT = 1.5, (0.82, 0.91, 1.0)
# Thickness, and how fast finer structure fades.
FOG = ((0.2, 3.0), (0.5, 3.0), (0.75, 2.5), (1.0, 2.0), (1.5, 1.75))
LIGHTER = (0.05, 0.1, 0.15, 0.2, 0.3)
GREY = (0.299, 0.587, 0.114)


def snow(image: Image, severity: int, rng: np.random.Generator) -> Image:
    """Flakes that fall, seen twice, over a bleached image."""
    mean, deviation, zoom, least, radius, fall, kept = SNOW[severity - 1]
    flakes = zoomed(rng.normal(mean, deviation, size=(*image.shape[:2], 1)), zoom)
    flakes[flakes < least] = 0
    flakes = np.floor(np.clip(flakes, 0, 1) * 255) / 255
    flakes = smeared(flakes, radius, fall, angle=rng.uniform(-135, -45))
    bleached = np.maximum(image, (image @ GREY)[:, :, None] * 1.5 + 0.5)
    return kept * image + (1 - kept) * bleached + flakes + flakes[::-1, ::-1]


def frost(image: Image, severity: int, rng: np.random.Generator) -> Image:
    """Pale ridges, like crystals on glass: where two clouds of noise are at their middle height.

    In place of the photographs that were published, see evaluation.corruptions.
    """
    own, of_frost = FROST[severity - 1]
    height, width = image.shape[:2]
    clouds = [_cloud(max(height, width), FROST_DECAY, rng)[:height, :width] for _ in range(2)]
    ridges = np.maximum(*(1 - np.abs(2 * cloud - 1) for cloud in clouds)) ** 2
    return own * image + of_frost * ridges[:, :, None] * FROST_TINT


def fog(image: Image, severity: int, rng: np.random.Generator) -> Image:
    """A cloud of noise over the image, which keeps its brightest value."""
    thickness, decay = FOG[severity - 1]
    height, width = image.shape[:2]
    brightest = image.max()
    cloud = _cloud(max(height, width), decay, rng)[:height, :width, None]
    return (image + thickness * cloud) * brightest / (brightest + thickness)


def brightness(image: Image, severity: int, rng: np.random.Generator) -> Image:
    """More value, at the hue and saturation there are."""
    value = image.max(axis=2, keepdims=True)
    lighter = np.clip(value + LIGHTER[severity - 1], 0, 1)
    return np.where(value > 0, image * lighter / np.maximum(value, 1e-12), lighter)


def _cloud(least: int, decay: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """Diamond-square noise from 0 to 1 on a torus whose side is a power of two, `least` or more.

    Each halving of the step sets the middles of the squares and then of their sides to the mean of four neighbours and
    noise up to ± wibble², wibble being divided by `decay` from step to step (Fournier et al., CACM 25, 1982).
    """
    side = 1 << (least - 1).bit_length()
    heights = np.zeros((side, side))
    step, wibble = side, 100.0

    def middle(of_four: NDArray[np.float64]) -> NDArray[np.float64]:
        return of_four / 4 + wibble * rng.uniform(-wibble, wibble, of_four.shape)

    while step >= 2:
        half = step // 2
        corners = heights[::step, ::step]
        in_row = corners + np.roll(corners, -1, axis=0)
        heights[half::step, half::step] = middle(in_row + np.roll(in_row, -1, axis=1))
        centres = heights[half::step, half::step]
        above = centres + np.roll(centres, 1, axis=0) + corners + np.roll(corners, -1, axis=1)
        left = centres + np.roll(centres, 1, axis=1) + corners + np.roll(corners, -1, axis=0)
        heights[::step, half::step], heights[half::step, ::step] = middle(above), middle(left)
        step, wibble = half, wibble / decay
    heights -= heights.min()
    return heights / heights.max()
