"""BentoML's own methods, for its clients: the same engine, the same limits, messages as its exceptions.

They take strings alone: BentoML's image inputs answer 500 to bad input, and fetch URLs.
"""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any

import bentoml
from bentoml.exceptions import BentoMLException
from pydantic_core import to_json
from starlette.responses import Response

from coterie.errors import CoterieError
from serving.answers import LARGE_ANSWER, entry
from serving.engine import Answered
from serving.errors import BadRequestError, RequestError, TimedOutError, TooLargeError, problem
from serving.inputs import from_strings
from serving.limits import check_count
from serving.questions import Classify, Question
from serving.served import Served

__all__ = ["NativeMethods"]


class NativeMethods:
    """The methods `embed` and `classify` of a service with an engine.

    Their answers are serialised here, for BentoML takes half a millisecond of the event loop for an embedding; they are
    annotated with what a client reads.
    """

    served: Served

    @bentoml.api
    async def embed(self, images: list[str]) -> list[list[float]]:
        """One embedding of unit length for each image, a base64 string or data URI."""
        answered = await self._answer(images, None)
        return await _response(answered, lambda: [row.tolist() for row in answered.rows])

    @bentoml.api
    async def classify(
        self, images: list[str], false_reject: float = 0.05, top: int = 5, neighbors: int = 5
    ) -> list[dict[str, Any]]:
        """Label or unknown for each image, a base64 string or data URI; entries as /v1/classify has them."""
        question = Classify(false_reject, top, neighbors)
        answered = await self._answer(images, question)
        return await _response(answered, lambda: [entry(row, index) for index, row in enumerate(answered.rows)])

    async def _answer(self, images: list[str], question: Question | None) -> Answered:
        with _as_bentoml(), self.served.held() as engine:
            if not images:
                raise BadRequestError("images is empty: send at least one")
            check_count(len(images), engine.limits)
            if sum(map(len, images)) > engine.limits.max_body:
                raise TooLargeError(f"the images are over the limit of {engine.limits.max_body:,} bytes: send fewer")
            if isinstance(question, Classify) and not (0 <= question.top <= 1000 and 0 <= question.neighbors <= 1000):
                raise BadRequestError("top and neighbors are numbers from 0 to 1000")
            try:
                async with asyncio.timeout(engine.limits.seconds):
                    return await engine.answer(await from_strings(images, engine.limits), question)
            except TimeoutError:
                raise TimedOutError("no answer in time: send fewer images, or try again later") from None


@contextmanager
def _as_bentoml() -> Iterator[None]:
    """Turn our errors into BentoML's, which it answers with their status and, below 500, their message."""
    try:
        yield
    except CoterieError as error:
        kind = problem(error)
        message = str(error) if isinstance(error, RequestError) else kind.message
        raise BentoMLException(message, error_code=HTTPStatus(kind.status)) from error


async def _response(answered: Answered, build: Callable[[], list[Any]]) -> Any:
    large = len(answered.rows) >= LARGE_ANSWER
    content = await asyncio.to_thread(lambda: to_json(build())) if large else to_json(build())
    return Response(content, media_type="application/json")
