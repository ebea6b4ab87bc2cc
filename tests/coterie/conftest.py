"""Galleries drawn from classes whose shape is known."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray

from coterie.clusters import ClassClusters
from coterie.gallery import GalleryItems, Snapshot

Labelled = tuple[NDArray[np.float32], NDArray[np.str_]]


def unit(vectors: NDArray[np.float64]) -> NDArray[np.float32]:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@dataclass(frozen=True)
class Clouds:
    """Classes "a", "b", … as round clouds on the unit sphere: `centres` (c, d) of unit length, `spreads` (c,)."""

    centres: NDArray[np.float32]
    spreads: NDArray[np.float64]

    @classmethod
    def make(cls, rng: np.random.Generator, classes: int, dim: int, spread: float) -> "Clouds":
        return cls(unit(rng.normal(size=(classes, dim))), spread * np.exp(rng.normal(size=classes) / 2))

    def draw(self, rng: np.random.Generator, counts: Sequence[int]) -> Labelled:
        """`counts` images of each class, mixed."""
        rows = rng.permutation(np.repeat(np.arange(len(counts)), counts))
        noise = rng.normal(size=(len(rows), self.centres.shape[1])) * self.spreads[rows, None]
        return unit(self.centres[rows] + noise / np.sqrt(self.centres.shape[1])), self.names[rows]

    @property
    def names(self) -> NDArray[np.str_]:
        return np.asarray([chr(ord("a") + row) for row in range(len(self.centres))])


def make_items(
    embeddings: NDArray[np.float32], labels: Sequence[str] | NDArray[np.str_], prefix: str = ""
) -> GalleryItems:
    n = len(embeddings)
    return GalleryItems(
        ids=tuple(f"{prefix}{row}" for row in range(n)),
        labels=np.asarray(labels, dtype=np.str_),
        embeddings=embeddings,
        positions=np.zeros((n, 2), dtype=np.float32),
        thumbnails=(b"",) * n,
        metadata=tuple({"row": row} for row in range(n)),
    )


@pytest.fixture
def cloud_class() -> type[Clouds]:
    return Clouds


@pytest.fixture(name="items")
def _items():  # type: ignore[no-untyped-def]
    """Gallery items of given embeddings and labels."""
    return make_items


@pytest.fixture
def snapshot_of() -> Callable[..., Snapshot]:
    """The snapshot of a labelled gallery, its clusters measured on held-out images if there are any."""

    def make(gallery: Labelled, held_out: Labelled | None = None) -> Snapshot:
        return Snapshot(make_items(*gallery), ClassClusters.fit(*gallery, held_out))

    return make


@pytest.fixture
def clouds() -> Clouds:
    """Six classes that overlap a little."""
    return Clouds.make(np.random.default_rng(0), 6, 8, 0.6)
