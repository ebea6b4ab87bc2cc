"""A momentum encoder and its labelled queue: more to compare with than a batch holds (arXiv 1911.05722).

Knows embeddings and their labels; the loss takes them as further columns, which get no gradient.
"""

import math

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from training.distributed import gather_rows
from training.network import Network
from training.sections import MomentumSection

__all__ = ["MomentumQueue"]


class MomentumQueue(nn.Module):
    """Slowly following copies of encoder and head, and the last `queue` rows they gave with their targets.

    Every process holds the same queue: rows of all processes enter it in the order of their ranks.

    Args:
        config: length and decay.
        network: what is followed.
        targets: an example of a batch's targets, int64 (b,) or probabilities (b, C); keys' are of the same kind.
        dim: width of the rows.
    """

    keys: Tensor
    key_targets: Tensor
    filled: Tensor

    def __init__(self, config: MomentumSection, network: Network, targets: Tensor, dim: int) -> None:
        super().__init__()
        self.average = ModelEmaV3(network, decay=config.decay)
        self.average.requires_grad_(False)
        # Statistics of its own batches, as in training: running ones lag behind young weights.
        self.average.module.train()
        device = targets.device
        self.register_buffer("keys", torch.zeros(config.queue, dim, device=device))
        self.register_buffer("key_targets", targets.new_zeros(config.queue, *targets.shape[1:]))
        self.register_buffer("filled", torch.zeros((), dtype=torch.int64))  # on the host: no step waits for it

    @torch.no_grad()
    def enqueue(self, views: Tensor, targets: Tensor, chunk: int | None = None) -> None:
        """Put the rows of views (b, 3, h, w) and their targets first; the oldest beyond the queue's length go.

        Args:
            chunk: views at a time, at most.
        """
        parts = views.tensor_split(math.ceil(len(views) / chunk)) if chunk else [views]
        rows = gather_rows(torch.cat([self.average.module.project(part).float() for part in parts]))
        targets = gather_rows(targets)
        length = len(self.keys)
        self.keys.copy_(torch.cat([rows, self.keys])[:length])
        self.key_targets.copy_(torch.cat([targets, self.key_targets])[:length])
        self.filled.add_(len(rows)).clamp_(max=length)

    @property
    def columns(self) -> dict[str, Tensor]:
        """What the objective takes beside the batch."""
        filled = int(self.filled)
        return {"keys": self.keys[:filled], "key_labels": self.key_targets[:filled]}

    def follow(self, network: Network) -> None:
        """Move the copies towards the network's weights."""
        self.average.update(network)
