"""Whitening: the identity it promises, and what shrinkage does to singular covariances."""

import torch
from torch import Generator

from training.whitening import fit_whitening


def clouds(n=400, d=6, classes=4):
    generator = Generator().manual_seed(0)
    labels = torch.arange(n) % classes
    spread = torch.randn(d, d, generator=generator)
    centres = torch.randn(classes, d, generator=generator) * 5
    return centres[labels] + torch.randn(n, d, generator=generator) @ spread + 3, labels


def within(features, labels):
    centred = torch.cat([features[labels == c] - features[labels == c].mean(0) for c in labels.unique()])
    return centred.T @ centred / len(features)


def test_the_within_class_covariance_becomes_a_multiple_of_the_identity():
    features, labels = clouds()
    centre, whitener = fit_whitening(features, labels, shrinkage=1e-6)
    covariance = within((features - centre) @ whitener.T, labels)
    scale = covariance.diagonal().mean()
    torch.testing.assert_close(covariance / scale, torch.eye(6), atol=2e-3, rtol=0)


def test_the_mean_becomes_zero():
    features, labels = clouds()
    centre, whitener = fit_whitening(features, labels, shrinkage=0.1)
    torch.testing.assert_close(((features - centre) @ whitener.T).mean(0), torch.zeros(6), atol=1e-4, rtol=0)


def test_full_shrinkage_leaves_the_directions_alone():
    features, labels = clouds()
    _, whitener = fit_whitening(features, labels, shrinkage=1.0)
    torch.testing.assert_close(whitener, torch.eye(6))


def test_dead_features_and_fewer_images_than_dimensions_are_no_trouble():
    features, labels = clouds(n=5, d=32, classes=2)
    features[:, 0] = 0
    _, whitener = fit_whitening(features, labels, shrinkage=0.1)
    assert torch.isfinite(whitener).all()
