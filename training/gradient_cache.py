"""Exact gradients of a whole batch's loss with the memory of a chunk (gradient caching, arXiv 2101.06983).

A contrastive loss couples all rows, so that plain accumulation over chunks would compare each row with its chunk alone.
Here all rows are computed without a graph, the loss gives ∂loss/∂z, and each chunk is computed again with its graph
to carry its part of ∂loss/∂z to the weights: one more forward pass, and the activations of one chunk.

BatchNorm takes its statistics from a chunk, not from the batch, in both passes alike: the gradient is exactly that of
a network with such a BatchNorm. Its running statistics move in the second pass only.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

__all__ = ["backward_in_chunks"]


def backward_in_chunks(
    network: nn.Module,
    *,
    project: Callable[[Tensor], Tensor],
    loss_of: Callable[[Tensor], Tensor],
    views: Tensor,
    chunk: int,
) -> Tensor:
    """Accumulate the gradients of loss_of(z) in the network's parameters and return the loss, detached.

    Args:
        network: `training.network.Network`, in DistributedDataParallel where there are several ranks: then the last
            chunk's backward pass exchanges the gradients.
        project: the network's rows z (c, d) of views (c, 3, h, w).
        loss_of: z (n, d) → scalar.
        views: (n, 3, h, w).
        chunk: views at a time, at most.
    """
    parts = views.tensor_split(math.ceil(len(views) / chunk))  # no short last one, whose statistics would be poor
    random_states = []
    with torch.no_grad(), _still_running_statistics(network):
        rows = []
        for part in parts:
            random_states.append(_random_state(views.device))
            rows.append(project(part))
    z = torch.cat(rows).requires_grad_()
    loss = loss_of(z)
    loss.backward()
    assert z.grad is not None
    for index, (part, gradient) in enumerate(zip(parts, z.grad.tensor_split(len(parts)), strict=True)):
        _set_random_state(views.device, random_states[index])  # the same dropout as before
        waits = index < len(parts) - 1 and hasattr(network, "no_sync")
        with network.no_sync() if waits else nullcontext():
            network(part, None, carried=gradient).backward()
    return loss.detach()


@contextmanager
def _still_running_statistics(network: nn.Module) -> Iterator[None]:
    norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    tracked = [norm.track_running_stats for norm in norms]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm, was in zip(norms, tracked, strict=True):
            norm.track_running_stats = was


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_random_state(device: torch.device, state: Tensor) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)
