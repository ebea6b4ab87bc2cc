"""Image files into a gallery: read, embedded, kept. The same work again takes up where it stopped."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from coterie.bundle import Bundle
from coterie.changes import StoredItem
from coterie.dataset import Rejected
from coterie.decoding import ImageRow
from coterie.errors import CoterieError, DataError
from coterie.gallery import Gallery
from coterie.images import Preprocessing, decode_to_fit, fit, read_file, thumbnail
from coterie.items import item_id
from coterie.labels import check_label
from coterie.machine import processors

__all__ = ["Enrolled", "Example", "enrol", "read_example", "same_bytes"]

BATCH = 32


@dataclass(frozen=True)
class Enrolled:
    """What became of images.

    Attributes:
        added: ids of those that are new in the gallery, or under another label than before.
        known: how many were there already, under the same label.
        rejected: those that were left out, and why.
    """

    added: tuple[str, ...]
    known: int
    rejected: tuple[Rejected, ...]


@dataclass(frozen=True)
class Example:
    """An image that was read, and not yet decoded."""

    id: str
    path: str
    label: str
    content: bytes


def enrol(
    bundle: Bundle,
    gallery: Gallery,
    images: Iterable[ImageRow],
    root: Path,
    *,
    label: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> Enrolled:
    """Enrol images whose files lie below `root`, in batches, each of which is durable when the next begins.

    An image with the bytes of one that came before is left out, even under another label. An image that is in the
    gallery under another label moves to this one.

    Args:
        label: of all images, instead of their own.

    Raises:
        QuotaError: a class is full; StoreError: the gallery cannot be changed. What came before is enrolled.
    """
    added: list[str] = []
    rejected: list[Rejected] = []
    seen: dict[str, tuple[str, str]] = {}  # path and label of each id
    known = 0
    with ThreadPoolExecutor(processors()) as pool:
        for batch in _batches(images):
            wanted = []
            snapshot = gallery.snapshot()
            for read in pool.map(lambda row: read_example(row, root, label), batch):
                if isinstance(read, Rejected):
                    rejected.append(read)
                elif read.id in seen:
                    rejected.append(Rejected(Path(read.path), same_bytes(*seen[read.id], read)))
                else:
                    seen[read.id] = read.path, read.label
                    row = snapshot.rows.get(read.id)
                    if row is not None and snapshot.items.label(row) == read.label:
                        known += 1
                    else:
                        wanted.append(read)
            decoded = list(pool.map(lambda read: _decode(read, bundle.manifest.encoder.preprocessing), wanted))
            rejected += [one for one in decoded if isinstance(one, Rejected)]
            items = _embed(bundle, [one for one in decoded if not isinstance(one, Rejected)])
            gallery.add(items)
            added += [item.id for item in items]
            if progress:
                progress(len(batch))
    return Enrolled(tuple(added), known, tuple(rejected))


def _batches(images: Iterable[ImageRow]) -> Iterator[list[ImageRow]]:
    rows = iter(images)
    while batch := list(islice(rows, BATCH)):
        yield batch


def read_example(row: ImageRow, root: Path, label: str | None) -> Example | Rejected:
    """The image of a row, of the class `label` or else the row's own; or why it is left out."""
    name = label or row.label
    try:
        if name is None:
            raise DataError("it has no label: give one with --label, or put it into a folder named after its class")
        check_label(name)
        content = read_file(root / row.path) if row.content is None else row.content
    except (CoterieError, ValueError) as error:  # a ValueError for a path with a null character
        return Rejected(Path(row.path), str(error))
    return Example(item_id(content), row.path, name, content)


def _decode(read: Example, preprocessing: Preprocessing) -> tuple[Example, NDArray[np.uint8], bytes] | Rejected:
    try:
        image, box = decode_to_fit(read.content, preprocessing)
        return read, fit(image, preprocessing, box), thumbnail(image)
    except CoterieError as error:
        return Rejected(Path(read.path), str(error))


def _embed(bundle: Bundle, decoded: list[tuple[Example, NDArray[np.uint8], bytes]]) -> list[StoredItem]:
    if not decoded:
        return []
    embeddings = bundle.encoder.embed(np.stack([pixels for _, pixels, _ in decoded]))
    return [
        StoredItem(read.id, read.label, embedding, {"path": read.path}, picture, read.content)
        for (read, _, picture), embedding in zip(decoded, embeddings, strict=True)
    ]


def same_bytes(path: str, label: str, again: Example) -> str:
    """Why an image is left out whose bytes came before, from `path` and under `label`."""
    return f"the same bytes as {path}" + ("" if label == again.label else f", which is labelled {label!r}")
