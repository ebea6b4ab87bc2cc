"""Ways around what BentoML does for each request, which costs more than a small encoder takes for an image.

BentoML's own paths are left to it. All others go to the application of `serving.routes` at once, without BentoML's
context and the search through its routes; they have time limits of their own. BentoML's time limit would keep a timer
of two minutes for every request that has long been answered.
"""

import asyncio

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.envelope import on_error
from serving.errors import TimedOutError

__all__ = ["Deadline", "Straight", "replace_time_limit"]

PROBES = ("/healthz", "/livez", "/readyz")
METHODS = ("/embed", "/classify")
# What BentoML answers itself; /schema.json is what its clients read first.
OWN = frozenset({*PROBES, *METHODS, "/schema.json", "/docs.json"})


class Straight:
    """Hands every request to `application` but those that BentoML answers itself."""

    def __init__(self, app: ASGIApp, application: ASGIApp) -> None:
        self._bentoml, self._application = app, application

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        ours = scope["type"] == "http" and scope["path"] not in OWN
        await (self._application if ours else self._bentoml)(scope, receive, send)


class Deadline:
    """Ends a request to one of BentoML's methods that takes longer than `timeout` seconds, with 504."""

    def __init__(self, app: ASGIApp, timeout: float) -> None:
        self._app, self._timeout = app, timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] not in METHODS:
            await self._app(scope, receive, send)
            return
        started = False

        async def send_noted(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            async with asyncio.timeout(self._timeout):
                await self._app(scope, receive, send_noted)
        except TimeoutError:
            if not started:
                error = TimedOutError("no answer in time: send fewer images, or try again later")
                await (await on_error(Request(scope), error))(scope, receive, send)


def replace_time_limit() -> None:
    """Have BentoML use `Deadline` where it would use its own."""
    from bentoml._internal.server.http import traffic

    traffic.TimeoutMiddleware = Deadline
