"""What a gallery asks of its store, whatever database is behind it: SQLite now (coterie.store), another one later.

A store holds how a gallery differs from its bundle: items enrolled since, items with another label or other metadata,
and ids that were removed. Every change gets the next number of one sequence; a reader that knows the changes up to one
number asks for those after it.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from coterie.receipts import Receipt

__all__ = ["Changes", "Edit", "GalleryStore", "KeptItem", "Lacking", "Receipt", "StoredItem"]


@dataclass(frozen=True)
class StoredItem:
    """A labelled embedding to be kept.

    Attributes:
        id: of the image, see `coterie.items.item_id`; an item of the same id is replaced.
        embedding: float32 (d,) of unit length.
        metadata: what JSON can say.
        thumbnail: an encoded picture, empty bytes if there is none.
        original: the image's encoded bytes, from which another encoder can embed it anew.
    """

    id: str
    label: str
    embedding: NDArray[np.float32]
    metadata: dict[str, Any]
    thumbnail: bytes
    original: bytes | None = None


@dataclass(frozen=True)
class Edit:
    """The label and the metadata that an item is to have from now on."""

    id: str
    label: str
    metadata: dict[str, Any]


class KeptItem(NamedTuple):
    """An item as a reader gets it; without an embedding of the reader's encoder if none was kept."""

    id: str
    label: str
    metadata: dict[str, Any]
    embedding: NDArray[np.float32] | None


class Lacking(NamedTuple):
    """An item without an embedding of this encoder; `original` is the sha256 of its image, if that was kept."""

    id: str
    label: str
    original: str | None


@dataclass(frozen=True)
class Changes:
    """What a store adds to and takes from a gallery.

    Attributes:
        sequence: of the last change among them.
        whole: these are all changes there ever were, for what was removed after the number that was asked about is no
            longer known.
        items: added or edited, in the order of their last change.
        removed: ids that are no longer in the gallery.
    """

    sequence: int
    whole: bool
    items: tuple[KeptItem, ...]
    removed: frozenset[str]


class GalleryStore(Protocol):
    """A gallery's durable changes, for one encoder; safe for many threads and processes.

    Methods that change something return when the change is on disk, and change everything or nothing. Each raises
    StoreError if the store cannot be used, and StoreBusyError if somebody else held it for too long.
    """

    def version(self) -> int:
        """A number that is another one after every change, by whomever; cheap enough for each query."""

    def changes(self, since: int = 0) -> Changes:
        """The changes after the number `since`, as of one moment."""

    def add(self, items: Sequence[StoredItem], receipt: Receipt | None = None) -> Receipt | None:
        """Keep `items`; QuotaError if a class would have too many.

        If there is a receipt of this key already, nothing is added; returns the one that is kept.
        """

    def receipt(self, key: str) -> Receipt | None:
        """The receipt of what was added under this key, if it is not too long ago."""

    def enrolled_counts(self) -> dict[str, int]:
        """How many enrolled items each class has that has any."""

    def is_enrolled(self, identifier: str) -> bool:
        """Whether the item is an enrolled one."""

    def edit(self, edits: Sequence[Edit]) -> None:
        """Change items, enrolled ones or the bundle's own; DataError if one was removed."""

    def remove(self, ids: Sequence[str], *, bundled: Collection[str] = ()) -> tuple[str, ...]:
        """Erase items with all that was kept of them; those of `bundled`, the bundle's own, stay hidden for ever.

        Returns:
            The ids of those that were there: of callers at the same time, one gets each.
        """

    def thumbnail(self, identifier: str) -> bytes:
        """An enrolled item's picture, empty if there is none."""

    def original(self, identifier: str) -> bytes | None:
        """An enrolled item's image; None if it was not kept."""

    def lacking(self) -> list[Lacking]:
        """The items without an embedding of this encoder."""

    def complete(self, embeddings: Mapping[str, NDArray[np.float32]]) -> None:
        """Keep this encoder's embeddings of items that lack them."""

    def forget_encoders(self) -> None:
        """Drop the embeddings of encoders before the last one, of items that could be embedded anew."""

    def backup(self, folder: Path, progress: Callable[[int, int], None] | None = None) -> None:
        """Write the store as it is now to a new folder; others may go on changing it."""

    def close(self) -> None: ...
