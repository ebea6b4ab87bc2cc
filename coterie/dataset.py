"""Labelled images: found in a class-per-folder tree or a table, read once, hashed.

Knows paths, labels and contents. Knows nothing of encoders beyond the pixels they ask for.
"""

import hashlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from coterie.errors import DataError, ImageError
from coterie.images import IMAGE_SUFFIXES, Limits, Preprocessing, decode_to_fit, fit, read_file, thumbnail
from coterie.labels import check_counts, check_label
from coterie.machine import processors
from coterie.splits import group_by_pattern
from coterie.tables import TABLE_SUFFIXES, read_table

__all__ = [
    "LabelledImages",
    "LabelledPixels",
    "Rejected",
    "read_folder",
    "read_images",
    "read_pixels",
    "read_unlabelled",
]

Progress = Callable[[int], None]


@dataclass(frozen=True)
class LabelledImages:
    """Where labelled images lie; nothing has been opened yet.

    Attributes:
        root: the folder that was read, or that holds the table.
        paths: relative to `root`; sorted within each class, or in the order of the table's rows.
        labels: int64 (n,), indices into `classes`.
        classes: sorted class names.
        groups: the object that each image shows, whose images stay on one side of a split; None where nobody asked.
        contents: binary (n,), the encoded images of a Parquet file, in memory; null where the file at `paths` is meant.
    """

    root: Path
    paths: tuple[Path, ...]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    groups: tuple[str, ...] | None = None
    contents: pa.ChunkedArray | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, row: int, limits: Limits = Limits()) -> bytes:
        """The encoded image of a row, wherever it lies.

        Raises:
            ImageError: its file cannot be read, or is over the limit.
        """
        content: bytes | None = self.contents[row].as_py() if self.contents is not None else None
        return read_file(self.root / self.paths[row], limits) if content is None else content


@dataclass(frozen=True)
class Rejected:
    """An image that was left out, and why."""

    path: Path
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


@dataclass(frozen=True)
class LabelledPixels:
    """Labelled images that were read, at one size.

    Attributes:
        pixels: uint8 (n, height, width, 3); without any rows where they were not to be kept.
        labels: int64 (n,), indices into `classes`.
        classes: class names; a class may have lost all its images.
        paths: relative to the folder that was read, or that holds the table.
        hashes: sha256 of each file's bytes, hexadecimal.
        thumbnails: small WebP pictures, or empty when none were asked for.
        rejected: what was left out.
        groups: the object that each image shows; None where nobody asked.
        rows: int64 (n,), which of the `LabelledImages` each image was.
    """

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    paths: tuple[Path, ...]
    hashes: tuple[str, ...]
    rows: NDArray[np.int64]
    thumbnails: tuple[bytes, ...] = ()
    rejected: tuple[Rejected, ...] = ()
    groups: tuple[str, ...] | None = None

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
            pixels=self.pixels[rows] if len(self.pixels) else self.pixels,
            labels=self.labels[rows],
            rows=self.rows[rows],
            paths=tuple(self.paths[i] for i in rows),
            hashes=tuple(self.hashes[i] for i in rows),
            thumbnails=tuple(self.thumbnails[i] for i in rows) if self.thumbnails else (),
            groups=_rows(self.groups, rows),
        )


def read_images(data: Path, *, group: str | None = None, min_classes: int = 1, min_images: int = 1) -> LabelledImages:
    """Find the labelled images of a class-per-folder tree, a CSV or a Parquet file.

    Args:
        group: what tells which object an image shows: the name of a table's column, or for a tree a regular expression
            as `group_by_pattern` takes it.

    Raises:
        DataError: `data` is none of the three or cannot be used, has too few classes, or a class with too few images.
    """
    if data.is_dir():
        return read_folder(data, group=group, min_classes=min_classes, min_images=min_images)
    if data.suffix.lower() not in TABLE_SUFFIXES:
        raise DataError(
            f"{data} is not a folder, a .csv or a .parquet file: give a folder that holds one folder of images per "
            "class, or a table with a row for each image"
        )
    table = read_table(data, group=group)
    classes = tuple(sorted(set(table.labels)))
    numbers = {label: number for number, label in enumerate(classes)}
    labels = np.asarray([numbers[label] for label in table.labels], dtype=np.int64)
    check_counts(labels, classes, where=data, min_classes=min_classes, min_images=min_images)
    return LabelledImages(
        root=data.parent,
        paths=tuple(map(Path, table.paths)),
        labels=labels,
        classes=classes,
        groups=table.groups,
        contents=table.contents,
    )


def read_folder(root: Path, *, group: str | None = None, min_classes: int = 1, min_images: int = 1) -> LabelledImages:
    """Find the images of a class-per-folder tree: `root/<label>/**/<image>`; as `read_images`, but for folders only.

    Hidden files and files without an image's suffix are passed over.

    Raises:
        DataError: no such folder, no class folders, too few classes, or a class with too few images.
    """
    if not root.is_dir():
        raise DataError(f"{root} is not a folder: give the folder that holds one folder of images per class")
    folders = sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not folders:
        raise DataError(f"{root} has no class folders: put the images of each class into a folder named after it")
    classes = tuple(folder.name for folder in folders)
    paths: list[Path] = []
    numbers: list[int] = []
    for number, folder in enumerate(folders):
        check_label(folder.name)
        found = sorted(_image_files(folder))
        paths += [path.relative_to(root) for path in found]
        numbers += [number] * len(found)
    labels = np.asarray(numbers, dtype=np.int64)
    check_counts(labels, classes, where=root, min_classes=min_classes, min_images=min_images)
    groups = None if group is None else group_by_pattern(paths, group)
    return LabelledImages(root=root, paths=tuple(paths), labels=labels, classes=classes, groups=groups)


def read_unlabelled(data: Path) -> LabelledImages:
    """Find the images of a folder, at any depth, or of a table whose labels do not matter; all of a class "unlabelled".

    Raises:
        DataError: `data` cannot be used, or holds no image.
    """
    if data.is_dir():
        paths = tuple(sorted(path.relative_to(data) for path in _image_files(data)))
        found = LabelledImages(root=data, paths=paths, labels=np.empty(0, dtype=np.int64), classes=())
    else:
        found = read_images(data)
    if not len(found):
        raise DataError(f"{data} holds no images: give a folder of some, or a .csv or a .parquet file")
    return replace(found, labels=np.zeros(len(found), dtype=np.int64), classes=("unlabelled",))


def read_pixels(
    images: LabelledImages,
    preprocessing: Preprocessing,
    *,
    thumbnails: bool = False,
    strict: bool = False,
    limits: Limits = Limits(),
    progress: Progress | None = None,
    keep_pixels: bool = True,
) -> LabelledPixels:
    """Read, hash and decode every image, on as many threads as there are processors, and keep the pixels if asked to.

    An image that cannot be read is left out and listed in `rejected`; so is one whose very bytes came before, even
    under another label, which its reason then names.

    Raises:
        DataError: with `strict`, if any image cannot be read; without, if none can.
    """

    def read(row: int) -> tuple[str, NDArray[np.uint8], bytes] | Rejected:
        try:
            data = images.read(row, limits)
            image, box = decode_to_fit(data, preprocessing, limits)
            picture = thumbnail(image) if thumbnails else b""
            return hashlib.sha256(data).hexdigest(), fit(image, preprocessing, box), picture
        except ImageError as error:
            return Rejected(images.paths[row], str(error))

    pixels = np.empty((len(images) if keep_pixels else 0, *preprocessing.input_size, 3), dtype=np.uint8)
    kept: list[int] = []
    hashes: list[str] = []
    pictures: list[bytes] = []
    rejected: list[Rejected] = []
    first_seen: dict[str, int] = {}
    with ThreadPoolExecutor(processors()) as pool:
        for row, result in enumerate(pool.map(read, range(len(images)))):
            if progress:
                progress(1)
            if isinstance(result, Rejected):
                if strict:
                    raise DataError(f"{images.root / result.path}: {result.reason} (--strict stops at the first)")
                rejected.append(result)
                continue
            digest, content, picture = result
            if digest in first_seen:
                rejected.append(Rejected(images.paths[row], _same_bytes(images, first_seen[digest], row)))
                continue
            first_seen[digest] = row
            if keep_pixels:
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
        rows=np.asarray(kept, dtype=np.int64),
        thumbnails=tuple(pictures) if thumbnails else (),
        rejected=tuple(rejected),
        groups=_rows(images.groups, kept),
    )


def _same_bytes(images: LabelledImages, first: int, row: int) -> str:
    reason = f"the same bytes as {images.paths[first]}"
    if images.labels[first] == images.labels[row]:
        return reason
    return f"{reason}, which is labelled {images.classes[images.labels[first]]!r}"


def _rows(values: tuple[str, ...] | None, rows: Iterable[int]) -> tuple[str, ...] | None:
    return None if values is None else tuple(values[row] for row in rows)


def _image_files(folder: Path) -> Iterable[Path]:
    for path in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.suffix.lower() in IMAGE_SUFFIXES and not hidden and path.is_file():
            yield path
