"""The log-sum-exp of every row's similarities to all other rows, in memory linear in their number.

Knows tiles, numerical range, the gradient, and which rows are this rank's to work on. Knows nothing of labels: in
the supervised contrastive loss they enter through class sums alone (see `training.losses`).
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from training.distributed import gather_rows, own_rows

__all__ = ["others_logsumexp"]

# A tile stays near the cores from its product over its exp to its second product, and large products run nearer to the
# cores' limit: on two AVX-512 cores with 32 MiB of L3, tiles of 1024 took 0.85 times as long as those of 512 at 4096
# rows, 0.83 at 8192 and 0.77 at 16,384; but 1.1 times as long at 1024 rows. On a GPU there are launches to amortise.
_CPU_TILE, _FEW_ROWS_TILE, _FEW_ROWS = 1024, 512, 2048
_GPU_TILE = 4096


def others_logsumexp(
    z: Tensor,
    *,
    temperature: float,
    columns: Tensor | None = None,
    across_ranks: bool = False,
    tile: int | None = None,
) -> Tensor:
    """Returns L (n,), L_i = log Σ_{a≠i} exp(z_i·z_a/τ) over all columns a, differentiable once in z.

    It is the logarithm of the denominator in eqs. 1 to 3 of arXiv 2004.11362. With S = z zᵀ/τ, g = ∂loss/∂L, and
    g_a = 0 for columns that are no anchors,

        τ ∂loss/∂z_i = Σ_{a≠i} (g_i exp(S_ia - L_i) + g_a exp(S_ia - L_a)) z_a,

    so that only z and L are kept between the passes. S is symmetric and formed one tile of its upper triangle
    at a time: each tile serves its rows and its columns, in the sum and again in the gradient.
    Peak memory above the inputs: L (n,), the gradient (n, d) and two tiles.

    Across ranks, each forms the tiles of its own rows against all columns, n²/size of them (half of its own square),
    and L alone is exchanged. With everyone's L and g at hand the backward pass then gives each rank the gradient of
    its own rows, complete, and of the other ranks' rows 0.

    Args:
        z: (n, d) of unit length, float32 or float64. The result has its dtype.
        temperature: τ > 0.
        columns: (n + k, d), z and after it k keys of unit length, which are anchors to nothing and get no gradient;
            by default z alone.
        across_ranks: z is every rank's rows, as `gather_live` orders them; the keys are the same on all ranks.
        tile: rows and columns of a tile; by default what suits the device.

    A row without any other column has L_i = -inf and gives no gradient.
    """
    columns = z if columns is None else columns
    own = own_rows(z.shape[0]) if across_ranks else slice(0, z.shape[0])
    return _OthersLogSumExp.apply(z, columns.detach(), own, temperature, tile or _tile_for(columns))


class _OthersLogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, columns: Tensor, own: slice, temperature: float, tile: int) -> Tensor:
        with torch.autocast(columns.device.type, enabled=False):
            lse = _sum_tiles(columns, own, temperature, tile)
        if lse.shape[0] < z.shape[0]:
            lse = gather_rows(lse)
        ctx.save_for_backward(columns, lse)
        ctx.own, ctx.temperature, ctx.tile = own, temperature, tile
        return lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        columns, lse = ctx.saved_tensors
        with torch.autocast(columns.device.type, enabled=False):
            grad = _gradient_tiles(columns, ctx.own, lse, grad_lse, ctx.temperature, ctx.tile)
        return grad, None, None, None, None


def _tile_for(columns: Tensor) -> int:
    if columns.device.type != "cpu":
        return _GPU_TILE
    return _CPU_TILE if columns.shape[0] >= _FEW_ROWS else _FEW_ROWS_TILE


def _sum_tiles(columns: Tensor, own: slice, temperature: float, tile: int) -> Tensor:
    """L of the own rows: plain sums of exponentials where their range allows, else a running log-sum-exp."""
    if _exp_is_in_range(temperature, columns.dtype):
        total = columns.new_zeros(own.stop)
        for t in _logit_tiles(columns, own, temperature, tile):
            exp = t.logits.exp_()
            total[t.rows] += exp.sum(1)
            if t.serves_columns:
                total[t.columns] += exp.sum(0)
        return total[own].log_()
    lse = columns.new_full((own.stop,), -math.inf)
    for t in _logit_tiles(columns, own, temperature, tile):
        lse[t.rows] = torch.logaddexp(lse[t.rows], t.logits.logsumexp(1))
        if t.serves_columns:
            lse[t.columns] = torch.logaddexp(lse[t.columns], t.logits.logsumexp(0))
    return lse[own]


def _gradient_tiles(
    columns: Tensor, own: slice, lse: Tensor, grad_lse: Tensor, temperature: float, tile: int
) -> Tensor:
    """∂loss/∂z (n, d), 0 beside the own rows: a tile becomes the bracket of the gradient above and multiplies z."""
    in_range = _exp_is_in_range(temperature, columns.dtype)
    lse = lse.masked_fill(lse == -math.inf, 0.0)  # a row alone: its only logit is -inf, and -inf + inf is NaN
    grad = columns.new_zeros(lse.shape[0], columns.shape[1])
    n_keys = columns.shape[0] - lse.shape[0]
    lse, scale = pad(lse, (0, n_keys), value=math.inf), pad(grad_lse, (0, n_keys))  # so that exp(S - L) g is 0
    scale = scale * (-lse).exp() if in_range else scale
    sums = _tile_buffer(columns, own, tile)
    for t in _logit_tiles(columns, own, temperature, tile):
        weights = sums[: t.logits.numel()].view_as(t.logits)
        if in_range:
            torch.add(scale[t.rows, None], scale[None, t.columns], out=weights)
            weights.mul_(t.logits.exp_())
        else:
            torch.sub(t.logits, lse[t.rows, None], out=weights).exp_().mul_(scale[t.rows, None])
            weights.addcmul_(t.logits.sub_(lse[None, t.columns]).exp_(), scale[None, t.columns])
        grad[t.rows].addmm_(weights, columns[t.columns])
        if t.serves_columns:
            grad[t.columns].addmm_(weights.T, columns[t.rows])
    grad[own].div_(temperature)
    return grad


class _Tile(NamedTuple):
    rows: slice
    columns: slice
    logits: Tensor  # (rows, columns), a buffer that the next tile overwrites; -inf at self-similarity
    serves_columns: bool  # strictly above the diagonal of the own rows' square


def _logit_tiles(columns: Tensor, own: slice, temperature: float, tile: int) -> Iterator[_Tile]:
    """The upper triangle of the own rows' square, and the own rows against all other columns."""
    buffer = _tile_buffer(columns, own, tile)
    elsewhere = [*_slices(0, own.start, tile), *_slices(own.stop, columns.shape[0], tile)]
    for rows in _slices(own.start, own.stop, tile):
        scaled = columns[rows] / temperature
        triangle = list(_slices(rows.start, own.stop, tile))
        for others in triangle + elsewhere:
            shape = (rows.stop - rows.start, others.stop - others.start)
            logits = buffer[: math.prod(shape)].view(shape)
            torch.mm(scaled, columns[others].T, out=logits)
            if others == rows:
                logits.fill_diagonal_(-math.inf)
            yield _Tile(rows, others, logits, rows.start < others.start < own.stop)


def _slices(start: int, stop: int, step: int) -> Iterator[slice]:
    return (slice(i, min(i + step, stop)) for i in range(start, stop, step))


def _tile_buffer(columns: Tensor, own: slice, tile: int) -> Tensor:
    return columns.new_empty(min(tile, own.stop - own.start) * min(tile, columns.shape[0]))


def _exp_is_in_range(temperature: float, dtype: torch.dtype) -> bool:
    """Whether exp(±1/τ), its sums and their quotients are normal numbers: then no maximum need be subtracted.

    The logits of unit vectors lie in [-1/τ, 1/τ]. Four fifths of the exponent's range leave room for sums
    over e^17 columns in float32. The bound is τ > 0.0143 there and τ > 0.0018 in float64.
    """
    return 1 / temperature < -0.8 * math.log(torch.finfo(dtype).tiny)
