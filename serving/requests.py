"""What every route asks of a request: the engine, its query checked, and an answer while the client still waits."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from serving import schemas
from serving.engine import Engine
from serving.errors import BadRequestError, NotFoundError, TimedOutError

__all__ = ["check_model", "engine_of", "in_time", "query_of"]

Answer = TypeVar("Answer")
Query = TypeVar("Query", bound=BaseModel)


def engine_of(request: Request) -> Engine:
    """The engine that was in charge when the request came; `serving.envelope` holds it until the answer is out."""
    engine: Engine = request.scope["coterie.engine"]
    return engine


def query_of(request: Request, schema: type[Query]) -> Query:
    """The query's values; one that is given more than once is a list."""
    given: dict[str, list[str]] = {}
    for name, value in request.query_params.multi_items():
        given.setdefault(name, []).append(value)
    try:
        return schema.model_validate({name: values if values[1:] else values[0] for name, values in given.items()})
    except ValidationError as error:
        param, message = schemas.first_complaint(error)
        raise BadRequestError(f"query parameter {param!r}: {message}", param=param) from error


def check_model(name: str | None, engine: Engine) -> None:
    if name not in (None, engine.manifest.name, engine.manifest.id):
        raise NotFoundError(f"the model served here is {engine.manifest.name}", param="model")


async def in_time(request: Request, work: Coroutine[Any, Any, Answer]) -> Answer:
    """Await `work` unless the client leaves or the time is over first; then it is cancelled."""
    task, left = asyncio.ensure_future(work), asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait((task, left), timeout=engine_of(request).limits.seconds, return_when=asyncio.FIRST_COMPLETED)
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
