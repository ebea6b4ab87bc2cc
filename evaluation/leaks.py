"""Queries that the gallery holds already: an evaluation on them measures memory.

Similarity alone does not tell, for a well trained encoder brings a whole class within 0.98: the pictures decide.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from coterie.gallery import Snapshot
from evaluation.queries import Queries

__all__ = ["Leak", "Leaks", "find_leaks"]

# So similar a neighbour is worth a look, and of so many of them.
SIMILAR, NEIGHBORS = 0.98, 3
# Pictures of 16 × 16 greys that differ by fewer levels of 255 in the mean are one. Copies saved anew as JPEGs of
# quality 75 differ by less than 1; no two images of CIFAR-10 or of hand signs, one from each part, by less than 6.
SIDE, SAME = 16, 5.0
MOST_SHOWN = 24


@dataclass(frozen=True)
class Leak:
    """A query and the gallery item that is the same picture."""

    path: str
    truth: str
    item: str
    label: str
    similarity: float
    same_bytes: bool
    thumbnail: bytes = field(repr=False)
    item_thumbnail: bytes = field(repr=False)


@dataclass(frozen=True)
class Leaks:
    """How many queries are in the gallery byte for byte, how many others as nearly the same picture; some of them."""

    same_bytes: int
    near: int
    shown: tuple[Leak, ...]


def find_leaks(
    queries: Queries, snapshot: Snapshot, neighbors: NDArray[np.int64], similarities: NDArray[np.float32]
) -> Leaks:
    """Look for each query among its nearest gallery items, rows and similarities (n, k)."""
    images, items = queries.images, snapshot.items
    same_bytes = near = 0
    found: list[Leak] = []
    picture_of_item = lru_cache(maxsize=None)(lambda row: _picture(items.thumbnails[row]))
    for query in range(len(queries)):
        row = snapshot.rows.get(images.hashes[query][:24])
        exact = row is not None
        if row is None:
            row = _same_picture(queries, query, neighbors, similarities, picture_of_item)
        if row is None:
            continue
        same_bytes, near = same_bytes + exact, near + (not exact)
        if len(found) < MOST_SHOWN:
            found.append(
                Leak(
                    path=images.paths[query].as_posix(),
                    truth=str(queries.labels[query]),
                    item=items.ids[row],
                    label=items.label(row),
                    similarity=float(items.embeddings[row] @ queries.embeddings[query]),
                    same_bytes=exact,
                    thumbnail=images.thumbnails[query] if images.thumbnails else b"",
                    item_thumbnail=items.thumbnails[row],
                )
            )
    return Leaks(same_bytes, near, tuple(found))


def _same_picture(
    queries: Queries,
    query: int,
    neighbors: NDArray[np.int64],
    similarities: NDArray[np.float32],
    picture_of_item: Callable[[int], NDArray[np.float32] | None],
) -> int | None:
    rows = neighbors[query, :NEIGHBORS][similarities[query, :NEIGHBORS] >= SIMILAR].tolist()
    own = _picture(queries.images.thumbnails[query]) if rows and queries.images.thumbnails else None
    if own is None:
        return None
    for row in rows:
        other = picture_of_item(row)
        if other is not None and np.abs(own - other).mean() < SAME:
            return int(row)
    return None


def _picture(thumbnail: bytes) -> NDArray[np.float32] | None:
    """The thumbnail as 16 × 16 greys; None where there is none."""
    if not thumbnail:
        return None
    with Image.open(io.BytesIO(thumbnail)) as image:
        grey = image.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX)
    return np.asarray(grey, dtype=np.float32)
