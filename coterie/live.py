"""A snapshot of a gallery that changes: a large foundation, and above it the rows that are newer.

A change makes the next snapshot out of this one in time that does not depend on the foundation's size. Now and then,
in the background, all rows become a new foundation.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from coterie.changes import Changes, KeptItem
from coterie.clusters import ClassClusters
from coterie.index import ExactIndex, IndexOptions, updated_index
from coterie.items import Items
from coterie.layers import Gaps, LayeredIndex
from coterie.live_items import LayeredValues, LiveItems, Newer, Picture, RowsById, SettledRows
from coterie.metadata import Values
from coterie.snapshot import Snapshot, join_clusters, place_class

__all__ = ["LiveSnapshot"]

Placing = Callable[[], ClassClusters | None]


class LiveSnapshot(Snapshot):
    """A snapshot that knows its successor; the first is made by `LiveSnapshot.of`.

    Args:
        base: the bundle's own gallery.
        foundation, newer: the two layers.
        placed: clusters as they were before the classes of `placing` changed.
        placing: finds the cluster of each class that has changed since, when clusters are first asked for.
        picture: gives the thumbnail of an id.
    """

    def __init__(
        self,
        base: Snapshot,
        foundation: Snapshot,
        newer: Newer,
        placed: ClassClusters,
        placing: Mapping[str, Placing],
        sequence: int,
        picture: Picture,
    ) -> None:
        self._base, self._foundation, self._newer, self._picture = base, foundation, newer, picture
        self._placed, self._placing = placed, placing
        self._live = LiveItems(foundation, newer, picture)
        self.items, self.sequence, self.options = self._live, sequence, base.options

    @classmethod
    def of(cls, base: Snapshot, picture: Picture) -> "LiveSnapshot":
        """The bundle's own gallery, without any change."""
        return cls(base, base, Newer.none(base.items.dim), base.clusters, {}, 0, picture)

    @property
    def weight(self) -> int:
        """How many rows were added or removed since the foundation was laid."""
        return len(self._newer.ids) + len(self._newer.gaps.dead)

    @property
    def foundation_size(self) -> int:
        return len(self._foundation.items)

    @cached_property
    def clusters(self) -> ClassClusters:
        return join_clusters(self._placed, {label: place() for label, place in self._placing.items()})

    @cached_property
    def names(self) -> tuple[str, ...]:
        names = set(self._placed.labels) - set(self._placing)
        changed = (label for label in self._placing if any(map(len, _members(self._foundation, self._newer, label))))
        return tuple(sorted(names.union(changed)))

    @cached_property
    def index(self) -> LayeredIndex:
        newer = ExactIndex(self._newer.vectors.array, checked=True)
        return LayeredIndex(self._foundation.index, newer, self._newer.gaps)

    @cached_property
    def classes(self) -> NDArray[np.int64]:
        names = np.asarray(self.names, dtype=np.str_)
        # A name that is no more stands for nothing but removed rows.
        renumbered = np.searchsorted(names, np.asarray(self._foundation.names, dtype=np.str_))
        newer = np.searchsorted(names, np.asarray([*self._newer.labels], dtype=np.str_))
        both = np.concatenate([renumbered[self._foundation.classes], newer])
        return both[self._live.left] if len(self._newer.gaps.dead) else both

    def classes_of(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        names = np.asarray(self.names, dtype=np.str_)
        places, below = self._newer.gaps.places(rows), len(self._foundation.items)
        newer, found = places >= below, np.empty(rows.shape, dtype=np.int64)
        foundation = np.searchsorted(names, np.asarray(self._foundation.names, dtype=np.str_))
        found[~newer] = foundation[self._foundation.classes[places[~newer]]]
        labels = [self._newer.labels[place - below] for place in places[newer].tolist()]
        found[newer] = np.searchsorted(names, np.asarray(labels, dtype=np.str_))
        return found

    @cached_property
    def rows(self) -> Mapping[str, int]:
        return RowsById(self._live)

    @cached_property
    def values(self) -> Values:
        return LayeredValues(self._foundation.values, len(self._foundation.items), self._newer)

    def changed(self, changes: Changes) -> "LiveSnapshot":
        """This snapshot with the changes after its sequence."""
        items = [item for item in changes.items if item.embedding is not None or item.id in self._base.rows]
        dead, touched = [], {item.label for item in items}
        for identifier in chain(changes.removed, (item.id for item in items)):
            place = self._live.place(identifier)
            if place is not None:
                dead.append(place)
                touched.add(self._live.label_at(place))
        newer = self._newer_with(items, dead)
        done = "clusters" in self.__dict__  # then they need not be found again
        placing: dict[str, Placing] = {
            **({} if done else self._placing),
            **_placings(self._base, self._foundation, newer, touched),
        }
        placed = self.clusters if done else self._placed
        return LiveSnapshot(self._base, self._foundation, newer, placed, placing, changes.sequence, self._picture)

    def settled(self) -> "LiveSnapshot":
        """The same rows, all of them foundation, with everything at hand that a search needs."""
        rows = SettledRows.after(self._foundation.rows, self._live, self._newer)
        foundation = _Foundation(self._live.whole(), self.names, self.sequence, self.classes, rows, self.options)
        if "index" in self._foundation.__dict__:
            left = self._live.left[: len(self._foundation.items)]
            index = updated_index(self._foundation.index, foundation.items.embeddings, left)
            if index is not None:
                foundation.index = index
        foundation.index  # noqa: B018  a cached property
        newer, done = Newer.none(self.items.dim), "clusters" in self.__dict__
        placing = {} if done else _placings(self._base, foundation, newer, self._placing)
        placed = self.clusters if done else self._placed
        return LiveSnapshot(self._base, foundation, newer, placed, placing, self.sequence, self._picture)

    def _newer_with(self, items: Sequence[KeptItem], dead: Sequence[int]) -> Newer:
        """The upper layer with `items` added, and without the rows at the places `dead`, in either layer."""
        newer, base = self._newer, self._base.items
        gaps = newer.gaps
        if dead:
            gaps = Gaps(np.sort(np.append(gaps.dead, np.asarray(dead, dtype=np.int64))))
        if not items:
            return replace(newer, gaps=gaps)
        own = [self._base.rows.get(item.id) for item in items]
        vectors = [
            base.embeddings[row] if item.embedding is None else item.embedding
            for item, row in zip(items, own, strict=True)
        ]
        nowhere = np.full(2, np.nan, dtype=np.float32)
        positions = [nowhere if row is None else base.positions[row] for row in own]
        return Newer(
            ids=newer.ids.with_entries(item.id for item in items),
            labels=newer.labels.with_entries(item.label for item in items),
            metadata=newer.metadata.with_entries(item.metadata for item in items),
            positions=newer.positions.with_rows(np.stack(positions)),
            vectors=newer.vectors.with_rows(np.stack(vectors)),
            gaps=gaps,
        )


class _Foundation(Snapshot):
    """Rows whose classes and numbers are known already. Nobody asks for their clusters, but for those of the whole."""

    def __init__(
        self,
        items: Items,
        names: tuple[str, ...],
        sequence: int,
        classes: NDArray[np.int64],
        rows: Mapping[str, int],
        options: IndexOptions,
    ) -> None:
        self.items, self.sequence, self.options = items, sequence, options
        self._names, self._classes, self._rows = names, classes, rows

    @property
    def names(self) -> tuple[str, ...]:
        return self._names

    @property
    def classes(self) -> NDArray[np.int64]:
        return self._classes

    @property
    def rows(self) -> Mapping[str, int]:
        return self._rows


def _placings(base: Snapshot, foundation: Snapshot, newer: Newer, labels: Iterable[str]) -> dict[str, Placing]:
    return {label: partial(_place, base, foundation, newer, label) for label in labels}


def _members(foundation: Snapshot, newer: Newer, label: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The rows of a class in either layer."""
    below = len(foundation.items)
    older = newer.gaps.left(foundation.members(label))
    return older, newer.gaps.left(below + np.asarray(newer.labels.rows(label), dtype=np.int64)) - below


def _place(base: Snapshot, foundation: Snapshot, newer: Newer, label: str) -> ClassClusters | None:
    """The cluster of a class whose items have changed."""
    older, above = _members(foundation, newer, label)
    ids = [
        *map(foundation.items.ids.__getitem__, older.tolist()),
        *map(newer.ids.__getitem__, above.tolist()),
    ]
    members = np.concatenate([foundation.items.embeddings[older], newer.vectors.array[above]])
    return place_class(base, label, ids, members)
