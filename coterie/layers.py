"""Two layers of rows that look like one: a large one that stays as it is, and a small one above it that grows.

A row's place counts the lower layer's rows first. Rows that were removed keep their places and are passed over; what
callers see are row numbers without gaps, 0 to n − 1.
"""

from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from coterie.nearest import best
from coterie.ranking import check_unit_vectors
from coterie.snapshot import Index

__all__ = ["Gaps", "LayeredIndex"]

# Fetched from the lower layer beyond k, in case that some are removed; if too few are left, four times as many.
SPARE = 16
# More than the two layers' ways of multiplying differ by.
CLOSE = 1e-5


class Gaps:
    """Places and row numbers where some rows were removed.

    Args:
        dead: places of the removed rows, ascending, int64.
    """

    def __init__(self, dead: NDArray[np.int64]) -> None:
        self.dead = dead
        self._before = dead - np.arange(len(dead))  # rows that are left before each

    def left(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Those of the ascending `places` that are left."""
        return np.setdiff1d(places, self.dead, assume_unique=True) if len(self.dead) else places

    def rows(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """The row numbers of places that are left."""
        if not len(self.dead):
            return places
        return places - np.searchsorted(self.dead, places)

    def places(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where the rows of these numbers are."""
        if not len(self.dead):
            return rows
        return rows + np.searchsorted(self._before, rows, side="right")

    def row(self, place: int) -> int:
        return place - int(np.searchsorted(self.dead, place))

    def place(self, row: int) -> int:
        return row + int(np.searchsorted(self._before, row, side="right"))


class LayeredIndex:
    """Search in both layers at once; answers as one index over the rows that are left would.

    Args:
        lower: over the lower layer.
        upper: vectors (m, d) of unit length.
        gaps: places of removed rows in either.
    """

    def __init__(self, lower: Index, upper: NDArray[np.float32], gaps: Gaps) -> None:
        self._lower, self._upper, self._gaps = lower, upper, gaps
        self._below = int(np.searchsorted(gaps.dead, len(lower)))

    def __len__(self) -> int:
        return len(self._lower) + len(self._upper) - len(self._gaps.dead)

    def search(self, queries: NDArray[np.float32], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """As `ExactIndex.search`."""
        similarities, places = self._search_lower(queries, k)
        if len(self._upper):
            queries = check_unit_vectors(queries, self._upper.shape[1])
            above = queries @ self._upper.T
            above[:, self._gaps.dead[self._below :] - len(self._lower)] = -np.inf
            wanted, where = min(k, len(self)), len(self._lower) + np.arange(len(self._upper))
            if similarities.shape[1] == wanted:
                # Few are as near as the last that the lower layer has found, and the others need no order.
                near = (above >= similarities[:, -1:] - CLOSE).any(axis=0)
                above, where = above[:, near], where[near]
            similarities = np.concatenate([similarities, above], axis=1)
            places = np.concatenate([places, np.broadcast_to(where, above.shape)], axis=1)
            similarities, places = best(similarities, places, wanted)
        return similarities, self._gaps.rows(places)

    def _search_lower(self, queries: NDArray[np.float32], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        if not self._below:
            return self._lower.search(queries, k)
        wanted = min(k, len(self._lower) - self._below)
        fetched = wanted + min(self._below, SPARE)
        while True:
            similarities, places = self._lower.search(queries, fetched)
            left = self._left[places]
            if fetched >= len(self._lower) or (left.sum(axis=1) >= wanted).all():
                break
            fetched = min(4 * fetched, len(self._lower))
        first = np.argsort(~left, axis=1, kind="stable")[:, :wanted]
        return np.take_along_axis(similarities, first, 1), np.take_along_axis(places, first, 1)

    @cached_property
    def _left(self) -> NDArray[np.bool_]:
        left = np.ones(len(self._lower), dtype=bool)
        left[self._gaps.dead[: self._below]] = False
        return left
