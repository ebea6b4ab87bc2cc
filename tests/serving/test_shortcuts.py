"""The ways around BentoML lead where BentoML would have led."""

import asyncio
from typing import Any

import pytest
from bentoml._internal.server.base_app import BaseAppFactory
from bentoml._internal.server.http import traffic
from starlette.applications import Starlette
from starlette.testclient import TestClient
from starlette.types import Message, Receive, Scope, Send

from serving.routes import ASKING, ROUTES, Direct, build_app
from serving.shortcuts import OWN, Straight, remove_time_limit


def scope_of(path: str, method: str = "POST", type_: str = "http") -> Scope:
    return {"type": type_, "method": method, "path": path, "headers": [], "query_string": b""}


def sent_by(app: Any, scope: Scope) -> list[Message]:
    messages: list[Message] = []

    async def receive() -> Message:
        return await asyncio.Event().wait()  # type: ignore[return-value]

    async def send(message: Message) -> None:
        messages.append(message)

    asyncio.run(app(scope, receive, send))
    return messages


def test_the_routes_that_images_are_asked_on_are_direct() -> None:
    assert set(ASKING) == {"/v1/embeddings", "/v1/classify", "/v1/search", "/v1/verify", "/embed", "/classify"}
    assert all(route in ROUTES for route in ASKING.values())


@pytest.mark.parametrize("path", sorted(ASKING))
@pytest.mark.parametrize("body", [b"", b"no image", b"{"])
def test_direct_routes_answer_as_the_others_do(client: TestClient, path: str, body: bytes) -> None:
    app = client.app
    assert isinstance(app, Starlette)
    headers = {"content-type": "application/json" if body == b"{" else "image/png"}
    around = Starlette(routes=app.routes, exception_handlers=app.exception_handlers, middleware=app.user_middleware[:1])
    around.state = app.state
    assert not any(one.cls is Direct for one in around.user_middleware)
    direct = client.post(path, content=body, headers=headers)
    with TestClient(around) as other:
        slow = other.post(path, content=body, headers=headers)
    assert direct.status_code == slow.status_code >= 400
    assert direct.json() == slow.json()
    assert direct.headers["x-bundle-id"] == slow.headers["x-bundle-id"]


def test_other_methods_of_a_direct_route_are_refused_as_before(client: TestClient) -> None:
    refused = client.get("/v1/embeddings")
    assert refused.status_code == 405 and refused.headers["allow"] == "POST"


def test_bentoml_keeps_its_own_paths_and_everything_else_is_ours() -> None:
    asked: list[tuple[str, str]] = []

    def noting(name: str) -> Any:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            asked.append((name, scope.get("path", scope["type"])))

        return app

    straight = Straight(noting("bentoml"), noting("ours"))
    for path in sorted(OWN):
        sent_by(straight, scope_of(path))
    for path in ("/", "/v1/embeddings", "/metrics", "/nowhere", "/embed/x"):
        sent_by(straight, scope_of(path))
    sent_by(straight, {"type": "lifespan"})
    assert [path for name, path in asked if name == "bentoml"] == [*sorted(OWN), "lifespan"]
    assert len([path for name, path in asked if name == "ours"]) == 5


def test_bentoml_puts_no_timer_around_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traffic, "TimeoutMiddleware", traffic.TimeoutMiddleware)
    remove_time_limit()

    class Factory(BaseAppFactory):
        name = "one"

    (middleware,) = Factory(timeout=60, max_concurrency=None).middlewares
    app = object()
    assert middleware.cls(app, *middleware.args, **middleware.kwargs) is app


def test_the_application_is_built_with_the_direct_routes() -> None:
    assert [one.cls for one in build_app().user_middleware][-1] is Direct
