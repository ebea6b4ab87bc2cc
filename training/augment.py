"""Random views of images, drawn for each image on its own and computed for the whole batch at once.

Everything runs on the device that holds the batch: one affine resampling for crop, flip, rotation and shear, then a
few elementwise passes for colour. The definitions of strength follow SimCLR's colour distortion (arXiv 2002.05709,
appendix A), which SupCon takes over.
"""

import math

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from training.recipe import AugmentSection

__all__ = ["Augment"]

# ITU-R BT.601 luma, as Pillow's conversion to grey.
LUMA = (0.299, 0.587, 0.114)
# RGB → YIQ and back: hue is a rotation of the I-Q plane.
TO_YIQ = ((0.299, 0.587, 0.114), (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112))


class Augment:
    """Turns uint8 images (n, h, w, 3) into augmented float views (n, 3, *size) within 0 … 1.

    Args:
        config: strengths and probabilities.
        size: height and width of the views.
        generator: source of all randomness, on the images' device.
    """

    def __init__(self, config: AugmentSection, size: tuple[int, int], generator: Generator) -> None:
        self.config = config
        self.size = size
        self.generator = generator

    def __call__(self, images: Tensor) -> Tensor:
        views = images.permute(0, 3, 1, 2).float().div_(255)
        views = self._warp(views)
        config = self.config
        if config.jitter:
            views = self._mix(self._jitter(views), views, config.jitter)
        if config.grey:
            views = self._mix(_luma(views).expand_as(views), views, config.grey)
        if config.blur:
            views = self._mix(self._blur(views), views, config.blur)
        return views

    def _uniform(self, n: int, low: float, high: float) -> Tensor:
        return torch.empty(n, device=self.generator.device).uniform_(low, high, generator=self.generator)

    def _mix(self, changed: Tensor, views: Tensor, probability: float) -> Tensor:
        chosen = self._uniform(len(views), 0, 1) < probability
        return torch.where(chosen.view(-1, 1, 1, 1), changed, views)

    def _warp(self, images: Tensor) -> Tensor:
        """Random resized crop, flip, rotation and shear in one bilinear resampling."""
        n, _, height, width = images.shape
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
        cos, sin, aspect = torch.cos(angle), torch.sin(angle), width / height
        # Output → input coordinates in −1 … 1: rotation · shear · flip · scale, about the crop's centre.
        theta = torch.stack(
            [
                torch.stack([share_x * sign * cos, share_y * (shear * cos - sin) / aspect, centre_x], dim=1),
                torch.stack([share_x * sign * sin * aspect, share_y * (shear * sin + cos), centre_y], dim=1),
            ],
            dim=1,
        )  # (n, 2, 3)
        grid = F.affine_grid(theta, [n, 3, *self.size], align_corners=False)
        return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)

    def _jitter(self, views: Tensor) -> Tensor:
        """Brightness, contrast, saturation and hue, in this order."""
        n, config = len(views), self.config

        def factor(strength: float) -> Tensor:
            return self._uniform(n, 1 - strength, 1 + strength).view(-1, 1, 1, 1)

        views = (views * factor(config.brightness)).clamp_(0, 1)
        mean = _luma(views).mean((2, 3), keepdim=True)
        views = torch.lerp(mean.expand_as(views), views, factor(config.contrast)).clamp_(0, 1)
        views = torch.lerp(_luma(views).expand_as(views), views, factor(config.saturation)).clamp_(0, 1)
        if config.hue:
            views = _rotate_hue(views, self._uniform(n, -config.hue, config.hue) * (2 * math.pi)).clamp_(0, 1)
        return views

    def _blur(self, views: Tensor) -> Tensor:
        """Gaussian blur of standard deviation 0.1 to 2 pixels, each image its own; the kernel spans 10 % of a side."""
        n, channels, height, _ = views.shape
        radius = max(1, height // 20)
        offsets = torch.arange(-radius, radius + 1, device=views.device, dtype=views.dtype)
        sigma = self._uniform(n, 0.1, 2.0).view(-1, 1)
        kernel = torch.softmax(-(offsets**2) / (2 * sigma**2), dim=1)  # (n, taps)
        kernel = kernel.repeat_interleave(channels, dim=0)  # one filter a channel
        flat = views.reshape(1, n * channels, *views.shape[2:])
        flat = F.pad(flat, (radius,) * 4, mode="reflect")
        flat = F.conv2d(flat, kernel[:, None, :, None], groups=n * channels)
        flat = F.conv2d(flat, kernel[:, None, None, :], groups=n * channels)
        return flat.view_as(views)


def _luma(images: Tensor) -> Tensor:
    weights = images.new_tensor(LUMA).view(1, 3, 1, 1)
    return (images * weights).sum(1, keepdim=True)


def _rotate_hue(images: Tensor, angle: Tensor) -> Tensor:
    to_yiq = images.new_tensor(TO_YIQ)
    cos, sin, one = torch.cos(angle), torch.sin(angle), torch.ones_like(angle)
    zero = torch.zeros_like(angle)
    rows = [one, zero, zero, zero, cos, -sin, zero, sin, cos]
    rotation = torch.stack(rows, dim=1).view(-1, 3, 3)
    matrix = torch.linalg.inv(to_yiq) @ rotation @ to_yiq  # (n, 3, 3)
    return torch.einsum("nij,njhw->nihw", matrix, images)
