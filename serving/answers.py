"""Answers in the shapes of `serving.schemas`, serialised without holding up the event loop."""

import asyncio
import base64
from collections.abc import Callable
from functools import singledispatch
from typing import Any
from urllib.parse import quote

import numpy as np
from pydantic import BaseModel
from pydantic_core import to_json
from starlette.responses import Response

from coterie.classifier import Classification, Verification
from coterie.gallery import Neighbor
from serving import schemas
from serving.engine import Answered, Embedding, Engine
from serving.errors import RequestError, problem
from serving.questions import Found
from serving.tensors import NPY, written

__all__ = ["LARGE_ANSWER", "array_answer", "embedding_answer", "entry", "json_answer", "list_answer", "timings"]

# The event loop is kept free of anything longer than about a millisecond: a 512-wide embedding takes 50 µs as JSON.
LARGE_ANSWER = 16


async def json_answer(
    size: int, build: Callable[[], BaseModel | list[Any]], headers: dict[str, str] | None = None, status: int = 200
) -> Response:
    """Build an answer and serialise it, in a thread if it has many entries."""
    content = to_json(build()) if size < LARGE_ANSWER else await asyncio.to_thread(lambda: to_json(build()))
    return Response(content, status, headers, media_type="application/json")


def array_answer(answered: Answered) -> Response:
    """Embeddings as a float32 array (n, d)."""
    return Response(written(np.asarray(answered.rows)), media_type=NPY, headers=timings(answered))


async def embedding_answer(answered: Answered, engine: Engine, encoding_format: str) -> Response:
    """Embeddings in OpenAI's shape, each a list of numbers or the base64 of little-endian float32."""

    def written_one(vector: Embedding) -> list[float] | str:
        if encoding_format == "float":
            return list(vector.tolist())
        return base64.b64encode(vector.astype("<f4").tobytes()).decode("ascii")

    def build() -> BaseModel:
        return schemas.EmbeddingList(
            data=[
                entry(row, index)
                if isinstance(row, RequestError)
                else schemas.EmbeddingEntry(index=index, embedding=written_one(row))
                for index, row in enumerate(answered.rows)
            ],
            model=engine.manifest.name,
        )

    return await json_answer(len(answered.rows), build, timings(answered))


async def list_answer(answered: Answered, engine: Engine) -> Response:
    """Answers to a question about each image."""

    def build() -> BaseModel:
        return schemas.AnswerList(
            bundle=engine.manifest.id, data=[entry(row, index) for index, row in enumerate(answered.rows)]
        )

    return await json_answer(len(answered.rows), build, timings(answered))


@singledispatch
def entry(answer: Any, index: int) -> BaseModel:
    """The answer for one image, the `index`-th of its request."""
    raise TypeError(f"{type(answer)} is no answer")


@entry.register
def _(error: RequestError, index: int) -> schemas.ErrorItem:
    kind = problem(error)
    said = schemas.ErrorEntry(message=str(error), type=kind.type, param=error.param, code=kind.code)
    return schemas.ErrorItem(index=index, error=said)


@entry.register
def _(answer: Classification, index: int) -> schemas.ClassificationEntry:
    return schemas.ClassificationEntry(
        index=index,
        label=answer.label,
        known=answer.known,
        probability=answer.probability,
        threshold=answer.threshold,
        similarity=answer.similarity,
        classes=[
            schemas.ClassScoreEntry(
                label=one.label, probability=one.probability, cluster_similarity=one.cluster_similarity
            )
            for one in answer.classes
        ],
        neighbors=[_neighbor(near) for near in answer.neighbors],
        calibration=answer.calibration,
        snapshot=answer.snapshot,
    )


@entry.register
def _(answer: Found, index: int) -> schemas.NeighborsEntry:
    return schemas.NeighborsEntry(
        index=index, neighbors=[_neighbor(near) for near in answer.neighbors], snapshot=answer.snapshot
    )


@entry.register
def _(answer: Verification, index: int) -> schemas.VerificationEntry:
    return schemas.VerificationEntry(
        index=index,
        label=answer.label,
        match=answer.match,
        similarity=answer.similarity,
        threshold=answer.threshold,
        calibration=answer.calibration,
        snapshot=answer.snapshot,
    )


def _neighbor(near: Neighbor) -> schemas.NeighborEntry:
    return schemas.NeighborEntry(
        id=near.id,
        label=near.label,
        similarity=near.similarity,
        metadata=near.metadata,
        thumbnail=f"/v1/gallery/{quote(near.id, safe='')}/thumbnail",
    )


def timings(answered: Answered) -> dict[str, str]:
    """How long the images waited and were encoded, in milliseconds, as headers."""
    return {
        "x-queue-time": f"{1000 * answered.queue_seconds:.3f}",
        "x-inference-time": f"{1000 * answered.encode_seconds:.3f}",
    }
