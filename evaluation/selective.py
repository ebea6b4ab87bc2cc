"""How often answers are wrong if only the most confident are given; see coterie.metrics.selective_risks."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from coterie.intervals import Interval, bootstrap_counts, interval
from coterie.metrics import risk_at_coverage, selective_risks

__all__ = ["COVERAGES", "Selective", "measure_selective", "risks_of_draws"]

COVERAGES = (0.5, 0.8, 0.9, 0.95, 1.0)


@dataclass(frozen=True)
class Selective:
    """The share of right labels among the most confident answers, that share of all being `coverage`."""

    coverage: float
    accuracy: float
    interval: tuple[float, float]


def measure_selective(
    confidence: NDArray[np.float64], right: NDArray[np.bool_], seed: int = 0
) -> tuple[Interval, tuple[Selective, ...], tuple[Interval, ...]]:
    """Of n answers the area under the risk–coverage curve, the accuracy at some coverages, and the risk at each
    hundredth."""
    values = _summary(selective_risks(confidence, right))
    drawn = np.asarray([_summary(of) for of in risks_of_draws(confidence, right, _counts(len(right), seed))])
    aurc, *risks = (interval(value, drawn[:, column]) for column, value in enumerate(values))
    at = [risks[round(100 * share) - 1] for share in COVERAGES]
    selective = tuple(
        Selective(share, 1 - risk.value, (1 - risk.high, 1 - risk.low))
        for share, risk in zip(COVERAGES, at, strict=True)
    )
    return aurc, selective, tuple(risks)


def risks_of_draws(
    confidence: NDArray[np.float64], right: NDArray[np.bool_], counts: Iterable[NDArray[np.float32]]
) -> Iterator[NDArray[np.float64]]:
    """`selective_risks` of bootstrap draws, each of which says how often an answer was drawn, (n,); sorted once.

    >>> confidence, right = np.array([0.9, 0.8, 0.8, 0.1]), np.array([True, True, False, False])
    >>> [risks.round(3).tolist() for risks in risks_of_draws(confidence, right, [np.float32([1, 0, 2, 1])])]
    [[0.0, 0.5, 0.667, 0.75]]
    """
    order = np.argsort(-confidence, kind="stable")
    wrong = ~right[order]
    starts = np.flatnonzero(np.diff(confidence[order], prepend=np.nan) != 0)  # of equal confidences the first
    position = np.arange(1, len(order) + 1)
    for drawn in counts:
        ordered = drawn[order]
        sizes = np.add.reduceat(ordered, starts)
        rates = np.add.reduceat(ordered * wrong, starts) / np.maximum(sizes, 1)
        yield np.cumsum(np.repeat(rates.astype(np.float64), sizes.astype(np.int64))) / position


def _counts(n: int, seed: int) -> Iterator[NDArray[np.float32]]:
    for block in bootstrap_counts(n, seed=seed):
        yield from block


def _summary(risks: NDArray[np.float64]) -> list[float]:
    """Their mean, and that at each hundredth."""
    return [float(risks.mean()), *(risk_at_coverage(risks, percent / 100) for percent in range(1, 101))]
