"""Supervised contrastive losses (arXiv 2004.11362), exact, in memory linear in the batch.

For anchor i among n rows z of unit length, with positives P(i), temperature τ and S = z zᵀ/τ, the paper has

    L_out,i = -1/|P(i)| Σ_{p∈P(i)} log( exp S_ip / Σ_{a≠i} exp S_ia )                       (eq. 2)
    L_in,i  = -log( 1/|P(i)| Σ_{p∈P(i)} exp S_ip / Σ_{a≠i} exp S_ia )                       (eq. 3)

and variants. SimCLR (eq. 1) is L_out with the image's index as its label; the N-pairs form has one view, one
positive and τ = 1. This module owns the formulas and the numbers that tell whether a batch can teach
anything. Tiles are in `training.pairwise`, who is a positive of whom in `training.positives`.
"""

import math
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from torch.utils.checkpoint import checkpoint

from training.batch_checks import check_batch
from training.distributed import gather_live, gather_rows
from training.pairwise import others_logsumexp
from training.positives import CappedPositives, Positives, SummablePositives, summable_positives

__all__ = ["BatchDiagnostics", "Denominator", "Summation", "SupConLoss", "batch_diagnostics"]

# Pairs of one row block; a block's autograd graph holds about ten arrays of this many numbers.
_CPU_BLOCK_PAIRS = 2**20
_GPU_BLOCK_PAIRS = 2**23


class Summation(StrEnum):
    """Where the mean over positives stands: outside the logarithm (eq. 2) or inside (eq. 3)."""

    OUTSIDE = "outside"
    INSIDE = "inside"


class Denominator(StrEnum):
    """What a positive is compared with: all other rows, itself and the negatives, or the negatives alone."""

    ALL = "all"
    ONE_POSITIVE = "one_positive"
    ONLY_NEGATIVES = "only_negatives"


class SupConLoss(nn.Module):
    """Supervised contrastive loss of a batch: eqs. 2 and 3 of arXiv 2004.11362 and the authors' variants.

    With w_ia the weight of a as a positive of i (1 or 0 for integer labels), v_ia its weight as a negative,
    W_i = Σ_a w_ia and D_i(p) the denominator,

        outside:  L_i = -1/W_i Σ_p w_ip log( exp S_ip / D_i(p) )
        inside:   L_i = -log( 1/W_i Σ_p w_ip exp S_ip / D_i(p) )  <= outside, by Jensen's inequality

        all:             D_i(p) = Σ_{a≠i} (w_ia + v_ia) exp S_ia     (w + v is 1 unless positives are capped)
        one_positive:    D_i(p) = exp S_ip + Σ_a v_ia exp S_ia
        only_negatives:  D_i(p) = Σ_a v_ia exp S_ia

    The loss is the mean of L_i over the anchors that have a positive (and, for only_negatives, a negative), by
    the anchors' own weights where they have any. The others leave the mean but stay in the denominators; without
    any such anchor the loss is 0 and its gradient 0.

    Labels are integers (n,), or floating-point class probabilities (n, C) as mixup and label smoothing give
    them: then w_ia = Σ_c Y_ic Y_ac and v = 1 - w, and one-hot rows give what their integers give.

    Outside with all and no cap is the fast path. The positives' similarities add up to a class sum,

        L_i = logsumexp_{a≠i} S_ia - z_i·(Σ_c Y_ic C_c - |Y_i|² z_i)/(τ W_i),    C = Yᵀ z,

    so that labels never meet the n x n similarities, which `others_logsumexp` forms tile by tile. Peak memory
    above the inputs: about ten arrays (n, d) and two tiles, and (n, C) where labels are probabilities.
    All other variants go over row blocks of about a million pairs, which the backward pass computes again:
    about ten blocks at the peak, and about the time of the masked textbook form.

    Logits are float32, or float64 for float64 input, whatever autocast says; on a GPU their product obeys
    `torch.set_float32_matmul_precision`. Self-similarity is masked before any maximum is taken, so that low
    temperatures give no NaN.

    Args:
        temperature: τ > 0; logits are similarities divided by it.
        summation: "outside" (eq. 2) or "inside" (eq. 3).
        denominator: "all", "one_positive" or "only_negatives".
        positives_cap: at most so many positives per anchor. The other views of its own image count and are
            always kept, so that two views give the paper's 1, 3, 5, … (table 5). The rest of the anchor's
            class leaves the denominator too.
        scale_by_temperature: multiply the loss by τ, as the authors' TPU code does. It changes the effective
            learning rate (tenfold at τ = 0.1) and nothing else.
        validate: check values too, at the price of one wait for the device; shapes are always checked.
        across_ranks: the batch is that of all ranks of torch.distributed, each of which brings equally many rows
            and the same keys. Each gets the loss of the whole batch, and for its own rows its gradient times the
            number of ranks, so that DistributedDataParallel's average is what one process would have. Embeddings,
            labels, weights and L are exchanged in the forward pass, nothing in the backward pass. The fast path
            shares the pairs out; all other variants are computed whole by every rank.
    """

    def __init__(
        self,
        *,
        temperature: float = 0.1,
        summation: Summation | str = Summation.OUTSIDE,
        denominator: Denominator | str = Denominator.ALL,
        positives_cap: int | None = None,
        scale_by_temperature: bool = False,
        validate: bool = True,
        across_ranks: bool = False,
    ) -> None:
        super().__init__()
        if not (math.isfinite(temperature) and temperature > 0):
            raise ValueError(f"temperature must be positive and finite, not {temperature}")
        if positives_cap is not None and positives_cap < 1:
            raise ValueError(f"positives_cap must be at least 1, or None for no cap, not {positives_cap}")
        self.temperature = temperature
        self.summation = Summation(summation)
        self.denominator = Denominator(denominator)
        self.positives_cap = positives_cap
        self.scale_by_temperature = scale_by_temperature
        self.validate = validate
        self.across_ranks = across_ranks

    def extra_repr(self) -> str:
        return (
            f"temperature={self.temperature}, summation={self.summation.value}, "
            f"denominator={self.denominator.value}, positives_cap={self.positives_cap}, "
            f"scale_by_temperature={self.scale_by_temperature}"
        )

    def forward(
        self,
        z: Tensor,
        labels: Tensor,
        *,
        n_views: int | None = None,
        keys: Tensor | None = None,
        key_labels: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Tensor:
        """Returns the loss, a scalar of float32, or float64 for float64 z.

        Args:
            z: (n, d) embeddings of any floating-point type and any length but zero; normalised here.
            labels: (n,) int64, or (n, C) class probabilities. Further views are further rows.
            n_views: the rows are n_views stacked blocks of the same images in the same order. Only
                positives_cap needs it: nothing else tells views from other images of the class.
            keys: (k, d) further columns, such as a momentum encoder's queue. They are normalised, get no
                gradient and are anchors to nothing.
            key_labels: (k,) or (k, C), of the same kind as labels.
            weights: (n,) floating-point, not negative: of each anchor in the mean, Σ_i weight_i L_i / Σ_i weight_i;
                such as the inverse frequency of its class.

        Raises:
            ValueError: shapes, types or (with validate) values are wrong; the message names them.
        """
        with torch.autocast(z.device.type, enabled=False):
            check_batch(
                z,
                labels,
                keys=keys,
                key_labels=key_labels,
                weights=weights,
                n_views=n_views,
                positives_cap=self.positives_cap,
                values=self.validate,
            )
            n = z.shape[0]
            z = _normalise(z)
            weights = z.new_ones(n) if weights is None else weights.to(z.dtype)
            if self.across_ranks:
                z, labels, weights = gather_live(z), gather_rows(labels), gather_rows(weights)
            if self.positives_cap is not None:
                assert n_views is not None  # check_batch
                z, labels, weights = (_view_major(rows, z.shape[0] // n, n_views) for rows in (z, labels, weights))
                capped = CappedPositives.from_labels(labels, n_views, self.positives_cap, z.dtype)
                losses, counts = self._blockwise(z, z, capped)
            else:
                columns = z if keys is None else torch.cat([z, _normalise(keys.detach()).to(z.dtype)])
                positives = summable_positives(labels, key_labels, z.dtype)
                fast = self.summation is Summation.OUTSIDE and self.denominator is Denominator.ALL
                losses, counts = (self._class_sums if fast else self._blockwise)(z, columns, positives)
            weights = weights.where(counts, 0)
            # Nothing over nothing is 0 and not NaN.
            loss = (losses.where(counts, 0) * weights).sum() / weights.sum().clamp_min(torch.finfo(z.dtype).tiny)
            return loss * self.temperature if self.scale_by_temperature else loss

    def _class_sums(self, z: Tensor, columns: Tensor, positives: SummablePositives) -> tuple[Tensor, Tensor]:
        """L_i (n,) and which of them count, by the class docstring's fast path."""
        lse = others_logsumexp(z, temperature=self.temperature, columns=columns, across_ranks=self.across_ranks)
        weight = positives.weight
        counts = weight > 0
        mean_positive = (z * positives.weighted_sum(columns)).sum(1) / (self.temperature * weight.where(counts, 1))
        return lse - mean_positive, counts

    def _blockwise(self, z: Tensor, columns: Tensor, positives: Positives) -> tuple[Tensor, Tensor]:
        """L_i (n,) and which of them count, by blocks of pairs."""
        pairs = _CPU_BLOCK_PAIRS if z.device.type == "cpu" else _GPU_BLOCK_PAIRS
        rows = max(1, pairs // columns.shape[0])
        weight = positives.weight
        counts = weight > 0
        if self.denominator is Denominator.ONLY_NEGATIVES:
            counts = counts & (positives.negative_weight > 0)
        weight = weight.where(counts, 1)
        # One split, not many slices: the gradient of a slice is an (n, d) array of its own.
        losses = [
            checkpoint(
                self._block,
                anchors,
                columns,
                slice(start, start + anchors.shape[0]),
                weight,
                positives,
                use_reentrant=False,
                preserve_rng_state=False,
            )
            for start, anchors in zip(range(0, z.shape[0], rows), torch.split(z, rows), strict=True)
        ]
        return torch.cat(losses), counts

    def _block(self, z: Tensor, columns: Tensor, anchors: slice, weight: Tensor, positives: Positives) -> Tensor:
        """L_i of some anchors (b,), by the class docstring's formulas over arrays (b, n + k)."""
        logits = z @ columns.T / self.temperature
        w, v = positives.block(anchors)
        compared = w + v if self.denominator is Denominator.ALL else v
        log_ratio = logits - (logits + _log(compared)).logsumexp(1, keepdim=True)
        if self.denominator is Denominator.ONE_POSITIVE:
            log_ratio = logsigmoid(log_ratio)  # exp S_ip / (exp S_ip + Σ) from exp S_ip / Σ
        if self.summation is Summation.OUTSIDE:
            return -(w * log_ratio).sum(1) / weight[anchors]
        return weight[anchors].log() - (log_ratio + _log(w)).logsumexp(1)


@dataclass(frozen=True)
class BatchDiagnostics:
    """Whether a batch can teach and how its embeddings spread; scalars on the batch's device."""

    share_without_positives: Tensor  # of the anchors: those that the loss leaves out of its mean
    mean_positives: Tensor  # per anchor; with class probabilities their weight
    alignment: Tensor  # 0 where every class is one point; NaN without a positive pair
    uniformity: Tensor  # 0 at collapse, about -4 where the rows are spread evenly; NaN for a single row


@torch.no_grad()
def batch_diagnostics(
    z: Tensor, labels: Tensor, *, keys: Tensor | None = None, key_labels: Tensor | None = None
) -> BatchDiagnostics:
    """Measures a batch as `SupConLoss` sees it; keys count as positives, uniformity is of z's rows alone.

    With squared distances ‖z_i - z_a‖² = 2 - 2 z_i·z_a on the unit sphere (arXiv 2005.10242),

        alignment  = mean over positive pairs of ‖z_i - z_a‖² = 2 - 2 Σ_i z_i·(Σ_a w_ia z_a) / Σ_i W_i
        uniformity = log mean_{i≠a} exp(-2 ‖z_i - z_a‖²) = -4 + log Σ_{i≠a} exp(4 z_i·z_a) - log n(n - 1),

    the one by class sums, the other by the loss's own tiles at τ = 1/4. Peak memory: about four arrays (n, d)
    and a tile; about a third of the loss's time, and no wait for the device.
    """
    check_batch(z, labels, keys=keys, key_labels=key_labels, values=False)
    with torch.autocast(z.device.type, enabled=False):
        z = _normalise(z)
        columns = z if keys is None else torch.cat([z, _normalise(keys).to(z.dtype)])
        positives = summable_positives(labels, key_labels, z.dtype)
        weight = positives.weight
        n = z.shape[0]
        pairs = n * (n - 1) if n > 1 else math.nan
        return BatchDiagnostics(
            share_without_positives=(weight <= 0).to(z.dtype).mean(),
            mean_positives=weight.mean(),
            alignment=2 - 2 * (z * positives.weighted_sum(columns)).sum() / weight.sum(),
            uniformity=others_logsumexp(z, temperature=0.25).logsumexp(0) - 4 - math.log(pairs),
        )


def _normalise(z: Tensor) -> Tensor:
    z = z if z.dtype == torch.float64 else z.float()
    # Without validation a zero row stays zero instead of poisoning the whole batch with NaN.
    return z / torch.linalg.vector_norm(z, dim=1, keepdim=True).clamp_min(torch.finfo(z.dtype).tiny)


def _log(weights: Tensor) -> Tensor:
    """log w, finite at w = 0: a row without any weight must give a zero gradient rather than NaN."""
    return weights.log().clamp_min(torch.finfo(weights.dtype).min / 4)


def _view_major(rows: Tensor, n_ranks: int, n_views: int) -> Tensor:
    """Rows (n_ranks · n_views · b, …) with the first views of all ranks' images before all second ones, and so on."""
    return rows.unflatten(0, (n_ranks, n_views, -1)).transpose(0, 1).flatten(0, 2)
