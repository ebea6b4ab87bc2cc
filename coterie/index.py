"""Which index a gallery gets: exact search for as long as that is fast enough, then inverted lists.

What was chosen, why, and how near it comes to exact search stands in the index's `report`.
"""

import statistics
import time
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from coterie.neighbors import ExactIndex, Index, IndexReport, InvertedIndex, inverted_bytes
from coterie.ranking import check_unit_vectors

__all__ = [
    "ExactIndex",
    "Index",
    "IndexOptions",
    "IndexReport",
    "InvertedIndex",
    "Kind",
    "build_index",
    "check_unit_vectors",
    "elected",
    "id_recall",
    "updated_index",
]

Kind = Literal["exact", "ivf", "ivf-sq8"]

# Any machine reads this fast, in bytes per second; what it reads within the budget needs no clock.
LEAST_BANDWIDTH = 1e9
# The clock is set to as many bytes, which no cache holds.
TIMED_BYTES = 1 << 28
TIMED_RUNS = 5
# Held back to choose how many lists are searched: 0.999 of them is all but one.
HELD_BACK = 1000
NEIGHBORS = 20
TEMPERATURE = 0.1
# Where labels agree, id recall is worth searching this share of the lists, and no more; and whoever has to search half
# of them had better look at every row.
RECALL_SHARE = 1 / 16
USELESS_SHARE = 1 / 2
# Lists divide space as the rows did that they were learned from; of fewer they say too little.
LEARNED_SHARE = 2 / 3


@dataclass(frozen=True)
class IndexOptions:
    """What an index may cost.

    Attributes:
        latency_budget: seconds a query may take.
        memory_budget: bytes that it may take beside the vectors; None for any number.
    """

    latency_budget: float = 0.010
    memory_budget: int | None = None


def build_index(
    vectors: ArrayLike,
    labels: ArrayLike | None = None,
    *,
    latency_budget: float = 0.010,
    memory_budget: float | None = None,
    kind: Kind | None = None,
    recall: float = 0.95,
    agreement: float = 0.999,
) -> Index:
    """The index that these vectors need on this machine.

    Exact search as long as one query takes no longer than `latency_budget`; above, inverted lists, of eight bits a
    number where whole vectors would exceed `memory_budget`. As few lists are searched as reach the goals on held-back
    rows, each of which is sought among the others: id recall alone without labels. With labels the goal is their
    agreement, and id recall only for as long as a sixteenth of the lists suffices: in a tightly packed class the
    nearest of many near ones is a matter of chance, and all of them vote alike. Where half of the lists had to be
    searched, the index is exact after all.

    Apart from the time of one query, equal input gives equal indexes.

    Args:
        vectors: float32 (n, d), finite and of unit length; n may be 0. Not copied, so they must not change.
        labels: (n,), of any type that can be sorted.
        latency_budget: seconds.
        memory_budget: bytes that the index may take beside the vectors; None for any number.
        kind: what to build whatever the budgets.
        recall: share of the 20 nearest neighbours to be found.
        agreement: share of queries whose 20 neighbours must elect the label that the exact ones elect.

    Raises:
        ValueError: an argument is not as described.
    """
    exact = ExactIndex(vectors)
    codes = None if labels is None else _codes(labels, len(exact))
    if kind is not None and kind not in get_args(Kind):
        raise ValueError(f"there is no index of kind {kind!r}: choose one of {', '.join(get_args(Kind))}")
    if not latency_budget > 0 or (memory_budget is not None and not memory_budget >= 0):
        raise ValueError(f"budgets must be positive, not {latency_budget} s and {memory_budget} bytes")
    if not (0 <= recall <= 1 and 0 <= agreement <= 1):
        raise ValueError(f"recall and agreement go from 0 to 1, not {recall} and {agreement}")
    chosen, reason = (kind, "asked for") if kind else _choice(exact, latency_budget, memory_budget)
    if chosen == "exact" or not len(exact):
        return ExactIndex(exact.vectors, reason=reason if len(exact) else "there are no rows")
    index = InvertedIndex(exact.vectors, quantized=chosen == "ivf-sq8")
    found, agreed = _tune(index, exact, codes, recall, agreement)
    if not kind and index.probes > USELESS_SHARE * index.lists:
        share = index.probes / index.lists
        return ExactIndex(exact.vectors, reason=f"{reason}, but {share:.0%} of the lists would have to be searched")
    reason = f"{reason}: {index.probes:,} of {index.lists:,} lists are searched"
    index.report = IndexReport(chosen, reason, len(index), index.report.bytes_per_vector, found, agreed)
    return index


def updated_index(index: object, vectors: ArrayLike, kept: ArrayLike) -> Index | None:
    """The index of other rows from one that took long to build, see `Index.updated`; None where one has to be built.

    That is where more than a third of the rows are newer than the lists, and where the index is exact, because more
    rows may need another.
    """
    if not isinstance(index, InvertedIndex):
        return None
    other = index.updated(vectors, kept)
    return other if other.share_learned >= LEARNED_SHARE else None


def _choice(exact: ExactIndex, latency_budget: float, memory_budget: float | None) -> tuple[Kind, str]:
    """A kind, and why."""
    n, dim, allowed = len(exact), exact.dim, f"{latency_budget * 1e3:.3g} ms allowed"
    if exact.vectors.nbytes <= LEAST_BANDWIDTH * latency_budget:
        return "exact", f"a query reads {exact.vectors.nbytes / 1e6:,.1f} MB, on any machine within the {allowed}"
    seconds = _seconds_of_a_query(exact.vectors)
    measured = f"a query of all {n:,} rows takes {seconds * 1e3:.3g} ms"
    if seconds <= latency_budget:
        return "exact", f"{measured}, within the {allowed}"
    measured = f"{measured}, above the {allowed}"
    if memory_budget is None:
        return "ivf", measured
    beside = {quantized: n * (inverted_bytes(n, dim, quantized=quantized) - 4 * dim) for quantized in (False, True)}
    if beside[False] <= memory_budget:
        return "ivf", measured
    too_much = f"{beside[False] / 1e6:,.0f} MB for lists of whole vectors are above the {memory_budget / 1e6:,.0f} MB"
    if beside[True] <= memory_budget:
        return "ivf-sq8", f"{measured}, and {too_much} allowed"
    return "exact", f"{measured}, but even {beside[True] / 1e6:,.0f} MB for short lists exceed the memory allowed"


def _seconds_of_a_query(vectors: NDArray[np.float32]) -> float:
    """Of exact search for one query; timed on some of the rows if they are many."""
    some = vectors[: max(1, TIMED_BYTES // vectors[:1].nbytes)]
    index, times = ExactIndex(some), []
    for row in range(TIMED_RUNS + 1):
        began = time.perf_counter()
        index.search(some[row % len(some), None], NEIGHBORS)
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:]) * len(vectors) / len(some)


def _tune(
    index: InvertedIndex, exact: ExactIndex, codes: NDArray[np.int64] | None, recall: float, agreement: float
) -> tuple[float, float | None]:
    """Set the least `probes` that reach the goals, by doubling and then halving; returns what is reached."""
    held_back = np.sort(np.random.default_rng(0).choice(len(exact), min(len(exact), HELD_BACK), replace=False))
    truth = _others(exact, held_back)

    def measured(probes: int) -> tuple[float, float | None]:
        index.probes = probes
        found = _others(index, held_back)
        if codes is None:
            return id_recall(found[1], truth[1]), None
        agreed = elected(found[0], codes[found[1]]) == elected(truth[0], codes[truth[1]])
        return id_recall(found[1], truth[1]), float(agreed.mean())

    def enough(probes: int) -> bool:
        found, agreed = measured(probes)
        if agreed is None:
            return found >= recall
        return agreed >= agreement and (found >= recall or probes > RECALL_SHARE * index.lists)

    few, many = 0, 1
    while many < index.lists and not enough(many):
        few, many = many, min(2 * many, index.lists)
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (few, middle) if enough(middle) else (middle, many)
    return measured(many)


def _others(index: Index, rows: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The nearest neighbours of some of an index's own rows, those themselves left out; (m, min(20, n - 1))."""
    similarities, found = index.search(index.vectors[rows], NEIGHBORS + 1)
    # Itself last; where so many are equal that it was not found, the last is one too many.
    order = np.argsort(found == rows[:, None], axis=1, kind="stable")[:, : min(NEIGHBORS, len(index) - 1)]
    return np.take_along_axis(similarities, order, 1), np.take_along_axis(found, order, 1)


def id_recall(found: NDArray[np.int64], truth: NDArray[np.int64]) -> float:
    """Share of the true neighbours, rows (m, k), that are among those found, (m, k); 1 where there are none.

    >>> id_recall(np.asarray([[4, 2], [7, 1]]), np.asarray([[2, 4], [7, 3]]))
    0.75
    """
    return float((found[:, :, None] == truth[:, None, :]).any(axis=1).mean()) if truth.size else 1.0


def elected(similarities: NDArray[np.float32], codes: NDArray[np.int64]) -> NDArray[np.int64]:
    """The class that each query's neighbours elect, their votes weighing exp(similarity / 0.1); (m,).

    Args:
        similarities: of the neighbours, (m, k).
        codes: their classes, whole numbers (m, k); of equally many votes the smallest wins.

    >>> elected(np.asarray([[0.9, 0.8, 0.8]], dtype=np.float32), np.asarray([[3, 5, 5]]))
    array([3])
    """
    if not codes.shape[1]:
        return np.full(len(codes), -1)
    weights = np.exp((similarities - similarities[:, :1]).astype(np.float64) / TEMPERATURE)
    votes = ((codes[:, :, None] == codes[:, None, :]) * weights[:, None, :]).sum(axis=2)  # (m, k): for each one's class
    winning = votes >= votes.max(axis=1, keepdims=True) * (1 - 1e-9)
    return np.asarray(np.where(winning, codes, codes.max() + 1).min(axis=1))


def _codes(labels: ArrayLike, n: int) -> NDArray[np.int64]:
    given = np.asarray(labels)
    if given.shape != (n,):
        raise ValueError(f"labels must have shape ({n},), one for each vector, not {given.shape}")
    return np.unique(given, return_inverse=True)[1]
