"""What every route asks of a request: the engine, its query checked, and an answer while the client still waits."""

import asyncio
from collections.abc import Coroutine
from functools import cache
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from serving import schemas
from serving.engine import Engine
from serving.errors import BadRequestError, NotFoundError, TimedOutError

__all__ = ["check_model", "engine_of", "in_time", "query_of"]

Answer = TypeVar("Answer")
Query = TypeVar("Query", bound=BaseModel)

# Most answers are out sooner; only then does a task look out for the client's leaving.
PATIENCE_SECONDS = 0.05


def engine_of(request: Request) -> Engine:
    """The engine that was in charge when the request came; `serving.envelope` holds it until the answer is out."""
    engine: Engine = request.scope["coterie.engine"]
    return engine


def query_of(request: Request, schema: type[Query]) -> Query:
    """The query's values; one that is given more than once is a list."""
    if not request.scope["query_string"]:
        return _without_query(schema)
    given: dict[str, list[str]] = {}
    for name, value in request.query_params.multi_items():
        given.setdefault(name, []).append(value)
    return _validated(schema, {name: values if values[1:] else values[0] for name, values in given.items()})


def _validated(schema: type[Query], given: dict[str, Any]) -> Query:
    try:
        return schema.model_validate(given)
    except ValidationError as error:
        param, message = schemas.first_complaint(error)
        place = f"query parameter {param!r}" if param else "the query"
        raise BadRequestError(f"{place}: {message}", param=param) from error


@cache
def _without_query(schema: type[Query]) -> Query:
    return _validated(schema, {})  # frozen, so that requests may share it


def check_model(name: str | None, engine: Engine) -> None:
    if name not in (None, engine.manifest.name, engine.manifest.id):
        raise NotFoundError(f"the model served here is {engine.manifest.name}", param="model")


async def in_time(request: Request, work: Coroutine[Any, Any, Answer]) -> Answer:
    """Await `work` unless the client leaves or the time is over first; then it is cancelled.

    The time begins with the first work of a request, and all of it shares it.
    """
    loop = asyncio.get_running_loop()
    end: float = request.scope.setdefault("coterie.end", loop.time() + engine_of(request).limits.seconds)
    watching: asyncio.Task[None] | None = None

    def watch() -> None:
        nonlocal watching
        watching = loop.create_task(_left(request))
        watching.add_done_callback(lambda done: done.cancelled() or deadline.reschedule(loop.time()))

    patience = loop.call_later(PATIENCE_SECONDS, watch)
    try:
        async with asyncio.timeout_at(end) as deadline:
            return await work
    except TimeoutError:
        if not deadline.expired():
            raise
        if watching is not None and watching.done():
            raise ClientDisconnect from None
        raise TimedOutError(
            "no answer in time: send fewer images, or try again later", headers={"Retry-After": "1"}
        ) from None
    finally:
        patience.cancel()
        if watching is not None:
            watching.cancel()


async def _left(request: Request) -> None:
    # The body has been read, so all that can still come is the news that the client is gone.
    while (await request.receive())["type"] != "http.disconnect":
        pass
