"""What tells known images from unknown ones, of the images and of all their bootstrap draws.

A draw says how often each image was drawn, so scores are sorted once and not in each draw.
"""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from coterie.metrics import auroc, average_precision, known_rejected_at_95, oscr, unknown_accepted_at_95

__all__ = ["Counts", "rejection", "rejection_draws"]

# How often known and unknown images were drawn, (d, m) and (d, n), for some of all draws.
Counts = tuple[NDArray[np.float32], NDArray[np.float32]]


def rejection(
    known: NDArray[np.float64], right: NDArray[np.bool_], unknown: NDArray[np.float64], accepted: NDArray[np.bool_]
) -> dict[str, float]:
    """The measures of coterie.metrics for the scores of m known and n unknown images, by their names in UnknownResult.

    Args:
        right: whether each known image got its own label, (m,).
        accepted: whether each unknown image got a label, (n,).
    """
    return {
        "accepted": float(accepted.mean()) if len(accepted) else float("nan"),
        "auroc": auroc(known, unknown),
        "aupr": average_precision(known, unknown),
        "aupr_unknown": average_precision(-unknown, -known),
        "oscr": oscr(known, right, unknown),
        "unknown_accepted_at_95": unknown_accepted_at_95(known, unknown),
        "known_rejected_at_95": known_rejected_at_95(known, unknown),
    }


def rejection_draws(
    known: NDArray[np.float64],
    right: NDArray[np.bool_],
    unknown: NDArray[np.float64],
    accepted: NDArray[np.bool_],
    counts: Iterable[Counts],
) -> dict[str, NDArray[np.float64]]:
    """The same of every draw, (draws,) each; NaN for a draw without known, or without unknown, images.

    >>> once = np.ones((1, 3), np.float32), np.ones((1, 2), np.float32)
    >>> known, right, unknown = np.array([0.9, 0.8, 0.4]), np.array([True, False, True]), np.array([0.5, 0.4])
    >>> drawn = rejection_draws(known, right, unknown, unknown > 0.4, [once])
    >>> [round(float(drawn[name][0]), 3) for name in ("accepted", "auroc", "aupr", "oscr", "known_rejected_at_95")]
    [0.5, 0.75, 0.867, 0.417, 0.333]
    """
    scores = np.concatenate([known, unknown])
    order = np.argsort(scores, kind="stable")
    starts = np.flatnonzero(np.diff(scores[order], prepend=np.nan) != 0)  # of equal scores the first
    distinct = len(starts) == len(scores)

    def by_score(weights: NDArray[np.float32]) -> NDArray[np.float32]:
        """Weights of all images, (d, m + n), summed over those of equal score, ascending: (d, scores)."""
        ordered = weights[:, order]
        return ordered if distinct else np.add.reduceat(ordered, starts, axis=1)

    parts = []
    for of_known, of_unknown in counts:
        none = np.zeros_like(of_known), np.zeros_like(of_unknown)
        part = _measured(
            by_score(np.concatenate([of_known, none[1]], axis=1)),
            by_score(np.concatenate([of_known * right, none[1]], axis=1)),
            by_score(np.concatenate([none[0], of_unknown], axis=1)),
        )
        with np.errstate(invalid="ignore"):
            part["accepted"] = of_unknown @ accepted.astype(np.float64) / of_unknown.sum(axis=1)
        parts.append(part)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _measured(
    known: NDArray[np.float32], right: NDArray[np.float32], unknown: NDArray[np.float32]
) -> dict[str, NDArray[np.float64]]:
    """From the numbers of images at each distinct score, ascending, (d, scores)."""
    known_to, unknown_to = known.cumsum(axis=1), unknown.cumsum(axis=1)  # of this score or less
    m, n = known_to[:, -1:], unknown_to[:, -1:]
    known_from, unknown_from = m - known_to + known, n - unknown_to + unknown  # of this score or more
    beaten = unknown_to - unknown / 2
    with np.errstate(invalid="ignore", divide="ignore"):
        pairs = m[:, 0].astype(np.float64) * n[:, 0]
        found = {
            "auroc": _dot(known, beaten) / pairs,
            "aupr": _dot(known, known_from / np.maximum(known_from + unknown_from, 1)) / m[:, 0],
            "aupr_unknown": _dot(unknown, unknown_to / np.maximum(known_to + unknown_to, 1)) / n[:, 0],
            "oscr": _dot(right, beaten) / pairs,
            "unknown_accepted_at_95": _share_past(unknown, unknown_to - unknown, known_to),
            "known_rejected_at_95": _share_past(known[:, ::-1], (m - known_to)[:, ::-1], unknown_from[:, ::-1]),
        }
    return {name: np.where(pairs == 0, np.nan, values) for name, values in found.items()}


def _dot(first: NDArray[np.float32], second: NDArray[np.floating]) -> NDArray[np.float64]:
    """Of each row, in double precision, for pairs of images are many."""
    return np.asarray(np.einsum("ds,ds->d", first, second, dtype=np.float64))


def _share_past(
    these: NDArray[np.float32], before: NDArray[np.float32], up_to: NDArray[np.float32]
) -> NDArray[np.float64]:
    """The share of `these` from the first column on up to which more than a twentieth of others lies, (d,)."""
    first = (up_to > np.floor(up_to[:, -1:] / 20)).argmax(axis=1)
    total = before[:, -1] + these[:, -1]
    return np.asarray((total - before[np.arange(len(first)), first]) / total, dtype=np.float64)
