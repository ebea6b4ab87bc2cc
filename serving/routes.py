"""The HTTP application: which path answers what.

`build_app` makes it before there is an engine; whoever starts the service puts one into `app.state.engine`.
"""

import asyncio
import base64
import logging
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ValidationError
from pydantic_core import to_json
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Match, Mount, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocketClose

from coterie.classifier import Classification
from serving import schemas
from serving.engine import ClassifyOptions, Engine
from serving.errors import BadRequestError, NotFoundError, RequestError, TimedOutError, problem
from serving.inputs import read_images

__all__ = ["build_app"]

logger = logging.getLogger("coterie.serving")

Answer = TypeVar("Answer")
Query = TypeVar("Query", bound=BaseModel)

# The event loop is kept free of anything longer than about a millisecond: a 512-wide embedding takes 50 µs as JSON.
LARGE_ANSWER = 16
CLIENT_CLOSED_REQUEST = 499


async def embeddings(request: Request) -> Response:
    """POST /v1/embeddings: one embedding per image, in OpenAI's shape."""
    engine = _engine(request)
    query = _query(request, schemas.EmbeddingsQuery)
    images, body = await read_images(request, engine.limits, schemas.EmbeddingsBody)
    encoding_format = query.encoding_format
    if body is not None:
        _check_model(body.model, engine)
        if body.dimensions not in (None, engine.manifest.encoder.embedding_dim):
            raise BadRequestError(
                f"this encoder's embeddings have {engine.manifest.encoder.embedding_dim} dimensions", param="dimensions"
            )
        encoding_format = body.encoding_format or encoding_format
    vectors = await _in_time(request, engine.embed(images))
    return await _json(len(vectors), lambda: _embedding_list(vectors, encoding_format or "float", engine))


async def classify(request: Request) -> Response:
    """POST /v1/classify: label or unknown for each image."""
    engine = _engine(request)
    query = _query(request, schemas.ClassifyQuery)
    images, body = await read_images(request, engine.limits, schemas.ClassifyBody)
    if body is not None:
        _check_model(body.model, engine)
    options = ClassifyOptions(**query.model_dump())
    answers = await _in_time(request, engine.classify(images, options))
    return await _json(len(answers), lambda: _classification_list(answers, engine))


async def bundle(request: Request) -> Response:
    """GET /v1/bundle: the manifest."""
    _query(request, schemas.NoQuery)
    return Response(_engine(request).manifest.canonical(), media_type="application/json")


async def models(request: Request) -> Response:
    """GET /v1/models: OpenAI's list, with the one bundle that is served."""
    _query(request, schemas.NoQuery)
    name = _engine(request).manifest.name
    return await _json(1, lambda: schemas.ModelList(data=[schemas.ModelEntry(id=name)]))


async def classes(request: Request) -> Response:
    """GET /v1/classes: how many items each class has, and how far its cluster reaches."""
    _query(request, schemas.NoQuery)
    engine = _engine(request)
    clusters = (await asyncio.to_thread(engine.gallery)).clusters
    rows = zip(clusters.labels, clusters.counts.tolist(), clusters.reaches.tolist(), strict=True)
    return await _json(
        len(clusters),
        lambda: schemas.ClassList(
            bundle=engine.manifest.id,
            data=[schemas.ClassEntry(label=label, count=count, radius=radius) for label, count, radius in rows],
        ),
    )


async def thumbnail(request: Request) -> Response:
    """GET /v1/gallery/{id}/thumbnail: the small picture kept with a gallery item."""
    _query(request, schemas.NoQuery)
    snapshot = await asyncio.to_thread(_engine(request).gallery)
    row = snapshot.rows.get(request.path_params["id"])
    if row is None or not snapshot.items.thumbnails[row]:
        raise NotFoundError("the gallery has no such item, or no picture of it", param="id")
    return Response(
        snapshot.items.thumbnails[row], media_type="image/webp", headers={"Cache-Control": "private, max-age=3600"}
    )


async def index(request: Request) -> Response:
    """GET /: what is served here, and where."""
    paths = [f"{method} {route.path}" for route in ROUTES for method in sorted((route.methods or set()) - {"HEAD"})]
    manifest = _engine(request).manifest
    return Response(
        to_json({"service": "coterie", "model": manifest.name, "bundle": manifest.id, "routes": paths}),
        media_type="application/json",
    )


ROUTES = (
    Route("/", index),
    Route("/v1/embeddings", embeddings, methods=["POST"]),
    Route("/v1/classify", classify, methods=["POST"]),
    Route("/v1/bundle", bundle),
    Route("/v1/models", models),
    Route("/v1/classes", classes),
    Route("/v1/gallery/{id}/thumbnail", thumbnail),
)


def build_app() -> Starlette:
    """The application; it needs `app.state.engine` before its first request."""
    return Starlette(
        # Last comes what answers for every path that is none, so that BentoML's plain text never does.
        routes=[*ROUTES, Mount("/", app=_no_such_route)],
        middleware=[Middleware(_Envelope)],
        exception_handlers={RequestError: _on_error, HTTPException: _on_http_exception},
    )


async def _no_such_route(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "websocket":
        await WebSocketClose()(scope, receive, send)
        return
    allowed = {method for route in ROUTES if route.matches(scope)[0] is Match.PARTIAL for method in route.methods or ()}
    if allowed:
        raise HTTPException(405, headers={"Allow": ", ".join(sorted(allowed))})
    raise HTTPException(404)


class _Envelope:
    """What every answer has in common: the bundle's id, and JSON even where our own code failed."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False
        bundle_id: str = scope["app"].state.engine.manifest.id

        async def send_with_headers(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] += [(b"x-bundle-id", bundle_id.encode()), (b"x-content-type-options", b"nosniff")]
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        except ClientDisconnect:
            await Response(status_code=CLIENT_CLOSED_REQUEST)(scope, receive, send)
        except Exception as error:
            logger.exception("a request to %s failed", scope["path"])
            if started:
                raise
            await _error_response(error)(scope, receive, send_with_headers)


async def _on_error(_: Request, error: Exception) -> Response:
    return _error_response(error)


async def _on_http_exception(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        return _error(404, error.detail, "invalid_request_error", None, "unknown_route", error.headers)
    return _error(error.status_code, error.detail, "invalid_request_error", None, "method_not_allowed", error.headers)


def _error_response(error: Exception) -> Response:
    kind = problem(error)
    if isinstance(error, RequestError):
        return _error(kind.status, str(error), kind.type, error.param, kind.code, error.headers)
    headers = None if kind.retry_after is None else {"Retry-After": str(kind.retry_after)}
    return _error(kind.status, kind.message, kind.type, None, kind.code, headers)


def _error(status: int, message: str, type_: str, param: str | None, code: str, headers: Any) -> Response:
    entry = schemas.ErrorEntry(message=message, type=type_, param=param, code=code)
    return Response(to_json(schemas.ErrorAnswer(error=entry)), status, headers, media_type="application/json")


def _engine(request: Request) -> Engine:
    engine: Engine = request.app.state.engine
    return engine


def _query(request: Request, schema: type[Query]) -> Query:
    try:
        return schema.model_validate(dict(request.query_params))
    except ValidationError as error:
        param, message = schemas.first_complaint(error)
        raise BadRequestError(f"query parameter {param!r}: {message}", param=param) from error


def _check_model(name: str | None, engine: Engine) -> None:
    if name not in (None, engine.manifest.name, engine.manifest.id):
        raise NotFoundError(f"the model served here is {engine.manifest.name}", param="model")


async def _in_time(request: Request, work: Coroutine[Any, Any, Answer]) -> Answer:
    """Await `work` unless the client leaves or the time is over first; then it is cancelled."""
    task, left = asyncio.ensure_future(work), asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait((task, left), timeout=_engine(request).limits.seconds, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        if left.done():
            raise ClientDisconnect
        raise TimedOutError("no answer in time: send fewer images, or try again later", headers={"Retry-After": "1"})
    finally:
        task.cancel()
        left.cancel()


async def _left(request: Request) -> None:
    # The body has been read, so all that can still come is the news that the client is gone.
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _json(size: int, build: Callable[[], BaseModel]) -> Response:
    """Build an answer and serialise it, in a thread if it has many entries."""
    content = to_json(build()) if size < LARGE_ANSWER else await asyncio.to_thread(lambda: to_json(build()))
    return Response(content, media_type="application/json")


def _embedding_list(vectors: list[NDArray[np.float32]], encoding_format: str, engine: Engine) -> BaseModel:
    def written(vector: NDArray[np.float32]) -> list[float] | str:
        if encoding_format == "float":
            return list(vector.tolist())
        return base64.b64encode(vector.astype("<f4").tobytes()).decode("ascii")

    return schemas.EmbeddingList(
        data=[schemas.EmbeddingEntry(index=index, embedding=written(vector)) for index, vector in enumerate(vectors)],
        model=engine.manifest.name,
    )


def _classification_list(answers: list[Classification], engine: Engine) -> BaseModel:
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
