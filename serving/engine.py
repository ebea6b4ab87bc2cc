"""A bundle at work: images in, embeddings or answers about them out.

Owns the bundle, its gallery, the decoder and the batcher, and knows whether the encoder really answers. Knows nothing
of HTTP.
"""

import asyncio
import io
import logging
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from coterie.bundle import Bundle
from coterie.errors import CoterieError
from coterie.gallery import Gallery, Snapshot
from coterie.index import IndexOptions
from coterie.machine import processors
from coterie.providers import CPU
from coterie.store import StoreOptions
from serving.batcher import Batcher, Part
from serving.decoder import Decoder
from serving.errors import EncoderError, OverloadedError, RejectedImageError
from serving.limits import RequestLimits
from serving.observer import Observer
from serving.questions import Question

__all__ = ["Answered", "Embedding", "Engine", "Images"]

NORMAL = RequestLimits()

logger = logging.getLogger("coterie.serving")

Embedding = NDArray[np.float32]
# Encoded images, where an error stands for one that has been refused already; or pixels of the encoder's size,
# uint8 (n, h, w, 3).
Images = Sequence[bytes | RejectedImageError] | NDArray[np.uint8]

# A lone image waits for one such batch at most; on CPUs larger ones encode no faster per image.
MAX_BATCH = 32
# Images under way, from arrival to answer: several full requests, and a bound on memory and on waiting.
CAPACITY = 1024
# Readiness: how old an answer may be before a probe is sent, how long the question waits for the probe, and how long
# an encoder may be busy with work that was there before.
FRESH_SECONDS, PROBE_SECONDS, PATIENCE_SECONDS = 2.0, 0.8, 10.0


@dataclass(frozen=True, slots=True)
class Answered:
    """What became of the images of one request, in their order.

    Attributes:
        rows: embedding float32 (d,) or answer of each, or its error where errors were asked for; without a question and
            without errors perhaps an array (n, d).
        queue_seconds: the longest that one of them waited for the encoder.
        encode_seconds: what the batches they were in took in the encoder.
    """

    rows: Sequence[Any]
    queue_seconds: float = 0.0
    encode_seconds: float = 0.0


@dataclass(eq=False, slots=True)
class _Asked:
    """What a request wants of its images, None for their embeddings, and how long its batches took to encode."""

    question: Question | None
    encode_seconds: list[float] = field(default_factory=list)  # appending is atomic, adding is not


class Engine:
    """Serves one bundle within one process.

    Args:
        bundle: what to serve.
        state: folder of the gallery's changes; None serves the bundle's own gallery.
        store: how changes are kept there.
        index: what the gallery's index may cost.
        limits: what a request may cost.
        capacity: images under way before further ones are refused; by default `CAPACITY`, or all that one request may
            have.
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
        index: IndexOptions = IndexOptions(),
        limits: RequestLimits = NORMAL,
        capacity: int | None = None,
        observer: Observer = Observer(),
    ) -> None:
        self.bundle, self.limits, self._observer = bundle, limits, observer
        self.manifest = bundle.manifest
        self._encoder = bundle.encoder
        self._gallery = bundle.gallery(state, options=store, index=index)
        self._gallery.snapshot().index  # noqa: B018  of many rows it takes seconds, which no request shall wait for
        pace = self._encoder.warm_up(MAX_BATCH)
        self._decoder = Decoder(
            self.manifest.encoder.preprocessing, limits.image, threads=processors(), observer=observer
        )
        self._batcher = Batcher[NDArray[np.uint8], _Asked, Any](
            self._run,
            max_batch=MAX_BATCH,
            capacity=max(CAPACITY, limits.max_images) if capacity is None else capacity,
            pace=pace,
            spread=self._encoder.provider == CPU.provider,
            patience=limits.seconds / 3,  # measured, so wrong at times, and no answer may come too late
            runners=self._encoder.concurrency,
            observer=observer,
        )
        self._probe: asyncio.Task[bool] | None = None
        self._answered = self._fresh = time.monotonic()

    async def embed(self, images: Images) -> Sequence[Embedding]:
        """Embeddings of images, each float32 (d,) of unit length.

        Raises:
            as `answer` does.
        """
        return (await self.answer(images, None)).rows

    async def answer(self, images: Images, question: Question | None, *, partial: bool = False) -> Answered:
        """Answer a question about each image, against the gallery as it is now; without one, embed it.

        Args:
            partial: let an error stand where an image failed, instead of raising the first.

        Raises:
            RejectedImageError: an image cannot be used.
            EncoderError: the encoder gave no usable answer for an image.
            BadRequestError, NotFoundError: the question cannot be answered.
            OverloadedError: too many images are under way.
            StoreError: the gallery's changes cannot be read.
        """
        if question is not None:
            question.check(self.manifest.calibration)
        asked = _Asked(question)
        with self._batcher.room_for(len(images)):
            if isinstance(images, np.ndarray):
                pixels, errors = images, {}
            else:
                _raise_first(images, partial)
                with self._batcher.coming():
                    pixels, errors = await self._decoder.decode(images)
                _raise_first(errors.values(), partial)
            if not len(pixels):
                return Answered([errors[row] for row in range(len(images))])
            outcome = await self._batcher.submit(pixels, asked)
        rows = outcome.results
        if errors or not isinstance(rows, np.ndarray):
            rows = _woven(rows, errors)
            _raise_first(rows, partial)
        return Answered(rows, outcome.waited, sum(asked.encode_seconds))

    def check_room(self) -> None:
        """Whether an image would be taken in now; so that one that is not need not be read.

        Raises:
            OverloadedError: too many images are under way.
        """
        self._batcher.check_room()

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

    @property
    def live_gallery(self) -> Gallery:
        """The gallery that changes. Its methods read and write files: not for the event loop."""
        return self._gallery

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
        self._decoder.close()
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

    def _run(self, parts: list[Part[NDArray[np.uint8], _Asked]]) -> list[Sequence[Any]]:
        """Embeddings of a batch's parts, or what their questions are answered with."""
        embeddings = self._encode(parts)
        results = _cut(embeddings, [len(part.rows) for part in parts])
        asking: dict[Question, list[int]] = defaultdict(list)
        for number, part in enumerate(parts):
            if part.context.question is not None:
                asking[part.context.question].append(number)
        for question, numbers in asking.items():
            own = [results[number] for number in numbers]
            answers = self._look_up(np.concatenate(own), question)
            for number, found in zip(numbers, _cut(answers, map(len, own)), strict=True):
                results[number] = found
        return results

    def _encode(self, parts: list[Part[NDArray[np.uint8], _Asked]]) -> NDArray[np.float32]:
        pixels = parts[0].rows if len(parts) == 1 else np.concatenate([part.rows for part in parts])
        began = time.perf_counter()
        try:
            embeddings = self._encoder.embed(pixels)
        except Exception as error:
            self._fresh = -np.inf  # the next question for readiness finds out whether it was the image's fault
            if len(pixels) == 1:
                logger.error("the encoder failed: %s", error)
            raise EncoderError("the encoder gave no usable embedding for it") from error
        self._answered = self._fresh = time.monotonic()
        seconds = time.perf_counter() - began
        self._observer.encoded(len(pixels), seconds)
        for part in parts:
            part.context.encode_seconds.append(seconds)
        return embeddings

    def _look_up(self, embeddings: NDArray[np.float32], question: Question) -> Sequence[Any]:
        began = time.perf_counter()
        try:
            answers = question.answers(embeddings, self.gallery(), self.manifest.calibration)
            self._observer.answered(answers)
            return answers
        except Exception as error:  # the others of the batch have their embeddings and need not be run again
            return [error] * len(embeddings)
        finally:
            self._observer.searched(len(embeddings), time.perf_counter() - began)


def _cut(rows: Sequence[Any], lengths: Iterable[int]) -> list[Sequence[Any]]:
    """Consecutive parts of rows."""
    ends = list(accumulate(lengths))
    return [rows[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def _woven(rows: Sequence[Any], errors: dict[int, RejectedImageError]) -> list[Any]:
    """Results, with the errors of images that were not run at their places, each named by its index."""
    found = iter(rows)
    woven = [errors[row] if row in errors else next(found) for row in range(len(rows) + len(errors))]
    for row, result in enumerate(woven):
        if isinstance(result, EncoderError):
            woven[row] = EncoderError(f"image {row}: {result}", param=f"input[{row}]")
    return woven


def _raise_first(rows: Iterable[Any], partial: bool) -> None:
    """Raise the first error among rows, or where errors are to stand in the answer, the first of more than an image."""
    for row in rows:
        if isinstance(row, Exception) and not (partial and isinstance(row, (RejectedImageError, EncoderError))):
            raise row


def _probe_image() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (1, 1)).save(buffer, "PNG")
    return buffer.getvalue()


PROBE_IMAGE = _probe_image()
