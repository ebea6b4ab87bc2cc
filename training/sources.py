"""Where training's pixels come from: all in the device's memory, or read anew each time by worker processes.

Knows pixels and their order; knows neither labels nor augmentation.
"""

import signal
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import psutil
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from coterie.dataset import LabelledImages
from coterie.errors import DataError, ImageError
from coterie.images import Preprocessing, load_pixels

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
        workers: processes that read and decode; 0 for this process.

    Raises:
        DataError: while reading, where an image that could be read before cannot any more.
    """

    def __init__(
        self,
        images: LabelledImages,
        rows: Sequence[int],
        preprocessing: Preprocessing,
        device: torch.device,
        workers: int,
    ) -> None:
        self.device = device
        self._order: list[list[int]] = []
        self._loader: DataLoader[Tensor | str] = DataLoader(
            _Decoded(images, rows, preprocessing),
            # A list that is filled before each pass, so that the workers live on between them.
            batch_sampler=self._order,
            num_workers=workers,
            persistent_workers=workers > 0,
            prefetch_factor=2 if workers else None,  # batches a worker, in shared memory
            pin_memory=device.type == "cuda",
            collate_fn=_stack,
            worker_init_fn=_outlive_sigterm,
        )

    def batches(self, rows: Iterable[Tensor]) -> Iterator[Tensor]:
        self._order[:] = [batch.tolist() for batch in rows]
        for pixels in self._loader:
            if isinstance(pixels, str):
                raise DataError(pixels)
            yield pixels.to(self.device, non_blocking=True)


class _Decoded(Dataset["Tensor | str"]):
    def __init__(self, images: LabelledImages, rows: Sequence[int], preprocessing: Preprocessing) -> None:
        self.images, self.rows, self.preprocessing = images, rows, preprocessing

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> Tensor | str:
        """Pixels, or what went wrong: an exception would arrive with the worker's traceback as its message."""
        row = self.rows[number]
        try:
            return torch.tensor(load_pixels(self.images.read(row), self.preprocessing))
        except ImageError as error:
            where = self.images.root / self.images.paths[row]
            return f"{where} could be read when training began, and now {error}: restore it and go on with --resume"


def _stack(items: list[Tensor | str]) -> Tensor | str:
    pixels = [item for item in items if isinstance(item, Tensor)]
    return torch.stack(pixels) if len(pixels) == len(items) else next(item for item in items if isinstance(item, str))


def _outlive_sigterm(worker: int) -> None:
    """Launchers send SIGTERM to all processes at once; workers end with the one they work for, after it has saved."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def fits_in_memory(n: int, size: tuple[int, int], device: torch.device, copies: int = 1) -> bool:
    """Whether n images of this size fill at most a third of the free memory.

    Args:
        device: where they are to stay; the host's memory has to hold them once in any case.
        copies: processes of this machine that each hold them, on a CPU in one memory.
    """
    needed = n * size[0] * size[1] * 3
    free = psutil.virtual_memory().available
    if device.type == "cuda":
        return needed <= MEMORY_SHARE * min(free, torch.cuda.mem_get_info(device)[0])
    return needed * copies <= MEMORY_SHARE * free
