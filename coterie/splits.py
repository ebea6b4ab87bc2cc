"""Which images stay together, and on which side of a split they fall.

Knows labels, content hashes and groups. Knows nothing of files or pixels.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from coterie.errors import DataError

__all__ = ["group_by_pattern", "split_by_hash"]


def group_by_pattern(paths: Sequence[Path], pattern: str) -> tuple[str, ...]:
    r"""Name the object that each image shows, after what `pattern` finds in its path below the class folder.

    The pattern's first capture group is the name, or the whole match where it has none. An image in which nothing is
    found is a group of its own.

    >>> group_by_pattern([Path("ok/part7_1.png"), Path("bad/part7_2.png"), Path("ok/new.png")], r"(part\d+)_")
    ('part7', 'part7', 'ok/new.png')

    Raises:
        DataError: not a regular expression, or one that is found nowhere.
    """
    try:
        regex = re.compile(pattern)
    except re.error as error:
        raise DataError(f"the group {pattern!r} is not a regular expression: {error}") from error
    below = (path.relative_to(path.parts[0]).as_posix() for path in paths)
    found = [match[min(regex.groups, 1)] if (match := regex.search(path)) else None for path in below]
    if not any(found):
        raise DataError(
            f"the group {pattern!r} is found in none of the {len(paths)} paths below the class folders: "
            "give a regular expression whose first group is the object's name"
        )
    return tuple(name or path.as_posix() for name, path in zip(found, paths, strict=True))


def split_by_hash(
    labels: NDArray[np.int64],
    hashes: Sequence[str],
    fraction: float,
    *,
    seed: int = 0,
    groups: Sequence[str] | None = None,
) -> NDArray[np.bool_]:
    """Choose about `fraction` of each class by the order of its salted content hashes.

    The choice depends on contents, grouping and `seed` alone, not on names or order. Images of one group fall on one
    side; without `groups` each image is its own.

    A class of n images aims at t = round(fraction · n). Groups take turns in the order of their smallest salted hash;
    one is chosen if for each of its classes, of which it has k images, chosen + k/2 ≤ t and an image stays behind.
    Single images make up exactly min(t, n − 1); a class is overshot by at most half a group.

    Returns:
        bool (n,), true where an image is chosen.
    """
    salted = [hashlib.sha256(f"{seed}:{digest}".encode()).digest() for digest in hashes]
    members: dict[str | int, list[int]] = {}
    for row in sorted(range(len(salted)), key=salted.__getitem__):
        members.setdefault(groups[row] if groups is not None else row, []).append(row)
    classes = labels.tolist()
    sizes = Counter(classes)
    targets = {label: round(fraction * size) for label, size in sizes.items()}
    taken: Counter[int] = Counter()
    chosen = np.zeros(len(labels), dtype=bool)
    for rows in members.values():
        counts = Counter(classes[row] for row in rows)
        if all(
            taken[label] + count / 2 <= targets[label] and taken[label] + count < sizes[label]
            for label, count in counts.items()
        ):
            chosen[rows] = True
            taken.update(counts)
    return chosen
