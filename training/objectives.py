"""The objectives a recipe can name, in one shape: `objective(z, labels, n_views=…)` returns a scalar.

SupCon's family is `training.losses`; triplet and large-margin softmax are pytorch-metric-learning's,
cross-entropy is torch's. This module says what each wants (embedding or projection, how many views, which
labels), holds the classifier of those that learn one, and knows no encoder.
"""

import inspect
from abc import ABC, abstractmethod
from enum import StrEnum
from typing import ClassVar

import torch
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.losses import LargeMarginSoftmaxLoss, TripletMarginLoss
from pytorch_metric_learning.miners import BatchEasyHardMiner
from torch import Tensor, nn
from torch.nn import functional as F

from training.batch_checks import check_batch
from training.distributed import gather_live, gather_rows, rank
from training.losses import SupConLoss

__all__ = ["Objective", "ObjectiveModule", "build_objective"]


class Objective(StrEnum):
    """Names of the objectives, as recipes spell them."""

    SUPCON = "supcon"
    SIMCLR = "simclr"
    N_PAIRS = "n_pairs"
    TRIPLET = "triplet"
    MAX_MARGIN = "max_margin"
    CROSS_ENTROPY = "cross_entropy"


class ObjectiveModule(nn.Module, ABC):
    """A loss and what a trainer must know to feed it.

    Called with z (n, d), labels (n,) int64 and n_views: the rows are n_views stacked blocks of the same
    images in the same order. Returns a scalar of at least float32 precision. Objectives with a classifier
    have parameters, which belong to an optimiser beside the encoder's.

    A trainer may set two switches of the instance:

        validate: SupCon's family checks values, too, at the price of one wait for the device.
        across_ranks: z is one rank's part of a batch; all parts are of one size. The mean of the ranks' losses is then
            the loss of the whole batch, and the mean of their gradients, as DistributedDataParallel takes it, its
            gradient.
    """

    validate: bool = True
    across_ranks: bool = False

    uses_projection: ClassVar[bool] = True  # z is the projection head's output, else the encoder's before it
    min_views: ClassVar[int] = 1
    max_views: ClassVar[int | None] = None
    soft_labels: ClassVar[bool] = False  # class probabilities (n, C) may stand for labels
    takes_keys: ClassVar[bool] = False  # a labelled queue may be given as keys and key_labels
    takes_weights: ClassVar[bool] = False  # anchors may be given weights (n,), by which their losses are averaged

    @property
    def uses_embedding(self) -> bool:
        """Whether z is the encoder's own output; such an objective needs no projection head."""
        return not self.uses_projection

    @abstractmethod
    def forward(self, z: Tensor, labels: Tensor, *, n_views: int) -> Tensor: ...

    def _check(self, z: Tensor, labels: Tensor, n_views: int, weights: Tensor | None = None) -> None:
        check_batch(z, labels, weights=weights, n_views=n_views, values=False)
        if n_views < self.min_views or (self.max_views is not None and n_views > self.max_views):
            wanted = f"at least {self.min_views}" if self.max_views is None else f"{self.max_views}"
            raise ValueError(f"{type(self).__name__} needs {wanted} view(s) of each image, not {n_views}")
        if labels.is_floating_point() and not self.soft_labels:
            raise ValueError(
                f"{type(self).__name__} needs integer labels, not class probabilities {tuple(labels.shape)}"
            )


class SupCon(SupConLoss, ObjectiveModule):
    """Supervised contrastive: `SupConLoss` with all its options, eqs. 2 and 3 of arXiv 2004.11362."""

    soft_labels = True
    takes_keys = True
    takes_weights = True


class SimCLR(SupConLoss, ObjectiveModule):
    """Self-supervised contrastive: eq. 1 of arXiv 2004.11362, L_out with the image's index as its label.

    The labels are ignored. The paper's CIFAR runs use τ = 0.5, its ImageNet runs 0.1.
    """

    min_views = 2
    soft_labels = True

    def __init__(self, *, temperature: float = 0.5, scale_by_temperature: bool = False) -> None:
        super().__init__(temperature=temperature, scale_by_temperature=scale_by_temperature)

    def forward(self, z: Tensor, labels: Tensor, *, n_views: int) -> Tensor:
        self._check(z, labels, n_views)
        images = torch.arange(z.shape[0] // n_views, device=z.device)
        if self.across_ranks:
            images += rank() * len(images)
        return super().forward(z, images.repeat(n_views), n_views=n_views)


class NPairs(SupConLoss, ObjectiveModule):
    """N-pairs as a form of L_out (arXiv 2004.11362, supplement): τ = 1, one view, one positive.

    The positive is another image of the class; the rest of the class is ignored.
    """

    max_views = 1

    def __init__(self, *, temperature: float = 1.0) -> None:
        super().__init__(temperature=temperature, positives_cap=1)

    def forward(self, z: Tensor, labels: Tensor, *, n_views: int) -> Tensor:
        self._check(z, labels, n_views)
        return super().forward(z, labels, n_views=n_views)


class Triplet(ObjectiveModule):
    """Triplet margin loss on unit vectors, one mined positive and negative for each anchor.

        L = max(0, z_a·z_n - z_a·z_p + margin), averaged over the triplets that violate it

    On the unit sphere this is half the loss of squared distances with margin 2·margin; the contrastive loss
    with one positive and one negative tends to the latter with margin 2τ (arXiv 2004.11362, its supplement),
    so that the default 0.1 corresponds to τ = 0.1. Mining is pytorch-metric-learning's BatchEasyHardMiner: by
    default the nearest positive and the nearest negative beyond it, which unlike the hardest pairs does not
    collapse from random weights. Peak memory: several arrays (n, n).
    """

    def __init__(
        self, *, margin: float = 0.1, positive_mining: str = "easy", negative_mining: str = "semihard"
    ) -> None:
        super().__init__()
        if margin <= 0:
            raise ValueError(f"margin must be positive, not {margin}")
        self.miner = BatchEasyHardMiner(
            pos_strategy=positive_mining, neg_strategy=negative_mining, distance=CosineSimilarity()
        )
        self.loss = TripletMarginLoss(margin=margin, distance=CosineSimilarity())

    def forward(self, z: Tensor, labels: Tensor, *, n_views: int) -> Tensor:
        self._check(z, labels, n_views)
        with torch.autocast(z.device.type, enabled=False):
            z = _at_least_float32(z)
            if self.across_ranks:
                z, labels = gather_live(z), gather_rows(labels)
            loss: Tensor = self.loss(z, labels, self.miner(z, labels))
        return loss


class MaxMargin(ObjectiveModule):
    """Large-margin softmax, the max-margin row of the paper's table 2 (arXiv 1612.02295, eqs. 6 and 7).

        L = -log softmax(‖W_c‖ ‖x‖ cos θ_c)_y, where (λ cos θ_y + ψ(θ_y)) / (1 + λ) stands for cos θ_y,
        ψ(θ) = (-1)^k cos(m θ) - 2k, and k is the integer with θ in [k π/m, (k + 1) π/m]

    Acts on the encoder's output; the length of z matters. m = 1 is softmax without bias. From random weights the margin
    alone does not begin to learn: λ anneals it (section 5.1 there), λ = max(lambda_min, lambda_start / (1 + 0.12 t)) at
    step t, with the constants that the authors' later code uses (arXiv 1704.08063).
    """

    uses_projection = False
    steps: Tensor

    def __init__(
        self,
        *,
        n_classes: int,
        embedding_dim: int,
        margin: int = 4,
        scale: float = 1.0,
        lambda_start: float = 1000.0,
        lambda_min: float = 5.0,
    ) -> None:
        super().__init__()
        if margin < 1 or margin != int(margin):
            raise ValueError(f"margin must be a positive integer, not {margin}")
        if min(lambda_start, lambda_min) < 0:
            raise ValueError(f"lambda_start and lambda_min must not be negative: {lambda_start}, {lambda_min}")
        self.loss = _AnnealedMargin(n_classes, embedding_dim, margin=margin, scale=scale)
        self.lambda_start, self.lambda_min = lambda_start, lambda_min
        self.register_buffer("steps", torch.zeros(()))  # of training, which a checkpoint keeps

    def forward(self, z: Tensor, labels: Tensor, *, n_views: int) -> Tensor:
        self._check(z, labels, n_views)
        self.loss.plain = (self.lambda_start / (1 + 0.12 * self.steps)).clamp_min(self.lambda_min)
        if self.training:
            self.steps += 1
        with torch.autocast(z.device.type, enabled=False):
            loss: Tensor = self.loss(_at_least_float32(z), labels)
        return loss


class _AnnealedMargin(LargeMarginSoftmaxLoss):  # type: ignore[misc]
    """pytorch-metric-learning's loss with a share of the plain cosine, weighted by `plain` to 1, in place of ψ."""

    plain: Tensor

    def modify_cosine_of_target_classes(self, cosines: Tensor) -> Tensor:
        with_margin: Tensor = super().modify_cosine_of_target_classes(cosines)
        return (self.plain * cosines + with_margin) / (1 + self.plain)


class CrossEntropy(ObjectiveModule):
    """Softmax cross-entropy of a linear classifier on the encoder's output: the baseline of every table.

    L_i = -Σ_c Y_ic log softmax(W x_i + b)_c, averaged over rows, by their weights where they have any
    """

    uses_projection = False
    soft_labels = True
    takes_weights = True

    def __init__(self, *, n_classes: int, embedding_dim: int) -> None:
        super().__init__()
        self.classifier = nn.Linear(embedding_dim, n_classes)

    def forward(self, z: Tensor, labels: Tensor, *, n_views: int, weights: Tensor | None = None) -> Tensor:
        self._check(z, labels, n_views, weights)
        with torch.autocast(z.device.type, enabled=False):
            z = _at_least_float32(z)
            targets = labels.to(z.dtype) if labels.is_floating_point() else labels
            logits = F.linear(z, self.classifier.weight.to(z.dtype), self.classifier.bias.to(z.dtype))
            if weights is None:
                return F.cross_entropy(logits, targets)
            weights = weights.to(z.dtype)
            total = weights.sum()
            if self.across_ranks:
                total = gather_rows(total[None]).mean()  # a rank's share of the whole batch's
            losses = F.cross_entropy(logits, targets, reduction="none")
            return (weights * losses).sum() / total.clamp_min(torch.finfo(z.dtype).tiny)


_SWITCHES = ("validate", "across_ranks")  # the trainer's, not a recipe's

_MODULES: dict[Objective, type[ObjectiveModule]] = {
    Objective.SUPCON: SupCon,
    Objective.SIMCLR: SimCLR,
    Objective.N_PAIRS: NPairs,
    Objective.TRIPLET: Triplet,
    Objective.MAX_MARGIN: MaxMargin,
    Objective.CROSS_ENTROPY: CrossEntropy,
}


def build_objective(
    objective: Objective | str,
    *,
    n_classes: int | None = None,
    embedding_dim: int | None = None,
    **options: object,
) -> ObjectiveModule:
    """Builds an objective from its name and its options, which are its class's keyword arguments.

    n_classes and embedding_dim may always be given; only objectives with a classifier use them.

    Raises:
        ValueError: unknown name, an option that this objective has not, or one it lacks.
    """
    try:
        module = _MODULES[Objective(objective)]
    except ValueError:
        raise ValueError(f"unknown objective {objective!r}: choose one of {', '.join(Objective)}") from None
    parameters = inspect.signature(module).parameters
    sizes = {"n_classes": n_classes, "embedding_dim": embedding_dim}
    missing = [name for name, value in sizes.items() if name in parameters and value is None]
    if missing:
        raise ValueError(f"{objective} learns a classifier: give {' and '.join(missing)}")
    known = [name for name in parameters if name not in {*sizes, *_SWITCHES}]
    unknown = [name for name in options if name not in known]
    if unknown:
        raise ValueError(
            f"{objective} has no option {', '.join(unknown)}: its options are {', '.join(known) or 'none'}"
        )
    return module(**options, **{name: value for name, value in sizes.items() if name in parameters})


def _at_least_float32(z: Tensor) -> Tensor:
    return z if z.dtype == torch.float64 else z.float()
