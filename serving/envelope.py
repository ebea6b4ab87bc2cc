"""What every answer has in common: headers, and JSON for every error, even where our own code failed."""

import asyncio
import logging
from contextlib import suppress
from typing import Any

from pydantic_core import to_json
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving import schemas
from serving.errors import RequestError, problem
from serving.served import Served

__all__ = ["Envelope", "on_error", "on_http_exception"]

logger = logging.getLogger("coterie.serving")

CLIENT_CLOSED_REQUEST = 499
LINGER_SECONDS = 2.0


class Envelope:
    """What every answer has in common: one engine from the first to the last byte, its bundle's id, and JSON even where
    our own code failed."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False
        served: Served = scope["app"].state.served
        engine = scope["coterie.engine"] = served.take()
        bundle_id, bodies = engine.manifest.id, engine.limits.bodies

        async def send_with_headers(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                bodies.let_go(scope)  # the client may take its time to read the answer
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
            await _error_response(scope, error)(scope, receive, send_with_headers)
        finally:
            bodies.let_go(scope)
            served.give_back(engine)


async def on_error(request: Request, error: Exception) -> Response:
    return _error_response(request.scope, error)


async def on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = "unknown_route" if error.status_code == 404 else "method_not_allowed"
    entry = schemas.ErrorEntry(message=error.detail, type="invalid_request_error", code=code)
    return _error(request.scope, error.status_code, entry, error.headers)


def _error_response(scope: Scope, error: Exception) -> Response:
    kind = problem(error)
    if isinstance(error, RequestError):
        entry = schemas.ErrorEntry(message=str(error), type=kind.type, param=error.param, code=kind.code)
        return _error(scope, kind.status, entry, error.headers)
    headers = None if kind.retry_after is None else {"Retry-After": str(kind.retry_after)}
    entry = schemas.ErrorEntry(message=kind.message, type=kind.type, code=kind.code)
    return _error(scope, kind.status, entry, headers)


def _error(scope: Scope, status: int, entry: schemas.ErrorEntry, headers: Any) -> Response:
    # For whoever keeps a log.
    scope.setdefault("state", {})["error"] = entry.code
    kind = _Closing if headers and "Connection" in headers else Response
    return kind(to_json(schemas.ErrorAnswer(error=entry)), status, headers, media_type="application/json")


class _Closing(Response):
    """The last answer of a connection. What the client still sends is read away for a while, because many a client that
    is cut off in the middle of sending looks for no answer."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        with suppress(TimeoutError):
            async with asyncio.timeout(LINGER_SECONDS):
                more = True
                while more:
                    await asyncio.sleep(0)  # the time must come to an end though there is always more
                    more = (await receive()).get("more_body", False)
        await send({"type": "http.response.body", "body": b"", "more_body": False})
