"""Ways around what BentoML does for each request, which costs more than a small encoder takes for an image.

BentoML's own paths are left to it. All others go to the application of `serving.routes` at once, without BentoML's
context and the search through its routes; they have time limits of their own.
"""

from starlette.types import ASGIApp, Receive, Scope, Send

__all__ = ["Straight", "remove_time_limit"]

PROBES = ("/healthz", "/livez", "/readyz")
# What BentoML answers itself; /schema.json is what its clients read first.
OWN = frozenset({*PROBES, "/schema.json", "/docs.json"})


class Straight:
    """Hands every request to `application` but those that BentoML answers itself."""

    def __init__(self, app: ASGIApp, application: ASGIApp) -> None:
        self._bentoml, self._application = app, application

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        ours = scope["type"] == "http" and scope["path"] not in OWN
        await (self._application if ours else self._bentoml)(scope, receive, send)


def remove_time_limit() -> None:
    """Have BentoML keep no timer for each request, as it would for a minute after the answer."""
    from bentoml._internal.server.http import traffic

    traffic.TimeoutMiddleware = lambda app, timeout: app
