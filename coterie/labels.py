"""Labels: what may name a class, and whether there are enough of them."""

import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from coterie.errors import DataError

__all__ = ["check_counts", "check_label"]

LABEL_BYTES = 128


def check_label(label: str) -> str:
    """Return `label` if it may name a class.

    Raises:
        DataError: it is empty, over 128 bytes of UTF-8, `.` or `..`, or has a `/` or control characters.
    """
    problem = ""
    if not label or label in (".", ".."):
        problem = "it is empty or a dot name"
    elif "/" in label or any(unicodedata.category(character) in ("Cc", "Cs") for character in label):
        problem = "it has a slash or a control character"
    elif len(label.encode("utf-8")) > LABEL_BYTES:
        problem = f"it is longer than {LABEL_BYTES} bytes"
    if problem:
        raise DataError(f"{label[:140]!r} cannot name a class: {problem}")
    return label


def check_counts(
    labels: NDArray[np.int64], classes: Sequence[str], *, where: Path, min_classes: int, min_images: int
) -> None:
    """Raise DataError unless there are enough classes and enough images in each."""
    counts = np.bincount(labels, minlength=len(classes))
    if len(classes) < min_classes:
        found = _counted(len(classes), "class", "classes")
        raise DataError(
            f"{where} has {found} ({', '.join(classes)}), at least {min_classes} are needed: add images of another"
        )
    for name, count in zip(classes, counts, strict=True):
        if count < min_images:
            found = _counted(int(count), "image", "images")
            raise DataError(
                f"class {name!r} in {where} has {found}, at least {min_images} are needed: add images or remove it"
            )


def _counted(count: int, one: str, many: str) -> str:
    return "no " + many if count == 0 else f"only {count} {one if count == 1 else many}"
