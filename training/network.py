"""What is trained: encoder, projection head and objective as one module, from views to the loss."""

from typing import Any

import torch
from torch import Tensor, nn

from training.encoders import ImageEncoder
from training.objectives import ObjectiveModule

__all__ = ["Network"]


class Network(nn.Module):
    """Encoder, projection head and objective.

    Args:
        head: None where the objective takes the encoder's own features.
        bf16: run encoder and head in bfloat16; the objective computes in float32.
    """

    def __init__(
        self, encoder: ImageEncoder, head: nn.Module | None, objective: ObjectiveModule, *, bf16: bool = False
    ) -> None:
        super().__init__()
        self.encoder, self.head, self.objective = encoder, head, objective
        self.bf16 = bf16

    def beside_encoder(self) -> list[nn.Module]:
        """The modules that export drops."""
        return [module for module in (self.head, self.objective) if module is not None]

    def compile_projection(self) -> None:
        """Let torch.compile fuse `project` from now on; measuring and exporting the encoder is left as it is."""
        self.project = torch.compile(self.project)  # type: ignore[method-assign]

    def project(self, views: Tensor) -> Tensor:
        """Rows z (n, d) that the objective takes, of float views (n, 3, h, w)."""
        with torch.autocast(views.device.type, torch.bfloat16, enabled=self.bf16):
            features: Tensor = self.encoder(views)
            return features if self.head is None else self.head(features)

    def forward(
        self, views: Tensor, targets: Tensor | None, *, carried: Tensor | None = None, **options: Any
    ) -> Tensor:
        """The loss, a scalar, of views and their labels or class probabilities.

        With `carried`, a gradient (n, d) that was already found for z, the sum of their product, whose own gradient
        brings it to the weights.
        """
        z = self.project(views)
        if carried is not None:
            return (z.to(carried.dtype) * carried).sum()
        loss: Tensor = self.objective(z, targets, **options)
        return loss
