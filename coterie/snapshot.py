"""A gallery at one moment: its rows, an index over them and the class clusters. Nothing in a snapshot changes."""

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from coterie.clusters import ClassClusters
from coterie.errors import DataError
from coterie.index import IndexOptions, build_index
from coterie.items import GalleryItems, Items
from coterie.metadata import Values
from coterie.ranking import Found

__all__ = ["Index", "Neighbor", "Snapshot", "join_clusters", "place_class"]

logger = logging.getLogger("coterie.gallery")

# So many of the bundle's items, evenly chosen, tell where a fifth of them begins.
STRANGERS = 1024


class Index(Protocol):
    """Nearest neighbours among rows, or among those `allowed`, ascending; see `coterie.index.ExactIndex`."""

    def __len__(self) -> int: ...

    def search(self, queries: NDArray[np.float32], k: int, *, allowed: NDArray[np.int64] | None = None) -> Found: ...


@dataclass(frozen=True)
class Neighbor:
    """A gallery item near a query."""

    id: str
    label: str
    similarity: float
    metadata: dict[str, Any]


class Snapshot:
    """Rows with an index and class clusters.

    Args:
        items: all rows.
        clusters: one for every label that has rows.
        sequence: of the last change of the store that is in it.
        options: of the index.
    """

    def __init__(
        self, items: Items, clusters: ClassClusters, sequence: int = 0, options: IndexOptions = IndexOptions()
    ) -> None:
        self.items, self.sequence, self.options = items, sequence, options
        self._clusters = clusters

    @property
    def clusters(self) -> ClassClusters:
        return self._clusters

    @property
    def names(self) -> tuple[str, ...]:
        """The labels that have rows, sorted; those of `clusters`, which take longer to find."""
        return self.clusters.labels

    @cached_property
    def index(self) -> Index:
        options = self.options
        index = build_index(
            self.items.embeddings,
            self.classes,
            latency_budget=options.latency_budget,
            memory_budget=options.memory_budget,
        )
        logger.info("%s", index.report)
        return index

    @cached_property
    def classes(self) -> NDArray[np.int64]:
        """The row in `clusters` of each item's label, int64 (n,)."""
        return np.searchsorted(np.asarray(self.names, dtype=np.str_), self.items.labels)

    def classes_of(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """`classes` of these rows alone, in their shape."""
        return self.classes[rows]

    @cached_property
    def rows(self) -> Mapping[str, int]:
        """Where each id stands in `items`."""
        return dict(zip(self.items.ids, range(len(self.items)), strict=True))

    @cached_property
    def values(self) -> Values:
        """Which rows have which metadata."""
        return Values(self.items.metadata)

    def members(self, label: str) -> NDArray[np.int64]:
        """The rows of a class, in order."""
        if label not in self.names:
            return np.empty(0, dtype=np.int64)
        return np.flatnonzero(self.classes == self.names.index(label))

    def ids_of(self, label: str) -> frozenset[str]:
        """The ids of a class."""
        if label not in self._ids_of:
            self._ids_of[label] = frozenset(map(self.items.ids.__getitem__, self.members(label).tolist()))
        return self._ids_of[label]

    @cached_property
    def _ids_of(self) -> dict[str, frozenset[str]]:
        return {}

    def search(
        self,
        embeddings: NDArray[np.float32],
        k: int,
        *,
        labels: Collection[str] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> list[list[Neighbor]]:
        """The `min(k, matches)` nearest items of each unit-length embedding (n, d), most similar first.

        Args:
            labels: only items of these classes.
            metadata: only items that have all these values.

        Raises:
            DataError: there is no such class.
        """
        similarities, nearest = self.index.search(embeddings, k, allowed=self.matching(labels, metadata))
        items = self.items
        return [
            [
                Neighbor(items.ids[row], items.label(row), similarity, items.metadata[row])
                for row, similarity in zip(own, close, strict=True)
            ]
            for own, close in zip(nearest.tolist(), similarities.tolist(), strict=True)
        ]

    def matching(self, labels: Collection[str] | None, metadata: Mapping[str, Any] | None) -> NDArray[np.int64] | None:
        """The rows that have one of `labels` and all of `metadata`, in order; None where nothing is asked of them."""
        if labels is None and not metadata:
            return None
        rows: NDArray[np.int64] | None = None
        if labels is not None:
            names = self.names
            for label in labels:
                if label not in names:
                    raise DataError(f"the gallery has no class {label!r}: `coterie gallery list` shows which it has")
            rows = np.flatnonzero(np.isin(names, list(labels))[self.classes])
        for key, value in (metadata or {}).items():
            found = self.values.rows(key, value)
            rows = found if rows is None else np.intersect1d(rows, found, assume_unique=True)
        return rows

    def with_items(self, added: GalleryItems, removed: Iterable[str] = (), sequence: int = 0) -> "Snapshot":
        """This snapshot plus `added` less `removed`; only the classes concerned get new clusters."""
        gone = set(removed) | set(added.ids)
        keep = np.asarray([row for row, name in enumerate(self.items.ids) if name not in gone], dtype=np.int64)
        touched = set(added.labels.tolist()) | {str(self.items.labels[self.rows[i]]) for i in gone if i in self.rows}
        kept = self.items.select(keep)
        items = kept + added
        placed = {}
        for label in sorted(touched):
            rows = np.flatnonzero(items.labels == label)
            placed[label] = place_class(self, label, [items.ids[row] for row in rows], items.embeddings[rows])
        return Snapshot(items, join_clusters(self.clusters, placed), sequence, self.options)

    @cached_property
    def strangers(self) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Some of the rows, evenly chosen: embeddings (m, d) and classes (m,)."""
        step = -(-len(self.items) // STRANGERS) or 1
        return self.items.embeddings[::step], self.classes[::step]


def place_class(base: Snapshot, label: str, ids: Sequence[str], members: NDArray[np.float32]) -> ClassClusters | None:
    """The cluster of one class whose items may have changed; None if none is left.

    It depends on the bundle and the class's own items alone, so that processes which learnt of changes in other orders
    agree, and so does one that was started anew.

    Args:
        base: the bundle's own gallery.
        ids, members: of the class's items as they are now, with their embeddings (m, d).
    """
    if not ids:
        return None
    embeddings, classes = base.strangers
    number = -1
    if label in base.clusters.labels:
        number = base.clusters.labels.index(label)
        embeddings = embeddings[classes != number]
        bundled = base.ids_of(label)
        kept = len(bundled.intersection(ids))
        if kept == len(ids) == len(bundled):
            return base.clusters.select([number])
        if kept:
            return base.clusters.select([number]).placed(label, members, embeddings)
        # Else the name is used anew, and forgets what it meant.
    # Of the other classes a new one needs to know how wide the widest is.
    others = [row for row in range(len(base.clusters)) if row != number]
    widest = sorted(others, key=base.clusters.reaches.__getitem__)[-1:]
    return base.clusters.select(widest).placed(label, members, embeddings)


def join_clusters(clusters: ClassClusters, placed: Mapping[str, ClassClusters | None]) -> ClassClusters:
    """`clusters` with each class of `placed` replaced, added or, where it has none, taken away."""
    if not placed:
        return clusters
    kept = clusters.select([row for row, label in enumerate(clusters.labels) if label not in placed])
    parts = [kept, *(one for one in placed.values() if one is not None)]
    return ClassClusters.joined(parts)
