"""The log-sum-exp of every row's similarities to all other rows, in memory linear in their number.

Knows tiles, numerical range and the gradient. Knows nothing of labels: in the supervised contrastive loss
they enter through class sums alone (see `training.losses`).
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["others_logsumexp"]

# A tile of 512 x 512 float32 is 1 MiB: it stays in a core's L2 cache from its product over its exp to its
# second product. On two AVX-512 cores 256 took 1.2 times as long at n = 8192, and 1024 took 1.2 times as long
# at n = 1024. On a GPU there are launches to amortise instead.
_CPU_TILE = 512
_GPU_TILE = 4096


def others_logsumexp(z: Tensor, *, temperature: float, keys: Tensor | None = None, tile: int | None = None) -> Tensor:
    """Returns L (n,), L_i = log( Σ_{a≠i} exp(z_i·z_a/τ) + Σ_k exp(z_i·k/τ) ), differentiable once in z.

    It is the logarithm of the denominator in eqs. 1 to 3 of arXiv 2004.11362. With S = z zᵀ/τ, g = ∂loss/∂L,

        τ ∂loss/∂z_i = Σ_{a≠i} (g_i exp(S_ia - L_i) + g_a exp(S_ia - L_a)) z_a + Σ_k g_i exp(S_ik - L_i) k,

    so that only z and L are kept between the passes. S is symmetric and formed one tile of its upper triangle
    at a time: each tile serves its rows and its columns, in the sum and again in the gradient.
    Peak memory above the inputs: L (n,), the gradient (n, d), a scaled copy (n, d) and two tiles.

    Args:
        z: (n, d) of unit length, float32 or float64. The result has its dtype.
        temperature: τ > 0.
        keys: (k, d) of unit length; further columns that receive no gradient.
        tile: rows and columns of a tile; by default what suits the device.

    A row without any other row nor key has L_i = -inf and gives no gradient.
    """
    return _OthersLogSumExp.apply(z, keys, temperature, tile or (_CPU_TILE if z.device.type == "cpu" else _GPU_TILE))


class _OthersLogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, keys: Tensor | None, temperature: float, tile: int) -> Tensor:
        with torch.autocast(z.device.type, enabled=False):
            lse = _sum_tiles(z, keys, temperature, tile)
        ctx.save_for_backward(z, keys, lse)
        ctx.temperature, ctx.tile = temperature, tile
        return lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_lse: Tensor) -> tuple[Tensor | None, None, None, None]:
        z, keys, lse = ctx.saved_tensors
        with torch.autocast(z.device.type, enabled=False):
            return _gradient_tiles(z, keys, lse, grad_lse, ctx.temperature, ctx.tile), None, None, None


def _sum_tiles(z: Tensor, keys: Tensor | None, temperature: float, tile: int) -> Tensor:
    """L (n,): plain sums of exponentials where their range allows, else a running log-sum-exp with maxima."""
    if _exp_is_in_range(temperature, z.dtype):
        total = z.new_zeros(z.shape[0])
        for t in _logit_tiles(z, keys, temperature, tile):
            exp = t.logits.exp_()
            total[t.rows] += exp.sum(1)
            if t.serves_columns:
                total[t.columns] += exp.sum(0)
        return total.log_()
    lse = z.new_full((z.shape[0],), -math.inf)
    for t in _logit_tiles(z, keys, temperature, tile):
        lse[t.rows] = torch.logaddexp(lse[t.rows], t.logits.logsumexp(1))
        if t.serves_columns:
            lse[t.columns] = torch.logaddexp(lse[t.columns], t.logits.logsumexp(0))
    return lse


def _gradient_tiles(
    z: Tensor, keys: Tensor | None, lse: Tensor, grad_lse: Tensor, temperature: float, tile: int
) -> Tensor:
    """∂loss/∂z (n, d): a tile becomes the bracket of the gradient above and multiplies z from both sides."""
    lse = lse.masked_fill(lse == -math.inf, 0.0)  # a row alone: its only logit is -inf, and -inf + inf is NaN
    in_range = _exp_is_in_range(temperature, z.dtype)
    scale = grad_lse * (-lse).exp() if in_range else grad_lse
    grad = torch.zeros_like(z)
    sums = z.new_empty(min(tile, z.shape[0]) ** 2)
    for t in _logit_tiles(z, keys, temperature, tile):
        if not t.square:  # keys are nobody's anchors: only the rows' half remains
            if not in_range:
                t.logits.sub_(lse[t.rows, None])
            grad[t.rows].addmm_(t.logits.exp_().mul_(scale[t.rows, None]), t.others)
            continue
        if in_range:
            weights = sums[: t.logits.numel()].view_as(t.logits)
            torch.add(scale[t.rows, None], scale[None, t.columns], out=weights)
            weights.mul_(t.logits.exp_())
        else:
            weights = (t.logits - lse[t.rows, None]).exp_().mul_(scale[t.rows, None])
            weights.addcmul_(t.logits.sub_(lse[None, t.columns]).exp_(), scale[None, t.columns])
        grad[t.rows].addmm_(weights, t.others)
        if t.serves_columns:
            grad[t.columns].addmm_(weights.T, z[t.rows])
    return grad.div_(temperature)


class _Tile(NamedTuple):
    rows: slice
    columns: slice
    others: Tensor  # (columns, d), what the columns are
    logits: Tensor  # (rows, columns), a buffer that the next tile overwrites; -inf at self-similarity
    square: bool  # of S = z zᵀ/τ, not of the keys
    serves_columns: bool  # strictly above the diagonal


def _logit_tiles(z: Tensor, keys: Tensor | None, temperature: float, tile: int) -> Iterator[_Tile]:
    n = z.shape[0]
    scaled = z / temperature
    widest = n if keys is None else max(n, keys.shape[0])
    buffer = z.new_empty(min(tile, n) * min(tile, widest))
    for i in range(0, n, tile):
        rows = slice(i, min(i + tile, n))
        sources = [(z, i, True)] if keys is None else [(z, i, True), (keys, 0, False)]
        for columns_of, first, square in sources:
            for j in range(first, columns_of.shape[0], tile):
                columns = slice(j, min(j + tile, columns_of.shape[0]))
                others = columns_of[columns]
                shape = (rows.stop - i, others.shape[0])
                logits = buffer[: math.prod(shape)].view(shape)
                torch.mm(scaled[rows], others.T, out=logits)
                if square and i == j:
                    logits.fill_diagonal_(-math.inf)
                yield _Tile(rows, columns, others, logits, square, square and i != j)


def _exp_is_in_range(temperature: float, dtype: torch.dtype) -> bool:
    """Whether exp(±1/τ), its sums and their quotients are normal numbers: then no maximum need be subtracted.

    The logits of unit vectors lie in [-1/τ, 1/τ]. Four fifths of the exponent's range leave room for sums
    over e^17 columns in float32. The bound is τ > 0.0143 there and τ > 0.0018 in float64.
    """
    return 1 / temperature < -0.8 * math.log(torch.finfo(dtype).tiny)
