"""What the loss is told about each image: its label, or class probabilities, and its weight.

Knows labels and views; knows no encoder and no loss.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from training.sections import TargetSection

__all__ = ["Targets", "balanced_weights"]


def balanced_weights(labels: Tensor, n_classes: int) -> Tensor:
    """Weights (n_classes,) inverse to class sizes, 1 on average over the images: w_c = n / (C·n_c)."""
    counts = torch.bincount(labels, minlength=n_classes)
    return len(labels) / ((counts > 0).sum() * counts.clamp(min=1))


class Targets(NamedTuple):
    """How views and labels of a batch become what the loss sees.

    Attributes:
        config: mixing, smoothing and weighing.
        class_weights: float (C,), or None where all anchors weigh the same.
        n_classes: C.
    """

    config: TargetSection
    class_weights: Tensor | None
    n_classes: int

    def __call__(
        self, views: Tensor, labels: Tensor, n_views: int, rng: np.random.Generator
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Views (n_views·b, …), their targets and their weights (n_views·b,) or None.

        Targets are the labels (b,) repeated, or with mixup or label smoothing class probabilities (n_views·b, C). An
        image is mixed with the same other one, by the same share, in all its views.
        """
        config = self.config
        if not config.soft:
            weights = None if self.class_weights is None else self.class_weights[labels]
            return views, labels.repeat(n_views), _repeat(weights, n_views)
        targets = F.one_hot(labels, self.n_classes).to(views.dtype)
        if config.label_smoothing:
            targets = targets * (1 - config.label_smoothing) + config.label_smoothing / self.n_classes
        if config.mixup:
            drawn = rng.beta(config.mixup, config.mixup, size=len(labels))
            partner = torch.from_numpy(rng.permutation(len(labels))).to(views.device, non_blocking=True)
            kept = torch.from_numpy(drawn).to(views.dtype).to(views.device, non_blocking=True)
            targets = torch.lerp(targets[partner], targets, kept[:, None])
            by_view = views.view(n_views, len(labels), *views.shape[1:])
            views = torch.lerp(by_view[:, partner], by_view, kept.view(1, -1, 1, 1, 1)).flatten(0, 1)
        weights = None if self.class_weights is None else targets @ self.class_weights
        return views, targets.repeat(n_views, 1), _repeat(weights, n_views)


def _repeat(weights: Tensor | None, n_views: int) -> Tensor | None:
    return None if weights is None else weights.repeat(n_views)
