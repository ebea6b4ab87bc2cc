"""Batches of an epoch: every image's turn, and classes' shares."""

import pytest
import torch
from torch import Generator

from training.sampling import epoch_batches

LABELS = torch.tensor([0] * 50 + [1] * 25 + [2] * 5)


def batches(seed=0, **options):
    return epoch_batches(LABELS, 16, Generator().manual_seed(seed), **options)


def test_each_image_comes_once_and_no_batch_is_ragged():
    rows = batches()
    assert rows.shape == (5, 16)
    assert sorted(rows.flatten().tolist()) == list(range(80))
    assert not torch.equal(rows, batches(seed=1))


def test_what_does_not_fill_a_batch_waits_for_another_epoch():
    rows = epoch_batches(LABELS, 30, Generator().manual_seed(0))
    assert rows.shape == (2, 30)
    assert len(rows.unique()) == 60


def test_balanced_classes_come_equally_often_and_repeat_their_images_evenly():
    rows = batches(balanced=True)
    assert rows.shape == (5, 16)
    shares = torch.bincount(LABELS[rows.flatten()])
    assert shares.max() - shares.min() <= 2  # 80 images of three classes
    small = torch.bincount(rows[LABELS[rows] == 2])[75:]
    assert small.max() - small.min() <= 1


@pytest.mark.parametrize("balanced", [True, False])
def test_a_batch_holds_the_images_asked_for_of_each_of_its_classes(balanced):
    for batch in batches(images_per_class=4, balanced=balanced):
        counts = torch.bincount(LABELS[batch])
        assert (counts % 4 == 0).all()


def test_the_generator_decides_the_order():
    assert torch.equal(batches(balanced=True), batches(balanced=True))
    assert torch.equal(batches(images_per_class=2), batches(images_per_class=2))
