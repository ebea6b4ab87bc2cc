"""What queries are compared with: labelled vectors, an index over them, and their class clusters.

A gallery's snapshot is one; `LabelledVectors` is one without ids, pictures and metadata.
"""

import bisect
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from coterie.clusters import ClassClusters
from coterie.index import ExactIndex

__all__ = ["LabelledVectors", "Reference"]


class Searchable(Protocol):
    """An index as coterie.index has them."""

    def search(self, queries: NDArray[np.float32], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]: ...


class Reference(Protocol):
    """Anything with an index, and the clusters of the classes that its rows belong to."""

    @property
    def index(self) -> Searchable: ...

    def classes_of(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """The row in `clusters` of each row's class, in the shape of `rows`."""

    @property
    def clusters(self) -> ClassClusters: ...


@dataclass(frozen=True)
class LabelledVectors:
    """Unit-length embeddings float32 (n, d) and their `classes` (n,), rows of `clusters`."""

    embeddings: NDArray[np.float32]
    classes: NDArray[np.int64]
    clusters: ClassClusters

    @cached_property
    def index(self) -> ExactIndex:
        return ExactIndex(self.embeddings)

    def classes_of(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        return self.classes[rows]

    def without(self, *rows: int) -> "LabelledVectors":
        """These less the classes `rows`."""
        kept = np.setdiff1d(np.arange(len(self.clusters)), rows)
        some = np.isin(self.classes, kept)
        classes = np.searchsorted(kept, self.classes[some])
        return LabelledVectors(self.embeddings[some], classes, self.clusters.select(kept.tolist()))

    def with_class(self, label: str, members: NDArray[np.float32]) -> "LabelledVectors":
        """These and the embeddings (m, d) of a class that is not among them, as if it had just been enrolled."""
        row = bisect.bisect_left(self.clusters.labels, label)
        return LabelledVectors(
            np.concatenate([self.embeddings, members]),
            np.append(self.classes + (self.classes >= row), np.full(len(members), row)),
            self.clusters.with_class(label, members, self.embeddings),
        )
