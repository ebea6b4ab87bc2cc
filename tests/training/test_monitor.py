"""What is measured after an epoch."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from torch.nn import functional as F

from training.monitor import centre, knn_top1, linear_top1, measure


@pytest.fixture
def features():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(300) % 3
    centres = torch.randn(3, 8, generator=generator) * 1.2
    return centres[labels] + torch.randn(300, 8, generator=generator) + 5, labels


def test_the_linear_probe_is_ridge_regression_on_one_hot_labels(features):
    x, labels = features
    gallery, queries = slice(0, 200), slice(200, 300)
    variance = x[gallery].double().var(0, correction=0).mean().item()
    oracle = Ridge(alpha=1e-3 * variance * 200)
    oracle.fit(x[gallery].double().numpy(), np.eye(3)[labels[gallery]])
    predicted = oracle.predict(x[queries].double().numpy()).argmax(1)
    expected = (predicted == labels[queries].numpy()).mean()
    assert 0.5 < expected < 1
    assert linear_top1(x[gallery], labels[gallery], x[queries], labels[queries], 3) == pytest.approx(expected)


def test_the_linear_probe_survives_features_that_do_not_vary():
    constant = torch.ones(10, 4)
    labels = torch.tensor([0] * 7 + [1] * 3)
    assert linear_top1(constant, labels, constant, labels, 2) == pytest.approx(0.7)


def test_neighbours_vote_with_weights_and_few_images_suffice():
    gallery = F.normalize(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.1, 1.0]]))
    labels = torch.tensor([0, 1, 1])
    queries = F.normalize(torch.tensor([[1.0, 0.1], [0.0, 1.0]]))
    assert knn_top1(gallery, labels, queries, torch.tensor([0, 1])) == 1.0
    assert knn_top1(gallery, labels, queries, torch.tensor([1, 1])) == 0.5


def test_everything_is_measured_at_once(features):
    x, labels = features
    measured = measure(x[:200], labels[:200], x[200:], labels[200:], 3)
    assert set(measured) == {"knn_top1", "linear_top1", "alignment", "uniformity"}
    assert measured["linear_top1"] > 0.5


def test_larger_images_are_shrunk_as_a_whole():
    images = torch.zeros(2, 8, 8, 3, dtype=torch.uint8)
    images[:, :, 4:] = 200
    small = centre(images, (4, 4))
    assert small.shape == (2, 4, 4, 3)
    assert small.dtype == torch.uint8
    assert small[0, 0, 0, 0] == 0
    assert small[0, 0, -1, 0] == 200
    assert centre(images, (8, 8)) is images
