"""Exact and approximate nearest neighbours among unit vectors: the only place in the project that touches FAISS.

FAISS only proposes rows; coterie.ranking makes the answer of them. An index never changes, filters never reach FAISS,
and every call makes its own parameters: so NaN queries, k above the number of rows, a selector that threads share, and
changes during a search, all of which FAISS answers wrongly or dies of, stay in here.
"""

import math
import operator
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

# Read when FAISS is loaded: two threads that spin for one small search make it four to ten times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import faiss
import numpy as np
from numpy.typing import ArrayLike, NDArray

from coterie.ranking import BLOCK, DOUBT, MILLION, Found, check_unit_vectors, largest, ranked, scanned

__all__ = ["ExactIndex", "Index", "IndexReport", "InvertedIndex", "inverted_bytes", "list_count"]

# FAISS keeps any of the rows that tie for the last places: a few more show most ties whole.
SPARE = 16
# A filter's rows are copied and multiplied, unless there are so many that multiplying all rows is less work: copying a
# row takes as long as multiplying it with eight queries.
COPY_PRODUCTS = 8
# 4·√n lists, learned from 32 rows each in 5 rounds. For 1 M × 128, ten rounds over 40 rows take 21 s instead of 9 and
# find the same neighbours to 0.003.
LISTS_PER_ROOT = 4
ROWS_PER_LIST = 32
ROUNDS = 5
# FAISS's map from id to place takes 25 to 53 bytes a row, and its lists grow by doubling: 1 M × 128 took 718 to 760
# bytes a row beside the vectors, and 238 with eight bits a number.
MAP_BYTES = 40
GROWTH = 4 / 3


@dataclass(frozen=True)
class IndexReport:
    """What an index is, why, and how near it comes to exact search.

    Attributes:
        kind: "exact", "ivf" (inverted lists of whole vectors) or "ivf-sq8" (of eight bits a number).
        reason: why this kind.
        n: rows.
        bytes_per_vector: memory for each row, by calculation, the stored float32 vector included.
        id_recall: share of the 20 exact nearest neighbours that were found for held-back queries; None: not measured.
        label_agreement: share of those queries whose neighbours elect the label that the exact ones elect; None: there
            were no labels, or it was not measured.
    """

    kind: str
    reason: str
    n: int
    bytes_per_vector: float
    id_recall: float | None = None
    label_agreement: float | None = None

    def __str__(self) -> str:
        measured = {"id recall": self.id_recall, "label agreement": self.label_agreement}
        parts = [f"{name} {value:.3f}" for name, value in measured.items() if value is not None]
        return f"{self.kind} index of {self.n:,} rows ({self.reason}): {', '.join(parts)}"


class Index(ABC):
    """Search by cosine similarity: what all indexes share.

    Attributes:
        vectors: float32 (n, d), not copied, so they must not change.
        dim: d.
        report: what the index is, and why.
    """

    report: IndexReport

    def __init__(self, vectors: ArrayLike, *, checked: bool = False) -> None:
        self.vectors = np.asarray(vectors) if checked else check_unit_vectors(vectors)
        self.dim = self.vectors.shape[1]
        # One matrix product beats one row at a time from four queries on; the default waits for 128,000 / d.
        faiss.cvar.distance_compute_blas_threshold = 4 * self.dim

    def __len__(self) -> int:
        return len(self.vectors)

    def search(self, queries: ArrayLike, k: int, *, allowed: ArrayLike | None = None) -> Found:
        """The nearest rows of each query, most similar first; equal similarities in row order.

        Any number of threads may search at once.

        Args:
            queries: float32 (m, d), finite and of unit length.
            k: at least 1; where there are fewer rows, or fewer allowed ones, the answer has fewer columns.
            allowed: which rows may be found: bool (n,), or row numbers in any order. The answer is then exact, whatever
                the kind of index.

        Returns:
            similarities, float32 of six decimals, and rows, int64; both (m, min(k, rows allowed)).

        Raises:
            ValueError: queries, k or allowed are not as described.
        """
        k = _checked_k(k)
        queries = check_unit_vectors(queries, self.dim)
        rows = None if allowed is None else _checked_rows(allowed, len(self))
        k = min(k, len(self) if rows is None else len(rows))
        if not len(queries) or not k:
            return np.empty((len(queries), k), dtype=np.float32), np.empty((len(queries), k), dtype=np.int64)
        return self._nearest(queries, k) if rows is None else self._nearest_among(queries, k, rows)

    @abstractmethod
    def updated(self, vectors: ArrayLike, kept: ArrayLike) -> "Index":
        """The index of other rows that are for the most part the same; this one stays as it is.

        Args:
            vectors: float32 (n', d): first the rows `kept` of this index, then new ones.
            kept: which rows of this index: bool (n,), or ascending row numbers.

        Raises:
            ValueError: vectors or kept are not as described.
        """

    @abstractmethod
    def _nearest(self, queries: NDArray[np.float32], k: int) -> Found:
        """`search` among all rows, 1 ≤ k ≤ n."""

    def _nearest_among(self, queries: NDArray[np.float32], k: int, rows: NDArray[np.int64]) -> Found:
        """Exact `search` among `rows`, which ascend, 1 ≤ k ≤ their number."""
        if (COPY_PRODUCTS + len(queries)) * len(rows) > len(queries) * len(self):
            return self._sifted(queries, k, rows)
        fetched = min(k + SPARE, len(rows))
        parts = zip(*self._copied(queries, fetched, rows), strict=True)
        similarities, candidates = (np.concatenate(blocks, axis=1) for blocks in parts)
        return self._settled(queries, k, largest(similarities, candidates, fetched), rows)

    def _sifted(self, queries: NDArray[np.float32], k: int, rows: NDArray[np.int64]) -> Found:
        """Of the nearest among all rows, those in `rows`; twice as many are fetched as should hold k of them."""
        allowed = np.zeros(len(self), dtype=bool)
        allowed[rows] = True
        fetched = min(2 * k * len(self) // len(rows) + SPARE, len(self))
        similarities, found, _ = ranked(queries, self.vectors, _knn(queries, self.vectors, fetched)[1], fetched)
        first = np.argsort(~allowed[found], axis=1, kind="stable")[:, :k]
        farthest = similarities[:, -1]
        similarities, found = np.take_along_axis(similarities, first, 1), np.take_along_axis(found, first, 1)
        if fetched < len(self):
            # What was not fetched may be as near as the last that was.
            sure = allowed[found[:, -1]] & (similarities[:, -1] > farthest + (DOUBT + 1) / MILLION)
            for query in (~sure).nonzero()[0]:
                similarities[query], found[query] = scanned(queries[query], self.vectors, k, rows)
        return similarities, found

    def _copied(self, queries: NDArray[np.float32], fetched: int, rows: NDArray[np.int64]) -> Iterator[Found]:
        """The nearest in each block of `rows`, which are copied to lie side by side."""
        step = max(1, BLOCK // self.dim)
        for start in range(0, len(rows), step):
            block = rows[start : start + step]
            similarities, places = _knn(queries, self.vectors.take(block, axis=0), min(fetched, len(block)))
            yield similarities, block[places]

    def _settled(
        self,
        queries: NDArray[np.float32],
        k: int,
        candidates: NDArray[np.int64],
        rows: NDArray[np.int64] | None = None,
    ) -> Found:
        """The answer from candidates (m, c) that are exact but for ties; all rows, or all of `rows`, settle those."""
        similarities, found, doubtful = ranked(queries, self.vectors, candidates, k)
        if candidates.shape[1] < len(self if rows is None else rows):
            for query in doubtful:
                similarities[query], found[query] = scanned(queries[query], self.vectors, k, rows)
        return similarities, found


class ExactIndex(Index):
    """Looks at every row; takes no memory beyond the vectors and no time to build.

    Args:
        vectors: float32 (n, d), finite and of unit length; n may be 0.
        reason: why this index was chosen, for its report.
        checked: whether the vectors are known to be as they must.
    """

    def __init__(self, vectors: ArrayLike, *, reason: str = "asked for", checked: bool = False) -> None:
        super().__init__(vectors, checked=checked)
        self.report = IndexReport("exact", reason, len(self), 4.0 * self.dim, 1.0, 1.0)

    def updated(self, vectors: ArrayLike, kept: ArrayLike) -> "ExactIndex":
        checked, _ = _checked_update(self, vectors, kept)
        return ExactIndex(checked, reason=self.report.reason)

    def _nearest(self, queries: NDArray[np.float32], k: int) -> Found:
        return self._settled(queries, k, _knn(queries, self.vectors, min(k + SPARE, len(self)))[1])


class InvertedIndex(Index):
    """Looks only at the rows that are listed under the centroids nearest to the query (FAISS's IVF).

    Equal vectors give equal lists for equal OMP_NUM_THREADS. Where the lists searched hold fewer than k rows, more of
    them are searched.

    Args:
        vectors: float32 (n, d), finite and of unit length; at least one.
        quantized: list eight bits a number instead of whole vectors; what is found is ranked by the whole ones.
        probes: how many lists are searched.
        reason: why this index was chosen, for its report.
    """

    def __init__(
        self, vectors: ArrayLike, *, quantized: bool = False, probes: int = 1, reason: str = "asked for"
    ) -> None:
        super().__init__(vectors)
        if not len(self):
            raise ValueError("there are no rows to make lists of: use ExactIndex")
        if probes < 1:
            raise ValueError(f"probes is {probes}: search at least one list")
        self.quantized, self.probes = quantized, probes
        self.lists = list_count(len(self))
        self._index = _trained(self.vectors, self.lists, quantized)
        self._index.add_with_ids(self.vectors, np.arange(len(self)))
        self._rows = np.append(np.arange(len(self)), -1)  # of each id; the last is for FAISS's id -1
        self._learned = len(self)
        self.report = IndexReport("ivf-sq8" if quantized else "ivf", reason, len(self), self._bytes_per_vector())

    def updated(self, vectors: ArrayLike, kept: ArrayLike) -> "InvertedIndex":
        """The index of other rows in the same lists, for the time of a copy.

        The lists go on dividing space as the rows did from which they were learned, and the report tells what was
        measured then: see `share_learned`.
        """
        checked, rows = _checked_update(self, vectors, kept)
        other = object.__new__(InvertedIndex)
        Index.__init__(other, checked)
        other.quantized, other.probes, other.lists = self.quantized, self.probes, self.lists
        other._learned = self._learned
        ids, next_id = np.flatnonzero(self._rows >= 0), len(self._rows) - 1
        new = np.arange(next_id, next_id + len(other) - len(rows))
        other._index = faiss.clone_index(self._index)
        other._index.remove_ids(np.delete(ids, rows))
        other._index.add_with_ids(other.vectors[len(rows) :], new)
        other._rows = np.full(len(self._rows) + len(new), -1)
        other._rows[np.append(ids[rows], new)] = np.arange(len(other))
        other.report = replace(self.report, n=len(other), bytes_per_vector=other._bytes_per_vector())
        return other

    @property
    def share_learned(self) -> float:
        """The share of the rows that the lists were learned from; the others came by `updated`."""
        return np.count_nonzero(self._rows[: self._learned] >= 0) / max(1, len(self))

    def _nearest(self, queries: NDArray[np.float32], k: int) -> Found:
        # Eight bits blur the order: twice as many rows hold all but a thousandth of the nearest.
        return self._among_nearest(queries, k, min((2 * k if self.quantized else k) + SPARE, len(self)))

    def _among_nearest(self, queries: NDArray[np.float32], k: int, fetched: int) -> Found:
        """`_nearest` of that many fetched rows, or more where similarities tie."""
        candidates = self._listed(queries, k, fetched)
        if fetched == len(self) or fetched > 100 * (k + SPARE):
            return self._settled(queries, k, candidates)
        similarities, found, doubtful = ranked(queries, self.vectors, candidates, k)
        if len(doubtful):
            settled = self._among_nearest(queries[doubtful], k, min(16 * fetched, len(self)))
            similarities[doubtful], found[doubtful] = settled
        return similarities, found

    def _listed(self, queries: NDArray[np.float32], k: int, fetched: int) -> NDArray[np.int64]:
        """The nearest rows in the lists searched, (m, fetched), at least k each; filled up with -1."""
        rows = np.empty((len(queries), fetched), dtype=np.int64)
        short, probes = np.arange(len(queries)), min(self.probes, self.lists)
        while True:
            # Of this call alone: FAISS writes into its parameters while it searches.
            parameters = faiss.SearchParametersIVF(nprobe=probes)  # type: ignore[call-arg]
            rows[short] = self._rows[self._index.search(queries[short], fetched, params=parameters)[1]]
            short = short[rows[short, k - 1] < 0]
            if not len(short) or probes == self.lists:
                return rows
            probes = min(2 * probes, self.lists)

    def _bytes_per_vector(self) -> float:
        return inverted_bytes(len(self), self.dim, quantized=self.quantized, lists=self.lists)


def list_count(n: int) -> int:
    """How many lists n rows get."""
    return max(1, min(round(LISTS_PER_ROOT * math.sqrt(n)), n // ROWS_PER_LIST))


def inverted_bytes(n: int, dim: int, *, quantized: bool, lists: int | None = None) -> float:
    """Bytes a row of an `InvertedIndex`: vector, listed vector, id, map, row, and its share of the centroids."""
    listed = GROWTH * ((dim if quantized else 4 * dim) + 8)
    return 4 * dim + listed + MAP_BYTES + 8 + 4 * dim * (lists or list_count(n)) / max(n, 1)


def _trained(vectors: NDArray[np.float32], lists: int, quantized: bool) -> Any:
    """FAISS's index with centroids, still without rows."""
    dim, metric = vectors.shape[1], faiss.METRIC_INNER_PRODUCT
    quantizer = faiss.IndexFlatIP(dim)
    index: Any
    if quantized:
        index = faiss.IndexIVFScalarQuantizer(quantizer, dim, lists, faiss.ScalarQuantizer.QT_8bit, metric)
    else:
        index = faiss.IndexIVFFlat(quantizer, dim, lists, metric)
    index.cp.niter, index.cp.max_points_per_centroid, index.cp.min_points_per_centroid = ROUNDS, ROWS_PER_LIST, 1
    index.train(vectors)
    # With ids of one's own this map is the only one that lets rows go without a walk through all lists.
    index.set_direct_map_type(faiss.DirectMap.Hashtable)  # type: ignore[attr-defined]
    return index


def _knn(queries: NDArray[np.float32], vectors: NDArray[np.float32], k: int) -> Any:
    return faiss.knn(queries, vectors, k, faiss.METRIC_INNER_PRODUCT)


def _checked_k(k: int) -> int:
    try:
        whole = operator.index(k)
    except TypeError:
        raise ValueError(f"k is {k!r}: ask for a whole number of neighbours") from None
    if whole < 1:
        raise ValueError(f"k is {whole}: ask for at least one neighbour")
    return whole


def _checked_rows(allowed: ArrayLike, n: int) -> NDArray[np.int64]:
    """A mask or row numbers as ascending row numbers."""
    given = np.asarray(allowed)
    if given.dtype == np.bool_:
        if given.shape != (n,):
            raise ValueError(f"a mask of rows must have shape ({n},), not {given.shape}")
        return np.flatnonzero(given)
    if given.ndim != 1 or (given.size and given.dtype.kind not in "iu"):
        raise ValueError(f"rows are a mask or whole numbers of shape (r,), not {given.dtype} of shape {given.shape}")
    if given.size and (given.min() < 0 or given.max() >= n):
        raise ValueError(f"there are {n} rows, counted from 0, but rows {given.min()} to {given.max()} are named")
    given = given.astype(np.int64, copy=False)
    return given if (given[1:] > given[:-1]).all() else np.unique(given)


def _checked_update(index: Index, vectors: ArrayLike, kept: ArrayLike) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    checked, rows = check_unit_vectors(vectors, index.dim), _checked_rows(kept, len(index))
    if np.asarray(kept).dtype != np.bool_ and not np.array_equal(kept, rows):
        raise ValueError("the rows kept must ascend, for the vectors stand in their order")
    if len(rows) > len(checked):
        raise ValueError(f"{len(rows)} rows are kept, but there are only {len(checked)} vectors")
    return checked, rows
