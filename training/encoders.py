"""Encoders and projection heads: pixels in, features out.

Knows architectures and normalisation constants; knows nothing of losses, data or schedules.
"""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from coterie.errors import RecipeError
from coterie.images import Preprocessing
from training.whitening import fit_whitening

__all__ = ["CifarResNet", "EncoderSpec", "ImageEncoder", "build_encoder", "projection_head"]


@dataclass(frozen=True)
class EncoderSpec:
    """What rebuilds an encoder beside its weights; written to a run's encoder.json."""

    name: str
    width: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    preprocessing: Preprocessing

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


def build_encoder(spec: EncoderSpec) -> ImageEncoder:
    """Build an encoder with random weights.

    Raises:
        RecipeError: no such architecture.
    """
    if spec.name.startswith("timm:"):
        backbone, dim = _timm_backbone(spec.name.removeprefix("timm:"))
    else:
        depth = spec.name.removeprefix("cifar_resnet")
        if not (spec.name.startswith("cifar_resnet") and depth.isdigit() and int(depth) % 6 == 2):
            raise RecipeError(f"no encoder {spec.name!r}: use cifar_resnet8, 14, 20 … (6n+2), or timm:NAME")
        net = CifarResNet(int(depth), spec.width)
        backbone, dim = net, net.dim
    return ImageEncoder(backbone, dim, spec.mean, spec.std)


def projection_head(dim: int, projection_dim: int) -> nn.Module:
    """Two-layer head of arXiv 2004.11362, section 3.2.2, with a BatchNorm in between.

    Without it SGD at the paper's rate stays collapsed at log(N - 1) on small data sets.
    """
    return nn.Sequential(
        nn.Linear(dim, dim, bias=False), nn.BatchNorm1d(dim), nn.ReLU(inplace=True), nn.Linear(dim, projection_dim)
    )


class CifarResNet(nn.Module):
    """ResNet for small images (He et al., arXiv 1512.03385, section 4.2): 3×3 stem, three stages, 6n+2 layers.

    Args:
        depth: 8, 14, 20, 32, 44, 56 …
        width: channels of the first stage; the following have two and four times as many.
    """

    def __init__(self, depth: int, width: int = 16) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.stem = nn.Sequential(_conv(3, width), nn.BatchNorm2d(width), nn.ReLU(inplace=True))
        stages: list[nn.Module] = []
        channels = width
        for stage in range(3):
            out = width * 2**stage
            for block in range(blocks):
                stages.append(_BasicBlock(channels, out, stride=2 if stage and not block else 1))
                channels = out
        self.stages = nn.Sequential(*stages)
        self.dim = channels
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def forward(self, images: Tensor) -> Tensor:
        return self.stages(self.stem(images)).mean((2, 3))


class _BasicBlock(nn.Module):
    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv(channels, out, stride), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = _conv(out, out), nn.BatchNorm2d(out)
        nn.init.zeros_(self.bn2.weight)  # each block starts as the identity
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != out:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        activated: Tensor = self.relu(out + self.shortcut(x))
        return activated


def _conv(channels: int, out: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, out, 3, stride, padding=1, bias=False)


def _timm_backbone(name: str) -> tuple[nn.Module, int]:
    import timm

    if not timm.is_model(name):
        close = ", ".join(timm.list_models(f"*{name[:6]}*")[:5]) or "see timm.list_models()"
        raise RecipeError(f"timm has no model {name!r}; near it: {close}")
    backbone = timm.create_model(name, pretrained=False, num_classes=0)
    return backbone, int(backbone.num_features)
