"""Measures of classification, calibration and rejection: pure functions of arrays.

Known images are the positives of every measure of rejection, and their scores are meant to be the higher ones. Where
there is nothing to measure the answer is NaN; scores that are NaN are refused with a ValueError. scikit-learn loads on
first use. What is measured of the embeddings themselves stands in coterie.retrieval.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "ClassRates",
    "Reliability",
    "auroc",
    "average_precision",
    "balanced_accuracy",
    "class_rates",
    "confidence_bins",
    "confusion",
    "expected_calibration_error",
    "known_rejected_at_95",
    "oscr",
    "reliability",
    "risk_at_coverage",
    "selective_risks",
    "top1",
    "top_k",
    "unknown_accepted_at_95",
]

Scores = NDArray[np.floating]


def top1(predicted: NDArray[np.str_], truth: NDArray[np.str_]) -> float:
    """Share of `predicted` (n,) that equals `truth` (n,).

    >>> top1(np.array(["a", "b", "b", "a"]), np.array(["a", "b", "a", "a"]))
    0.75
    """
    return float(np.mean(predicted == truth)) if len(truth) else float("nan")


def top_k(scores: Scores, truth: NDArray[np.int64], k: int) -> NDArray[np.bool_]:
    """Whether each true class (n,) is among the k of highest score (n, c), (n,); equal scores stand in class order.

    >>> top_k(np.array([[0.5, 0.3, 0.2], [0.4, 0.4, 0.2]]), np.array([1, 1]), 1).tolist()
    [False, False]
    >>> top_k(np.array([[0.5, 0.3, 0.2], [0.4, 0.4, 0.2]]), np.array([1, 1]), 2).tolist()
    [True, True]
    """
    _refuse_nan(scores)
    own = np.take_along_axis(scores, truth[:, None], 1)
    before = (scores > own) | ((scores == own) & (np.arange(scores.shape[1]) < truth[:, None]))
    return np.asarray(before.sum(axis=1) < k)


@dataclass(frozen=True)
class ClassRates:
    """Of each class, (c,): float64, NaN where there is nothing to measure.

    Attributes:
        images: how many queries are of the class.
        precision: share of the answers naming it that are right.
        recall: share of its queries that are named so.
        f1: 2 · right / (queries of it + answers naming it).
    """

    images: NDArray[np.int64]
    precision: NDArray[np.float64]
    recall: NDArray[np.float64]
    f1: NDArray[np.float64]


def class_rates(table: NDArray[np.int64]) -> ClassRates:
    """Precision, recall and F1 of each class from a confusion table (c, c), rows true and columns predicted.

    >>> rates = class_rates(np.array([[3, 1], [1, 0]]))
    >>> rates.precision.tolist(), rates.recall.tolist(), rates.f1.tolist()
    ([0.75, 0.0], [0.75, 0.0], [0.75, 0.0])
    """
    right, images, answers = np.diag(table).astype(np.float64), table.sum(axis=1), table.sum(axis=0)
    with np.errstate(invalid="ignore"):
        return ClassRates(images, right / answers, right / images, 2 * right / (images + answers))


def balanced_accuracy(table: NDArray[np.int64]) -> float:
    """Mean recall of the classes that have queries, from a confusion table (c, c).

    >>> balanced_accuracy(np.array([[3, 1], [0, 1]]))
    0.875
    """
    images = table.sum(axis=1)
    some = images > 0
    return float((np.diag(table)[some] / images[some]).mean()) if some.any() else float("nan")


@dataclass(frozen=True)
class Reliability:
    """Confidence beside accuracy in bins of equal width, (bins,): NaN in empty ones."""

    counts: NDArray[np.int64]
    confidence: NDArray[np.float64]
    accuracy: NDArray[np.float64]


def confidence_bins(confidences: Scores, bins: int) -> NDArray[np.int64]:
    """The bin of each probability, of any shape: bin b, from 0 on, holds those in (b / bins, (b + 1) / bins].

    >>> confidence_bins(np.array([0.0, 0.5, 0.51, 1.0]), 2).tolist()
    [0, 0, 1, 1]
    """
    _refuse_nan(confidences)
    return np.asarray(np.clip(np.ceil(confidences * bins).astype(np.int64) - 1, 0, bins - 1))


def reliability(confidences: Scores, right: NDArray[np.bool_], *, bins: int = 15) -> Reliability:
    """What a reliability diagram shows (arXiv 1706.04599, section 2), of answers (n,); bins as in the function below.

    >>> reliability(np.array([0.2, 0.9, 0.8]), np.array([False, True, False]), bins=2).accuracy.tolist()
    [0.0, 0.5]
    """
    bin_of = confidence_bins(confidences, bins)
    counts = np.bincount(bin_of, minlength=bins)
    with np.errstate(invalid="ignore"):
        confidence = np.bincount(bin_of, weights=confidences, minlength=bins) / counts
        return Reliability(counts, confidence, np.bincount(bin_of, weights=right, minlength=bins) / counts)


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
    bin_of = confidence_bins(confidences, bins)
    surplus = np.bincount(bin_of, weights=right.astype(np.float64) - confidences, minlength=bins)
    return float(np.abs(surplus).sum() / len(right))


def selective_risks(confidences: Scores, right: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Share of wrong answers among the i most confident, for i = 1 … n (El-Yaniv & Wiener, JMLR 11, 2010); (n,).

    Their mean is the area under the risk–coverage curve, AURC. Answers of equal confidence enter in expectation over
    their orders, so that the result does not depend on the order of the queries.

    >>> selective_risks(np.array([0.9, 0.8, 0.8, 0.1]), np.array([True, True, False, False])).round(3).tolist()
    [0.0, 0.25, 0.333, 0.5]
    """
    _refuse_nan(confidences)
    _, group, sizes = np.unique(-confidences, return_inverse=True, return_counts=True)
    wrong = np.bincount(group, weights=~right, minlength=len(sizes))
    expected = np.repeat(wrong / np.maximum(sizes, 1), sizes)  # of the i-th most confident answer
    return np.asarray(np.cumsum(expected) / np.arange(1, len(expected) + 1))


def risk_at_coverage(risks: NDArray[np.float64], coverage: float) -> float:
    """Of `selective_risks`, that of the ⌈coverage · n⌉ most confident answers.

    >>> risk_at_coverage(np.array([0.0, 0.25, 0.333, 0.5]), 0.7)
    0.333
    """
    return float(risks[max(1, int(np.ceil(coverage * len(risks) - 1e-9))) - 1]) if len(risks) else float("nan")


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
    _refuse_nan(known, unknown)
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
    _refuse_nan(known, unknown)
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


def _refuse_nan(*scores: Scores) -> None:
    for values in scores:
        if np.isnan(values).any():
            raise ValueError(f"{np.isnan(values).sum()} of {values.size} scores are NaN: they cannot be measured")


def _as_truth_and_score(known: Scores, unknown: Scores) -> tuple[NDArray[np.int64], Scores]:
    return np.repeat([1, 0], [len(known), len(unknown)]), np.concatenate([known, unknown])
