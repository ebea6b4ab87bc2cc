"""How far a measured number can be trusted: bootstrap intervals, and tests of a difference on the same images.

All draws follow from a seed. Percentile intervals of 95 % (Efron & Tibshirani 1993, chapter 13); of an error that was
never seen they say nothing: without a mistake among n images its true rate may still be 3 / n.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "DRAWS",
    "Interval",
    "bootstrap_counts",
    "bootstrap_means",
    "bootstrap_sums",
    "bootstrap_tallies",
    "interval",
    "mcnemar",
]

DRAWS = 1000
TAIL = 0.025
# Counts held at once: 64 MB of float32.
BLOCK = 1 << 24


@dataclass(frozen=True)
class Interval:
    """A number and its 95 % interval, `bounds`; all NaN where nothing was measured."""

    value: float
    low: float
    high: float

    @property
    def bounds(self) -> tuple[float, float]:
        return self.low, self.high


def bootstrap_counts(
    n: int, *, draws: int = DRAWS, seed: int | Sequence[int] = 0, at_once: int | None = None
) -> Iterator[NDArray[np.float32]]:
    """How often each of n rows is among n drawn with replacement: blocks of `at_once` draws, (at_once, n).

    For one seed and n the same draws in every call and for blocks of any size: what is made of them stays paired.

    >>> [block.sum(axis=1).tolist() for block in bootstrap_counts(7, draws=3, at_once=2)]
    [[7.0, 7.0], [7.0]]
    """
    rng = np.random.default_rng(seed)
    step = at_once or max(1, BLOCK // max(n, 1))
    for start in range(0, draws, step):
        counts = np.empty((min(step, draws - start), n), dtype=np.float32)
        for row in counts:
            row[:] = np.bincount(rng.integers(max(n, 1), size=n), minlength=n)
        yield counts


def bootstrap_sums(values: NDArray[Any], *, draws: int = DRAWS, seed: int = 0) -> NDArray[np.float32]:
    """The sums of the columns of `values` (n, m) over the rows of each draw, (draws, m); the same rows for all columns.

    >>> bootstrap_sums(np.ones((7, 2)), draws=3).tolist()
    [[7.0, 7.0], [7.0, 7.0], [7.0, 7.0]]
    """
    columns = values.astype(np.float32)
    return np.concatenate([counts @ columns for counts in bootstrap_counts(len(values), draws=draws, seed=seed)])


def bootstrap_tallies(
    groups: NDArray[np.int64], count: int, *, draws: int = DRAWS, seed: int = 0
) -> NDArray[np.float64]:
    """How many rows of each of `count` groups are in each draw, (m, draws, count).

    What `bootstrap_sums` makes of a column for each group, without those n · count numbers.

    Args:
        groups: of which group each of n rows is, in each of m divisions, (m, n); −1 of none.

    >>> bootstrap_tallies(np.array([[0, 0, 0, -1], [1, 1, 1, 1]]), 2, draws=1).sum(axis=1).tolist()
    [[3.0, 0.0], [0.0, 4.0]]
    """
    m, n = groups.shape
    some, rows = groups >= 0, np.broadcast_to(np.arange(n), groups.shape)
    cells, rows = (groups + np.arange(m)[:, None] * count)[some], rows[some]
    tallies = [
        np.bincount(cells, weights=drawn[rows], minlength=m * count)
        for block in bootstrap_counts(n, draws=draws, seed=seed)
        for drawn in block
    ]
    return np.asarray(tallies, dtype=np.float64).reshape(draws, m, count).swapaxes(0, 1)


def bootstrap_means(values: NDArray[Any], *, draws: int = DRAWS, seed: int = 0) -> list[Interval]:
    """The mean of each column of `values` (n, m); NaN stands for a row that has no such value and does not count.

    >>> bootstrap_means(np.array([[1.0, 1.0], [0.0, 1.0], [1.0, 1.0], [0.0, np.nan]]), draws=100)[1]
    Interval(value=1.0, low=1.0, high=1.0)
    """
    there = ~np.isnan(values.astype(np.float64))
    filled, m = np.where(there, values, 0), values.shape[1]
    drawn = bootstrap_sums(np.concatenate([filled, there], axis=1), draws=draws, seed=seed)
    with np.errstate(invalid="ignore"):
        means, wholes = drawn[:, :m] / drawn[:, m:], filled.sum(axis=0, dtype=np.float64) / there.sum(axis=0)
    return [interval(float(whole), means[:, column]) for column, whole in enumerate(wholes)]


def mcnemar(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> float:
    """Probability of so uneven a split of the images that one of two gets right and the other wrong, were both as good.

    The exact, two-sided test (McNemar, Psychometrika 12, 1947): binomial with p = ½ over those images.

    Args:
        first, second: whether each answered rightly, of the same images (n,).

    >>> mcnemar(np.array([True] * 5 + [False]), np.array([False] * 5 + [False]))
    0.0625
    """
    from scipy.stats import binomtest

    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    if only_first + only_second == 0:
        return 1.0
    return float(binomtest(only_first, only_first + only_second).pvalue)


def interval(value: float, drawn: NDArray[Any]) -> Interval:
    """The interval of a number from what draws made of it; draws that made NaN do not count."""
    drawn = drawn[~np.isnan(drawn)]
    if np.isnan(value) or not len(drawn):
        return Interval(value, float("nan"), float("nan"))
    low, high = np.quantile(drawn.astype(np.float64), [TAIL, 1 - TAIL])
    return Interval(value, float(low), float(high))
