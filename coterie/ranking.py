"""How candidate rows become an answer: similarities anew in double precision, to six decimals, ties in row order.

So an answer depends neither on the other queries of its batch, nor on who proposed the rows and how near it took them
to be. Products are NumPy's own, not those of its BLAS, whose threads would wait for each other on busy cores.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["BLOCK", "DOUBT", "MILLION", "Found", "check_unit_vectors", "largest", "merged", "ranked", "scanned"]

Found = tuple[NDArray[np.float32], NDArray[np.int64]]

# Work in blocks of this many numbers, 16 MB of float32.
BLOCK = 1 << 22
# Similarities are whole millionths: beyond, they would depend on how a product is summed up.
MILLION = 1_000_000
# In millionths: single precision errs by half of one, so what lies this near the last candidate may belong before it.
DOUBT = 4
# A sort key holds the row in its lower bits.
ROW_BITS = 40


def check_unit_vectors(vectors: ArrayLike, dim: int | None = None) -> NDArray[np.float32]:
    """Return `vectors` as contiguous float32 (n, d) if they are finite and of unit length.

    Raises:
        ValueError: wrong shape or width, NaN, infinity, or a row whose length is not 1; the message names the row.
    """
    with np.errstate(over="ignore"):  # becomes infinity, which is found below
        checked = np.ascontiguousarray(vectors, dtype=np.float32)
        if checked.ndim != 2 or (dim is not None and checked.shape[1] != dim):
            raise ValueError(f"vectors must have shape (n, {dim or 'd'}), not {checked.shape}")
        lengths = np.sqrt(np.vecdot(checked, checked))
    sound = np.abs(lengths - 1) < 1e-3
    if not sound.all():
        bad = sound.argmin()
        raise ValueError(f"row {bad} has length {lengths[bad]}, not 1: normalise the vectors first")
    return checked


def ranked(
    queries: NDArray[np.float32], vectors: NDArray[np.float32], rows: NDArray[np.int64], k: int
) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]:
    """The k nearest of each query's candidate `rows` (m, c), of which at least k are not -1.

    Returns:
        similarities and rows (m, k); and the numbers of those queries for which a row that is no candidate may be as
        near as the k-th, because the last candidate hardly is farther.
    """
    step = max(1, BLOCK // rows.shape[1] // vectors.shape[1])
    if len(rows) > step:
        blocks = [slice(start, start + step) for start in range(0, len(rows), step)]
        keys = np.concatenate([_keys(queries[block], vectors, rows[block]) for block in blocks])
    else:
        keys = _keys(queries, vectors, rows)
    keys.sort(axis=1)
    doubtful = keys[:, -1] - keys[:, k - 1] < (DOUBT + 1) << ROW_BITS
    return *_unpacked(keys[:, :k]), doubtful.nonzero()[0]


def scanned(
    query: NDArray[np.float32], vectors: NDArray[np.float32], k: int, rows: NDArray[np.int64] | None = None
) -> Found:
    """The k nearest of all rows, or of these, to one query (d,): each (k,). The slow way that leaves no doubt."""
    similarities = np.einsum("nd,d->n", vectors, query)
    if rows is not None:
        similarities = similarities[rows]
    near = np.flatnonzero(similarities >= np.partition(similarities, -k)[-k] - DOUBT / MILLION)
    near = near if rows is None else rows[near]
    step = max(1, BLOCK // vectors.shape[1])
    blocks = [near[start : start + step] for start in range(0, len(near), step)]
    keys = np.concatenate([_keys(query[None], vectors, block[None])[0] for block in blocks])
    return _unpacked(np.sort(keys)[:k])


def merged(parts: Sequence[Found], k: int) -> Found:
    """The k nearest of what several searches among different rows have found for the same queries, each (m, c)."""
    similarities, rows = (np.concatenate(columns, axis=1) for columns in zip(*parts, strict=True))
    keys = _packed(similarities.astype(np.float64), rows)
    keys.sort(axis=1)
    return _unpacked(keys[:, :k])


def largest(similarities: NDArray[np.float32], rows: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Those `count` of each line's `rows` (m, c) whose similarities are largest, in any order."""
    if rows.shape[1] <= count:
        return rows
    return np.take_along_axis(rows, np.argpartition(similarities, -count, axis=1)[:, -count:], 1)


def _keys(queries: NDArray[np.float32], vectors: NDArray[np.float32], rows: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Numbers that sort by similarity in millionths, then by row, for candidate `rows` (m, c); -1 comes last."""
    candidates = vectors.take(rows, axis=0, mode="wrap").astype(np.float64)  # (m, c, d)
    return _packed(np.vecdot(candidates, queries.astype(np.float64)[:, None, :]), rows)


def _packed(similarities: NDArray[np.float64], rows: NDArray[np.int64]) -> NDArray[np.uint64]:
    distances = 2 * MILLION - np.rint(similarities * MILLION).astype(np.int64)
    keys: NDArray[np.uint64] = ((distances << ROW_BITS) | rows).view(np.uint64)  # -1 becomes the largest number
    return keys


def _unpacked(keys: NDArray[np.uint64]) -> Found:
    """Similarities and rows of `_keys`."""
    whole = keys.view(np.int64)
    similarities = (2 * MILLION - (whole >> ROW_BITS)) / MILLION
    return similarities.astype(np.float32), whole & ((1 << ROW_BITS) - 1)
