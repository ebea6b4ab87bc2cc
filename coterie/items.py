"""The rows of a gallery, column by column, and their file."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, SupportsIndex, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from coterie.changes import StoredItem
from coterie.errors import BundleError, DataError
from coterie.ranking import check_unit_vectors

__all__ = ["ID_DIGITS", "Column", "GalleryItems", "Items", "item_id", "matrix_column"]

ID_DIGITS = 24
Entry_co = TypeVar("Entry_co", covariant=True)


class Column(Protocol[Entry_co]):
    """What a tuple can do, as far as a column needs it."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Entry_co]: ...
    def __getitem__(self, row: SupportsIndex, /) -> Entry_co: ...


class Items(Protocol):
    """Rows of a gallery, wherever they are kept; columns as in `GalleryItems`."""

    @property
    def ids(self) -> Column[str]: ...
    @property
    def labels(self) -> NDArray[np.str_]: ...
    @property
    def embeddings(self) -> NDArray[np.float32]: ...
    @property
    def positions(self) -> NDArray[np.float32]: ...
    @property
    def thumbnails(self) -> Column[bytes]: ...
    @property
    def metadata(self) -> Column[dict[str, Any]]: ...

    def __len__(self) -> int: ...

    def label(self, row: int) -> str:
        """One of `labels`."""

    @property
    def dim(self) -> int:
        """Width of the embeddings."""

    def select(self, rows: NDArray[np.int64]) -> "GalleryItems":
        """The items at `rows`, in that order."""

    def whole(self) -> "GalleryItems":
        """All of them, at one place."""


def item_id(content: bytes) -> str:
    """The gallery id of an image: the first `ID_DIGITS` hexadecimal digits of its bytes' sha256."""
    return hashlib.sha256(content).hexdigest()[:ID_DIGITS]


@dataclass(frozen=True)
class GalleryItems:
    """Rows of a gallery.

    Attributes:
        ids: unique; (n,).
        labels: str (n,).
        embeddings: float32 (n, d), unit length.
        positions: float32 (n, 2), for drawing a map.
        thumbnails: encoded pictures, empty bytes where there is none.
        metadata: one mapping each.
    """

    ids: Column[str]
    labels: NDArray[np.str_]
    embeddings: NDArray[np.float32]
    positions: NDArray[np.float32]
    thumbnails: Column[bytes]
    metadata: Column[dict[str, Any]]

    def __post_init__(self) -> None:
        n = len(self.ids)
        if len(set(self.ids)) != n:
            raise DataError("gallery ids must be unique")
        check_unit_vectors(self.embeddings)
        sizes = {len(self.labels), len(self.embeddings), len(self.positions), len(self.thumbnails), len(self.metadata)}
        if sizes != {n}:
            raise ValueError(f"a gallery's columns differ in length: {sorted(sizes | {n})}")

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def enrolled(cls, items: Sequence[StoredItem], dim: int) -> "GalleryItems":
        """Rows for items that came after the bundle was made; they have no place on its map."""
        return cls(
            ids=tuple(item.id for item in items),
            labels=np.asarray([item.label for item in items], dtype=np.str_),
            embeddings=np.stack([item.embedding for item in items]) if items else np.empty((0, dim), np.float32),
            positions=np.full((len(items), 2), np.nan, dtype=np.float32),
            thumbnails=tuple(item.thumbnail for item in items),
            metadata=tuple(item.metadata for item in items),
        )

    def label(self, row: int) -> str:
        """One of `labels`."""
        return str(self.labels[row])

    @property
    def dim(self) -> int:
        """Width of the embeddings."""
        return int(self.embeddings.shape[1])

    def select(self, rows: NDArray[np.int64]) -> "GalleryItems":
        """The items at `rows`, in that order."""
        return GalleryItems(
            ids=tuple(self.ids[row] for row in rows),
            labels=self.labels[rows],
            embeddings=self.embeddings[rows],
            positions=self.positions[rows],
            thumbnails=tuple(self.thumbnails[row] for row in rows),
            metadata=tuple(self.metadata[row] for row in rows),
        )

    def whole(self) -> "GalleryItems":
        """These."""
        return self

    def __add__(self, other: "GalleryItems") -> "GalleryItems":
        return GalleryItems(
            ids=(*self.ids, *other.ids),
            labels=np.concatenate([self.labels, other.labels]),
            embeddings=np.concatenate([self.embeddings, other.embeddings]),
            positions=np.concatenate([self.positions, other.positions]),
            thumbnails=(*self.thumbnails, *other.thumbnails),
            metadata=(*self.metadata, *other.metadata),
        )

    def write(self, path: Path) -> None:
        """Write the rows as Parquet; equal rows give equal bytes."""
        dim = self.embeddings.shape[1]
        table = pa.table(
            {
                "id": pa.array(list(self.ids), pa.string()),
                "label": pa.array(self.labels.tolist(), pa.string()),
                "embedding": pa.FixedSizeListArray.from_arrays(self.embeddings.ravel(), dim),
                "position": pa.FixedSizeListArray.from_arrays(self.positions.ravel(), 2),
                "thumbnail": pa.array(list(self.thumbnails), pa.binary()),
                "metadata": pa.array([json.dumps(row, sort_keys=True) for row in self.metadata], pa.string()),
            }
        )
        pq.write_table(table, path, compression="zstd")

    @classmethod
    def read(cls, path: Path) -> "GalleryItems":
        """Read what `write` wrote.

        Raises:
            BundleError: not such a file.
        """
        try:
            table = pq.read_table(path).combine_chunks()
            return cls(
                ids=tuple(table["id"].to_pylist()),
                labels=np.asarray(table["label"].to_pylist(), dtype=np.str_),
                embeddings=matrix_column(table["embedding"]),
                positions=matrix_column(table["position"]),
                thumbnails=tuple(table["thumbnail"].to_pylist()),
                metadata=tuple(json.loads(row) for row in table["metadata"].to_pylist()),
            )
        except (pa.ArrowException, OSError, KeyError, TypeError, ValueError, DataError) as error:
            raise BundleError(f"{path} is not a gallery: {error}") from error


def matrix_column(column: pa.ChunkedArray) -> NDArray[np.float32]:
    """A column of vectors of one width as an array (n, width).

    Raises:
        ValueError: the column holds anything else.
    """
    flat = column.combine_chunks()
    if not pa.types.is_fixed_size_list(flat.type):
        raise ValueError(f"a column of vectors has the type {flat.type}")
    values = flat.flatten().to_numpy(zero_copy_only=False).astype(np.float32)
    return np.asarray(values.reshape(len(flat), flat.type.list_size))
