"""A bundle at work: encoded images in, embeddings or classifications out.

Owns the bundle, its gallery and the batcher, and knows whether the encoder really answers. Knows nothing of HTTP.
"""

import asyncio
import io
import logging
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from coterie.bundle import Bundle
from coterie.classifier import Classification, classify
from coterie.errors import CoterieError, ImageError
from coterie.gallery import Snapshot
from coterie.images import load_pixels
from coterie.machine import processors
from coterie.store import StoreOptions
from serving.batcher import Batcher, ItemError
from serving.errors import BadRequestError, EncoderError, OverloadedError, RejectedImageError
from serving.limits import RequestLimits
from serving.observer import Observer

__all__ = ["ClassifyOptions", "Engine"]

NORMAL = RequestLimits()

logger = logging.getLogger("coterie.serving")

Embedding = NDArray[np.float32]

# A lone image waits for one such batch at most; on CPUs larger ones encode no faster per image.
MAX_BATCH = 32
# Images under way, from arrival to answer: several full requests, and a bound on memory and on waiting.
CAPACITY = 1024
# Readiness: how old an answer may be before a probe is sent, how long the question waits for the probe, and how long
# an encoder may be busy with work that was there before.
FRESH_SECONDS, PROBE_SECONDS, PATIENCE_SECONDS = 2.0, 0.8, 10.0


@dataclass(frozen=True)
class ClassifyOptions:
    """How a request wants its images classified; see `coterie.classifier.classify`."""

    false_reject: float = 0.05
    top: int = 5
    neighbors: int = 5


@dataclass(frozen=True)
class _Query:
    """One image on its way: encoded at first, then pixels; without options only its embedding is wanted."""

    image: bytes
    options: ClassifyOptions | None


@dataclass(frozen=True)
class _Pixels:
    pixels: NDArray[np.uint8]
    options: ClassifyOptions | None


class Engine:
    """Serves one bundle within one process.

    Args:
        bundle: what to serve.
        state: folder of the gallery's changes; None serves the bundle's own gallery.
        store: how changes are kept there.
        limits: what a request may cost.
        capacity: images under way before further ones are refused.
        observer: is told how long each step takes.

    Raises:
        CoterieError: the encoder cannot run here, or the gallery's changes cannot be read.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        state: Path | None = None,
        store: StoreOptions = StoreOptions(),
        limits: RequestLimits = NORMAL,
        capacity: int = CAPACITY,
        observer: Observer = Observer(),
    ) -> None:
        self.bundle, self.limits, self._observer = bundle, limits, observer
        self.manifest = bundle.manifest
        self._preprocessing = self.manifest.encoder.preprocessing
        self._encoder = bundle.encoder
        self._gallery = bundle.gallery(state, options=store)
        self._encoder.warm_up(MAX_BATCH)
        self._batcher = Batcher[_Query, _Pixels, Embedding | Classification](
            self._decode,
            self._answer,
            max_batch=MAX_BATCH,
            capacity=capacity,
            threads=processors(),
            runners=self._encoder.concurrency,
            observer=observer,
        )
        self._probe: asyncio.Task[bool] | None = None
        self._answered = self._fresh = time.monotonic()

    async def embed(self, images: Sequence[bytes]) -> list[Embedding]:
        """Embeddings of encoded images, each float32 (d,) of unit length.

        Raises:
            RejectedImageError: the first that cannot be used.
            OverloadedError: too many are under way.
            EncoderError: the encoder gave no usable answer.
        """
        return cast(list[Embedding], await self._submit(images, None))

    async def classify(self, images: Sequence[bytes], options: ClassifyOptions) -> list[Classification]:
        """Classes of encoded images, against the gallery as it is now.

        Raises:
            BadRequestError: no threshold was fitted for `options.false_reject`.
            StoreError: the gallery's changes cannot be read.
            and what `embed` raises.
        """
        try:
            self.manifest.calibration.limit(options.false_reject)
        except CoterieError as error:
            raise BadRequestError(str(error), param="false_reject") from error
        return cast(list[Classification], await self._submit(images, options))

    @property
    def under_way(self) -> int:
        """Images between arrival and answer."""
        return self._batcher.under_way

    @property
    def waiting(self) -> int:
        """Of these, the ones that are decoded and wait for the encoder."""
        return self._batcher.waiting

    def gallery(self) -> Snapshot:
        """The gallery as it is now. Reads a file: not for the event loop."""
        return self._gallery.snapshot()

    async def ready(self) -> bool:
        """Whether the encoder answers: it just did, or does so now for an image of ours.

        While it is busy, an answer within the last `PATIENCE_SECONDS` counts.
        """
        if time.monotonic() - self._fresh < FRESH_SECONDS:
            return True
        if self._probe is None or self._probe.done():
            self._probe = asyncio.ensure_future(self._answers())
        done, _ = await asyncio.wait([self._probe], timeout=PROBE_SECONDS)
        return self._probe.result() if done else self._busy()

    def close(self) -> None:
        """Stop the threads; work that is under way ends first."""
        self._batcher.close()
        self._gallery.close()

    async def _answers(self) -> bool:
        try:
            await self.embed([PROBE_IMAGE])
        except OverloadedError:
            return self._busy()
        except CoterieError:
            return False
        return True

    def _busy(self) -> bool:
        return time.monotonic() - self._answered < PATIENCE_SECONDS

    async def _submit(self, images: Sequence[bytes], options: ClassifyOptions | None) -> list[Any]:
        try:
            return await self._batcher.submit([_Query(image, options) for image in images])
        except ItemError as failure:
            cause = failure.__cause__
            assert cause is not None
            if isinstance(cause, ImageError):
                raise RejectedImageError(failure.index, str(cause)) from cause
            if isinstance(cause, EncoderError):
                raise EncoderError(f"image {failure.index}: {cause}", param=f"input[{failure.index}]") from cause
            raise cause from None

    def _decode(self, query: _Query) -> _Pixels:
        began = time.perf_counter()
        try:
            return _Pixels(load_pixels(query.image, self._preprocessing, self.limits.image), query.options)
        finally:
            self._observer.decoded(time.perf_counter() - began)

    def _answer(self, batch: list[_Pixels]) -> list[Embedding | Classification | Exception]:
        began = time.perf_counter()
        try:
            embeddings = self._encoder.embed(np.stack([query.pixels for query in batch]))
        except Exception as error:
            self._fresh = -np.inf  # the next question for readiness finds out whether it was the image's fault
            if len(batch) == 1:
                logger.error("the encoder failed: %s", error)
            raise EncoderError("the encoder gave no usable embedding for it") from error
        self._observer.encoded(len(batch), time.perf_counter() - began)
        self._answered = self._fresh = time.monotonic()
        answers: list[Embedding | Classification | Exception] = list(embeddings)
        rows_by_options: dict[ClassifyOptions, list[int]] = defaultdict(list)
        for row, query in enumerate(batch):
            if query.options is not None:
                rows_by_options[query.options].append(row)
        for options, rows in rows_by_options.items():
            for row, answer in zip(rows, self._classify(embeddings[rows], options), strict=True):
                answers[row] = answer
        return answers

    def _classify(
        self, embeddings: NDArray[np.float32], options: ClassifyOptions
    ) -> Sequence[Classification | Exception]:
        began = time.perf_counter()
        try:
            return classify(
                embeddings,
                self.gallery(),
                self.manifest.calibration,
                false_reject=options.false_reject,
                top=options.top,
                neighbors=options.neighbors,
            )
        except Exception as error:  # the others of the batch have their embeddings and need not be run again
            return [error] * len(embeddings)
        finally:
            self._observer.searched(len(embeddings), time.perf_counter() - began)


def _probe_image() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (1, 1)).save(buffer, "PNG")
    return buffer.getvalue()


PROBE_IMAGE = _probe_image()
