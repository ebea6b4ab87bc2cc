"""The gallery: labelled embeddings that queries are compared with, the bundle's own and those enrolled since.

Readers work on an immutable snapshot; a change builds the next one and swaps it in by reference.
"""

import hashlib
import json
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from coterie.clusters import ClassClusters
from coterie.errors import BundleError, DataError
from coterie.index import ExactIndex, check_unit_vectors
from coterie.labels import check_label
from coterie.store import Store, StoredItem

__all__ = ["Gallery", "GalleryItems", "Snapshot", "item_id", "matrix_column"]


def item_id(content: bytes) -> str:
    """The gallery id of an image: the first 24 hexadecimal digits of its bytes' sha256."""
    return hashlib.sha256(content).hexdigest()[:24]


@dataclass(frozen=True)
class GalleryItems:
    """Rows of a gallery.

    Attributes:
        ids: unique; (n,).
        labels: str (n,).
        embeddings: float32 (n, d), unit length.
        positions: float32 (n, 2), for drawing a map.
        thumbnails: encoded pictures, empty bytes where there is none.
        metadata: one mapping each.
    """

    ids: tuple[str, ...]
    labels: NDArray[np.str_]
    embeddings: NDArray[np.float32]
    positions: NDArray[np.float32]
    thumbnails: tuple[bytes, ...]
    metadata: tuple[dict[str, Any], ...]

    def __post_init__(self) -> None:
        n = len(self.ids)
        if len(set(self.ids)) != n:
            raise DataError("gallery ids must be unique")
        check_unit_vectors(self.embeddings)
        sizes = {len(self.labels), len(self.embeddings), len(self.positions), len(self.thumbnails), len(self.metadata)}
        if sizes != {n}:
            raise ValueError(f"a gallery's columns differ in length: {sorted(sizes | {n})}")

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def enrolled(cls, items: Sequence[StoredItem], dim: int) -> "GalleryItems":
        """Rows for items that came after the bundle was made; they have no place on its map."""
        return cls(
            ids=tuple(item.id for item in items),
            labels=np.asarray([item.label for item in items], dtype=np.str_),
            embeddings=np.stack([item.embedding for item in items]) if items else np.empty((0, dim), np.float32),
            positions=np.full((len(items), 2), np.nan, dtype=np.float32),
            thumbnails=tuple(item.thumbnail for item in items),
            metadata=tuple(item.metadata for item in items),
        )

    def select(self, rows: NDArray[np.int64]) -> "GalleryItems":
        """The items at `rows`, in that order."""
        return GalleryItems(
            ids=tuple(self.ids[row] for row in rows),
            labels=self.labels[rows],
            embeddings=self.embeddings[rows],
            positions=self.positions[rows],
            thumbnails=tuple(self.thumbnails[row] for row in rows),
            metadata=tuple(self.metadata[row] for row in rows),
        )

    def __add__(self, other: "GalleryItems") -> "GalleryItems":
        return GalleryItems(
            ids=self.ids + other.ids,
            labels=np.concatenate([self.labels, other.labels]),
            embeddings=np.concatenate([self.embeddings, other.embeddings]),
            positions=np.concatenate([self.positions, other.positions]),
            thumbnails=self.thumbnails + other.thumbnails,
            metadata=self.metadata + other.metadata,
        )

    def write(self, path: Path) -> None:
        """Write the rows as Parquet; equal rows give equal bytes."""
        dim = self.embeddings.shape[1]
        table = pa.table(
            {
                "id": pa.array(self.ids, pa.string()),
                "label": pa.array(self.labels.tolist(), pa.string()),
                "embedding": pa.FixedSizeListArray.from_arrays(self.embeddings.ravel(), dim),
                "position": pa.FixedSizeListArray.from_arrays(self.positions.ravel(), 2),
                "thumbnail": pa.array(self.thumbnails, pa.binary()),
                "metadata": pa.array([json.dumps(row, sort_keys=True) for row in self.metadata], pa.string()),
            }
        )
        pq.write_table(table, path, compression="zstd")

    @classmethod
    def read(cls, path: Path) -> "GalleryItems":
        """Read what `write` wrote.

        Raises:
            BundleError: not such a file.
        """
        try:
            table = pq.read_table(path).combine_chunks()
            return cls(
                ids=tuple(table["id"].to_pylist()),
                labels=np.asarray(table["label"].to_pylist(), dtype=np.str_),
                embeddings=matrix_column(table["embedding"]),
                positions=matrix_column(table["position"]),
                thumbnails=tuple(table["thumbnail"].to_pylist()),
                metadata=tuple(json.loads(row) for row in table["metadata"].to_pylist()),
            )
        except (pa.ArrowException, OSError, KeyError, TypeError, ValueError, DataError) as error:
            raise BundleError(f"{path} is not a gallery: {error}") from error


def matrix_column(column: pa.ChunkedArray) -> NDArray[np.float32]:
    """A column of vectors of one width as an array (n, width).

    Raises:
        ValueError: the column holds anything else.
    """
    flat = column.combine_chunks()
    if not pa.types.is_fixed_size_list(flat.type):
        raise ValueError(f"a column of vectors has the type {flat.type}")
    values = flat.flatten().to_numpy(zero_copy_only=False).astype(np.float32)
    return np.asarray(values.reshape(len(flat), flat.type.list_size))


@dataclass(frozen=True)
class Snapshot:
    """A gallery at one moment; nothing in it changes.

    Attributes:
        items: all rows.
        clusters: one for every label that has rows.
        sequence: of the last change that is in it.
    """

    items: GalleryItems
    clusters: ClassClusters
    sequence: int = 0

    @cached_property
    def index(self) -> ExactIndex:
        return ExactIndex(self.items.embeddings)

    @cached_property
    def classes(self) -> NDArray[np.int64]:
        """The row in `clusters` of each item's label, int64 (n,)."""
        return np.searchsorted(np.asarray(self.clusters.labels, dtype=np.str_), self.items.labels)

    @cached_property
    def rows(self) -> dict[str, int]:
        """Where each id stands in `items`."""
        return {identifier: row for row, identifier in enumerate(self.items.ids)}

    def with_items(self, added: GalleryItems, removed: Iterable[str] = (), sequence: int = 0) -> "Snapshot":
        """This snapshot plus `added` less `removed`; only the classes concerned get new clusters."""
        gone = set(removed) | set(added.ids)
        keep = np.asarray(
            [row for row, identifier in enumerate(self.items.ids) if identifier not in gone], dtype=np.int64
        )
        touched = set(added.labels.tolist()) | {str(self.items.labels[self.rows[i]]) for i in gone if i in self.rows}
        kept = self.items.select(keep)
        items = kept + added
        clusters = self.clusters
        for label in sorted(touched):
            if label not in kept.labels:  # nothing is left of the class that had this name
                clusters = clusters.with_class(label, items.embeddings[:0], items.embeddings)
            own = items.labels == label
            clusters = clusters.with_class(label, items.embeddings[own], items.embeddings[~own])
        return Snapshot(items, clusters, sequence)


class Gallery:
    """The bundle's items plus the store's changes.

    Args:
        base: items and clusters as the bundle holds them.
        store: where changes are kept; without one the gallery cannot be changed.
    """

    def __init__(self, base: Snapshot, store: Store | None = None) -> None:
        self._base, self._store = base, store
        self._lock = threading.Lock()
        self._current = base
        self.snapshot()

    def snapshot(self) -> Snapshot:
        """The gallery as it is now, with every change that any process has been told is durable."""
        if self._store is None or self._store.sequence() == self._current.sequence:
            return self._current
        with self._lock:
            if self._store.sequence() != self._current.sequence:
                changes = self._store.changes()
                added = GalleryItems.enrolled(changes.added, self._base.items.embeddings.shape[1])
                self._current = self._base.with_items(added, changes.removed, changes.sequence)
            return self._current

    def add(self, items: Sequence[StoredItem]) -> None:
        """Enrol `items`; they are durable, and part of the next snapshot, when this returns."""
        for item in items:
            check_label(item.label)
            check_unit_vectors(item.embedding[None], self._base.items.embeddings.shape[1])
        self._changeable().add(items)

    def remove(self, ids: Sequence[str]) -> None:
        """Forget these items; ids that are not in the gallery are passed over."""
        known = self.snapshot().rows
        self._changeable().remove([identifier for identifier in ids if identifier in known])

    def _changeable(self) -> Store:
        if self._store is None:
            raise DataError("this gallery was opened without a store and cannot be changed")
        return self._store
