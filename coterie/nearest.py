"""Which of many rows are nearest, in the order that every search of the project answers in."""

import numpy as np
from numpy.typing import NDArray

from coterie.items import Items
from coterie.ranking import check_unit_vectors

__all__ = ["DECIMALS", "best", "nearest_of"]

# Similarities that agree to so many decimals are equal, as in coterie.ranking.
DECIMALS = 6

# Similarities held at once: 16 MB.
BLOCK = 2**22


def best(
    similarities: NDArray[np.float32], rows: NDArray[np.int64], k: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The k largest similarities of each query, (m, n) to (m, k), with their rows; equal ones in row order.

    Similarities that agree to six decimals are equal. Minus infinity marks what is not to be found.
    """
    rows = np.broadcast_to(rows, similarities.shape)
    # One whole number for similarity and row, so that no two are equal and a partial sort suffices.
    rounded = np.rint(np.round(np.maximum(similarities, -2), DECIMALS).astype(np.float64) * 10**DECIMALS)
    order = -rounded.astype(np.int64) * 2**32 + rows
    if k < order.shape[1]:
        some = np.argpartition(order, k - 1, axis=1)[:, :k]
    else:
        some = np.broadcast_to(np.arange(order.shape[1]), order.shape)
    first = np.take_along_axis(some, np.argsort(np.take_along_axis(order, some, 1), axis=1), 1)
    return np.take_along_axis(similarities, first, 1), np.take_along_axis(rows, first, 1)


def nearest_of(
    queries: NDArray[np.float32], items: Items, rows: NDArray[np.int64], k: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The `min(k, r)` nearest of the items at `rows` (r,) to each unit-length query (m, d), by looking at all of them.

    Returns:
        similarities float32 and rows int64, both (m, min(k, r)).
    """
    if k < 1:
        raise ValueError(f"k is {k}: ask for at least one neighbour")
    queries = check_unit_vectors(queries, items.dim)
    k = min(k, len(rows))
    similarities = np.empty((len(queries), k), dtype=np.float32)
    nearest = np.empty((len(queries), k), dtype=np.int64)
    step = max(1, BLOCK // max(1, len(items)))
    for start in range(0, len(queries) if k else 0, step):
        part = slice(start, start + step)
        similarities[part], nearest[part] = best(items.similarities(queries[part], rows), rows, k)
    return similarities, nearest
