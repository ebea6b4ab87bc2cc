"""Random views of images, drawn for each image on its own and computed for the whole batch at once.

Everything runs on the device that holds the batch: one affine resampling for crop, flip, rotation and shear, then one
3×3 matrix and offset for each image's colours. The definitions of strength follow SimCLR's colour distortion (arXiv
2002.05709, appendix A), which SupCon takes over; its brightness, contrast, saturation, hue and grey are linear in the
pixels, so that an image's own five of them are one matrix, and values are clipped once, after the last.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from training.policies import AutoAugment, RandAugment
from training.sections import AugmentSection

__all__ = ["Augment"]

# ITU-R BT.601 luma, as Pillow's conversion to grey.
LUMA = (0.299, 0.587, 0.114)
# RGB → YIQ: hue is a rotation of the I-Q plane.
TO_YIQ = (LUMA, (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112))


class Draws(NamedTuple):
    """What was drawn for a batch of n images; equal to "change nothing" where an image drew no change."""

    theta: Tensor  # (n, 2, 3) where each view's pixels lie in the image, in −1 … 1
    brightness: Tensor  # (n,) factor
    contrast: Tensor  # (n,) factor about the image's mean luma
    saturation: Tensor  # (n,) factor about each pixel's luma
    hue: Tensor  # (n,) radians
    grey: Tensor  # (n,) 1 where colours are dropped, else 0
    blurred: Tensor  # (n,) bool
    blur: Tensor  # (n,) standard deviation in pixels


class Augment:
    """Turns uint8 images (n, h, w, 3) into augmented float views (n, 3, *size) within 0 … 1.

    Args:
        config: strengths and probabilities.
        size: height and width of the views.
        generator: source of all randomness, on the images' device.
        compile: fuse what lies between the draws by torch.compile.
    """

    def __init__(
        self, config: AugmentSection, size: tuple[int, int], generator: Generator, *, compile: bool = False
    ) -> None:
        self.config = config
        self.size = size
        self.generator = generator
        self.policy = _build_policy(config, generator)
        self.luma = torch.tensor(LUMA, device=generator.device)
        self.to_yiq = torch.tensor(TO_YIQ, device=generator.device)
        self.from_yiq = torch.linalg.inv(self.to_yiq)
        fuse: Callable[..., Callable[..., Tensor]] = torch.compile if compile else lambda function: function
        self._geometry, self._colour, self._blur = fuse(_geometry), fuse(_colour), fuse(_blur)

    def __call__(self, images: Tensor) -> Tensor:
        config, draws = self.config, self._draw(*images.shape[:3])
        nothing = torch.zeros_like(draws.grey)
        views = self._geometry(images, draws.theta, self.size)
        if config.jitter or (config.grey and self.policy is None):
            views = self._recolour(views, draws._replace(grey=nothing) if self.policy else draws)
        if self.policy is not None:
            views = self.policy(views)
            if config.grey:
                views = self._recolour(views, _only_grey(draws))
        if config.blur:
            views = torch.where(draws.blurred.view(-1, 1, 1, 1), self._blur(views, draws.blur), views)
        return views

    def _recolour(self, views: Tensor, draws: Draws) -> Tensor:
        return self._colour(views, draws, self.luma, self.to_yiq, self.from_yiq)

    def _uniform(self, n: int, low: float, high: float) -> Tensor:
        return torch.empty(n, device=self.generator.device).uniform_(low, high, generator=self.generator)

    def _draw(self, n: int, height: int, width: int) -> Draws:
        config = self.config
        theta = self._draw_theta(n, width / height)
        jittered = self._uniform(n, 0, 1) < config.jitter

        def factor(strength: float) -> Tensor:
            return torch.where(jittered, self._uniform(n, 1 - strength, 1 + strength), 1.0)

        return Draws(
            theta=theta,
            brightness=factor(config.brightness),
            contrast=factor(config.contrast),
            saturation=factor(config.saturation),
            hue=torch.where(jittered, self._uniform(n, -config.hue, config.hue) * (2 * math.pi), 0.0),
            grey=(self._uniform(n, 0, 1) < config.grey).float(),
            blurred=self._uniform(n, 0, 1) < config.blur,
            blur=self._uniform(n, 0.1, 2.0),
        )

    def _draw_theta(self, n: int, aspect: float) -> Tensor:
        """Output → input coordinates (n, 2, 3): rotation · shear · flip · scale, about the crop's centre."""
        config = self.config
        area = self._uniform(n, *config.crop_area)
        ratio = torch.exp(self._uniform(n, math.log(config.crop_ratio[0]), math.log(config.crop_ratio[1])))
        # Shares of the image's width and height; a crop wider than the image is cut to it.
        share_x = (area * ratio).sqrt().clamp(max=1)
        share_y = (area / ratio).sqrt().clamp(max=1)
        centre_x = self._uniform(n, -1, 1) * (1 - share_x)
        centre_y = self._uniform(n, -1, 1) * (1 - share_y)
        sign = torch.where(self._uniform(n, 0, 1) < config.flip, -1.0, 1.0)
        angle = self._uniform(n, -config.rotate, config.rotate) * (math.pi / 180)
        shear = torch.tan(self._uniform(n, -config.shear, config.shear) * (math.pi / 180))
        cos, sin = torch.cos(angle), torch.sin(angle)
        rows = [
            torch.stack([share_x * sign * cos, share_y * (shear * cos - sin) / aspect, centre_x], dim=1),
            torch.stack([share_x * sign * sin * aspect, share_y * (shear * sin + cos), centre_y], dim=1),
        ]
        return torch.stack(rows, dim=1)


def _build_policy(config: AugmentSection, generator: Generator) -> Callable[[Tensor], Tensor] | None:
    if config.policy == "none":
        return None
    if config.policy == "randaugment":
        return RandAugment(generator, n_ops=config.randaugment_ops, magnitude=config.randaugment_magnitude)
    return AutoAugment(generator, policy=config.policy.removeprefix("autoaugment-"))


def _only_grey(draws: Draws) -> Draws:
    one, zero = torch.ones_like(draws.grey), torch.zeros_like(draws.grey)
    return draws._replace(brightness=one, contrast=one, saturation=one, hue=zero)


def _geometry(images: Tensor, theta: Tensor, size: tuple[int, int]) -> Tensor:
    """Views (n, 3, *size) of uint8 images (n, h, w, 3) by one bilinear resampling."""
    pixels = images.permute(0, 3, 1, 2).to(theta.dtype).div(255)
    grid = F.affine_grid(theta, [len(images), 3, *size], align_corners=False)
    return F.grid_sample(pixels, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _colour(views: Tensor, draws: Draws, luma: Tensor, to_yiq: Tensor, from_yiq: Tensor) -> Tensor:
    """Brightness, contrast, saturation, hue and grey, in this order, as one matrix and offset for each image."""
    n, channels, height, width = views.shape
    to_luma = luma.expand(channels, channels)  # every row gives the luma

    def blend(weight: Tensor, matrix: Tensor, other: Tensor) -> Tensor:
        weight = weight.view(-1, 1, 1)
        return weight * matrix + (1 - weight) * other

    identity = torch.eye(channels, dtype=views.dtype, device=views.device)
    saturation = blend(draws.saturation, identity, to_luma)
    cos, sin = torch.cos(draws.hue), torch.sin(draws.hue)
    one, zero = torch.ones_like(cos), torch.zeros_like(cos)
    rotation = torch.stack([one, zero, zero, zero, cos, -sin, zero, sin, cos], dim=1).view(-1, 3, 3)
    hue = from_yiq @ rotation @ to_yiq
    after_contrast = blend(draws.grey, to_luma, identity) @ hue @ saturation  # (n, 3, 3)
    # Contrast keeps the mean luma, whose grey the later steps leave as it is.
    mean = views.mean((2, 3)) @ luma * draws.brightness
    offset = ((1 - draws.contrast) * mean).view(-1, 1, 1)
    matrix = (draws.brightness * draws.contrast).view(-1, 1, 1) * after_contrast
    # Pixels in rows: the result has its channels last, as the encoder wants them.
    pixels = views.permute(0, 2, 3, 1).reshape(n, height * width, channels)
    return torch.baddbmm(offset, pixels, matrix.mT).clamp(0, 1).view(n, height, width, channels).permute(0, 3, 1, 2)


def _blur(views: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur of standard deviation sigma (n,) in pixels, each image its own; the kernel spans 10 % of a side."""
    n, channels, height, width = views.shape
    radius = max(1, height // 20)
    offsets = torch.arange(-radius, radius + 1, device=views.device, dtype=views.dtype)
    kernel = torch.softmax(-(offsets**2) / (2 * sigma.view(-1, 1) ** 2), dim=1)  # (n, taps)
    kernel = kernel.repeat_interleave(channels, dim=0)  # one filter a channel
    flat = views.reshape(1, n * channels, height, width)
    flat = F.pad(flat, (radius,) * 4, mode="reflect")
    flat = F.conv2d(flat, kernel[:, None, :, None], groups=n * channels)
    flat = F.conv2d(flat, kernel[:, None, None, :], groups=n * channels)
    return flat.view(n, channels, height, width)
