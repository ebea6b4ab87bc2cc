"""Which images make up the batches of an epoch.

Knows labels and a generator; knows neither pixels nor processes.
"""

import math

import torch
from torch import Generator, Tensor

__all__ = ["epoch_batches"]


def epoch_batches(
    labels: Tensor,
    batch_size: int,
    generator: Generator,
    *,
    balanced: bool = False,
    images_per_class: int | None = None,
) -> Tensor:
    """Rows of an epoch's batches, int64 (n // batch_size, batch_size); the last batch is never ragged.

    Args:
        labels: int64 (n,), on the generator's device.
        balanced: classes come equally often, small ones repeating images. Otherwise each image comes at most once,
            unless `images_per_class` needs more of its class.
        images_per_class: each batch holds so many images of each of its classes, a divisor of batch_size; a class
            with fewer repeats them.
    """
    n = len(labels)
    steps = n // batch_size
    if not balanced and images_per_class is None:
        order = torch.randperm(n, generator=generator, device=labels.device)
        return order[: steps * batch_size].view(steps, batch_size)
    group = images_per_class or 1
    classes = labels.unique()
    share = math.ceil(n / len(classes))
    groups = []
    for label in classes:
        rows = (labels == label).nonzero().squeeze(1)
        wanted = math.ceil((share if balanced else len(rows)) / group) * group
        rounds = [
            rows[torch.randperm(len(rows), generator=generator, device=labels.device)]
            for _ in range(math.ceil(wanted / len(rows)))
        ]
        groups.append(torch.cat(rounds)[:wanted].view(-1, group))
    pooled = torch.cat(groups)
    pooled = pooled[torch.randperm(len(pooled), generator=generator, device=labels.device)]
    return pooled.flatten()[: steps * batch_size].view(steps, batch_size)
