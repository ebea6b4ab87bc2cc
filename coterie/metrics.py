"""Measures of classification and rejection: pure functions of arrays."""

import numpy as np
from numpy.typing import NDArray

__all__ = ["auroc", "confusion", "false_positive_rate_at_95", "top1"]


def top1(predicted: NDArray[np.str_], truth: NDArray[np.str_]) -> float:
    """Share of `predicted` (n,) that equals `truth` (n,); NaN when there are none.

    >>> top1(np.array(["a", "b", "b", "a"]), np.array(["a", "b", "a", "a"]))
    0.75
    """
    return float(np.mean(predicted == truth)) if len(truth) else float("nan")


def auroc(known: NDArray[np.floating], unknown: NDArray[np.floating]) -> float:
    """Probability that a random known image scores above a random unknown one, ties counting half.

    The area under the ROC curve with known images as positives, by the Mann-Whitney identity.

    >>> auroc(np.array([0.9, 0.8, 0.4]), np.array([0.5, 0.4]))
    0.75
    """
    if not len(known) or not len(unknown):
        return float("nan")
    ordered = np.sort(unknown)
    below = np.searchsorted(ordered, known, side="left")
    up_to = np.searchsorted(ordered, known, side="right")
    return float((below + up_to).mean() / (2 * len(unknown)))


def false_positive_rate_at_95(known: NDArray[np.floating], unknown: NDArray[np.floating]) -> float:
    """Share of unknown images accepted when 95 % of the known ones are (the definition of arXiv 2204.06507).

    >>> false_positive_rate_at_95(np.array([0.9, 0.8, 0.7, 0.6]), np.array([0.65, 0.1]))
    0.5
    """
    if not len(known) or not len(unknown):
        return float("nan")
    accept = np.sort(known)[int(np.floor(0.05 * len(known)))]
    return float(np.mean(unknown >= accept))


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
