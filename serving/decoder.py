"""Encoded images of a request to pixels, in threads, before they queue: a bad one is found while it harms nobody."""

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from coterie.errors import ImageError
from coterie.images import Limits, Preprocessing, load_pixels
from serving.errors import RejectedImageError
from serving.observer import Observer

__all__ = ["Decoder"]

# A thread's hop costs the event loop some 30 µs; the images of a client that left are decoded to the end of so many.
TOGETHER = 8
# Decoding a lone image of so little, for an encoder of so few pixels, costs less than that hop and holds nobody up.
TINY, TINY_SIDE = Limits(max_bytes=4096, max_pixels=64 * 64), 64


class Decoder:
    """Decodes with `threads` threads; `observer` is told how long each image took."""

    def __init__(self, preprocessing: Preprocessing, limits: Limits, *, threads: int, observer: Observer) -> None:
        self._preprocessing, self._limits, self._observer = preprocessing, limits, observer
        self._count = threads
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="decode")

    async def decode(
        self, images: Sequence[bytes | RejectedImageError]
    ) -> tuple[NDArray[np.uint8], dict[int, RejectedImageError]]:
        """The pixels of a request's images, at least one, and by row the errors of those that have none.

        Returns:
            uint8 (m, height, width, 3) of the m images that can be used, in their order; and the errors of the others,
            those that were among `images` included.
        """
        pixels = np.empty((len(images), *self._preprocessing.input_size, 3), dtype=np.uint8)
        if self._at_once(images, pixels):
            return pixels, {}
        step = min(TOGETHER, -(-len(images) // self._count))
        loop = asyncio.get_running_loop()
        found = await asyncio.gather(
            *(
                loop.run_in_executor(self._threads, self._decode, images[start : start + step], start, pixels)
                for start in range(0, len(images), step)
            )
        )
        errors = {row: error for some in found for row, error in some.items()}
        if errors:
            pixels = await loop.run_in_executor(self._threads, np.delete, pixels, list(errors), 0)
        return pixels, errors

    def _at_once(self, images: Sequence[bytes | RejectedImageError], pixels: NDArray[np.uint8]) -> bool:
        """Decode a lone tiny image here; whether that was done. Whatever is wrong with one the threads will say."""
        image = images[0]
        if len(images) > 1 or not isinstance(image, bytes) or max(self._preprocessing.input_size) > TINY_SIDE:
            return False
        began = time.perf_counter()
        try:
            pixels[0] = load_pixels(image, self._preprocessing, TINY)
        except ImageError:
            return False
        self._observer.decoded(time.perf_counter() - began)
        return True

    def close(self) -> None:
        """Let go of the threads; nothing may be decoded afterwards."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _decode(
        self, images: Sequence[bytes | RejectedImageError], start: int, pixels: NDArray[np.uint8]
    ) -> dict[int, RejectedImageError]:
        """Decode the request's images from `start` on into their rows of `pixels`."""
        errors: dict[int, RejectedImageError] = {}
        for row, image in enumerate(images, start):
            if isinstance(image, RejectedImageError):
                errors[row] = image
                continue
            began = time.perf_counter()
            try:
                pixels[row] = load_pixels(image, self._preprocessing, self._limits)
            except ImageError as error:
                errors[row] = RejectedImageError(row, str(error))
            self._observer.decoded(time.perf_counter() - began)
        return errors
