"""What a run trains on: images found, read and split, the same on every rank."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from coterie.dataset import LabelledImages, LabelledPixels, read_images, read_pixels
from coterie.errors import DataError
from coterie.images import Preprocessing
from coterie.labels import check_counts
from coterie.machine import processors
from coterie.progress import progress_bar
from coterie.splits import split_by_hash
from training.distributed import World
from training.recipe import Recipe
from training.run import DatasetRecord
from training.sources import ImageSource, MemoryImages, StreamedImages, fits_in_memory

__all__ = ["Prepared", "prepare"]


@dataclass(frozen=True)
class Prepared:
    """Images and their split.

    Attributes:
        images: what could be read, without the pixels.
        source: the pixels by row of `images`.
        train, calibration, test: int64, rows of `images`.
    """

    images: LabelledPixels
    source: ImageSource
    train: NDArray[np.int64]
    calibration: NDArray[np.int64]
    test: NDArray[np.int64]

    @property
    def n_classes(self) -> int:
        return len(self.images.classes)

    @property
    def record(self) -> DatasetRecord:
        """What the run directory keeps of this."""
        return DatasetRecord.of(self.images, train=self.train, calibration=self.calibration, test=self.test)


def prepare(data: Path, recipe: Recipe, world: World, *, group: str | None, strict: bool) -> Prepared:
    """Find, read and split labelled images, on the first rank, and tell the others.

    Raises:
        DataError: they cannot be used.
    """
    pixels: list[Tensor] = []  # rank 0's, which travel apart from the rest

    def read() -> tuple[LabelledImages, LabelledPixels, tuple[int, ...]]:
        found, images = _read(data, recipe, world, group, strict)
        pixels.append(torch.from_numpy(images.pixels))
        return found, replace(images, pixels=images.pixels[:0]), images.pixels.shape

    found, images, shape = world.from_first(read)
    source: ImageSource
    if shape[0]:
        source = MemoryImages(world.share(pixels.pop() if pixels else None, shape, torch.uint8))
    else:
        workers = recipe.data.workers
        if workers is None:
            workers = max(1, processors() // world.local_size - 1)
        source = StreamedImages(found, images.rows.tolist(), cached_form(recipe), world.device, workers)
    train, calibration, test = _split(images, recipe, data)
    return Prepared(images, source, train=train, calibration=calibration, test=test)


def _read(
    data: Path, recipe: Recipe, world: World, group: str | None, strict: bool
) -> tuple[LabelledImages, LabelledPixels]:
    found = read_images(data, group=group, min_classes=2, min_images=2)
    form = cached_form(recipe)
    stays = recipe.data.storage == "memory" or (
        recipe.data.storage == "auto" and fits_in_memory(len(found), form.input_size, world.device, world.local_size)
    )
    with progress_bar("reading images", len(found)) as advance:
        images = read_pixels(found, form, strict=strict, progress=advance, keep_pixels=stays)
    check_counts(images.labels, images.classes, where=data, min_classes=2, min_images=2)
    return found, images


def _split(images: LabelledPixels, recipe: Recipe, data: Path) -> tuple[NDArray[np.int64], ...]:
    """Rows for training, calibration and test."""
    shares, seed = recipe.data, recipe.seed
    test = np.zeros(len(images), dtype=bool)
    if shares.test:
        test = split_by_hash(images.labels, images.hashes, shares.test, seed=seed, groups=images.groups)
    rest = np.flatnonzero(~test)
    calibration = np.zeros(len(images), dtype=bool)
    calibration[rest] = split_by_hash(
        images.labels[rest],
        [images.hashes[row] for row in rest],
        shares.calibration / (1 - shares.test),
        seed=seed,
        groups=None if images.groups is None else [images.groups[row] for row in rest],
    )
    if not calibration.any():
        raise DataError(
            f"no class in {data} has images enough to hold a share of {shares.calibration:g} out: add images, "
            "or raise data.calibration"
        )
    return np.flatnonzero(~test & ~calibration), np.flatnonzero(calibration), np.flatnonzero(test)


def cached_form(recipe: Recipe) -> Preprocessing:
    """How training images wait for their random crops."""
    form = recipe.data.preprocessing
    return form.model_copy(update={"input_size": recipe.data.cache_size}) if recipe.data.cache_size else form
