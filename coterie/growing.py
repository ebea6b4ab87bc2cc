"""Columns that are added to. Whoever holds one sees the entries that were there when it was made, and no others.

Versions share what they hold, so another costs the time of what is added. Only the newest is added to without a copy;
not by two threads at once.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from operator import index
from typing import Generic, Self, SupportsIndex, TypeVar

import numpy as np
from numpy.typing import NDArray

__all__ = ["GrowingColumn", "GrowingKeys", "GrowingRows"]

Entry = TypeVar("Entry")


class GrowingRows:
    """Vectors float32 (n, d)."""

    def __init__(self, dim: int) -> None:
        self._room = np.empty((0, dim), dtype=np.float32)
        self._used = [0]  # shared by all who hold a part of the same room
        self._length = 0

    @property
    def array(self) -> NDArray[np.float32]:
        return self._room[: self._length]

    def __len__(self) -> int:
        return self._length

    def with_rows(self, rows: NDArray[np.float32]) -> "GrowingRows":
        """These rows and then `rows`, which are copied."""
        grown = GrowingRows(self._room.shape[1])
        grown._length = self._length + len(rows)
        grown._room, grown._used = self._room, self._used
        if grown._length > len(self._room) or self._used[0] != self._length:
            grown._room = np.empty((2 * grown._length, self._room.shape[1]), dtype=np.float32)
            grown._room[: self._length] = self.array
            grown._used = [0]
        grown._room[self._length : grown._length] = rows
        grown._used[0] = grown._length
        return grown


class GrowingColumn(Generic[Entry]):
    """Entries of any kind; a `coterie.items.Column`."""

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        self._entries = list(entries)  # shared, and may hold more than this version's
        self._length = len(self._entries)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries[: self._length])

    def __getitem__(self, row: SupportsIndex) -> Entry:
        number = index(row)
        if not -self._length <= number < self._length:
            raise IndexError(f"there is no row {number} in {self._length}")
        return self._entries[number % self._length]

    def with_entries(self, entries: Iterable[Entry]) -> Self:
        """These entries and then `entries`."""
        newest = self if len(self._entries) == self._length else type(self)(self)
        grown = newest._sharing()
        grown._entries.extend(entries)
        grown._length = len(grown._entries)
        return grown

    def _sharing(self) -> Self:
        shared = type(self)()
        shared._entries = self._entries
        return shared


class GrowingKeys(GrowingColumn[str]):
    """Names that are looked up; a name may stand in many rows."""

    def __init__(self, entries: Iterable[str] = ()) -> None:
        super().__init__(entries)
        self._rows: dict[str, list[int]] = {}
        self._list(0)

    def rows(self, name: str) -> list[int]:
        """The rows in which it stands, ascending."""
        rows = self._rows.get(name, [])
        return rows[: bisect_left(rows, self._length)]

    def with_entries(self, entries: Iterable[str]) -> Self:
        grown = super().with_entries(entries)
        grown._list(len(self))
        return grown

    def _list(self, start: int) -> None:
        for row in range(start, self._length):
            self._rows.setdefault(self._entries[row], []).append(row)

    def _sharing(self) -> Self:
        shared = super()._sharing()
        shared._rows = self._rows
        return shared
