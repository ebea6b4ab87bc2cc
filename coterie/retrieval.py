"""How well embeddings bring their own together: neighbours' votes, retrieval, silhouette.

Similarities count as equal where they agree to six decimals, and equal ones stand in gallery order, as in every search
of the project; see coterie.ranking.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from coterie.machine import processors
from coterie.ranking import check_unit_vectors

__all__ = ["Retrieval", "retrieve", "silhouettes", "weighted_votes"]

# Similarities held at once by a thread: 32 MB of float64, and as sort keys as much.
BLOCK = 1 << 22
MILLION = 1_000_000
ROW_BITS = 32


def weighted_votes(
    similarities: NDArray[np.float32], classes: NDArray[np.int64], count: int, *, temperature: float = 0.07
) -> NDArray[np.float64]:
    """Σ exp((s_i − 1) / T) over the neighbours of each class: DINO's weighted vote (arXiv 2104.14294, appendix F.1).

    Less the factor exp(1 / T), which is the same for all and beyond float16's range.

    Args:
        similarities, classes: of the neighbours, both (n, k).
        count: how many classes there are, c.

    Returns:
        float64 (n, c).

    >>> votes = weighted_votes(np.array([[0.9, 0.8, 0.8]], dtype=np.float32), np.array([[2, 0, 0]]), 3)
    >>> votes.argmax(axis=1).tolist(), (votes[0, 2] / votes[0, 0]).round(3).item()
    ([2], 2.086)
    """
    n = len(similarities)
    weights = np.exp((similarities.astype(np.float64) - 1) / temperature)
    cells = np.arange(n)[:, None] * count + classes
    votes = np.bincount(cells.ravel(), weights=weights.ravel(), minlength=n * count)
    return np.asarray(votes.reshape(n, count), dtype=np.float64)


@dataclass(frozen=True)
class Retrieval:
    """Of each query, float64 (n,): NaN where the gallery has nothing of its class. R is what it has of it.

    Attributes:
        recall: by k, 1 where one of the k nearest is of the class; in metric learning called Recall@k.
        r_precision: share of the R nearest that are of the class.
        map_at_r: 1/R Σ_{i ≤ R} P(i) · [the i-th is of the class], P(i) being the share of the i nearest that are
            (arXiv 2003.08505, section 3.2).
    """

    recall: dict[int, NDArray[np.float64]]
    r_precision: NDArray[np.float64]
    map_at_r: NDArray[np.float64]


def retrieve(
    queries: NDArray[np.float32],
    truth: NDArray[np.int64],
    gallery: NDArray[np.float32],
    classes: NDArray[np.int64],
    *,
    ks: Sequence[int] = (1, 5, 10),
    progress: Callable[[int], None] | None = None,
) -> Retrieval:
    """Rank the whole gallery for every query; queries go in blocks, on as many threads as there are processors.

    Args:
        queries, gallery: float32 (n, d) and (m, d), of unit length.
        truth, classes: numbers of their classes, (n,) and (m,).
        ks: of Recall@k; more than m counts as m.
        progress: called with the number of queries done.

    Raises:
        ValueError: embeddings are not finite or not of unit length.

    >>> corners = np.eye(3, dtype=np.float32)
    >>> found = retrieve(corners[:1], np.array([7]), corners, np.array([5, 7, 7]), ks=(1, 2))
    >>> found.recall[1].tolist(), found.recall[2].tolist(), found.r_precision.tolist(), found.map_at_r.tolist()
    ([0.0], [1.0], [0.5], [0.25])
    """
    q, g = (check_unit_vectors(vectors).astype(np.float64) for vectors in (queries, gallery))
    values = np.full((len(q), len(ks) + 2), np.nan)

    def rank(rows: NDArray[np.int64]) -> int:
        values[rows] = _ranked(q[rows], truth[rows[0]], g, classes, ks)
        return len(rows)

    # Each thread multiplies alone: several that share NumPy's own threads stand in each other's way.
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(processors()) as pool:
        for done in pool.map(rank, _blocks(truth, classes)):
            if progress:
                progress(done)
    return Retrieval({k: values[:, i] for i, k in enumerate(ks)}, values[:, -2], values[:, -1])


def _blocks(truth: NDArray[np.int64], classes: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    """Rows of queries of one class that the gallery has, for whom R is the same."""
    step = max(1, BLOCK // max(1, len(classes)))
    for number in np.intersect1d(truth, classes):
        rows = np.flatnonzero(truth == number)
        yield from (rows[start : start + step] for start in range(0, len(rows), step))


def _ranked(
    queries: NDArray[np.float64],
    number: np.int64,
    gallery: NDArray[np.float64],
    classes: NDArray[np.int64],
    ks: Sequence[int],
) -> NDArray[np.float64]:
    """Recall at each of `ks`, R-precision and MAP@R of queries of the class `number`, (n, len(ks) + 2)."""
    same = classes == number
    relevant = int(same.sum())
    deep = min(max(relevant, *ks), len(classes))
    distances = queries @ gallery.T
    distances *= -MILLION
    np.rint(distances, out=distances)
    distances += 2 * MILLION
    # One whole number for similarity and row, so that no two are equal. In place: fresh memory costs more than sums.
    keys = distances.astype(np.int64)
    keys <<= ROW_BITS
    keys |= np.arange(len(classes))
    if deep < keys.shape[1]:
        keys.partition(deep - 1, axis=1)
        keys = keys[:, :deep]
    keys.sort(axis=1)
    hits = same[keys & ((1 << ROW_BITS) - 1)]
    precision = np.cumsum(hits[:, :relevant], axis=1) / np.arange(1, relevant + 1)
    found = [hits[:, :k].any(axis=1) for k in ks]
    return np.stack(
        [*found, hits[:, :relevant].mean(axis=1), (precision * hits[:, :relevant]).sum(axis=1) / relevant], axis=1
    )


def silhouettes(embeddings: NDArray[np.float32], classes: NDArray[np.int64]) -> NDArray[np.float64]:
    """(b − a) / max(a, b) of each row (n, d) by cosine distance, (n,): Rousseeuw, J. Comput. Appl. Math. 20 (1987).

    a is the mean distance to the others of its class, b that to the nearest other class. Of unit vectors the mean
    distance to a class is 1 − x · its mean, so n² distances are never formed. A row alone in its class has 0; all are
    NaN where there is but one class.

    >>> rows = np.array([[1, 0], [1, 0], [0, 1], [0, 1]], dtype=np.float32)
    >>> silhouettes(rows, np.array([0, 0, 1, 1])).tolist()
    [1.0, 1.0, 1.0, 1.0]
    """
    x = check_unit_vectors(embeddings).astype(np.float64)
    names, codes, counts = np.unique(classes, return_inverse=True, return_counts=True)
    if len(names) < 2:
        return np.full(len(x), np.nan)
    sums = np.zeros((len(names), x.shape[1]))
    np.add.at(sums, codes, x)
    distances = counts - x @ sums.T  # (n, c): summed over each class
    each = np.arange(len(x))
    own = distances[each, codes] - (1 - np.vecdot(x, x))  # a row is at no distance from itself
    within = own / np.maximum(counts[codes] - 1, 1)
    distances /= counts
    distances[each, codes] = np.inf
    between = distances.min(axis=1)
    larger = np.maximum(np.maximum(within, between), 1e-12)
    return np.asarray(np.where(counts[codes] > 1, (between - within) / larger, 0.0))
