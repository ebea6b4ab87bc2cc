"""Tables of labelled images, one row an image: CSV files that name image files, Parquet files that may hold them.

Knows columns and rows, and where in the file each came from. Knows nothing of classes, folders or pixels.
"""

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from coterie.errors import DataError
from coterie.labels import check_label

__all__ = [
    "BATCH",
    "IMAGE_COLUMNS",
    "LABEL_COLUMNS",
    "TABLE_SUFFIXES",
    "Table",
    "class_names_of",
    "csv_rows",
    "find_column",
    "parse_images",
    "parse_labels",
    "parse_texts",
    "read_table",
]

IMAGE_COLUMNS = ("path", "image", "file", "filename", "file_name", "filepath", "image_path")
LABEL_COLUMNS = ("label", "class", "category")
TABLE_SUFFIXES = frozenset({".csv", ".parquet"})

# Arrow reads at most 2 GiB of nested bytes at once: 64 images of 32 MB.
BATCH = 64


@dataclass(frozen=True)
class Table:
    """The rows of a table, none of them without an image or a label.

    Attributes:
        paths: of the image files, from the table's folder; for images inside the table the path that it gives,
            else `<file's stem>/<row>`, counted from 0.
        labels: as text.
        groups: which object each image shows, or None if no column was asked for.
        contents: binary (n,), the encoded images inside the table, null where the file at `paths` is meant; None for
            a CSV file.
        place: where row i stands, for messages.
    """

    paths: tuple[str, ...]
    labels: tuple[str, ...]
    groups: tuple[str, ...] | None
    contents: pa.ChunkedArray | None
    place: Callable[[int], str]


def read_table(file: Path, *, group: str | None = None) -> Table:
    """Read a `.csv` or `.parquet` file.

    The image column is the only one with a name of `IMAGE_COLUMNS`, the label column the only one with a name of
    `LABEL_COLUMNS`, whatever their case; `group` is the exact name of a third.

    CSV: UTF-8, comma-separated, with a header. Parquet: the image column holds bytes, paths, or structs of both as
    Hugging Face writes them; the label column text or whole numbers, for which the names of a Hugging Face ClassLabel
    are taken. Images inside a Parquet file are held in memory as they are encoded.

    Raises:
        DataError: the file cannot be read, lacks a column, has a row that lacks a value, or several labels an image.
    """
    table = _read_csv(file, group) if file.suffix.lower() == ".csv" else _read_parquet(file, group)
    _check_values(table)
    _check_labels(table)
    _check_one_label_per_file(table)
    return table


def _read_csv(file: Path, group: str | None) -> Table:
    rows = csv_rows(file)
    _, header = next(rows, (0, []))
    if not header:
        raise DataError(f"{file} is empty: give it a header such as path,label and a row for each image")
    pick = itemgetter(*(header.index(name) for name in _columns(file, header, group)))
    lines: list[int] = []
    picked: list[tuple[str, ...]] = []
    for line, row in rows:
        if len(row) != len(header):
            raise DataError(f"{file}, line {line}: {len(row)} values where the header has {len(header)}")
        lines.append(line)
        picked.append(pick(row))
    if not picked:
        raise DataError(f"{file} has a header but no rows: add a row for each image")
    paths, labels, *groups = zip(*picked, strict=True)
    return Table(paths, labels, groups[0] if groups else None, None, lambda row: f"{file}, line {lines[row]}")


def csv_rows(file: Path) -> Iterator[tuple[int, list[str]]]:
    """Every row that is not blank, with the number of its first line."""
    try:
        data = file.read_bytes()
        data.decode("utf-8-sig")  # the whole at once: only so does an error tell its place
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise DataError(f"{file}, line {line}: not UTF-8: save the table as CSV in UTF-8") from error
    reader = csv.reader(io.TextIOWrapper(io.BytesIO(data), "utf-8-sig", newline=""), strict=True)
    line = 1
    try:
        for row in reader:
            if row:
                yield line, row
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{file}, line {line}: not CSV from here on ({error}): are the quotes in pairs?") from error


def _read_parquet(file: Path, group: str | None) -> Table:
    try:
        with pq.ParquetFile(file) as parquet:
            schema = parquet.schema_arrow
            names = _columns(file, schema.names, group)
            batches = list(parquet.iter_batches(BATCH, columns=names))
        if not any(map(len, batches)):
            raise DataError(f"{file} has no rows: add a row for each image")
        table = pa.Table.from_batches(batches)
        image, label, *groups = (table.column(name) for name in names)
        contents, paths = parse_images(f"{file}, column {names[0]!r}", image, file.stem)
        labels = parse_labels(f"{file}, column {names[1]!r}", label, class_names_of(schema, names[1]))
        objects = parse_texts(f"{file}, column {names[2]!r}", groups[0]) if groups else None
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(f"{file} cannot be read as Parquet: {reason}") from error
    return Table(paths, labels, objects, contents, lambda row: f"{file}, row {row}")


def parse_images(where: str, column: pa.ChunkedArray, stem: str) -> tuple[pa.ChunkedArray | None, tuple[str, ...]]:
    """The bytes inside the table, if any, and a path for each row that has an image."""
    if pa.types.is_struct(column.type):
        if not {field.name for field in column.type} >= {"bytes", "path"}:
            raise DataError(f"{where}: the struct of an image has the fields bytes and path, not {column.type}")
        contents, paths = pc.struct_field(column, "bytes"), parse_texts(where, pc.struct_field(column, "path"))
        if pa.types.is_null(contents.type):
            return None, paths
    elif _is_binary(column.type):
        contents, paths = column, ("",) * len(column)
    else:
        return None, parse_texts(where, column)
    if not _is_binary(contents.type):
        raise DataError(f"{where}: its bytes are of type {contents.type}, not binary")
    held = contents.is_valid().to_pylist()
    return contents, tuple(
        path or (f"{stem}/{row}" if inside else "") for row, (path, inside) in enumerate(zip(paths, held, strict=True))
    )


def parse_labels(where: str, column: pa.ChunkedArray, class_names: Sequence[str]) -> tuple[str, ...]:
    """Labels as text, numbers by their names where there are some; DataError for lists."""
    if _is_list(column.type):
        raise DataError(f"{where}: multi-label: it holds lists, and an image has one label here")
    labels = parse_texts(where, column)
    if not class_names:
        return labels
    names = {str(number): str(name) for number, name in enumerate(class_names)}
    for row, label in enumerate(labels):
        if label and label not in names:
            raise DataError(f"{where}, row {row}: {label} is none of the {len(names)} classes: remove the row")
    return tuple(names.get(label, "") for label in labels)


def class_names_of(schema: pa.Schema, column: str) -> Sequence[str]:
    """The names of a ClassLabel column as Hugging Face datasets notes them, or none."""
    try:
        names = json.loads(schema.metadata[b"huggingface"])["info"]["features"][column]["names"]
    except (KeyError, TypeError, ValueError):
        return ()
    return names if isinstance(names, list) and pa.types.is_integer(schema.field(column).type) else ()


def parse_texts(where: str, column: pa.ChunkedArray) -> tuple[str, ...]:
    """Text, or whole numbers as text; empty where there is none."""
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if not (pa.types.is_integer(kind) or _is_text(kind) or pa.types.is_null(kind)):
        raise DataError(f"{where}: it is of type {column.type}: text or whole numbers are needed")
    return tuple(text or "" for text in column.cast(kind).cast(pa.string()).to_pylist())


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _columns(file: Path, header: Sequence[str], group: str | None) -> list[str]:
    """The names of the image and the label column, and of `group` if given."""
    names = [find_column(file, header, "image", IMAGE_COLUMNS), find_column(file, header, "label", LABEL_COLUMNS)]
    if group is None:
        return names
    if header.count(group) != 1:
        found = "several columns" if group in header else "no column"
        raise DataError(f"{file} has {found} {group!r} to group by: it has {_listed(header)}")
    return [*names, group]


def find_column(file: Path, header: Sequence[str], role: str, accepted: Sequence[str]) -> str:
    """The one column of `header` whose name is accepted for this role, whatever its case; else DataError."""
    found = [name for name in header if name.lower() in accepted]
    if not found:
        raise DataError(f"{file} has no {role} column: it has {_listed(header)}; name it one of {', '.join(accepted)}")
    if len(found) > 1:
        raise DataError(f"{file} has more than one {role} column, {_listed(found)}: rename or remove all but one")
    return found[0]


def _listed(names: Sequence[str], most: int = 20) -> str:
    return ", ".join(repr(name[:40]) for name in names[:most]) + (" …" if len(names) > most else "")


def _check_values(table: Table) -> None:
    for role, values in (("image", table.paths), ("label", table.labels), ("group", table.groups or ())):
        for row, value in enumerate(values):
            if not value.strip():
                raise DataError(f"{table.place(row)}: the {role} is missing: fill it in or remove the row")
            if "\0" in value:
                raise DataError(f"{table.place(row)}: the {role} has a null character: remove it")


def _check_labels(table: Table) -> None:
    """Every label may name a class, and none is made of others: `cat|dog` where there are cat and dog."""
    first_rows: dict[str, int] = {}
    for row, label in enumerate(table.labels):
        first_rows.setdefault(label, row)
    for label, row in first_rows.items():
        try:
            check_label(label)
        except DataError as error:
            raise DataError(f"{table.place(row)}: {error}") from None
        for separator in "|;,":
            if separator in label and all(part.strip() in first_rows for part in label.split(separator)):
                raise DataError(
                    f"{table.place(row)}: multi-label: {label!r} is made of other rows' labels: give it one label"
                )


def _check_one_label_per_file(table: Table) -> None:
    in_files = table.contents.is_null().to_pylist() if table.contents is not None else [True] * len(table.paths)
    first_rows: dict[str, int] = {}
    for row, (path, label, in_file) in enumerate(zip(table.paths, table.labels, in_files, strict=True)):
        if in_file and table.labels[first := first_rows.setdefault(path, row)] != label:
            raise DataError(
                f"{table.place(row)}: multi-label: {path} is labelled {label!r} here and {table.labels[first]!r} "
                f"before ({table.place(first)}): give it one label"
            )
