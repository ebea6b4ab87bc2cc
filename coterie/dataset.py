"""Labelled images: found in a class-per-folder tree, read once, hashed, split.

Knows paths, labels and contents. Knows nothing of encoders beyond the pixels they ask for.
"""

import hashlib
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from coterie.errors import DataError, ImageError
from coterie.images import IMAGE_SUFFIXES, Limits, Preprocessing, decode, fit, read_file, thumbnail
from coterie.machine import processors

__all__ = ["LabelledImages", "LabelledPixels", "Rejected", "check_label", "read_folder", "read_pixels", "split_by_hash"]

Progress = Callable[[int], None]
LABEL_BYTES = 128


@dataclass(frozen=True)
class LabelledImages:
    """Where labelled images lie; nothing has been opened yet.

    Attributes:
        root: the folder that was read.
        paths: relative to `root`, sorted within each class.
        labels: int64 (n,), indices into `classes`.
        classes: sorted class names.
    """

    root: Path
    paths: tuple[Path, ...]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.paths)


@dataclass(frozen=True)
class Rejected:
    """An image that was left out, and why."""

    path: Path
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


@dataclass(frozen=True)
class LabelledPixels:
    """Labelled images in memory, at one size.

    Attributes:
        pixels: uint8 (n, height, width, 3).
        labels: int64 (n,), indices into `classes`.
        classes: class names; a class may have lost all its images.
        paths: relative to the folder that was read.
        hashes: sha256 of each file's bytes, hexadecimal.
        thumbnails: small WebP pictures, or empty when none were asked for.
        rejected: what was left out.
    """

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    paths: tuple[Path, ...]
    hashes: tuple[str, ...]
    thumbnails: tuple[bytes, ...] = ()
    rejected: tuple[Rejected, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def names(self) -> NDArray[np.str_]:
        """The label of each image as text, (n,)."""
        return np.asarray(self.classes, dtype=np.str_)[self.labels]

    @property
    def fingerprint(self) -> str:
        """sha256 over every label and content; file names and order do not count."""
        rows = sorted(
            f"{self.classes[label]}\0{digest}\n" for label, digest in zip(self.labels, self.hashes, strict=True)
        )
        return "sha256:" + hashlib.sha256("".join(rows).encode()).hexdigest()

    def select(self, mask: NDArray[np.bool_]) -> "LabelledPixels":
        """The images where `mask` (n,) is true; classes keep their numbers."""
        rows = np.flatnonzero(mask)
        return replace(
            self,
            pixels=self.pixels[rows],
            labels=self.labels[rows],
            paths=tuple(self.paths[i] for i in rows),
            hashes=tuple(self.hashes[i] for i in rows),
            thumbnails=tuple(self.thumbnails[i] for i in rows) if self.thumbnails else (),
        )


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


def read_folder(root: Path, *, min_classes: int = 1, min_images: int = 1) -> LabelledImages:
    """Find the images of a class-per-folder tree: `root/<label>/**/<image>`.

    Hidden files and files without an image's suffix are passed over.

    Raises:
        DataError: no such folder, no class folders, too few classes, or a class with too few images.
    """
    if not root.is_dir():
        raise DataError(f"{root} is not a folder: give the folder that holds one folder of images per class")
    folders = sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not folders:
        raise DataError(f"{root} has no class folders: put the images of each class into a folder named after it")
    paths: list[Path] = []
    labels: list[int] = []
    for number, folder in enumerate(folders):
        check_label(folder.name)
        found = sorted(_image_files(folder))
        paths += [path.relative_to(root) for path in found]
        labels += [number] * len(found)
    images = LabelledImages(
        root=root,
        paths=tuple(paths),
        labels=np.asarray(labels, dtype=np.int64),
        classes=tuple(folder.name for folder in folders),
    )
    check_counts(images.labels, images.classes, where=root, min_classes=min_classes, min_images=min_images)
    return images


def check_counts(
    labels: NDArray[np.int64], classes: Sequence[str], *, where: Path, min_classes: int, min_images: int
) -> None:
    """Raise DataError unless there are enough classes and enough images in each."""
    counts = np.bincount(labels, minlength=len(classes))
    if len(classes) < min_classes:
        found = _counted(len(classes), "class", "classes")
        raise DataError(
            f"{where} has {found} ({', '.join(classes)}), at least {min_classes} are "
            "needed: put the images of each class into a folder named after it"
        )
    for name, count in zip(classes, counts, strict=True):
        if count < min_images:
            found = _counted(int(count), "image", "images")
            raise DataError(
                f"class {name!r} in {where} has {found}, at least {min_images} are needed: "
                "add images or remove the folder"
            )


def read_pixels(
    images: LabelledImages,
    preprocessing: Preprocessing,
    *,
    thumbnails: bool = False,
    strict: bool = False,
    limits: Limits = Limits(),
    progress: Progress | None = None,
) -> LabelledPixels:
    """Read, hash and decode every image into memory, on as many threads as there are processors.

    An image that cannot be read is left out and listed in `rejected`; so is one whose very bytes came before.

    Raises:
        DataError: with `strict`, if any image cannot be read; without, if none can.
    """

    def read(path: Path) -> tuple[str, NDArray[np.uint8], bytes] | Rejected:
        try:
            data = read_file(images.root / path, limits)
            image = decode(data, background=preprocessing.background, limits=limits)
            picture = thumbnail(image) if thumbnails else b""
            return hashlib.sha256(data).hexdigest(), fit(image, preprocessing), picture
        except ImageError as error:
            return Rejected(path, str(error))

    pixels = np.empty((len(images), *preprocessing.input_size, 3), dtype=np.uint8)
    kept: list[int] = []
    hashes: list[str] = []
    pictures: list[bytes] = []
    rejected: list[Rejected] = []
    first_seen: dict[str, int] = {}
    with ThreadPoolExecutor(processors()) as pool:
        for row, result in enumerate(pool.map(read, images.paths)):
            if progress:
                progress(1)
            if isinstance(result, Rejected):
                if strict:
                    raise DataError(f"{images.root / result.path}: {result.reason} (--strict stops at the first)")
                rejected.append(result)
                continue
            digest, content, picture = result
            if digest in first_seen:
                rejected.append(Rejected(images.paths[row], f"the same bytes as {images.paths[first_seen[digest]]}"))
                continue
            first_seen[digest] = row
            pixels[len(kept)] = content
            kept.append(row)
            hashes.append(digest)
            pictures.append(picture)
    if not kept:
        first = f"; the first: {rejected[0]}" if rejected else ""
        raise DataError(f"none of the {len(images)} images in {images.root} can be read{first}")
    return LabelledPixels(
        pixels=pixels[: len(kept)],
        labels=images.labels[kept],
        classes=images.classes,
        paths=tuple(images.paths[row] for row in kept),
        hashes=tuple(hashes),
        thumbnails=tuple(pictures) if thumbnails else (),
        rejected=tuple(rejected),
    )


def split_by_hash(
    labels: NDArray[np.int64], hashes: Sequence[str], fraction: float, *, seed: int = 0
) -> NDArray[np.bool_]:
    """Choose `fraction` of each class by the order of its salted content hashes.

    The choice depends on contents and `seed` alone, not on names or order. A class keeps at least one image on the
    side that is not chosen; classes too small for the fraction give none.

    Returns:
        bool (n,), true where an image is chosen.
    """
    salted = np.asarray([hashlib.sha256(f"{seed}:{digest}".encode()).hexdigest() for digest in hashes])
    chosen = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        take = min(round(fraction * len(rows)), len(rows) - 1)
        chosen[rows[np.argsort(salted[rows])[:take]]] = True
    return chosen


def _counted(count: int, one: str, many: str) -> str:
    return "no " + many if count == 0 else f"only {count} {one if count == 1 else many}"


def _image_files(folder: Path) -> Iterable[Path]:
    for path in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.suffix.lower() in IMAGE_SUFFIXES and not hidden and path.is_file():
            yield path
