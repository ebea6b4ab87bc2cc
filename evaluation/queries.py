"""Labelled images, read and embedded as the service would."""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from coterie.bundle import Bundle
from coterie.dataset import LabelledImages, LabelledPixels, read_images, read_pixels
from coterie.errors import DataError
from coterie.progress import progress_bar

__all__ = ["Queries", "check_labels", "embed_folder", "embed_images"]


@dataclass(frozen=True)
class Queries:
    """Embedded labelled images: `images` with their unit-length `embeddings` (n, d), and how long the encoder took."""

    images: LabelledPixels
    embeddings: NDArray[np.float32]
    seconds: float = float("nan")

    @property
    def labels(self) -> NDArray[np.str_]:
        return self.images.names

    def __len__(self) -> int:
        return len(self.images)

    def select(self, mask: NDArray[np.bool_]) -> "Queries":
        """The images where `mask` (n,) is true."""
        return Queries(self.images.select(mask), self.embeddings[mask])


def check_labels(labels: Iterable[str], known: Iterable[str]) -> None:
    """Refuse labels that a gallery does not have.

    Raises:
        DataError: names the first of them.
    """
    strange = sorted(set(labels) - set(known))
    if strange:
        raise DataError(
            f"the gallery has no class {', '.join(map(repr, strange[:5]))}{' …' if len(strange) > 5 else ''}: "
            "enrol it first, or give these images as --unknown"
        )


def embed_folder(bundle: Bundle, data: Path, *, strict: bool = False) -> Queries:
    """Read and embed labelled images: a class-per-folder tree, a CSV or a Parquet file.

    Raises:
        DataError: they cannot be used.
        DeviceError: the encoder cannot run where it shall.
    """
    return embed_images(bundle, read_images(data), data.name, strict=strict)


def embed_images(bundle: Bundle, found: LabelledImages, name: str, *, strict: bool = False) -> Queries:
    """Read and embed images that were found; `name` is shown meanwhile.

    Raises:
        DataError: they cannot be read.
        DeviceError: the encoder cannot run where it shall.
    """
    encoder = bundle.encoder  # that it cannot run here is said before anything is decoded
    with progress_bar(f"reading {name}", len(found)) as advance:
        images = read_pixels(
            found, bundle.manifest.encoder.preprocessing, thumbnails=True, strict=strict, progress=advance
        )
    with progress_bar(f"embedding {name}", len(images)) as advance:
        began = time.perf_counter()
        embeddings = encoder.embed(images.pixels, progress=advance)
        return Queries(images, embeddings, time.perf_counter() - began)
