"""Where training's pixels come from: all in the device's memory, or read anew each time by worker processes.

Knows pixels and their order; knows neither labels nor augmentation.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from coterie.dataset import LabelledImages
from coterie.images import Preprocessing, load_pixels
from coterie.machine import processors

__all__ = ["ImageSource", "MemoryImages", "StreamedImages", "fits_in_memory"]

MEMORY_SHARE = 1 / 3


class ImageSource(Protocol):
    """Images by number."""

    def batches(self, rows: Iterable[Tensor]) -> Iterator[Tensor]:
        """For each batch of row numbers (b,) its uint8 pixels (b, h, w, 3), on the device."""


class MemoryImages:
    """Pixels that stay on the device.

    Args:
        pixels: uint8 (n, h, w, 3), on the device.
    """

    def __init__(self, pixels: Tensor) -> None:
        self.pixels = pixels

    def batches(self, rows: Iterable[Tensor]) -> Iterator[Tensor]:
        return (self.pixels[batch] for batch in rows)


class StreamedImages:
    """Images that are decoded each time they are asked for, ahead of their use.

    Args:
        images: where they lie.
        rows: which of them, in the order of the numbers that `batches` takes.
        preprocessing: their size in memory.
        device: where batches go.
        workers: processes that read and decode; None for one less than the processors, 0 for this process.
    """

    def __init__(
        self,
        images: LabelledImages,
        rows: Sequence[int],
        preprocessing: Preprocessing,
        device: torch.device,
        workers: int | None = None,
    ) -> None:
        self.device = device
        self._order: list[list[int]] = []
        count = max(1, processors() - 1) if workers is None else workers
        self._loader: DataLoader[Tensor] = DataLoader(
            _Decoded(images, rows, preprocessing),
            # A list that is filled before each pass, so that the workers live on between them.
            batch_sampler=self._order,
            num_workers=count,
            persistent_workers=count > 0,
            prefetch_factor=4 if count else None,
            pin_memory=device.type == "cuda",
        )

    def batches(self, rows: Iterable[Tensor]) -> Iterator[Tensor]:
        self._order[:] = [batch.tolist() for batch in rows]
        return (pixels.to(self.device, non_blocking=True) for pixels in self._loader)


class _Decoded(Dataset[Tensor]):
    def __init__(self, images: LabelledImages, rows: Sequence[int], preprocessing: Preprocessing) -> None:
        self.images, self.rows, self.preprocessing = images, rows, preprocessing

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> Tensor:
        return torch.tensor(load_pixels(self.images.read(self.rows[number]), self.preprocessing))


def fits_in_memory(n: int, size: tuple[int, int], device: torch.device) -> bool:
    """Whether n images of this size fill at most a third of the memory that is free on the device."""
    needed = n * size[0] * size[1] * 3
    if device.type == "cuda":
        return needed <= MEMORY_SHARE * torch.cuda.mem_get_info(device)[0]
    return needed <= MEMORY_SHARE * _free_memory()


def _free_memory() -> int:
    import psutil

    return int(psutil.virtual_memory().available)
