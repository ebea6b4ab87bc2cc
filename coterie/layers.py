"""Two layers of rows that look like one: a large one that stays as it is, and a small one above it that grows.

A row's place counts the lower layer's rows first. Rows that were removed keep their places and are passed over; what
callers see are row numbers without gaps, 0 to n − 1.
"""

from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from coterie.index import ExactIndex
from coterie.ranking import Found, merged
from coterie.snapshot import Index

__all__ = ["Gaps", "LayeredIndex"]

# Fetched from the lower layer beyond k, in case that some are removed; if too few are left, four times as many.
SPARE = 16
# More than a product in single precision errs.
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
        lower, upper: over the rows of each layer.
        gaps: places of removed rows in either.
    """

    def __init__(self, lower: Index, upper: ExactIndex, gaps: Gaps) -> None:
        self._lower, self._upper, self._gaps = lower, upper, gaps
        self._below = int(np.searchsorted(gaps.dead, len(lower)))

    def __len__(self) -> int:
        return len(self._lower) + len(self._upper) - len(self._gaps.dead)

    def search(self, queries: NDArray[np.float32], k: int, *, allowed: NDArray[np.int64] | None = None) -> Found:
        """As `coterie.index.ExactIndex.search`; `allowed` are ascending row numbers."""
        first = len(self._lower)
        if allowed is None:
            lower = self._search_lower(queries, k)
            near = self._near(queries, lower[0][:, -1]) if lower[0].shape[1] == k else self._left_above
            if not len(near):
                return lower[0], self._gaps.rows(lower[1])
            upper = self._upper.search(queries, k, allowed=near)
        else:
            places = self._gaps.places(allowed)
            below = int(np.searchsorted(places, first))
            lower = self._lower.search(queries, k, allowed=places[:below])
            upper = self._upper.search(queries, k, allowed=places[below:] - first)
        similarities, places = merged([lower, (upper[0], upper[1] + first)], k)
        return similarities, self._gaps.rows(places)

    def _search_lower(self, queries: NDArray[np.float32], k: int) -> Found:
        if not self._below:
            return self._lower.search(queries, k)
        wanted = min(k, len(self._lower) - self._below)
        fetched = wanted + min(self._below, SPARE)
        while True:
            similarities, places = self._lower.search(queries, fetched)
            left = self._left_below[places]
            if fetched >= len(self._lower) or (left.sum(axis=1) >= wanted).all():
                break
            fetched = min(4 * fetched, len(self._lower))
        first = np.argsort(~left, axis=1, kind="stable")[:, :wanted]
        return np.take_along_axis(similarities, first, 1), np.take_along_axis(places, first, 1)

    @cached_property
    def _left_below(self) -> NDArray[np.bool_]:
        left = np.ones(len(self._lower), dtype=bool)
        left[self._gaps.dead[: self._below]] = False
        return left

    def _near(self, queries: NDArray[np.float32], least: NDArray[np.float32]) -> NDArray[np.int64]:
        """The rows of the upper layer that may be as similar to a query as `least` (m,): few, and often none."""
        above = np.asarray(queries, dtype=np.float32) @ self._upper.vectors.T
        near = np.any(above >= (least - CLOSE)[:, None], axis=0)
        near[self._gaps.dead[self._below :] - len(self._lower)] = False
        return np.flatnonzero(near)

    @cached_property
    def _left_above(self) -> NDArray[np.int64]:
        """The rows of the upper layer that are left."""
        return np.delete(np.arange(len(self._upper)), self._gaps.dead[self._below :] - len(self._lower))
