"""Nearest neighbours among unit vectors: the only place in the project that touches FAISS.

An index is immutable. FAISS's own traps stay in here: NaN queries, k above the number of rows, unordered ties, and
its choice of threads.
"""

import os

# Read when FAISS is loaded: two threads that spin for one small search make it four to ten times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import faiss
import numpy as np
from numpy.typing import NDArray

__all__ = ["ExactIndex", "check_unit_vectors"]

# Similarities that agree to so many decimals are equal: beyond, they depend on how FAISS multiplies.
DECIMALS = 6
SPARE = 16


def check_unit_vectors(vectors: NDArray[np.float32], dim: int | None = None) -> NDArray[np.float32]:
    """Return `vectors` as contiguous float32 (n, d) if they are finite and of unit length.

    Raises:
        ValueError: wrong shape or width, NaN, infinity, or a row whose length is not 1; the message names the row.
    """
    vectors = np.ascontiguousarray(vectors, dtype=np.float32)
    if vectors.ndim != 2 or (dim is not None and vectors.shape[1] != dim):
        raise ValueError(f"vectors must have shape (n, {dim or 'd'}), not {vectors.shape}")
    lengths = np.sqrt(np.einsum("nd,nd->n", vectors, vectors))
    bad = np.flatnonzero(~(np.abs(lengths - 1) < 1e-3))
    if len(bad):
        raise ValueError(f"row {bad[0]} has length {lengths[bad[0]]}, not 1: normalise the vectors first")
    return vectors


class ExactIndex:
    """Exact search by cosine similarity.

    Args:
        vectors: float32 (n, d), finite and of unit length; n may be 0.
    """

    def __init__(self, vectors: NDArray[np.float32]) -> None:
        vectors = check_unit_vectors(vectors)
        # One matrix product beats one row at a time from four queries on; the default waits for 128,000 / d.
        faiss.cvar.distance_compute_blas_threshold = 4 * vectors.shape[1]
        self.dim = vectors.shape[1]
        self._vectors = vectors
        self._index = faiss.IndexFlatIP(self.dim)
        self._index.add(vectors)

    def __len__(self) -> int:
        return int(self._index.ntotal)

    def search(self, queries: NDArray[np.float32], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """The `min(k, n)` nearest rows of each query, most similar first; equal similarities in row order.

        Args:
            queries: float32 (m, d), finite and of unit length.
            k: at least 1.

        Returns:
            similarities float32 and rows int64, both (m, min(k, n)).
        """
        if k < 1:
            raise ValueError(f"k is {k}: ask for at least one neighbour")
        queries = check_unit_vectors(queries, self.dim)
        k = min(k, len(self))
        if not len(queries) or not k:
            return np.empty((len(queries), k), dtype=np.float32), np.empty((len(queries), k), dtype=np.int64)
        # FAISS keeps any of the rows that tie for the last places: a few more show most ties whole.
        fetched = min(k + SPARE, len(self))
        similarities, rows = self._index.search(queries, fetched)
        # The last bits depend on the other queries of a batch: order by what is stable, then by row.
        order = np.lexsort((rows, -np.round(similarities, DECIMALS)), axis=1)
        similarities, rows = np.take_along_axis(similarities, order, 1), np.take_along_axis(rows, order, 1)
        if fetched < len(self):
            edge = np.round(similarities[:, [k - 1, fetched - 1]], DECIMALS)
            for query in np.flatnonzero(edge[:, 0] == edge[:, 1]):
                similarities[query, :k], rows[query, :k] = self._scan(queries[query], k)
        return similarities[:, :k], rows[:, :k]

    def _scan(self, query: NDArray[np.float32], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """`search` for one query (d,) by looking at every row."""
        similarities = self._vectors @ query
        rounded = np.round(similarities, DECIMALS)
        near = np.flatnonzero(rounded >= np.partition(rounded, -k)[-k])
        rows = near[np.argsort(-rounded[near], kind="stable")][:k]
        return similarities[rows], rows
