"""The rows of a gallery in two layers: a foundation that stays as it is, and above it those that are newer.

Single rows are looked up where they lie; whole columns are put together when they are asked for.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, compress
from operator import index
from typing import Any, Generic, SupportsIndex, TypeVar

import numpy as np
from numpy.typing import NDArray

from coterie.growing import GrowingColumn, GrowingKeys, GrowingRows
from coterie.items import Column, GalleryItems
from coterie.layers import Gaps
from coterie.metadata import Values
from coterie.snapshot import Snapshot

__all__ = ["LayeredValues", "LiveItems", "Newer", "Picture", "RowsById", "SettledRows"]

Entry = TypeVar("Entry")
Scalar = TypeVar("Scalar", bound=np.generic)
Picture = Callable[[str], bytes]

IDLE_NUMBERS = 1000  # that are no longer any id's


@dataclass(frozen=True)
class Newer:
    """The rows above the foundation, and the places of removed rows in either; columns as in GalleryItems."""

    ids: GrowingKeys
    labels: GrowingKeys
    metadata: GrowingColumn[dict[str, Any]]
    positions: GrowingRows
    vectors: GrowingRows
    gaps: Gaps

    @classmethod
    def none(cls, dim: int) -> "Newer":
        gaps = Gaps(np.empty(0, dtype=np.int64))
        return cls(GrowingKeys(), GrowingKeys(), GrowingColumn(), GrowingRows(2), GrowingRows(dim), gaps)


class LiveItems:
    """The rows of a live snapshot; a `coterie.items.Items`."""

    def __init__(self, foundation: Snapshot, newer: Newer, picture: Picture) -> None:
        self._foundation, self._newer, self._picture = foundation, newer, picture
        self._below = len(foundation.items)

    def __len__(self) -> int:
        return self._below + len(self._newer.ids) - len(self._newer.gaps.dead)

    @property
    def foundation_ids(self) -> Column[str]:
        return self._foundation.items.ids

    @property
    def ids(self) -> Column[str]:
        return _LayeredColumn(self, self._foundation.items.ids, self._newer.ids)

    @property
    def metadata(self) -> Column[dict[str, Any]]:
        return _LayeredColumn(self, self._foundation.items.metadata, self._newer.metadata)

    @property
    def thumbnails(self) -> Column[bytes]:
        return _Pictures(self.ids, self._picture)

    @cached_property
    def labels(self) -> NDArray[np.str_]:
        return self._joined(self._foundation.items.labels, np.asarray([*self._newer.labels], dtype=np.str_))

    @cached_property
    def embeddings(self) -> NDArray[np.float32]:
        return self._joined(self._foundation.items.embeddings, self._newer.vectors.array)

    @cached_property
    def positions(self) -> NDArray[np.float32]:
        return self._joined(self._foundation.items.positions, self._newer.positions.array)

    @cached_property
    def left(self) -> NDArray[np.bool_]:
        """Which places have a row."""
        left = np.ones(self._below + len(self._newer.ids), dtype=bool)
        left[self._newer.gaps.dead] = False
        return left

    def _joined(self, older: NDArray[Scalar], newer: NDArray[Scalar]) -> NDArray[Scalar]:
        both = np.concatenate([older, newer])
        return both[self.left] if len(self._newer.gaps.dead) else both

    def label(self, row: int) -> str:
        return self.label_at(self._newer.gaps.place(row))

    def label_at(self, place: int) -> str:
        """The label of the row at a place, left or removed."""
        if place < self._below:
            return self._foundation.items.label(place)
        return self._newer.labels[place - self._below]

    def place(self, identifier: str) -> int | None:
        """Where the item of this id stands, if it is in the gallery."""
        newer = self._newer.ids.rows(identifier)
        # One that came anew stands in several rows, of which all but the last are removed.
        place = self._below + newer[-1] if newer else self._foundation.rows.get(identifier)
        return place if place is not None and self.left[place] else None

    def row(self, place: int) -> int:
        return self._newer.gaps.row(place)

    @property
    def dim(self) -> int:
        return self._foundation.items.dim

    def select(self, rows: NDArray[np.int64]) -> GalleryItems:
        ids = tuple(self.ids[row] for row in rows.tolist())
        return GalleryItems(
            ids=ids,
            labels=self.labels[rows],
            embeddings=self.embeddings[rows],
            positions=self.positions[rows],
            thumbnails=_Pictures(ids, self._picture),
            metadata=tuple(self.metadata[row] for row in rows.tolist()),
        )

    def whole(self) -> GalleryItems:
        """All rows; nothing that was put together for it stays behind here."""
        old, newer = self._foundation.items, self._newer
        ids = self._joined(_objects(old.ids), _objects(newer.ids))
        return _CheckedItems(
            ids=ids,
            labels=self._joined(old.labels, np.asarray([*newer.labels], dtype=np.str_)),
            embeddings=self._joined(old.embeddings, newer.vectors.array),
            positions=self._joined(old.positions, newer.positions.array),
            thumbnails=_Pictures(ids, self._picture),
            metadata=self._joined(_objects(old.metadata), _objects(newer.metadata)),
        )

    def entry(self, row: SupportsIndex, older: Column[Entry], newer: Column[Entry]) -> Entry:
        """A row's entry of a column."""
        number = index(row)
        if not -len(self) <= number < len(self):
            raise IndexError(f"there is no row {number} in {len(self)}")
        place = self._newer.gaps.place(number % len(self))
        return older[place] if place < self._below else newer[place - self._below]


class _LayeredColumn(Generic[Entry]):
    """A column of two layers, without the removed rows."""

    def __init__(self, items: LiveItems, older: Column[Entry], newer: Column[Entry]) -> None:
        self._items, self._older, self._newer = items, older, newer

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Entry]:
        return compress(chain(self._older, self._newer), self._items.left.tolist())

    def __getitem__(self, row: SupportsIndex) -> Entry:
        return self._items.entry(row, self._older, self._newer)


class _Pictures:
    """Thumbnails, fetched one by one: all of a gallery's would fill the memory."""

    def __init__(self, ids: Column[str], picture: Picture) -> None:
        self._ids, self._picture = ids, picture

    def __len__(self) -> int:
        return len(self._ids)

    def __iter__(self) -> Iterator[bytes]:
        return map(self._picture, self._ids)

    def __getitem__(self, row: SupportsIndex) -> bytes:
        return self._picture(self._ids[row])


@dataclass(frozen=True)
class _CheckedItems(GalleryItems):
    """Rows that were checked when they came in; to look at all of them again would hold up every query."""

    def __post_init__(self) -> None: ...


def _objects(column: Column[Any]) -> NDArray[np.object_]:
    """A column as an array, which is put together and picked from without Python's help."""
    if isinstance(column, np.ndarray):
        return column
    objects = np.empty(len(column), dtype=np.object_)
    objects[:] = list(column)
    return objects


class RowsById(Mapping[str, int]):
    """Row numbers by id, in two layers."""

    def __init__(self, items: LiveItems) -> None:
        self._items = items

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[str]:
        return iter(self._items.ids)

    def __getitem__(self, identifier: str) -> int:
        place = self._items.place(identifier)
        if place is None:
            raise KeyError(identifier)
        return self._items.row(place)


class SettledRows(Mapping[str, int]):
    """Row numbers by id, of a foundation. An id keeps its number when rows before it go; where that is, an array says.

    So the next foundation's are a copy with a few changes, in a tenth of the time that it takes to count all ids anew.

    Args:
        numbers: of the ids that are left, from 0 on.
        row_of: row by number; −1 for numbers that are no more in use.
    """

    def __init__(self, numbers: dict[str, int], row_of: NDArray[np.int64]) -> None:
        self._numbers, self._row_of = numbers, row_of

    @classmethod
    def after(cls, before: Mapping[str, int], items: LiveItems, newer: Newer) -> "SettledRows":
        """Those of `items`, a foundation with the rows `before`, and `newer` above it."""
        if isinstance(before, SettledRows):
            numbers, row_of = before._numbers.copy(), before._row_of
        else:
            numbers, row_of = dict(before), np.arange(len(before))
        if len(row_of) > 2 * len(items) + IDLE_NUMBERS:  # most are out of use
            return cls(dict(zip(items.ids, range(len(items)), strict=True)), np.arange(len(items)))
        below = len(before)
        used = np.empty(below, dtype=np.int64)  # number by row
        used[row_of[row_of >= 0]] = np.flatnonzero(row_of >= 0)
        ids = items.foundation_ids
        for place in newer.gaps.dead[: np.searchsorted(newer.gaps.dead, below)].tolist():
            numbers.pop(ids[place], None)
        added = compress(enumerate(newer.ids, len(row_of)), items.left[below:].tolist())
        numbers.update((identifier, number) for number, identifier in added)
        left = np.concatenate([used, len(row_of) + np.arange(len(newer.ids))])[items.left]
        rows = np.full(len(row_of) + len(newer.ids), -1, dtype=np.int64)
        rows[left] = np.arange(len(left))
        return cls(numbers, rows)

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Iterator[str]:
        return iter(self._numbers)

    def __getitem__(self, identifier: str) -> int:
        return int(self._row_of[self._numbers[identifier]])


class LayeredValues(Values):
    """Metadata of two layers, without the removed rows."""

    def __init__(self, older: Values, below: int, newer: Newer) -> None:
        super().__init__(newer.metadata)
        self._older, self._below, self._gaps = older, below, newer.gaps

    def rows(self, key: str, value: Any) -> NDArray[np.int64]:
        places = np.concatenate([self._older.rows(key, value), super().rows(key, value) + self._below])
        return self._gaps.rows(self._gaps.left(places))
