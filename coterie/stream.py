"""Images in order and one at a time, labelled or not: a folder of any depth, a CSV or a Parquet file of any size.

Knows where images lie and what they are called. Opens none of them, and refuses no row: whoever reads it does.
"""

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from coterie.decoding import ImageRow
from coterie.errors import DataError
from coterie.images import IMAGE_SUFFIXES
from coterie.tables import (
    BATCH,
    IMAGE_COLUMNS,
    LABEL_COLUMNS,
    class_names_of,
    csv_rows,
    find_column,
    parse_images,
    parse_labels,
    parse_texts,
)

__all__ = ["ImageStream", "open_stream"]

# Of a Parquet file, whose row groups may hold any number of images, this much is read ahead.
READ_AHEAD = 2**20


@dataclass(frozen=True)
class ImageStream:
    """Images in an order that is the same each time.

    Attributes:
        root: what paths are relative to: the folder, or the one that holds the table.
        count: of images.
        fingerprint: sha256 over the paths and sizes of a folder's images, or over the table's bytes.
        rows: `rows(start)` begins at image `start`.
    """

    root: Path
    count: int
    fingerprint: str
    rows: Callable[[int], Iterator[ImageRow]]

    def __len__(self) -> int:
        return self.count


def open_stream(data: Path) -> ImageStream:
    """Find the images of a folder, a `.csv` or a `.parquet` file.

    Folder: each image's label is the name of the topmost folder it lies in, provided that every image lies in one; a
    single image beside them, and none has a label. Hidden files and files without an image's suffix are passed over.

    Table: the columns are named and made as for `read_table`, the one for labels may be missing. A row without a path
    is called `<file's stem>/<row>`, counted from 0; where it has no image either, its content is empty.

    A list of paths is kept of a folder and of a CSV file; a Parquet file is read as it goes.

    Raises:
        DataError: `data` is none of the three, cannot be read, or has no images.
    """
    if data.is_dir():
        stream = _folder(data)
    elif data.suffix.lower() == ".csv":
        stream = _csv(data)
    elif data.suffix.lower() == ".parquet":
        stream = _parquet(data)
    else:
        raise DataError(f"{data} is not a folder, a .csv or a .parquet file: give one that holds or names images")
    if not len(stream):
        raise DataError(f"{data} has no images: give a folder of images, or a table with a row for each")
    return stream


def _folder(root: Path) -> ImageStream:
    paths: list[str] = []
    digest = hashlib.sha256()
    for path in _image_files(root):
        relative = path.relative_to(root).as_posix()
        paths.append(relative)
        digest.update(os.fsencode(relative) + b"\0%d\n" % path.stat().st_size)
    labelled = all("/" in path for path in paths)

    def rows(start: int) -> Iterator[ImageRow]:
        for path in paths[start:]:
            yield ImageRow(path, path.partition("/")[0] if labelled else None)

    return ImageStream(root, len(paths), "sha256:" + digest.hexdigest(), rows)


def _image_files(root: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(folder, name)
            if path.suffix.lower() in IMAGE_SUFFIXES and not name.startswith(".") and path.is_file():
                yield path


def _csv(file: Path) -> ImageStream:
    lines = csv_rows(file)
    _, header = next(lines, (0, []))
    if not header:
        raise DataError(f"{file} is empty: give it a header such as path and a row for each image")
    image_name, label_name = _names(file, header)
    image, label = header.index(image_name), None if label_name is None else header.index(label_name)
    pairs: list[tuple[str, str | None]] = []
    for line, row in lines:
        if len(row) != len(header):
            raise DataError(f"{file}, line {line}: {len(row)} values where the header has {len(header)}")
        pairs.append((row[image], None if label is None else row[label]))

    def rows(start: int) -> Iterator[ImageRow]:
        for number, (path, name) in enumerate(pairs[start:], start):
            yield _row(file, number, path, None, name)

    return ImageStream(file.parent, len(pairs), _sha256(file), rows)


def _parquet(file: Path) -> ImageStream:
    with _readable(file), pq.ParquetFile(file) as parquet:
        schema, count = parquet.schema_arrow, parquet.metadata.num_rows
        image, label = _names(file, schema.names)
        # Without rows, these do nothing but refuse types that hold no images or labels.
        empty = schema.empty_table()
        parse_images(f"{file}, column {image!r}", empty.column(image), file.stem)
        class_names = {}
        if label is not None:
            parse_labels(f"{file}, column {label!r}", empty.column(label), ())
            class_names = {str(number): name for number, name in enumerate(class_names_of(schema, label))}

    def rows(start: int) -> Iterator[ImageRow]:
        with _readable(file), pq.ParquetFile(file, buffer_size=READ_AHEAD) as parquet:
            groups, number = _groups_from(parquet.metadata, start)
            columns = [name for name in (image, label) if name is not None]
            for batch in parquet.iter_batches(BATCH, row_groups=groups, columns=columns):
                contents = batch.column(image).to_pylist()
                names: tuple[str, ...] = ("",) * len(batch)
                if label is not None:
                    names = parse_texts(f"{file}, column {label!r}", pa.chunked_array([batch.column(label)]))
                for content, name in zip(contents, names, strict=True):
                    if number >= start:
                        known = class_names.get(name) if class_names else name
                        yield _row(file, number, *_path_and_bytes(content), known)
                    number += 1

    return ImageStream(file.parent, count, _sha256(file), rows)


def _groups_from(metadata: pq.FileMetaData, start: int) -> tuple[list[int], int]:
    """The row groups from the one that holds row `start` on, and the number of their first row."""
    first = 0
    for group in range(metadata.num_row_groups):
        size = metadata.row_group(group).num_rows
        if first + size > start:
            return list(range(group, metadata.num_row_groups)), first
        first += size
    return [], first


def _path_and_bytes(value: object) -> tuple[str | None, bytes | None]:
    match value:
        case bytes():
            return None, value
        case str():
            return value, None
        case int():
            return str(value), None
        case {"path": path, "bytes": content}:
            return path, content
    return None, None


def _row(file: Path, number: int, path: str | None, content: bytes | None, label: str | None) -> ImageRow:
    if path and path.strip():
        return ImageRow(path, label or None, content)
    return ImageRow(f"{file.stem}/{number}", label or None, content or b"")


def _names(file: Path, header: list[str]) -> tuple[str, str | None]:
    """The names of the image column and, if there is one, of the label column."""
    labelled = any(name.lower() in LABEL_COLUMNS for name in header)
    label = find_column(file, header, "label", LABEL_COLUMNS) if labelled else None
    return find_column(file, header, "image", IMAGE_COLUMNS), label


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return "sha256:" + hashlib.file_digest(content, "sha256").hexdigest()


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(f"{file} cannot be read as Parquet: {reason}") from error
