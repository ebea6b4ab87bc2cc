"""The HTTP application: which path answers what.

`build_app` makes it before there is an engine; whoever starts the service puts a `Served` into `app.state.served` and,
for bundles to be swapped, a `Swapper` into `app.state.swapper`.
"""

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match, Mount, Route
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocketClose

from serving import asking, browsing, changing, native, presenting
from serving.envelope import Envelope, on_error, on_http_exception
from serving.errors import RequestError
from serving.metrics import metrics
from serving.presenting import Presented
from serving.requests import engine_of

__all__ = ["build_app"]

ROUTES = (
    Route("/", presenting.index),
    Route("/v1/embeddings", asking.embeddings, methods=["POST"]),
    Route("/v1/classify", asking.classify, methods=["POST"]),
    Route("/v1/search", asking.search, methods=["POST"]),
    Route("/v1/verify", asking.verify, methods=["POST"]),
    Route("/embed", native.bentoml_embed, methods=["POST"]),
    Route("/classify", native.bentoml_classify, methods=["POST"]),
    Route("/v1/bundle", browsing.bundle),
    Route("/v1/bundle", changing.swap, methods=["POST"]),
    Route("/v1/models", browsing.models),
    Route("/v1/classes", browsing.classes),
    Route("/v1/classes/{label}/examples", changing.enroll, methods=["POST"]),
    Route("/v1/classes/{label}", changing.forget, methods=["DELETE"]),
    Route("/v1/gallery", browsing.items),
    Route("/v1/gallery/{id}", browsing.item),
    Route("/v1/gallery/{id}", changing.delete_item, methods=["DELETE"]),
    Route("/v1/gallery/{id}/thumbnail", browsing.thumbnail),
    Route("/metrics", metrics),
    Route("/docs", presenting.docs),
    Route("/openapi.json", presenting.openapi),
    Route("/page/{name}", presenting.page_file),
)

PRESENTED = Presented(ROUTES)

ASKING = {route.path: route for route in ROUTES if route.endpoint.__module__ in (asking.__name__, native.__name__)}


class Direct:
    """Answers the routes of `ASKING` at once, which spares a busy service a twentieth of its work, and what there is no
    room for before its body is read; and hands all other requests to `app`, which answers the same."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        route = ASKING.get(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        if route is None:
            await self._app(scope, receive, send)
            return
        scope["route"] = route
        request = Request(scope, receive)
        try:
            engine_of(request).check_room()
            response: Response = await route.endpoint(request)
        except RequestError as error:
            response = await on_error(request, error)
        await response(scope, receive, send)


def build_app() -> Starlette:
    """The application; it needs `app.state.served` before its first request."""
    app = Starlette(
        # Last comes what answers for every path that is none, so that BentoML's plain text never does.
        routes=[*ROUTES, Mount("/", app=_no_such_route)],
        middleware=[Middleware(Envelope), Middleware(Direct)],
        exception_handlers={RequestError: on_error, HTTPException: on_http_exception},
    )
    app.state.presented = PRESENTED
    return app


async def _no_such_route(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "websocket":
        await WebSocketClose()(scope, receive, send)
        return
    allowed = {method for route in ROUTES if route.matches(scope)[0] is Match.PARTIAL for method in route.methods or ()}
    if allowed:
        raise HTTPException(405, headers={"Allow": ", ".join(sorted(allowed))})
    raise HTTPException(404)
