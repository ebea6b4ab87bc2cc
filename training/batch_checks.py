"""The checks of a loss's inputs: every message names the value that is wrong and what to do about it."""

import math

import torch
from torch import Tensor

__all__ = ["check_batch"]


def check_batch(
    z: Tensor,
    labels: Tensor,
    *,
    keys: Tensor | None = None,
    key_labels: Tensor | None = None,
    weights: Tensor | None = None,
    n_views: int | None = None,
    positives_cap: int | None = None,
    values: bool = True,
) -> None:
    """Raises ValueError unless a contrastive loss is defined for these inputs (see `SupConLoss.forward`).

    Shapes and types cost nothing. Values, which `values=False` leaves out, cost one wait for the device.
    """
    _check_shapes(z, labels, keys, key_labels, weights)
    _check_views(z, labels, keys, n_views, positives_cap)
    if values:
        _check_values(z, labels, keys, key_labels, weights, n_views)


def _check_shapes(
    z: Tensor, labels: Tensor, keys: Tensor | None, key_labels: Tensor | None, weights: Tensor | None
) -> None:
    if z.ndim != 2 or 0 in z.shape or not z.is_floating_point():
        raise ValueError(f"z must be a floating-point array (n, d), not {tuple(z.shape)} of {z.dtype}")
    n, d = z.shape
    _check_labels("labels", labels, n)
    if weights is not None and (weights.shape != (n,) or not weights.is_floating_point()):
        raise ValueError(f"weights must be floating-point ({n},), not {tuple(weights.shape)} of {weights.dtype}")
    if (keys is None) != (key_labels is None):
        raise ValueError("keys and key_labels go together: give both or neither")
    if keys is not None and key_labels is not None:
        if keys.ndim != 2 or keys.shape[1] != d or not keys.is_floating_point():
            raise ValueError(f"keys must be floating-point (k, {d}) like z, not {tuple(keys.shape)} of {keys.dtype}")
        _check_labels("key_labels", key_labels, keys.shape[0])
        if key_labels.dtype.is_floating_point != labels.dtype.is_floating_point or (
            key_labels.shape[1:] != labels.shape[1:]
        ):
            raise ValueError(
                f"key_labels must be of labels' kind: {tuple(key_labels.shape)} of {key_labels.dtype} "
                f"against {tuple(labels.shape)} of {labels.dtype}"
            )


def _check_views(
    z: Tensor, labels: Tensor, keys: Tensor | None, n_views: int | None, positives_cap: int | None
) -> None:
    n = z.shape[0]
    if n_views is not None and (n_views < 1 or n % n_views):
        raise ValueError(f"n_views must divide the {n} rows of z, not {n_views}")
    if positives_cap is None:
        return
    if n_views is None:
        raise ValueError("positives_cap keeps the views of an image together: pass n_views")
    if positives_cap < n_views - 1:
        raise ValueError(f"positives_cap {positives_cap} would drop views of the anchor's image: n_views is {n_views}")
    if labels.is_floating_point():
        raise ValueError("positives_cap counts positives, which needs integer labels, not class probabilities")
    if keys is not None:
        raise ValueError("positives_cap does not go with keys: a queue does not know which image a key came from")


def _check_labels(name: str, labels: Tensor, n: int) -> None:
    if labels.is_floating_point():
        if labels.ndim != 2 or labels.shape[0] != n or labels.shape[1] == 0:
            raise ValueError(f"floating-point {name} must be class probabilities ({n}, C), not {tuple(labels.shape)}")
    elif labels.dtype != torch.int64 or labels.shape != (n,):
        raise ValueError(
            f"{name} must be int64 ({n},) or class probabilities ({n}, C), not {tuple(labels.shape)} of {labels.dtype}"
        )


def _check_values(
    z: Tensor,
    labels: Tensor,
    keys: Tensor | None,
    key_labels: Tensor | None,
    weights: Tensor | None,
    n_views: int | None,
) -> None:
    """Lengths of rows, probabilities, weights and the order of views, read from the device in one go."""
    faults = {"z": (z, _bad_rows(z)), "labels": (labels, _bad_labels(labels, n_views))}
    if keys is not None and key_labels is not None:
        faults |= {"keys": (keys, _bad_rows(keys)), "key_labels": (key_labels, _bad_labels(key_labels, None))}
    if weights is not None:
        faults |= {"weights": (weights, ~((weights >= 0) & (weights < math.inf)))}
    if not bool(torch.stack([bad.any() for _, bad in faults.values()]).any()):
        return
    for name, (values, bad) in faults.items():
        if not bool(bad.any()):
            continue
        row = int(bad.nonzero()[0])
        if name == "weights":
            raise ValueError(f"row {row} of weights is {float(values[row]):g}: weights are finite and at least 0")
        if name in ("z", "keys"):
            length = float(torch.linalg.vector_norm(values[row].detach().double()))
            raise ValueError(
                f"row {row} of {name} has length {length:g} ({int(bad.sum())} such rows of {len(values)}): "
                "an embedding must be finite and longer than zero to be normalised"
            )
        if values.is_floating_point():
            raise ValueError(
                f"row {row} of {name} is {values[row].tolist()[:8]} with sum {float(values[row].sum()):g}: "
                "class probabilities lie in [0, 1] and sum to 1"
            )
        assert n_views is not None  # integer labels have no other fault
        image = row % (len(values) // n_views)
        raise ValueError(
            f"row {row} of labels is {int(values[row])}, yet row {image}, another view of that image, is "
            f"{int(values[image])}: stack view by view, as labels.repeat({n_views}) does"
        )


def _bad_rows(z: Tensor) -> Tensor:
    z = z.detach()
    length = torch.linalg.vector_norm(z if z.dtype == torch.float64 else z.float(), dim=1)
    return ~((length > 0) & (length < math.inf))


def _bad_labels(labels: Tensor, n_views: int | None) -> Tensor:
    if labels.is_floating_point():
        # Half-precision mixup weights sum to 1 only to about 1e-2.
        sums_to_one = (labels.detach().float().sum(1) - 1).abs() < 1e-2
        return ~(sums_to_one & (labels >= 0).all(1))
    if n_views is None:
        return torch.zeros_like(labels, dtype=torch.bool)
    by_view = labels.view(n_views, -1)
    return (by_view != by_view[0]).flatten()
