"""RandAugment and AutoAugment, drawn for each image on its own and computed for the batch in groups.

Operations, magnitudes and the learnt policies are torchvision's. Each image becomes what torchvision's kernels make
of it alone as a float image, resampled by the nearest pixel and black beyond the border; only equalize rounds to
eight bits. Images that drew the same operation pass through it in one call, each with its own magnitude and sign, and
the five geometric operations are one resampling.

The draws stay on the device. A batch waits for the device once, to read how many images each operation got.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor
from torch.nn.functional import affine_grid, grid_sample
from torchvision import transforms
from torchvision.transforms.v2 import functional as F

from coterie.errors import RecipeError

__all__ = ["AutoAugment", "RandAugment", "apply_operations"]

# torchvision's `_augmentation_space` is private, but the only place that holds the magnitudes. It is asked for images
# of one pixel: translations are then shares of a side, and one table serves every size.
ONE_PIXEL = (1, 1)


class RandAugment:
    """Applies `n_ops` operations to each image, every one drawn afresh (arXiv 1909.13719).

    Takes and returns float images (n, 3, h, w) within 0 … 1.

    Args:
        generator: source of all randomness, on the images' device.
        magnitude: of every operation, 0 to 30 as torchvision counts; three of its steps are one of the paper's.

    Raises:
        RecipeError: the magnitude is out of range.
    """

    def __init__(self, generator: Generator, *, n_ops: int = 2, magnitude: int = 9) -> None:
        source = transforms.RandAugment()
        bins = source.num_magnitude_bins
        if not 0 <= magnitude < bins:
            raise RecipeError(f"RandAugment has no magnitude {magnitude}; choose 0 to {bins - 1}")
        space = source._augmentation_space(bins, ONE_PIXEL)
        self.generator = generator
        self.n_ops = n_ops
        self._choices = _Choices.of(((name, magnitude) for name in space), space, generator.device)

    def __call__(self, images: Tensor) -> Tensor:
        return apply_operations(images, *self.draw(len(images)))

    def draw(self, n: int) -> tuple[Tensor, Tensor]:
        """Operations, as positions in OPERATIONS, and signed magnitudes of n images; both (n_ops, n)."""
        shape, device = (self.n_ops, n), self.generator.device
        picked = torch.randint(len(self._choices), shape, generator=self.generator, device=device)
        return self._choices.take(picked, self.generator)


class AutoAugment:
    """Draws one of 25 learnt pairs of operations for each image, then each of the two by its probability.

    Takes and returns float images (n, 3, h, w) within 0 … 1. The policies are those of arXiv 1805.09501.

    Args:
        generator: source of all randomness, on the images' device.
        policy: the data it was learnt on.

    Raises:
        RecipeError: there is no such policy.
    """

    def __init__(self, generator: Generator, *, policy: Literal["imagenet", "cifar10", "svhn"] = "imagenet") -> None:
        known = [member.value for member in transforms.AutoAugmentPolicy]
        if policy not in known:
            raise RecipeError(f"AutoAugment has no policy {policy!r}; choose {', '.join(known)}")
        source = transforms.AutoAugment(transforms.AutoAugmentPolicy(policy))
        steps = [step for pair in source.policies for step in pair]
        space = source._augmentation_space(10, ONE_PIXEL)  # the policies' levels are 0 to 9
        self.generator = generator
        self._choices = _Choices.of(((name, level) for name, _, level in steps), space, generator.device)
        self._probabilities = torch.tensor([probability for _, probability, _ in steps], device=generator.device)

    def __call__(self, images: Tensor) -> Tensor:
        return apply_operations(images, *self.draw(len(images)))

    def draw(self, n: int) -> tuple[Tensor, Tensor]:
        """Operations, as positions in OPERATIONS, and signed magnitudes of n images; both (2, n)."""
        device = self.generator.device
        pair = torch.randint(len(self._choices) // 2, (n,), generator=self.generator, device=device)
        picked = torch.stack([2 * pair, 2 * pair + 1])
        operations, magnitudes = self._choices.take(picked, self.generator)
        kept = torch.rand(picked.shape, generator=self.generator, device=device) < self._probabilities[picked]
        return torch.where(kept, operations, OPERATIONS.index("Identity")), magnitudes


def apply_operations(images: Tensor, operations: Tensor, magnitudes: Tensor) -> Tensor:
    """Float images (n, 3, h, w) after each row of operations and signed magnitudes, both (steps, n).

    Operations are positions in OPERATIONS; magnitudes are torchvision's, translations in shares of the side.
    """
    images = images.clone()
    magnitudes = magnitudes.to(images.dtype)
    orders = operations.argsort(dim=1)
    every = torch.arange(len(OPERATIONS), device=operations.device)
    counts = (operations[..., None] == every).sum(1).tolist()  # (steps, len(OPERATIONS)): the wait for the device
    for operation, magnitude, order, count in zip(operations, magnitudes, orders, counts, strict=True):
        n_geometric = sum(count[: len(GEOMETRIC)])
        geometric, *groups, _identity = order.split([n_geometric, *count[len(GEOMETRIC) :]])
        if n_geometric:
            warped = _warp(images.index_select(0, geometric), operation[geometric], magnitude[geometric])
            images.index_copy_(0, geometric, warped)
        for kernel, group in zip(KERNELS.values(), groups, strict=True):
            if len(group):
                changed = kernel(images.index_select(0, group), magnitude[group].view(-1, 1, 1, 1))
                images.index_copy_(0, group, changed)
    return images


@dataclass(frozen=True)
class _Choices:
    """What can be drawn: operation, magnitude, and whether it is taken with either sign; each (choices,)."""

    operations: Tensor
    magnitudes: Tensor
    signed: Tensor

    @classmethod
    def of(
        cls, steps: Iterable[tuple[str, int | None]], space: dict[str, tuple[Tensor, bool]], device: torch.device
    ) -> "_Choices":
        """Steps are (name, level) in torchvision's space, where an operation without levels has a scalar."""
        rows = []
        for name, level in steps:
            values, signed = space[name]
            rows.append((OPERATIONS.index(name), float(values[level] if values.ndim else values), signed))
        return cls(*(torch.tensor(column, device=device) for column in zip(*rows, strict=True)))

    def __len__(self) -> int:
        return len(self.operations)

    def take(self, picked: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        """Operations and magnitudes of the picked choices, half of the signed ones negative."""
        negative = torch.rand(picked.shape, generator=generator, device=picked.device) < 0.5
        magnitudes = self.magnitudes[picked]
        return self.operations[picked], torch.where(negative & self.signed[picked], -magnitudes, magnitudes)


def _warp(images: Tensor, operations: Tensor, magnitudes: Tensor) -> Tensor:
    """Shears from the top left corner, translations by whole pixels, and rotations about the centre."""
    height, width = images.shape[2:]
    # Each image has one operation; its other four are zero and do nothing.
    which = torch.arange(len(GEOMETRIC), device=operations.device).view(-1, 1) == operations
    shear_x, shear_y, share_x, share_y, degrees = torch.where(which, magnitudes, 0)
    shift_x, shift_y = (share_x * width).trunc(), (share_y * height).trunc()
    angle, aspect = torch.deg2rad(degrees), height / width
    cos, sin = torch.cos(angle), torch.sin(angle)
    # Output → input coordinates, −1 … 1 from border to border.
    theta = torch.stack(
        [
            torch.stack([cos, (shear_x - sin) * aspect, shear_x * aspect - shift_x * (2 / width)], dim=1),
            torch.stack([(shear_y + sin) / aspect, cos, shear_y / aspect - shift_y * (2 / height)], dim=1),
        ],
        dim=1,
    )  # (n, 2, 3)
    grid = affine_grid(theta, list(images.shape), align_corners=False)
    return grid_sample(images, grid, mode="nearest", padding_mode="zeros", align_corners=False)


def _blend(extreme: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """A kernel that mixes each image with its own extreme: none of the image at magnitude −1, all of it at 0."""
    return lambda images, magnitudes: torch.lerp(extreme(images), images, 1 + magnitudes).clamp_(0, 1)


def _mean_grey(images: Tensor) -> Tensor:
    return F.rgb_to_grayscale(images).mean((1, 2, 3), keepdim=True)


def _smooth(images: Tensor) -> Tensor:
    """Mean over 3×3 pixels, the middle one counted five times; the border stays, as in Pillow."""
    # Sums of slices: on a CPU ten times faster than torchvision's convolution, whose weights a device would wait for.
    rows = images[..., :-2, :] + images[..., 1:-1, :] + images[..., 2:, :]
    squares = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
    inner = (..., slice(1, -1), slice(1, -1))
    smooth = images.clone()
    smooth[inner] = squares.add_(images[inner], alpha=4).div_(13)
    return smooth


def _posterize(images: Tensor, bits: Tensor) -> Tensor:
    levels = torch.exp2(bits)
    return (images * levels).floor_().clamp_(max=levels - 1).div_(levels)


def _solarize(images: Tensor, thresholds: Tensor) -> Tensor:
    """Inverts the pixels from the threshold on, which is counted from 0 to 255."""
    return torch.where(images >= thresholds / 255, 1 - images, images)


# All by torchvision's names. A kernel takes images (n, 3, h, w) and magnitudes (n, 1, 1, 1).
GEOMETRIC = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")
KERNELS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Brightness": _blend(lambda images: images.new_zeros(1)),
    "Color": _blend(F.rgb_to_grayscale),
    "Contrast": _blend(_mean_grey),
    "Sharpness": _blend(_smooth),
    "Posterize": _posterize,
    "Solarize": _solarize,
    "Invert": lambda images, _: F.invert(images),
    "AutoContrast": lambda images, _: F.autocontrast(images),
    "Equalize": lambda images, _: F.equalize(images),
}
OPERATIONS = (*GEOMETRIC, *KERNELS, "Identity")
