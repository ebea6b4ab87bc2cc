"""What a run trains on: images found, read and split, the same on every rank."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from coterie.dataset import LabelledImages, LabelledPixels, read_images, read_pixels
from coterie.images import Preprocessing
from coterie.labels import check_counts
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
        found: where they lie.
        images: what could be read; without pixels where these are to be streamed.
        train, calibration, test: int64, rows of `images`.
    """

    found: LabelledImages
    images: LabelledPixels
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

    def source(self, recipe: Recipe, device: torch.device) -> ImageSource:
        """Pixels by row of `images`."""
        if len(self.images.pixels):
            return MemoryImages(torch.from_numpy(self.images.pixels).to(device))
        return StreamedImages(self.found, self.images.rows, cached_form(recipe), device, recipe.data.workers)


def prepare(data: Path, recipe: Recipe, world: World, *, group: str | None, strict: bool) -> Prepared:
    """Find, read and split labelled images, on the first rank, and tell the others.

    Raises:
        DataError: they cannot be used.
    """
    return world.from_first(lambda: _prepare(data, recipe, world, group, strict))


def _prepare(data: Path, recipe: Recipe, world: World, group: str | None, strict: bool) -> Prepared:
    found = read_images(data, group=group, min_classes=2, min_images=2)
    form = cached_form(recipe)
    stays = recipe.data.storage == "memory" or (
        recipe.data.storage == "auto" and fits_in_memory(len(found), form.input_size, world.device)
    )
    with progress_bar("reading images", len(found)) as advance:
        images = read_pixels(found, form, strict=strict, progress=advance, keep_pixels=stays)
    check_counts(images.labels, images.classes, where=data, min_classes=2, min_images=2)
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
    return Prepared(
        found=found,
        images=images,
        train=np.flatnonzero(~test & ~calibration),
        calibration=np.flatnonzero(calibration),
        test=np.flatnonzero(test),
    )


def cached_form(recipe: Recipe) -> Preprocessing:
    """How training images wait for their random crops."""
    form = recipe.data.preprocessing
    return form.model_copy(update={"input_size": recipe.data.cache_size}) if recipe.data.cache_size else form
