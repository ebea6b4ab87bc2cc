"""Measures of classification, calibration and rejection: pure functions of arrays.

Known images are the positives of every measure of rejection, and their scores are meant to be the higher ones. Where
there is nothing to measure the answer is NaN. scikit-learn loads on first use.
"""

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "auroc",
    "average_precision",
    "confusion",
    "expected_calibration_error",
    "known_rejected_at_95",
    "oscr",
    "top1",
    "unknown_accepted_at_95",
]

Scores = NDArray[np.floating]


def top1(predicted: NDArray[np.str_], truth: NDArray[np.str_]) -> float:
    """Share of `predicted` (n,) that equals `truth` (n,).

    >>> top1(np.array(["a", "b", "b", "a"]), np.array(["a", "b", "a", "a"]))
    0.75
    """
    return float(np.mean(predicted == truth)) if len(truth) else float("nan")


def expected_calibration_error(confidences: Scores, right: NDArray[np.bool_], *, bins: int = 15) -> float:
    """Σ_b n_b / n · |share right − mean confidence| over bins of equal width: top-label, L1 (arXiv 1706.04599).

    Bin b holds confidences in ((b − 1) / bins, b / bins].

    Args:
        confidences: probability of the label that was given, (n,).
        right: whether it was right, (n,).

    >>> round(expected_calibration_error(np.array([0.95, 0.95, 0.6, 0.6]), np.array([True, True, True, False])), 3)
    0.075
    """
    if not len(right):
        return float("nan")
    bin_of = np.clip(np.ceil(confidences * bins).astype(np.int64) - 1, 0, bins - 1)
    surplus = np.bincount(bin_of, weights=right.astype(np.float64) - confidences, minlength=bins)
    return float(np.abs(surplus).sum() / len(right))


def auroc(known: Scores, unknown: Scores) -> float:
    """Probability that a random known image scores above a random unknown one, ties counting half.

    >>> auroc(np.array([0.9, 0.8, 0.4]), np.array([0.5, 0.4]))
    0.75
    """
    from sklearn.metrics import roc_auc_score

    if not len(known) or not len(unknown):
        return float("nan")
    return float(roc_auc_score(*_as_truth_and_score(known, unknown)))


def average_precision(known: Scores, unknown: Scores) -> float:
    """Σ (recall_i − recall_{i−1}) · precision_i over descending thresholds: AUPR with known images as positives.

    Swap the two and negate the scores for unknown images as positives.

    >>> round(average_precision(np.array([0.9, 0.6]), np.array([0.7])), 4)
    0.8333
    """
    from sklearn.metrics import average_precision_score

    if not len(known) or not len(unknown):
        return float("nan")
    return float(average_precision_score(*_as_truth_and_score(known, unknown)))


def unknown_accepted_at_95(known: Scores, unknown: Scores) -> float:
    """FPR95 as in arXiv 2204.06507: share of unknown images accepted where at least 95 % of the known ones are.

    >>> unknown_accepted_at_95(np.array([0.9, 0.8, 0.7, 0.6]), np.array([0.65, 0.1]))
    0.5
    """
    if not len(known) or not len(unknown):
        return float("nan")
    accept = np.sort(known)[len(known) // 20]
    return float(np.mean(unknown >= accept))


def known_rejected_at_95(known: Scores, unknown: Scores) -> float:
    """FPR95 as in OpenOOD (arXiv 2210.07242): share of known images rejected where at least 95 % of the unknown are.

    >>> known_rejected_at_95(np.array([0.9, 0.8, 0.7, 0.6]), np.array([0.65, 0.1]))
    0.25
    """
    return unknown_accepted_at_95(-unknown, -known)


def oscr(known: Scores, right: NDArray[np.bool_], unknown: Scores) -> float:
    """Area under correct classification rate over false positive rate (Dhamija et al., arXiv 1811.04110).

    With ties counting half that is the mean of right_i · [known_i > unknown_j] over all pairs: AUROC that counts only
    rightly labelled images, and equals it where all are.

    Args:
        right: whether each known image was given its own label, rejection ignored; as long as `known`.

    >>> oscr(np.array([0.9, 0.8, 0.4]), np.array([True, False, True]), np.array([0.5, 0.4]))
    0.4166666666666667
    """
    if not len(known) or not len(unknown):
        return float("nan")
    ordered = np.sort(unknown)
    below = np.searchsorted(ordered, known, side="left") + np.searchsorted(ordered, known, side="right")
    return float((right * below).mean() / (2 * len(unknown)))


def confusion(predicted: NDArray[np.str_], truth: NDArray[np.str_], labels: tuple[str, ...]) -> NDArray[np.int64]:
    """Counts (len(labels), len(labels)): rows are true labels, columns predicted ones; others are left out.

    >>> confusion(np.array(["a", "b"]), np.array(["a", "a"]), ("a", "b")).tolist()
    [[1, 1], [0, 0]]
    """
    table = np.zeros((len(labels), len(labels)), dtype=np.int64)
    rows = {label: row for row, label in enumerate(labels)}
    for true, guess in zip(truth.tolist(), predicted.tolist(), strict=True):
        if true in rows and guess in rows:
            table[rows[true], rows[guess]] += 1
    return table


def _as_truth_and_score(known: Scores, unknown: Scores) -> tuple[NDArray[np.int64], Scores]:
    return np.repeat([1, 0], [len(known), len(unknown)]), np.concatenate([known, unknown])
