"""What BentoML's clients ask at /embed and /classify: the same engine, the same limits and errors as under /v1.

BentoML reads a body of any size into memory, writes a traceback for each that it refuses, and does not see its client
leave; so it describes these methods, and they are answered here.
"""

from collections.abc import Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from serving import schemas
from serving.answers import entry, json_answer, timings
from serving.engine import Answered, Images
from serving.errors import BadRequestError
from serving.inputs import read_strings
from serving.questions import Classify, Question
from serving.records import note_images
from serving.requests import engine_of, in_time

__all__ = ["bentoml_classify", "bentoml_embed"]


async def bentoml_embed(request: Request) -> Response:
    """POST /embed: embeddings, for BentoML's own clients."""
    images, _ = await read_strings(request, engine_of(request).limits, schemas.StringsBody)
    return await _answer(request, images, None, lambda row, _: row.tolist())


async def bentoml_classify(request: Request) -> Response:
    """POST /classify: label or unknown, for BentoML's own clients."""
    images, body = await read_strings(request, engine_of(request).limits, schemas.ClassifyStringsBody)
    if not (0 <= body.top <= 1000 and 0 <= body.neighbors <= 1000):
        raise BadRequestError("top and neighbors are numbers from 0 to 1000")
    return await _answer(request, images, Classify(body.false_reject, body.top, body.neighbors), entry)


async def _answer(
    request: Request, images: Images, question: Question | None, written: Callable[[Any, int], Any]
) -> Response:
    note_images(request.scope, len(images))
    answered: Answered = await in_time(request, engine_of(request).answer(images, question))
    rows = answered.rows
    return await json_answer(len(rows), lambda: [written(row, at) for at, row in enumerate(rows)], timings(answered))
