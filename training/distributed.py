"""The ranks of a training run: one process for each device, as torchrun starts them.

Knows who is who and how rows travel between ranks, and nothing of losses. Ranks hold equally many rows of a batch; the
batch of all is rank-major. Rows travel in the forward pass alone: no gradient is ever sent from here.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist
from torch.autograd.function import once_differentiable

from coterie.errors import DeviceError

__all__ = ["World", "gather_live", "gather_rows", "is_first_rank", "own_rows", "rank"]

T = TypeVar("T")

PATIENCE = timedelta(days=2)  # longer than reading or measuring any set takes
SLAB_BYTES = 256 * 2**20
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class World:
    """This process among those of the run; alone, it is rank 0 of 1."""

    rank: int
    size: int
    local_rank: int  # on this machine
    device: torch.device
    local_size: int = 1  # ranks on this machine
    patient: dist.ProcessGroup | None = None  # for waiting while rank 0 alone reads, measures or saves

    @classmethod
    def start(cls, *, timeout: timedelta = timedelta(minutes=10)) -> "World":
        """Join the other ranks, if torchrun started any: over NCCL where there are GPUs, else over Gloo.

        Args:
            timeout: how long a rank waits for the others, here and whenever rows travel, before it fails.

        Raises:
            DeviceError: torchrun's environment is incomplete, a rank has no GPU of its own, or the others do not come.
        """
        rank, size, local_rank = _torchrun_environment()
        on_gpu = torch.cuda.is_available()
        if on_gpu and local_rank >= (gpus := torch.cuda.device_count()):
            raise DeviceError(
                f"local rank {local_rank} has no GPU of its own, {gpus} being visible: "
                f"run torchrun with --nproc-per-node={gpus}"
            )
        device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
        if on_gpu:
            torch.cuda.set_device(device)
        patient = None
        if size > 1:
            try:
                dist.init_process_group(
                    "nccl" if on_gpu else "gloo", timeout=timeout, device_id=device if on_gpu else None
                )
            except (RuntimeError, ValueError) as error:
                where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
                raise DeviceError(
                    f"rank {rank} did not meet the other {size - 1} at {where} within {timeout}: "
                    f"see that all were started and reach it ({error})"
                ) from error
            patient = dist.new_group(backend="gloo", timeout=PATIENCE)
        return cls(rank, size, local_rank, device, int(os.environ.get("LOCAL_WORLD_SIZE", 1)), patient)

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which alone writes files and reports."""
        return self.rank == 0

    def from_first(self, make: Callable[[], T]) -> T:
        """What `make` gives on rank 0, which alone calls it; the others wait and get a copy.

        Raises:
            DeviceError: on the others, where it failed.
        """
        if self.size == 1:
            return make()
        made: list[tuple[T] | None] = [None]
        try:
            if self.is_first:
                made = [(make(),)]
        finally:
            dist.broadcast_object_list(made, src=0, group=self.patient)
        if made[0] is None:
            raise DeviceError(f"rank {self.rank} stops, for rank 0 failed: see its message")
        return made[0][0]

    def share(self, rows: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Rank 0's `rows`, of this shape and dtype and in the host's memory, on every rank's device."""
        if self.size == 1:
            assert rows is not None
            return rows.to(self.device)
        received = torch.empty(shape, dtype=dtype, device=self.device)
        for start in range(0, shape[0], slab := max(1, SLAB_BYTES // max(1, math.prod(shape[1:])))):
            part = torch.empty_like(received[start : start + slab], device="cpu")
            if rows is not None:
                part.copy_(rows[start : start + slab])
            dist.broadcast(part, src=0, group=self.patient)
            received[start : start + slab].copy_(part)
        return received

    def wait_for_first(self) -> None:
        """Return when every rank is here, however long rank 0 takes."""
        if self.size > 1:
            dist.barrier(group=self.patient)

    def close(self) -> None:
        """Leave the others; nothing to leave where there are none."""
        if self.size > 1:
            dist.destroy_process_group()


def is_first_rank() -> bool:
    """Whether torchrun, if anything, calls this process rank 0; for those who report before or after a `World`."""
    return os.environ.get("RANK", "0") == "0"


def gather_rows(rows: Tensor) -> Tensor:
    """All ranks' rows (size · n, …), rank-major and without gradient; each brings (n, …) of one shape and dtype."""
    size = _size()
    if size == 1:
        return rows.detach()
    gathered = rows.new_empty((size * rows.shape[0], *rows.shape[1:]))
    dist.all_gather_into_tensor(gathered, rows.detach().contiguous())
    return gathered


def gather_live(rows: Tensor) -> Tensor:
    """All ranks' rows as `gather_rows` orders them; this rank's own carry gradient, the others are constant.

    The gradient is multiplied by the number of ranks. Let every rank compute one and the same loss of all rows: each
    one's parameters then get `size` times what its own rows contribute, and DistributedDataParallel's average is the
    sum of the contributions, the gradient that one process would have.
    """
    return rows if _size() == 1 else _GatherLive.apply(rows)


def own_rows(n: int) -> slice:
    """Which of the n rows of all ranks are this rank's."""
    n_local = n // _size()
    return slice(rank() * n_local, (rank() + 1) * n_local)


def rank() -> int:
    """This process's number among the ranks; 0 where it is alone."""
    return dist.get_rank() if _size() > 1 else 0


class _GatherLive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        return gather_rows(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad[own_rows(grad.shape[0])] * _size()


def _size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _torchrun_environment() -> tuple[int, int, int]:
    """Rank, world size and local rank."""
    found = {name: os.environ[name] for name in _TORCHRUN if os.environ.get(name)}
    if not found.keys() & {"RANK", "WORLD_SIZE", "LOCAL_RANK"}:
        return 0, 1, 0
    if missing := [name for name in _TORCHRUN if name not in found]:
        raise DeviceError(
            f"the environment has {', '.join(found)} but not {', '.join(missing)}: start the ranks with torchrun, "
            "or unset these to train in one process"
        )
    try:
        rank, size, local_rank, _ = (int(found[name]) for name in _TORCHRUN if name != "MASTER_ADDR")
    except ValueError as error:
        raise DeviceError(f"torchrun's environment is damaged: {found} ({error})") from error
    if not (0 <= rank < size and 0 <= local_rank <= rank):
        raise DeviceError(f"torchrun's environment is damaged: rank {rank} (local {local_rank}) of {size}")
    return rank, size, local_rank
