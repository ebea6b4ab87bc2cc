"""The gallery: labelled embeddings that queries are compared with, the bundle's own and those enrolled since.

Readers work on an immutable snapshot. A change is laid over the last one and the result swapped in by reference; when
much has changed, a thread in the background makes the whole a new foundation, which is swapped in the same way.
"""

import logging
import threading
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coterie.changes import Edit, GalleryStore, KeptItem, Receipt, StoredItem
from coterie.errors import CoterieWarning, DataError, StoreError
from coterie.items import GalleryItems, item_id, matrix_column
from coterie.labels import check_label
from coterie.live import LiveSnapshot
from coterie.ranking import check_unit_vectors
from coterie.snapshot import Neighbor, Snapshot

__all__ = ["Gallery", "GalleryItems", "Neighbor", "Snapshot", "item_id", "matrix_column"]

logger = logging.getLogger("coterie.gallery")

# A new foundation is laid when so many rows were added or removed, and this share of the old one. Up to there they
# cost a search a tenth of what the foundation does.
MANY_CHANGES, LARGE_SHARE = 2000, 0.1


class Gallery:
    """The bundle's items plus the store's changes. Ends with `close`, or as a context manager.

    Args:
        base: items and clusters as the bundle holds them.
        store: where changes are kept; without one the gallery cannot be changed.
        complete: called when there are items that another encoder's process has enrolled; embeds them anew.
    """

    def __init__(
        self, base: Snapshot, store: GalleryStore | None = None, *, complete: Callable[[], None] | None = None
    ) -> None:
        self._base, self._store, self._complete = base, store, complete
        self._lock = threading.Lock()
        self._settling: threading.Thread | None = None
        self._version = -1
        self._current: Snapshot = base
        if store is not None:
            self._version = store.version()
            current = self._with_changes(LiveSnapshot.of(base, self._picture))
            self._current = current.settled() if _is_heavy(current) else current

    def __enter__(self) -> "Gallery":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Wait for what runs in the background, and close the store."""
        settling = self._settling
        if settling is not None:
            settling.join()
        if self._store is not None:
            self._store.close()

    def snapshot(self) -> Snapshot:
        """The gallery as it is now, with every change that any process has been told is durable.

        Raises:
            StoreError: the store cannot be read.
        """
        if self._store is None or self._store.version() == self._version:
            return self._current
        with self._lock:
            version = self._store.version()
            if version != self._version:
                self._current = self._with_changes(self._current)
                self._version = version
                self._settle_if_much_has_changed()
            return self._current

    def search(
        self,
        embeddings: NDArray[np.float32],
        k: int,
        *,
        labels: Collection[str] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> list[list[Neighbor]]:
        """The nearest items now; see `Snapshot.search`."""
        return self.snapshot().search(embeddings, k, labels=labels, metadata=metadata)

    def add(self, items: Sequence[StoredItem], receipt: Receipt | None = None) -> Receipt | None:
        """Enrol `items`; they are durable, and part of the next snapshot, when this returns.

        An item is what its id stands for, an image. One that is in the gallery already gets the new label and metadata.

        Args:
            receipt: kept with the items. If there is one of the same key already, nothing is added.

        Returns:
            The receipt that is kept: `receipt`, or the older one.

        Raises:
            DataError: a label cannot name a class, metadata is not JSON, or an original is not the image of its id.
            QuotaError: a class would have too many items.
            StoreError: they cannot be kept.
        """
        for item in items:
            check_label(item.label)
            check_unit_vectors(item.embedding[None], self._base.items.dim)
            if item.original is not None and item_id(item.original) != item.id:
                raise DataError(f"item {item.id} has an original whose id is {item_id(item.original)}")
        return self._changeable().add(items, receipt)

    def edit(self, identifier: str, *, label: str | None = None, metadata: dict[str, Any] | None = None) -> None:
        """Give an item, the bundle's own or an enrolled one, another label or other metadata.

        Raises:
            DataError: there is no such item, or what it is to have cannot be kept.
            StoreError: the change cannot be kept.
        """
        now = self.snapshot()
        items, row = now.items, now.rows.get(identifier)
        if row is None:
            raise DataError(f"the gallery has no item {identifier}")
        edit = Edit(
            identifier,
            items.label(row) if label is None else check_label(label),
            items.metadata[row] if metadata is None else metadata,
        )
        self._changeable().edit([edit])

    def remove(self, ids: Sequence[str] = (), *, label: str | None = None) -> tuple[str, ...]:
        """Erase the items of these ids, or all items of a class; returns the ids of those that this call erased.

        Raises:
            DataError: there is no such class.
            StoreError: they cannot be removed.
        """
        snapshot = self.snapshot()
        found = [identifier for identifier in dict.fromkeys(ids) if identifier in snapshot.rows]
        if label is not None:
            members = snapshot.members(label).tolist()
            if not members:
                raise DataError(f"the gallery has no class {label!r}: `coterie gallery list` shows which it has")
            found = list(dict.fromkeys([*found, *(snapshot.items.ids[row] for row in members)]))
        bundled = {identifier for identifier in found if identifier in self._base.rows}
        return self._changeable().remove(found, bundled=bundled)

    def original(self, identifier: str) -> bytes | None:
        """The image of an enrolled item; None if it was not kept, or is the bundle's own.

        Raises:
            StoreError: the image is gone or damaged.
        """
        return self._store.original(identifier) if self._store else None

    def receipt(self, key: str) -> Receipt | None:
        """The receipt of what was enrolled under this key, if it is not too long ago.

        Raises:
            StoreError: the store cannot be read.
        """
        return self._store.receipt(key) if self._store else None

    def enrolled_counts(self) -> dict[str, int]:
        """How many enrolled items each class has that has any."""
        return self._store.enrolled_counts() if self._store else {}

    def is_enrolled(self, identifier: str) -> bool:
        """Whether the item is an enrolled one, or one of the bundle's that was enrolled once more."""
        return self._store is not None and self._store.is_enrolled(identifier)

    def enrolled_ids(self) -> frozenset[str]:
        """The items that came after the bundle was made, or were enrolled once more."""
        return frozenset(item.id for item in self._kept())

    def enrolled(self) -> Iterator[StoredItem]:
        """Those items, with their pictures and images, in the order of their last change."""
        for item in self._kept():
            assert item.embedding is not None and self._store is not None
            try:
                original = self._store.original(item.id)
            except StoreError as error:
                warnings.warn(f"{error}; the item is used without it", CoterieWarning, stacklevel=2)
                original = None
            yield StoredItem(
                item.id, item.label, item.embedding, item.metadata, self._store.thumbnail(item.id), original
            )

    def backup(self, folder: Path, progress: Callable[[int, int], None] | None = None) -> None:
        """Copy what the store holds to a new folder, which can take the place of this gallery's state folder.

        Raises:
            CoterieError: the folder exists, or nothing can be written there.
        """
        self._changeable().backup(folder, progress)

    def _kept(self) -> list[KeptItem]:
        if self._store is None:
            return []
        return [item for item in self._store.changes().items if item.embedding is not None]

    def _changeable(self) -> GalleryStore:
        if self._store is None:
            raise DataError("this gallery was opened without a store and cannot be changed")
        return self._store

    def _picture(self, identifier: str) -> bytes:
        picture = self._store.thumbnail(identifier) if self._store else b""
        row = self._base.rows.get(identifier)
        return picture or (b"" if row is None else self._base.items.thumbnails[row])

    def _with_changes(self, current: Snapshot) -> LiveSnapshot:
        assert self._store is not None and isinstance(current, LiveSnapshot)
        changes = self._store.changes(current.sequence)
        if self._complete is not None and any(
            item.embedding is None and item.id not in self._base.rows for item in changes.items
        ):
            self._complete()
            changes = self._store.changes(current.sequence)
        if changes.whole:
            current = LiveSnapshot.of(self._base, self._picture)
        return current.changed(changes)

    def _settle_if_much_has_changed(self) -> None:
        current = self._current
        assert isinstance(current, LiveSnapshot)
        if _is_heavy(current) and (self._settling is None or not self._settling.is_alive()):
            self._settling = threading.Thread(target=self._settle, args=(current,), name="gallery-index", daemon=True)
            self._settling.start()

    def _settle(self, current: LiveSnapshot) -> None:
        try:
            settled = current.settled()
            with self._lock:
                # What has changed meanwhile is laid over it.
                self._current = self._with_changes(settled)
        except Exception:  # the old snapshot still answers, and the next change starts another attempt
            logger.exception("the gallery's index could not be renewed")


def _is_heavy(snapshot: LiveSnapshot) -> bool:
    return snapshot.weight > max(MANY_CHANGES, LARGE_SHARE * snapshot.foundation_size)
