"""Pixels to embeddings: a session on each device, batches to the one that is free, and a check of what comes out.

This class owns every choice about the sessions and logs it; coterie/session.py runs one of them, coterie/providers.py
knows what a device is and needs. Knows nothing of labels or galleries.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from coterie.errors import BundleError, DeviceError
from coterie.machine import processors
from coterie.providers import CPU, Placement, has_driver, place
from coterie.session import BUCKETS, Session, model_shapes

__all__ = ["Encoder"]

logger = logging.getLogger("coterie.encoder")

SMALL_MODEL = 256 * 2**20  # bytes of a file whose model may be in memory twice


class Encoder:
    """Runs an exported encoder: uint8 images in, unit-length float32 embeddings out. Safe to use from many threads.

    Args:
        model: `model.onnx` with input `images` uint8 (n, h, w, 3) and output `embedding` float32 (n, d).
        device: `auto` takes a GPU if one answers, else the CPU; `cpu`; `cuda`, `cuda:1`; `cuda:0,1` or `cuda:all` for
            one session on each of several GPUs; `tensorrt` likewise.
        threads: of the CPU session; by default as many as this process may use.
        side_by_side: have the CPU run so many batches at once, each on one thread, while more than one is under way:
            for services, which are asked by many. It takes the model's memory twice, and is not done for large models.

    Attributes:
        provider: of ONNX Runtime, the one that really runs the model.
        input_size: height and width of the images.
        dim: of the embeddings.
        concurrency: how many batches are worth running at once.

    Raises:
        DeviceError: the device was asked for by name and cannot be had, or has no room for the model.
        BundleError: the file is not such a model.
    """

    def __init__(
        self, model: Path, *, device: str = "auto", threads: int | None = None, side_by_side: bool = False
    ) -> None:
        self.threads = threads or processors()
        self._sessions = _open(model, device, self.threads)
        self._choosing = threading.Lock()
        first = self._sessions[0]
        self._narrow: Session | None = None
        if side_by_side and first.placement == CPU and self.threads > 1 and model.stat().st_size <= SMALL_MODEL:
            self._narrow = Session(model, CPU, first.input_size, 1)
        self.provider = first.placement.provider
        self.input_size, self.dim = first.input_size, first.dim
        # A GPU computes one batch while the next is copied to it; CPU threads would only take turns.
        alone = self.threads if self._narrow else 1
        self.concurrency = alone if first.placement == CPU else 2 * len(self._sessions)
        where = ", ".join(str(session.placement) for session in self._sessions)
        logger.info("encoder on %s, %d threads, dim %d", where, self.threads, self.dim)

    def embed(self, pixels: NDArray[np.uint8], progress: Callable[[int], None] | None = None) -> NDArray[np.float32]:
        """Embed images of the encoder's size.

        Args:
            pixels: uint8 (n, h, w, 3); n may be 0.
            progress: called with the number of images after each batch.

        Returns:
            float32 (n, d), each row of unit length.

        Raises:
            ValueError: wrong shape or dtype.
            BundleError: the model gave NaN or a row that is not of unit length; the message has the image's index.
            DeviceError: the device failed, or has no room for a batch.
        """
        expected = (*self.input_size, 3)
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[1:] != expected:
            raise ValueError(
                f"pixels must be uint8 (n, {', '.join(map(str, expected))}), not {pixels.dtype} {pixels.shape}"
            )
        embeddings = np.empty((len(pixels), self.dim), dtype=np.float32)

        def run(start: int) -> int:
            part = pixels[start : start + BUCKETS[-1]]
            with self._free_session() as session:
                embeddings[start : start + len(part)] = session.run(part)
            return len(part)

        starts = range(0, len(pixels), BUCKETS[-1])
        for count in _in_order(run, starts, min(self.concurrency, len(starts))):
            if progress:
                progress(count)
        _check(embeddings)
        return embeddings

    def warm_up(self, max_batch: int = BUCKETS[-1]) -> float:
        """Run every bucket up to `max_batch` once on every device, so that no request pays for a first time.

        Returns:
            images a second, about, of all devices.

        Raises:
            as `embed` does.
        """
        for session in (*self._sessions, *([self._narrow] if self._narrow else [])):
            # A CPU meets a new size without a search.
            for bucket in BUCKETS if session.placement != CPU else (max_batch,):
                if bucket <= max_batch:
                    _check(session.run(np.zeros((bucket, *self.input_size, 3), dtype=np.uint8)))
        images, began = np.zeros((max_batch, *self.input_size, 3), dtype=np.uint8), time.perf_counter()
        self._sessions[0].run(images)
        return len(self._sessions) * len(images) / (time.perf_counter() - began)

    @contextmanager
    def _free_session(self) -> Iterator[Session]:
        """The session with the least to do; beside another batch on the CPU, the one that takes one thread."""
        with self._choosing:
            session = min(self._sessions, key=lambda session: session.under_way)
            if self._narrow and session.under_way + self._narrow.under_way:
                session = self._narrow
            session.under_way += 1
        try:
            yield session
        finally:
            with self._choosing:
                session.under_way -= 1


def _in_order(run: Callable[[int], int], starts: Iterable[int], threads: int) -> Iterator[int]:
    if threads < 2:
        yield from map(run, starts)
        return
    with ThreadPoolExecutor(threads) as pool:
        yield from pool.map(run, starts)


def _open(model: Path, device: str, threads: int) -> list[Session]:
    if device != "auto":
        return _open_all(model, place(device), threads)
    if has_driver():
        try:
            return _open_all(model, place("cuda"), threads)
        except DeviceError as error:
            logger.warning("device auto takes the CPU: %s", error)
    return _open_all(model, (CPU,), threads)


def _open_all(model: Path, placements: tuple[Placement, ...], threads: int) -> list[Session]:
    # A model that the CPU can read is whole: what then goes wrong on a GPU is the GPU's.
    size = (0, 0) if CPU in placements else model_shapes(model)[0]
    return [Session(model, placement, size, threads) for placement in placements]


def _check(embeddings: NDArray[np.float32]) -> None:
    # One pass finds NaN, infinity and zero length alike.
    lengths = np.einsum("nd,nd->n", embeddings, embeddings)
    bad = np.flatnonzero(~(np.abs(lengths - 1) < 1e-3))
    if len(bad):
        raise BundleError(f"the encoder gave an embedding of squared length {lengths[bad[0]]} for image {bad[0]}")
