"""Who may do what: keys, and where they are not demanded, that it is this machine that asks.

Pure ASGI middleware around everything, BentoML's own methods too; nothing of a refused request is read but its head.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from pydantic_core import to_json
from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from serving.envelope import on_error
from serving.errors import (
    ForbiddenError,
    HeadersTooLargeError,
    RequestError,
    TooLongError,
    UnauthorizedError,
)
from serving.keys import Keyring
from serving.listening import listens_on_loopback
from serving.presenting import is_open
from serving.schemas import ErrorAnswer, ErrorEntry

__all__ = ["Access", "Policy"]

logger = logging.getLogger("coterie.serving")

# Whether a service lives is no secret, and who asks that has no key.
PROBES = frozenset({"/healthz", "/livez", "/readyz"})
# What is not one of these, and no plain reading, counts as a change: a route that is forgotten here is closed.
ASKING = frozenset({"/v1/embeddings", "/v1/classify", "/v1/search", "/v1/verify", "/embed", "/classify"})
NOTED = frozenset({b"authorization", b"host", b"origin"})
READING = frozenset({"GET", "HEAD", "OPTIONS"})
# What a proxy adds to requests of others that it hands over from this machine.
FORWARDED = frozenset({b"forwarded", b"x-forwarded-for", b"x-real-ip", b"via"})

MAX_TARGET = 8 * 2**10
MAX_HEADERS = 64 * 2**10


@dataclass(frozen=True)
class Policy:
    """What is asked of a request before anything else looks at it.

    Attributes:
        keyring: the keys; where it demands none, only this machine may change anything.
        hosts: names beside those of the loopback interface that a request without a key may come to.
        origins: of the web pages that browsers may let in.
        on_loopback: tells whether the service can be reached from this machine alone; asked once.
    """

    keyring: Keyring
    hosts: frozenset[str] = frozenset()
    origins: tuple[str, ...] = ()
    on_loopback: Callable[[], bool] = listens_on_loopback

    @cached_property
    def local(self) -> bool:
        return self.on_loopback()

    def check(self, scope: Scope) -> None:
        """Let a request pass, and note the key's id in its state.

        Raises:
            TooLongError, HeadersTooLargeError: its head is beyond reason.
            UnauthorizedError: it needs a key.
            ForbiddenError: its key is not enough, or it comes from a web page or to a name that is not ours.
        """
        if len(scope["path"]) + len(scope["query_string"]) > MAX_TARGET:
            raise TooLongError(f"path and query are over {MAX_TARGET:,} bytes", headers={"Connection": "close"})
        size, forwarded, found = 0, False, {}
        for name, value in scope["headers"]:
            size += len(name) + len(value)
            if name in NOTED:
                found[name] = value.decode("latin-1")
            elif name in FORWARDED:
                forwarded = True
        if size > MAX_HEADERS:
            raise HeadersTooLargeError(f"the headers are over {MAX_HEADERS:,} bytes", headers={"Connection": "close"})
        changes = scope["method"] not in READING and not (scope["method"] == "POST" and scope["path"] in ASKING)
        if self.keyring.demanded and not (is_open(scope) and not changes):
            self._check_key(scope, found.get(b"authorization", ""), changes)
        elif changes and (forwarded or not self.local):
            raise UnauthorizedError("changes need a key here: coterie key new --scope change makes one")
        elif self.local and _name(found.get(b"host", "")) not in self.hosts | LOOPBACK_NAMES:
            raise ForbiddenError(
                "the Host is not this machine: COTERIE_HOSTS lists further names, or send a key", param="host"
            )
        if changes and b"origin" in found:
            self._check_origin(found[b"origin"], found.get(b"host", ""))

    def _check_key(self, scope: Scope, header: str, changes: bool) -> None:
        scheme, _, token = header.partition(" ")
        key = self.keyring.find(token.strip()) if scheme.lower() == "bearer" else None
        if key is None:
            raise UnauthorizedError("this needs a valid key: send Authorization: Bearer …")
        scope.setdefault("state", {})["key"] = key.id
        if changes and key.scope != "change":
            raise ForbiddenError(f"the key {key.id} may ask, not change", param="authorization")

    def _check_origin(self, origin: str, host: str) -> None:
        # Browsers say where a request comes from, and a page of another site may send one without seeing the answer.
        own = (f"http://{host}".lower(), f"https://{host}".lower())
        if origin.lower() not in own and origin not in self.origins:
            raise ForbiddenError("changes are not taken from pages of other origins", param="origin")


class Access:
    """Refuses what the policy does.

    Args:
        policy: gives the policy; called at the first request, for an application is made before its settings are read.
    """

    def __init__(self, app: ASGIApp, policy: Callable[[], Policy]) -> None:
        self._app, self._make = app, policy

    @cached_property
    def _policy(self) -> Policy:
        return self._make()

    @cached_property
    def _allowed(self) -> ASGIApp:
        """The application, as browsers may call it from pages of the origins in the policy."""
        if not self._policy.origins:
            return self._checked
        return _Cors(
            self._checked,
            allow_origins=self._policy.origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["Authorization", "Content-Type", "Idempotency-Key", "X-Request-Id"],
            expose_headers=["X-Bundle-Id", "X-Request-Id", "X-Queue-Time", "X-Inference-Time", "Retry-After"],
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in PROBES:
            await self._app(scope, receive, send)
            return
        try:
            allowed = self._allowed
        except Exception as error:
            await _refuse(error, scope, receive, send)
            return
        await allowed(scope, receive, send)

    async def _checked(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            self._policy.check(scope)
        except Exception as error:
            await _refuse(error, scope, receive, send)
            return
        await self._app(scope, receive, send)


class _Cors(CORSMiddleware):
    def preflight_response(self, request_headers: Headers) -> Response:
        answer = super().preflight_response(request_headers)
        headers = {name: value for name, value in answer.headers.items() if not name.startswith("content-")}
        if answer.status_code == 200:
            return Response(headers=headers)
        entry = ErrorEntry(message=bytes(answer.body).decode(), type="invalid_request_error", code="bad_request")
        return Response(to_json(ErrorAnswer(error=entry)), 400, headers, media_type="application/json")


async def _refuse(error: Exception, scope: Scope, receive: Receive, send: Send) -> None:
    if not isinstance(error, RequestError):
        logger.error("who asks for %s could not be checked", scope["path"], exc_info=error)
    response = await on_error(Request(scope), error)
    await response(scope, receive, send)


LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})


def _name(host: str) -> str:
    """The name in a Host header, without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()
