"""Enrolled items as one Parquet file, with their pictures and images, for another machine or another bundle.

Columns: id, label, embedding, metadata as JSON, thumbnail, and original, the encoded image or null. The file's metadata
names the encoder (`coterie.model`, its sha256); where another one reads the file, it embeds the images anew.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from coterie.bundle import MODEL, Bundle
from coterie.changes import StoredItem
from coterie.dataset import Rejected
from coterie.errors import DataError, ImageError
from coterie.files import atomic_file
from coterie.gallery import Gallery
from coterie.images import load_pixels
from coterie.items import item_id, matrix_column
from coterie.labels import check_label
from coterie.ranking import check_unit_vectors

__all__ = ["export_items", "import_items"]

BATCH = 64  # Arrow reads at most 2 GiB of images at once
COLUMNS = ("id", "label", "embedding", "metadata", "thumbnail", "original")

Entry = TypeVar("Entry")


def export_items(bundle: Bundle, gallery: Gallery, out: Path, *, progress: Callable[[int], None] | None = None) -> int:
    """Write the enrolled items of a gallery to the Parquet file `out`, whole or not at all; returns how many.

    Raises:
        DataError: there are none.
        StoreError: they cannot be read.
    """
    items = gallery.enrolled()
    first = list(islice(items, BATCH))
    if not first:
        raise DataError("no items were enrolled, so there is nothing to export: the bundle's own are in the bundle")
    dim = bundle.manifest.encoder.embedding_dim
    named = {"coterie.model": bundle.manifest.files[MODEL].sha256, "coterie.gallery": bundle.manifest.name}
    schema = pa.schema(
        [
            pa.field("id", pa.string(), nullable=False),
            pa.field("label", pa.string(), nullable=False),
            pa.field("embedding", pa.list_(pa.float32(), dim), nullable=False),
            pa.field("metadata", pa.string(), nullable=False),
            pa.field("thumbnail", pa.binary(), nullable=False),
            pa.field("original", pa.binary()),
        ],
        named,
    )
    count, batch = 0, first
    with (
        atomic_file(out) as file,
        pq.ParquetWriter(file, schema, compression="zstd", use_dictionary=["label"]) as writer,
    ):
        while batch:
            embeddings = np.concatenate([item.embedding for item in batch])
            columns = [
                pa.array([item.id for item in batch]),
                pa.array([item.label for item in batch]),
                pa.FixedSizeListArray.from_arrays(embeddings, dim),
                pa.array([json.dumps(item.metadata, ensure_ascii=False, sort_keys=True) for item in batch]),
                pa.array([item.thumbnail for item in batch], pa.binary()),
                pa.array([item.original for item in batch], pa.binary()),
            ]
            writer.write_table(pa.table(columns, schema=schema))
            count += len(batch)
            if progress:
                progress(len(batch))
            batch = list(islice(items, BATCH))
    return count


def import_items(
    bundle: Bundle, gallery: Gallery, file: Path, *, progress: Callable[[int, int], None] | None = None
) -> tuple[int, list[Rejected]]:
    """Enrol the items of a file that `export_items` wrote; the same again changes nothing.

    Args:
        progress: called with the number of items that are done, and of all.

    Returns:
        how many were enrolled, and those that another encoder embedded and whose image the file lacks or which cannot
        be read.

    Raises:
        DataError: it is no such file, or a row cannot be used; the batches of rows before it are enrolled.
        QuotaError, StoreError: they cannot be enrolled.
    """
    count, rejected = 0, list[Rejected]()
    for number, total, encoder, rows in _batches(file):
        own = encoder == bundle.manifest.files[MODEL].sha256
        items = rows if own else _embedded_anew(bundle, file, rows, rejected)
        _check(file, number, items, bundle.manifest.encoder.embedding_dim)
        gallery.add(items)
        count += len(items)
        if progress:
            progress(len(rows), total)
    return count, rejected


def _batches(file: Path) -> Iterator[tuple[int, int, str, list[StoredItem]]]:
    """The number of the first row, that of all rows, the encoder, and the rows, batch by batch."""
    try:
        with pq.ParquetFile(file) as parquet:
            schema, number = parquet.schema_arrow, 0
            missing = [name for name in COLUMNS if name not in schema.names]
            encoder = (schema.metadata or {}).get(b"coterie.model", b"").decode()
            if missing or not encoder:
                raise DataError(
                    f"{file} was not written by `coterie gallery export`: it has no "
                    f"{', '.join(missing) or 'name of an encoder'}; images and labels go in by `coterie gallery add`"
                )
            for batch in parquet.iter_batches(BATCH, columns=list(COLUMNS)):
                columns: dict[str, Any] = {name: batch.column(name).to_pylist() for name in COLUMNS}
                columns["embedding"] = matrix_column(pa.chunked_array([batch.column("embedding")]))
                columns["thumbnail"] = [picture or b"" for picture in columns["thumbnail"]]
                columns["metadata"] = [json.loads(text) for text in columns["metadata"]]
                yield (
                    number,
                    parquet.metadata.num_rows,
                    encoder,
                    [StoredItem(*row) for row in zip(*(columns[name] for name in COLUMNS), strict=True)],
                )
                number += len(batch)
    except (pa.ArrowException, OSError, TypeError, ValueError) as error:
        raise DataError(f"{file} cannot be read as a gallery's export: {str(error).splitlines()[0]}") from error


def _embedded_anew(
    bundle: Bundle, file: Path, rows: Iterable[StoredItem], rejected: list[Rejected]
) -> list[StoredItem]:
    usable, pixels = [], []
    for row in rows:
        try:
            if row.original is None:
                raise ImageError("another encoder embedded it, and its image is not in the file")
            pixels.append(load_pixels(row.original, bundle.manifest.encoder.preprocessing))
            usable.append(row)
        except ImageError as error:
            rejected.append(Rejected(Path(f"{file}: {row.id} ({row.label})"), str(error)))
    if not usable:
        return []
    embeddings = bundle.encoder.embed(np.stack(pixels))
    return [
        StoredItem(row.id, row.label, embedding, row.metadata, row.thumbnail, row.original)
        for row, embedding in zip(usable, embeddings, strict=True)
    ]


def _check(file: Path, number: int, items: Iterable[StoredItem], dim: int) -> None:
    for row, item in enumerate(items, number):
        try:
            check_label(item.label)
            check_unit_vectors(item.embedding[None], dim)
            if item.original is not None and item_id(item.original) != item.id:
                raise DataError(f"its image has the id {item_id(item.original)}, not {item.id}")
            if not isinstance(item.metadata, dict):
                raise DataError("its metadata is not a JSON object")
        except (DataError, ValueError, TypeError) as error:
            raise DataError(f"{file}, row {row}: {error}") from error
