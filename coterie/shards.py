"""A Parquet file of embeddings that grows shard by shard, and outlives the process that writes it.

FILE.parquet        path, label, sha256, embedding; which bundle made it stands in the file's metadata
FILE.rejects.csv    path and reason of every image that could not be read
FILE.parquet.parts  the shards that are finished, while the work goes on

A shard is written whole or not at all, under its number. Knows nothing of where images and embeddings come from.
"""

import csv
import io
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from coterie.decoding import DecodedRow
from coterie.errors import CoterieError, DataError
from coterie.files import sync_directory, write_bytes, write_text

__all__ = ["Batch", "Embedded", "Plan", "count_parts", "hold", "join", "take_up", "write_part"]


@dataclass(frozen=True)
class Batch:
    """Consecutive images: those that were read with their `embeddings` (n, d), and path and reason of the others."""

    rows: tuple[DecodedRow, ...]
    embeddings: NDArray[np.float32]
    rejected: tuple[tuple[str, str], ...]

    def __len__(self) -> int:
        return len(self.rows) + len(self.rejected)


@dataclass(frozen=True)
class Embedded:
    """What was written: `images` rows in `file`, and `rejected` rows in `rejects`."""

    file: Path
    rejects: Path
    images: int
    rejected: int
    dim: int


@dataclass(frozen=True)
class Plan:
    """What the shards of one output have in common."""

    bundle: str
    model: str
    data: str
    images: int
    shard: int


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Keep other processes out of `folder`; the system lets go of it when this one ends, however it does."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "lock"
    with path.open("ab") as file:
        try:
            _lock(file.fileno())
            # Whoever held it until now may have removed it with the folder.
            held = os.path.samestat(os.fstat(file.fileno()), path.stat())
        except OSError:
            held = False
        if not held:
            raise CoterieError(f"{folder} is in use: another process writes this output; wait for it, or stop it")
        yield


def _lock(descriptor: int) -> None:
    """Take the lock of an open file, or raise OSError at once."""
    if sys.platform == "win32":
        import msvcrt

        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def take_up(folder: Path, plan: Plan, restart: bool) -> None:
    """Leave those shards in `folder` that are part of `plan`."""
    file = folder / "plan.json"
    if restart:
        file.unlink(missing_ok=True)
    if not file.exists():
        for part in folder.glob("*.parquet"):
            part.unlink()
        write_text(file, json.dumps(asdict(plan), indent=1) + "\n")
        return
    found = json.loads(file.read_text("utf-8"))
    differing = [name for name, value in asdict(plan).items() if found.get(name) != value]
    if differing:
        raise DataError(
            f"{folder} holds the unfinished work of another run, its {' and '.join(differing)} differ: go on with what "
            "it was begun with, or give --restart to begin again"
        )


def count_parts(folder: Path) -> int:
    """How many shards are finished, from the first on."""
    return next(number for number in count() if not _part(folder, number).exists())


def _part(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.parquet"


def _schema(dim: int, metadata: dict[str, str]) -> pa.Schema:
    fields = [
        pa.field("path", pa.string(), nullable=False),
        pa.field("label", pa.string()),
        pa.field("sha256", pa.string(), nullable=False),
        pa.field("embedding", pa.list_(pa.float32(), dim), nullable=False),
    ]
    return pa.schema(fields, metadata)


def write_part(folder: Path, number: int, batches: list[Batch], dim: int) -> None:
    """A shard and, in its metadata, its rejects: they exist together or not at all."""
    rows = [row for batch in batches for row in batch.rows]
    rejected = [entry for batch in batches for entry in batch.rejected]
    embeddings = np.concatenate([batch.embeddings for batch in batches])
    table = pa.table(
        [
            pa.array([row.path for row in rows], pa.string()),
            pa.array([row.label for row in rows], pa.string()),
            pa.array([row.sha256 for row in rows], pa.string()),
            pa.FixedSizeListArray.from_arrays(embeddings.ravel(), dim),
        ],
        schema=_schema(dim, {"rejected": json.dumps(rejected)}),
    )
    content = io.BytesIO()
    with _writer(content, table.schema) as writer:
        writer.write_table(table)
    write_bytes(_part(folder, number), content.getvalue())


def _writer(sink: BinaryIO, schema: pa.Schema) -> pq.ParquetWriter:
    # Of floats that are all different, dictionaries, bounds and compression are work for nothing.
    words = [field.name for field in schema if field.name != "embedding"]
    return pq.ParquetWriter(
        sink,
        schema,
        compression=dict.fromkeys(words, "zstd") | {"embedding.list.element": "none"},
        use_dictionary=["label"],
        write_statistics=words,
    )


def join(folder: Path, out: Path, plan: Plan, dim: int) -> Embedded:
    """All shards as one file, a row group each, and all their rejects as another."""
    schema = _schema(dim, {"coterie.bundle": plan.bundle, "coterie.model": plan.model})
    rejects = out.with_suffix(".rejects.csv")
    whole, left_out = folder / "whole", folder / "rejects"
    images = rejected = 0
    with whole.open("wb") as embeddings, left_out.open("w", encoding="utf-8", newline="") as reasons:
        lines = csv.writer(reasons)
        lines.writerow(["path", "reason"])
        with _writer(embeddings, schema) as writer:
            for number in range(-(-plan.images // plan.shard)):
                table, entries = _read_part(_part(folder, number))
                lines.writerows(entries)
                if len(table):
                    writer.write_table(table.replace_schema_metadata(schema.metadata), row_group_size=len(table))
                images, rejected = images + len(table), rejected + len(entries)
        for file in (embeddings, reasons):
            file.flush()
            os.fsync(file.fileno())
    left_out.replace(rejects)
    if images:
        whole.replace(out)
    sync_directory(out.parent)
    return Embedded(out, rejects, images, rejected, dim)


def _read_part(path: Path) -> tuple[pa.Table, list[list[str]]]:
    try:
        table = pq.ParquetFile(path).read()
        return table, json.loads(table.schema.metadata[b"rejected"])
    except (pa.ArrowException, OSError, TypeError, KeyError, ValueError) as error:
        raise DataError(f"{path} is damaged ({error}): give --restart to begin again") from error
