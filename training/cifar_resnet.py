"""The small ResNets of He et al. for images of 32 pixels: pixels in, pooled features out."""

from torch import Tensor, nn

__all__ = ["CifarResNet"]


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
