"""Labels, mixed, smoothed and weighed."""

import numpy as np
import pytest
import torch

from training.sections import TargetSection
from training.targets import Targets, balanced_weights

LABELS = torch.tensor([0, 2, 1])
VIEWS = torch.arange(2 * 3 * 3 * 4 * 4, dtype=torch.float32).view(6, 3, 4, 4)


def apply(class_weights=None, seed=0, **settings):
    targets = Targets(TargetSection(**settings), class_weights, 3)
    return targets(VIEWS, LABELS, 2, np.random.default_rng(seed))


def test_plain_labels_are_repeated_for_each_view():
    views, targets, weights = apply()
    assert views is VIEWS
    assert targets.tolist() == [0, 2, 1, 0, 2, 1]
    assert weights is None


def test_smoothing_spreads_a_share_over_all_classes():
    _, targets, _ = apply(label_smoothing=0.3)
    assert targets[1].tolist() == pytest.approx([0.1, 0.1, 0.8])
    assert torch.equal(targets[:3], targets[3:])


def test_mixup_mixes_views_and_labels_by_the_same_share_in_every_view():
    views, targets, _ = apply(mixup=1.0)
    torch.testing.assert_close(targets.sum(1), torch.ones(6))
    assert torch.equal(targets[:3], targets[3:])
    for view in (0, 3):
        for image in range(3):
            kept = targets[image, LABELS[image]]
            # The labels are all different, so that the rest of the target tells the partner.
            partner = LABELS.tolist().index(int((targets[image] * (1 - torch.eye(3)[LABELS[image]])).argmax()))
            mixed = kept * VIEWS[view + image] + (1 - kept) * VIEWS[view + partner]
            torch.testing.assert_close(views[view + image], mixed)
    assert not torch.equal(views, apply(mixup=1.0, seed=1)[0])


def test_balanced_weights_are_inverse_to_class_sizes_and_one_on_average():
    labels = torch.tensor([0] * 6 + [1] * 3 + [2])
    weights = balanced_weights(labels, 4)  # the fourth class has no image here
    assert (weights[:3] * torch.tensor([6, 3, 1])).tolist() == pytest.approx([10 / 3] * 3)
    assert weights[labels].mean() == pytest.approx(1)
    _, targets, anchors = apply(class_weights=torch.tensor([1.0, 2.0, 4.0]))
    assert anchors.tolist() == [1, 4, 2, 1, 4, 2]
    _, targets, anchors = apply(class_weights=torch.tensor([1.0, 2.0, 4.0]), mixup=0.4)
    torch.testing.assert_close(anchors, targets @ torch.tensor([1.0, 2.0, 4.0]))
