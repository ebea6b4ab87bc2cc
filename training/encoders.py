"""Encoders and projection heads: pixels in, features out.

Knows architectures and normalisation constants; knows nothing of losses, data or schedules. Where first weights come
from is training.start's business.
"""

from dataclasses import asdict, dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from coterie.errors import RecipeError
from coterie.images import Preprocessing
from training.cifar_resnet import CifarResNet
from training.whitening import fit_whitening

__all__ = [
    "CifarResNet",
    "EncoderSpec",
    "ImageEncoder",
    "Stem",
    "build_encoder",
    "encoder_warnings",
    "projection_head",
]

Stem = Literal["auto", "small", "large"]

RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnet200")
# At 64 pixels the large stem leaves 2×2 features; above 96 the small one keeps 13×13 and more, at 16 times the memory.
SMALL_IMAGE, LARGE_IMAGE = 64, 96
STRIDE = {"small": 8, "large": 32}  # of a ResNet's features, by its stem
CIFAR_STRIDE = 4


@dataclass(frozen=True)
class EncoderSpec:
    """What rebuilds an encoder beside its weights; written to a run's encoder.json.

    Attributes:
        name: resnet18, 34, 50, 101, 152 or 200, cifar_resnetN with N = 6n+2, or timm:NAME.
        width: channels of the first stage, of cifar_resnetN only.
        mean, std: per channel, of pixels scaled to 0 … 1.
        stem: of a ResNet: small (3×3 convolution of stride 1) or large (7×7 of stride 2, then a max-pool). `auto`
            becomes small where the input's shorter side has at most 64 pixels. Other models of timm stay as they
            are, which is called large.

    Raises:
        RecipeError: no such architecture, or it cannot have this stem.
    """

    name: str
    width: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    preprocessing: Preprocessing
    stem: Stem = "auto"

    def __post_init__(self) -> None:
        # Resolved at once, so that an encoder is rebuilt as it was whatever `auto` may come to mean.
        object.__setattr__(self, "stem", _resolve_stem(self))

    @property
    def timm_name(self) -> str | None:
        """timm's name of the architecture; None for a CifarResNet."""
        if self.name in RESNETS:
            return self.name
        if self.name.startswith("timm:"):
            return self.name.removeprefix("timm:")
        depth = self.name.removeprefix("cifar_resnet")
        if self.name.startswith("cifar_resnet") and depth.isdecimal() and int(depth) >= 8 and int(depth) % 6 == 2:
            return None
        raise RecipeError(
            f"no encoder {self.name!r}: use {', '.join(RESNETS)}, cifar_resnet8, 14, 20 … (6n+2), or timm:NAME"
        )

    @property
    def is_resnet(self) -> bool:
        """Whether this is a ResNet of either stem, which a CifarResNet is not."""
        if self.timm_name is None or self.name in RESNETS:
            return self.name in RESNETS
        from training.timm_backbones import is_resnet

        return is_resnet(self.timm_name)

    @property
    def architecture(self) -> str:
        """The name for people, with what else decides the shapes of the weights."""
        if self.timm_name is None:
            return f"{self.name} of width {self.width}"
        return f"{self.name} with the {self.stem} stem" if self.is_resnet else self.name

    def to_json(self) -> dict[str, object]:
        return {**asdict(self), "preprocessing": self.preprocessing.model_dump(mode="json")}


class ImageEncoder(nn.Module):
    """A backbone between its normalisation and the whitening of its features, which is the identity until fitted.

    `forward` takes float images (n, 3, h, w) scaled to 0 … 1 and returns features (n, dim), not yet of unit length.
    """

    mean: Tensor
    std: Tensor
    centre: Tensor
    whitener: Tensor

    def __init__(self, backbone: nn.Module, dim: int, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.backbone = backbone
        self.dim = dim
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("centre", torch.zeros(dim))
        self.register_buffer("whitener", torch.eye(dim))

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = (self.backbone((images - self.mean) / self.std) - self.centre) @ self.whitener.T
        return features

    def whiten(self, features: Tensor, labels: Tensor, *, shrinkage: float) -> None:
        """Fit the last step on `features` (n, dim) that this encoder gave before, and their labels (n,)."""
        centre, whitener = fit_whitening(features, labels, shrinkage=shrinkage)
        self.centre.copy_(centre)
        self.whitener.copy_(whitener)

    def reset_whitening(self) -> None:
        """Make the last step the identity again."""
        self.centre.zero_()
        self.whitener.copy_(torch.eye(self.dim))


def build_encoder(spec: EncoderSpec) -> ImageEncoder:
    """Build an encoder with random weights.

    Raises:
        RecipeError: the architecture cannot take images of this size.
    """
    backbone: nn.Module
    if spec.timm_name is None:
        backbone = CifarResNet(int(spec.name.removeprefix("cifar_resnet")), spec.width)
        dim = backbone.dim
    else:
        from training.timm_backbones import build_backbone

        backbone, dim = build_backbone(
            spec.timm_name, spec.preprocessing.input_size, small_stem=spec.is_resnet and spec.stem == "small"
        )
    return ImageEncoder(backbone, dim, spec.mean, spec.std)


def encoder_warnings(spec: EncoderSpec) -> list[str]:
    """What looks wrong about an encoder for images of this size; one sentence each."""
    size = spec.preprocessing.input_size
    images = f"{_times(size)} images"
    if spec.timm_name is not None and not spec.is_resnet:
        from training.timm_backbones import native_size

        native = native_size(spec.timm_name)
        if native is None or native == size:
            return []
        return [f"{spec.name} was designed for {_times(native)} images; this one takes {images}, and those alone"]
    stride = STRIDE[spec.stem] if spec.is_resnet else CIFAR_STRIDE
    found = f"{spec.name} with the {spec.stem} stem makes {_times(_features(size, stride))} features of {images}"
    if spec.stem == "large" and min(size) <= SMALL_IMAGE:
        return [f"{found}; encoder.stem=small makes {_times(_features(size, STRIDE['small']))}"]
    if spec.stem == "small" and min(size) > LARGE_IMAGE:
        other = "encoder.stem=large" if spec.is_resnet else "resnet18"
        return [f"{found}; {other} makes {_times(_features(size, STRIDE['large']))} in far less memory"]
    return []


def projection_head(dim: int, projection_dim: int, layers: int = 2, hidden: int | None = None) -> nn.Module:
    """The head that training puts on an encoder's features (n, dim) and export drops.

    A BatchNorm follows each hidden layer: without it SGD at the paper's rate stays collapsed at log(N - 1) on small
    data sets.

    Args:
        layers: 1 is the paper's ImageNet script, 2 its section 3.2.2 (arXiv 2004.11362), 3 as in SimCLR v2
            (arXiv 2006.10029).
        hidden: width of the hidden layers, `dim` unless told.

    Raises:
        RecipeError: no layers, or a hidden width without hidden layers.
    """
    if layers < 1:
        raise RecipeError(f"a projection head of {layers} layers: it has at least 1")
    if layers == 1 and hidden is not None:
        raise RecipeError(f"a projection head of 1 layer has no hidden width ({hidden}): leave it out, or use 2 layers")
    parts: list[nn.Module] = []
    width = dim
    for _ in range(layers - 1):
        out = hidden or dim
        parts += [nn.Linear(width, out, bias=False), nn.BatchNorm1d(out), nn.ReLU(inplace=True)]
        width = out
    return nn.Sequential(*parts, nn.Linear(width, projection_dim))


def _resolve_stem(spec: EncoderSpec) -> Stem:
    if spec.is_resnet:
        if spec.stem != "auto":
            return spec.stem
        return "small" if min(spec.preprocessing.input_size) <= SMALL_IMAGE else "large"
    own: Stem = "small" if spec.timm_name is None else "large"
    if spec.stem not in ("auto", own):
        raise RecipeError(f"{spec.name} has no {spec.stem} stem: set encoder.stem=auto, or choose a ResNet")
    return own


def _features(size: tuple[int, int], stride: int) -> tuple[int, int]:
    return -(-size[0] // stride), -(-size[1] // stride)


def _times(size: tuple[int, int]) -> str:
    return f"{size[0]}×{size[1]}"
