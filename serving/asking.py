"""Routes that take images and say what they show; nothing is changed here."""

from typing import TypeVar

from starlette.requests import Request
from starlette.responses import Response

from serving import answers, schemas
from serving.engine import Engine
from serving.errors import BadRequestError
from serving.inputs import Sent, read_sent
from serving.questions import Classify, Question, Search, Verify
from serving.records import note_images
from serving.requests import check_model, engine_of, in_time, query_of
from serving.tensors import NPY

__all__ = ["classify", "embeddings", "search", "verify"]

Query = TypeVar("Query", bound=schemas.AskingQuery)
Body = TypeVar("Body", bound=schemas.ImagesBody)


async def embeddings(request: Request) -> Response:
    """POST /v1/embeddings: one embedding per image, in OpenAI's shape or as an npy array."""
    engine, images, query, body = await _read(request, schemas.EmbeddingsQuery, schemas.EmbeddingsBody)
    width = engine.manifest.encoder.embedding_dim
    if body is not None and body.dimensions not in (None, width):
        raise BadRequestError(f"this encoder's embeddings have {width} dimensions", param="dimensions")
    as_array = _accepts_npy(request)
    if as_array and query.partial:
        raise BadRequestError(
            f"an array has no place for errors: leave on_error=partial out, or accept JSON instead of {NPY}",
            param="on_error",
        )
    answered = await in_time(request, engine.answer(images, None, partial=query.partial))
    if as_array:
        return answers.array_answer(answered)
    return await answers.embedding_answer(answered, engine, query.encoding_format or "float")


async def classify(request: Request) -> Response:
    """POST /v1/classify: label or unknown for each image."""
    engine, images, query, _ = await _read(request, schemas.ClassifyQuery, schemas.ClassifyBody)
    question = Classify(query.false_reject, query.top, query.neighbors, query.k)
    return await _ask(request, engine, images, question, query)


async def search(request: Request) -> Response:
    """POST /v1/search: the gallery items nearest to each image."""
    engine, images, query, _ = await _read(request, schemas.SearchQuery, schemas.SearchBody)
    return await _ask(request, engine, images, Search.of(query.k, query.label, query.metadata), query)


async def verify(request: Request) -> Response:
    """POST /v1/verify: whether each image belongs to one class."""
    engine, images, query, _ = await _read(request, schemas.VerifyQuery, schemas.VerifyBody)
    if query.label is None:
        raise BadRequestError("say which class the images are held against: ?label=", param="label")
    return await _ask(request, engine, images, Verify(query.label, query.false_reject), query)


async def _read(
    request: Request, query_schema: type[Query], body_schema: type[Body]
) -> tuple[Engine, Sent, Query, Body | None]:
    """The images of a request, its options, of which the body's count more than the query's, and the body's others."""
    engine = engine_of(request)
    query = query_of(request, query_schema)
    images, body = await read_sent(request, engine.limits, body_schema, size=engine.manifest.encoder.input_size)
    note_images(request.scope, len(images))
    if body is not None:
        check_model(body.model, engine)
        given = body.model_fields_set & query_schema.model_fields.keys()
        query = query.model_copy(update={name: getattr(body, name) for name in given})
    return engine, images, query, body


async def _ask(
    request: Request, engine: Engine, images: Sent, question: Question, query: schemas.AskingQuery
) -> Response:
    answered = await in_time(request, engine.answer(images, question, partial=query.partial))
    return await answers.list_answer(answered, engine)


def _accepts_npy(request: Request) -> bool:
    """Whether an array is asked for by name; what accepts anything gets JSON."""
    accepted = request.headers.get("accept", "").lower()
    return NPY in accepted and any(kind.partition(";")[0].strip() == NPY for kind in accepted.split(","))
