"""Answers in the shapes of `serving.schemas`, serialised without holding up the event loop."""

import asyncio
import base64
from collections.abc import Callable
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel
from pydantic_core import to_json
from starlette.responses import Response

from coterie.classifier import Classification
from serving import schemas
from serving.engine import Engine

__all__ = ["classification_list", "embedding_list", "json_answer"]

# The event loop is kept free of anything longer than about a millisecond: a 512-wide embedding takes 50 µs as JSON.
LARGE_ANSWER = 16


async def json_answer(size: int, build: Callable[[], BaseModel]) -> Response:
    """Build an answer and serialise it, in a thread if it has many entries."""
    content = to_json(build()) if size < LARGE_ANSWER else await asyncio.to_thread(lambda: to_json(build()))
    return Response(content, media_type="application/json")


def embedding_list(vectors: list[NDArray[np.float32]], encoding_format: str, engine: Engine) -> BaseModel:
    def written(vector: NDArray[np.float32]) -> list[float] | str:
        if encoding_format == "float":
            return list(vector.tolist())
        return base64.b64encode(vector.astype("<f4").tobytes()).decode("ascii")

    return schemas.EmbeddingList(
        data=[schemas.EmbeddingEntry(index=index, embedding=written(vector)) for index, vector in enumerate(vectors)],
        model=engine.manifest.name,
    )


def classification_list(answers: list[Classification], engine: Engine) -> BaseModel:
    return schemas.ClassificationList(
        bundle=engine.manifest.id, data=[_classification_entry(i, answer) for i, answer in enumerate(answers)]
    )


def _classification_entry(index: int, answer: Classification) -> schemas.ClassificationEntry:
    return schemas.ClassificationEntry(
        index=index,
        label=answer.label,
        known=answer.known,
        probability=answer.probability,
        threshold=answer.threshold,
        similarity=answer.similarity,
        classes=[
            schemas.ClassScoreEntry(
                label=entry.label, probability=entry.probability, cluster_similarity=entry.cluster_similarity
            )
            for entry in answer.classes
        ],
        neighbors=[
            schemas.NeighborEntry(
                id=near.id,
                label=near.label,
                similarity=near.similarity,
                metadata=near.metadata,
                thumbnail=f"/v1/gallery/{quote(near.id, safe='')}/thumbnail",
            )
            for near in answer.neighbors
        ],
        calibration=answer.calibration,
        snapshot=answer.snapshot,
    )
