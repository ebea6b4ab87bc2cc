"""Backbones of timm's architectures, without their classifiers; the only place that builds models with timm.

Import it where it is used: timm takes as long to import as torch itself.
"""

from typing import Any

import timm
import torch
from timm.models import PretrainedCfg, get_pretrained_cfg
from timm.models.resnet import ResNet
from torch import nn

from coterie.errors import RecipeError

__all__ = ["build_backbone", "create", "is_resnet", "native_size"]


def is_resnet(name: str) -> bool:
    """Whether timm's `name` is a ResNet: plain, -D, SE, Res2Net, ResNeSt …; all have the same two stems.

    Raises:
        RecipeError: timm has no such model.
    """
    _config(name)
    # Each entry point declares what it returns; building a model to look at it takes seconds.
    return timm.model_entrypoint(name.partition(".")[0]).__annotations__.get("return") is ResNet


def native_size(name: str) -> tuple[int, int] | None:
    """Height and width that timm's `name` was made for, where a built model takes one size only; None for any size."""
    config = _config(name)
    return config.input_size[1:] if config.fixed_input_size else None


def create(name: str, input_size: tuple[int, int], *, pretrained: bool = False) -> nn.Module:
    """timm's model without its classifier, for images of `input_size` (height, width)."""
    size: dict[str, Any] = {"img_size": input_size} if native_size(name) else {}
    return timm.create_model(name, pretrained=pretrained, num_classes=0, **size)


def build_backbone(name: str, input_size: tuple[int, int], *, small_stem: bool) -> tuple[nn.Module, int]:
    """A backbone with random weights and the width of its pooled features.

    Raises:
        RecipeError: timm has no such model, or it cannot take images of this size.
    """
    if is_resnet(name):
        net = create(name, input_size)
        if small_stem:
            _use_small_stem(net)
        return net, int(net.num_features)
    height, width = input_size
    try:
        net = create(name, input_size).eval()
        with torch.no_grad():
            features = net(torch.zeros(1, 3, height, width))
    except Exception as error:  # architectures refuse a size each in their own way
        reason = (str(error) or type(error).__name__).splitlines()[0]
        rows, columns = _config(name).input_size[1:]
        raise RecipeError(
            f"timm:{name} cannot take images of {height}×{width} pixels ({reason}): "
            f"set data.preprocessing.input_size to [{rows}, {columns}], or choose another encoder"
        ) from error
    if features.ndim != 2:
        raise RecipeError(f"timm:{name} gives no pooled features, but {tuple(features.shape)}: choose another encoder")
    return net.train(), features.shape[1]


def _config(name: str) -> PretrainedCfg:
    if not timm.is_model(name):
        close = ", ".join(timm.list_models(f"*{name[:6]}*")[:5]) or "see timm.list_models()"
        raise RecipeError(f"timm has no model {name!r}; near it: {close}")
    try:
        return get_pretrained_cfg(name) or PretrainedCfg()
    except RuntimeError as error:
        tags = ", ".join(timm.list_pretrained(f"{name.partition('.')[0]}.*"))
        raise RecipeError(f"timm has no weights {name!r}; there are {tags or 'none'}") from error


def _use_small_stem(net: ResNet) -> None:
    """The stem for images of 32 pixels: stride 1 and no max-pool, 3×3 for 7×7 (SimCLR, arXiv 2002.05709, B.9)."""
    if isinstance(net.conv1, nn.Sequential):  # a deep stem is of 3×3 convolutions already
        net.conv1[0].stride = (1, 1)
    else:
        net.conv1 = nn.Conv2d(net.conv1.in_channels, net.conv1.out_channels, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
    net.maxpool = nn.Identity()
