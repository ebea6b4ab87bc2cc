"""Who is a positive of whom: pair weights from labels, never held as an n x n matrix.

Anchors are the n rows of a batch; columns are those rows and, after them, the k keys of a queue. Each class
below gives totals per anchor without forming pairs, and the pairs of a block of anchors on demand. Self pairs
weigh 0.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

__all__ = [
    "CappedPositives",
    "ClassPositives",
    "Positives",
    "SoftPositives",
    "SummablePositives",
    "share_without_positives",
    "summable_positives",
]


class Positives(Protocol):
    """Weights w_ia of positives and v_ia of negatives; both lie in [0, 1]."""

    @property
    def weight(self) -> Tensor:
        """(n,) Σ_a w_ia; for integer labels the number of positives |P(i)|."""

    @property
    def negative_weight(self) -> Tensor:
        """(n,) Σ_a v_ia; for integer labels the number of negatives."""

    def block(self, anchors: slice) -> tuple[Tensor, Tensor]:
        """w and v of these anchors, (anchors, n + k) each."""


class SummablePositives(Positives, Protocol):
    """Those whose sums per anchor need no pairs."""

    def weighted_sum(self, columns: Tensor) -> Tensor:
        """(n, d) Σ_a w_ia z_a for columns (n + k, d), by class sums: O((n + k)·d), differentiable."""


def summable_positives(labels: Tensor, key_labels: Tensor | None, dtype: torch.dtype) -> SummablePositives:
    """The positives of n anchors by labels (n,) or class probabilities (n, C), and of k keys after them."""
    kind = SoftPositives if labels.is_floating_point() else ClassPositives
    return kind.from_labels(labels, key_labels, dtype)


@torch.no_grad()
def share_without_positives(labels: Tensor, key_labels: Tensor | None = None) -> Tensor:
    """The share of anchors that a contrastive loss leaves out of its mean, from labels alone: a float32 scalar.

    Takes labels as `SupConLoss` does; O((n + k) log(n + k)) time, or O((n + k)·C), and no wait for the device.
    """
    return (summable_positives(labels, key_labels, torch.float32).weight <= 0).float().mean()


@dataclass(frozen=True)
class ClassPositives:
    """Positives share the anchor's integer label: w is 1 for them, v is 1 for all others."""

    classes: Tensor  # (n + k,) int64 in [0, n + k), equal where labels are
    n_anchors: int
    dtype: torch.dtype

    @classmethod
    def from_labels(cls, labels: Tensor, key_labels: Tensor | None, dtype: torch.dtype) -> "ClassPositives":
        columns = labels if key_labels is None else torch.cat([labels, key_labels])
        # A class is named by where it starts in sorted order. Unlike torch.unique's, this result's size is
        # known beforehand, so that a GPU need not be waited for.
        classes = torch.searchsorted(columns.sort().values, columns)
        return cls(classes, labels.shape[0], dtype)

    @property
    def weight(self) -> Tensor:
        counts = torch.zeros_like(self.classes).index_add_(0, self.classes, torch.ones_like(self.classes))
        return (counts[self.classes[: self.n_anchors]] - 1).to(self.dtype)

    @property
    def negative_weight(self) -> Tensor:
        return self.classes.shape[0] - 1 - self.weight

    def weighted_sum(self, columns: Tensor) -> Tensor:
        class_sums = columns.new_zeros(columns.shape).index_add(0, self.classes, columns)
        return class_sums[self.classes[: self.n_anchors]] - columns[: self.n_anchors]

    def block(self, anchors: slice) -> tuple[Tensor, Tensor]:
        same = self.classes[anchors, None] == self.classes[None]
        negatives = (~same).to(self.dtype)
        return _without_self(same.to(self.dtype), anchors), negatives


@dataclass(frozen=True)
class SoftPositives:
    """Positives by class probabilities Y: w_ia = Σ_c Y_ic Y_ac, v_ia = 1 - w_ia.

    w_ia is the probability that i and a, drawn from their distributions, are of one class. One-hot rows give
    exactly the weights of `ClassPositives`.
    """

    probabilities: Tensor  # (n + k, C), rows sum to 1
    n_anchors: int

    @classmethod
    def from_labels(cls, labels: Tensor, key_labels: Tensor | None, dtype: torch.dtype) -> "SoftPositives":
        columns = labels if key_labels is None else torch.cat([labels, key_labels])
        return cls(columns.detach().to(dtype), labels.shape[0])

    @property
    def weight(self) -> Tensor:
        anchors = self.probabilities[: self.n_anchors]
        # The difference comes first: it is exactly 0 for a class that only the anchor has.
        return (anchors * (self.probabilities.sum(0) - anchors)).sum(1)

    @property
    def negative_weight(self) -> Tensor:
        return self.probabilities.shape[0] - 1 - self.weight

    def weighted_sum(self, columns: Tensor) -> Tensor:
        anchors = self.probabilities[: self.n_anchors]
        class_sums = self.probabilities.T @ columns  # (C, d)
        own = (anchors * anchors).sum(1, keepdim=True)
        return anchors @ class_sums - own * columns[: self.n_anchors]

    def block(self, anchors: slice) -> tuple[Tensor, Tensor]:
        weights = self.probabilities[anchors] @ self.probabilities.T
        return _without_self(weights, anchors), _without_self((1 - weights).clamp_min_(0), anchors)


@dataclass(frozen=True)
class CappedPositives:
    """At most `cap` positives per anchor, as in table 5 of arXiv 2004.11362; more of its class are ignored.

    The other views of the anchor's own image come first, then the images of its class that follow it in the
    batch, cyclically and view by view, so that every image serves equally often. What is beyond the cap is
    neither positive nor negative: w and v are both 0.
    """

    labels: Tensor  # (n,)
    class_size: Tensor  # (n,) images of the row's class
    rank: Tensor  # (n,) place of the row's image among them
    n_views: int
    cap: int
    dtype: torch.dtype

    @classmethod
    def from_labels(cls, labels: Tensor, n_views: int, cap: int, dtype: torch.dtype) -> "CappedPositives":
        """labels: (n,), row v·(n / n_views) + b being view v of image b."""
        image_labels = labels[: labels.shape[0] // n_views]
        values, order = image_labels.sort(stable=True)
        first = torch.searchsorted(values, values)  # of its class, in sorted order
        last = torch.searchsorted(values, values, right=True)
        places = torch.arange(values.shape[0], device=labels.device)
        class_size = torch.empty_like(places).scatter_(0, order, last - first)
        rank = torch.empty_like(places).scatter_(0, order, places - first)
        return cls(labels, class_size.repeat(n_views), rank.repeat(n_views), n_views, cap, dtype)

    @property
    def weight(self) -> Tensor:
        return (self.class_size * self.n_views - 1).clamp_max(self.cap).to(self.dtype)

    @property
    def negative_weight(self) -> Tensor:
        return (self.labels.shape[0] - self.class_size * self.n_views).to(self.dtype)

    def block(self, anchors: slice) -> tuple[Tensor, Tensor]:
        n = self.labels.shape[0]
        view = torch.arange(n, device=self.labels.device) // (n // self.n_views)
        same = self.labels[anchors, None] == self.labels[None]
        images_on = (self.rank[None] - self.rank[anchors, None]) % self.class_size[anchors, None]
        views_on = (view[None] - view[anchors, None]) % self.n_views
        place = images_on * self.n_views + views_on - 1  # -1 at the anchor itself, then 0, 1, 2, …
        kept = same & (place >= 0) & (place < self.cap)
        return kept.to(self.dtype), (~same).to(self.dtype)


def _without_self(weights: Tensor, anchors: slice) -> Tensor:
    weights.diagonal(offset=anchors.start).zero_()
    return weights
