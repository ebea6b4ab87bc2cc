"""Items of a gallery that are nearly the same: copies, crops and re-encodings, in one class or, worse, in two.

What similarity means "the same" depends on the encoder, so the report shows how similar each item is to its nearest
neighbour: copies stand apart at the right end of that histogram, and the threshold belongs into the gap before them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from coterie.items import Items

__all__ = ["Duplicates", "Pair", "find_duplicates"]

# Of a copy that was saved again as a JPEG, say; see the histogram for the gallery at hand.
THRESHOLD = 0.98
MOST_PAIRS = 10_000
# Rows compared at once: 1,024 × 4,096 similarities are 16 MB.
ROWS, COLUMNS = 1024, 4096
DECIMALS = 6
# Ends of the histogram's bins, finer towards 1 where copies lie.
EDGES = (-1.0, 0.0, 0.5, 0.7, 0.8, 0.85, 0.9, 0.92, 0.94, 0.96, 0.97, 0.98, 0.99, 0.995, 0.999, 0.9999, 1.0)


@dataclass(frozen=True)
class Pair:
    """Two items that are as similar as the threshold, or more."""

    first: str
    second: str
    first_label: str
    second_label: str
    similarity: float


@dataclass(frozen=True)
class Duplicates:
    """What `find_duplicates` found.

    Attributes:
        pairs: the most similar first, those of one similarity in the order of their rows; at most `MOST_PAIRS`.
        within, between: how many pairs there are within classes and between two, listed or not.
        edges, counts: histogram of each item's similarity to its nearest neighbour; a bin begins with its lower edge.
    """

    threshold: float
    pairs: tuple[Pair, ...]
    within: int
    between: int
    edges: tuple[float, ...]
    counts: tuple[int, ...]


def find_duplicates(
    items: Items, threshold: float = THRESHOLD, *, progress: Callable[[int], None] | None = None
) -> Duplicates:
    """Compare every two items, block by block.

    Items with equal bytes cannot be told from one another, they are one item; see `coterie.items.item_id`.

    Args:
        threshold: the least similarity of a pair.
        progress: called with the number of items that were compared with all others.

    Raises:
        ValueError: the threshold is no similarity.
    """
    if not -1 <= threshold <= 1:
        raise ValueError(f"a similarity lies between -1 and 1, {threshold} does not")
    _, classes = np.unique(items.labels, return_inverse=True)
    embeddings, nearest = items.embeddings, np.full(len(items), -1, dtype=np.float32)
    kept = np.empty((0, 3))  # similarity, first row, second row
    within = between = 0
    for start in range(0, len(items), ROWS):
        for other in range(start, len(items), COLUMNS):
            rows, columns = slice(start, start + ROWS), slice(other, other + COLUMNS)
            block = _compare(embeddings, rows, columns)
            np.maximum(nearest[rows], block.max(axis=1), out=nearest[rows])
            np.maximum(nearest[columns], block.max(axis=0), out=nearest[columns])
            close = block >= threshold
            same = int(np.count_nonzero(close & (classes[rows, None] == classes[columns])))
            within, between = within + same, between + int(np.count_nonzero(close)) - same
            kept = _most_similar(kept, block, close, start, other)
        if progress:
            progress(min(ROWS, len(items) - start))
    counts, _ = np.histogram(nearest if len(items) > 1 else (), bins=EDGES)
    pairs = [_pair(items, similarity, int(first), int(second)) for similarity, first, second in kept.tolist()]
    return Duplicates(threshold, tuple(pairs), within, between, EDGES, tuple(counts.tolist()))


def _compare(embeddings: NDArray[np.float32], rows: slice, columns: slice) -> NDArray[np.float32]:
    """Similarities of two blocks, rounded to what float32 is good for; −2 where a pair comes elsewhere or is none."""
    block = np.round(embeddings[rows] @ embeddings[columns].T, DECIMALS).clip(-1, 1)
    if columns.start < rows.stop:
        height, width = block.shape
        block[columns.start + np.arange(width) <= rows.start + np.arange(height)[:, None]] = -2
    return block


def _most_similar(
    kept: NDArray[np.float64], block: NDArray[np.float32], close: NDArray[np.bool_], start: int, other: int
) -> NDArray[np.float64]:
    """The most similar of the pairs in `kept` and of those that are `close` in `block`, which begins at these rows."""
    if len(kept) == MOST_PAIRS:
        close = close & (block >= kept[-1, 0])
    first, second = np.nonzero(close)
    pairs = np.concatenate([kept, np.stack([block[first, second], start + first, other + second], axis=1)])
    return pairs[np.lexsort((pairs[:, 2], pairs[:, 1], -pairs[:, 0]))[:MOST_PAIRS]]


def _pair(items: Items, similarity: float, first: int, second: int) -> Pair:
    return Pair(items.ids[first], items.ids[second], items.label(first), items.label(second), similarity)
