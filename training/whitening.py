"""The encoder's last step: features centred and whitened within classes.

Contrastive training pulls a class together in the projection head's space; in the features below it, directions that
separate classes and directions along which one class varies keep very different scales, and all features share a large
mean. One linear map fitted in closed form after training puts that right: x ↦ L(x − μ), where μ is the mean feature and
LᵀL the inverse of the shrunken within-class covariance (Fisher's discriminant metric). Cosines of the result tell
classes apart, and unknown images from known ones, far better than those of the raw features.
"""

import torch
from torch import Tensor

__all__ = ["fit_whitening"]


def fit_whitening(features: Tensor, labels: Tensor, *, shrinkage: float) -> tuple[Tensor, Tensor]:
    """Mean and whitening matrix of features within their classes.

    Args:
        features: float (n, d).
        labels: int64 (n,).
        shrinkage: weight of the identity against the covariance scaled to a mean variance of 1; 0 < shrinkage ≤ 1.

    Returns:
        μ float32 (d,) and L float32 (d, d), to be applied as (x − μ) @ Lᵀ.
    """
    features = features.double()
    classes = int(labels.max()) + 1
    sums = features.new_zeros(classes, features.shape[1]).index_add_(0, labels, features)
    counts = torch.bincount(labels, minlength=classes).clamp(min=1)
    centred = features - (sums / counts[:, None])[labels]
    covariance = centred.T @ centred / len(features)
    scale = covariance.diagonal().mean().clamp(min=1e-12)
    identity = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    shrunken = (1 - shrinkage) * covariance / scale + shrinkage * identity
    # L = C⁻¹ for the Cholesky factor C of the covariance, so that LᵀL is its inverse.
    factor = torch.linalg.cholesky(shrunken)
    whitener = torch.linalg.solve_triangular(factor, identity, upper=False)
    return features.mean(0).float(), whitener.float()
