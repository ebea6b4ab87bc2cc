"""What BentoML's clients ask at /embed and /classify; tests/serving/test_process.py has one of them ask."""

import asyncio
from typing import Any

import pytest
from starlette.testclient import TestClient

from serving.engine import Engine
from serving.errors import OverloadedError

PATHS = pytest.mark.parametrize("path", ["/embed", "/classify"])


def test_they_answer_as_the_routes_do(client: TestClient, digit_images, data_uri) -> None:
    strings = [data_uri(image) for image in digit_images.images[:3]]
    embedded = client.post("/embed", json={"images": strings})
    entries = client.post("/v1/embeddings", json={"input": strings}).json()["data"]
    assert embedded.json() == [entry["embedding"] for entry in entries]
    assert float(embedded.headers["x-inference-time"]) > 0
    options = {"top": 2, "neighbors": 1, "false_reject": 0.2}
    classified = client.post("/classify", json={"images": strings, **options})
    assert classified.json() == client.post("/v1/classify", json={"input": strings, **options}).json()["data"]


@PATHS
@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"json": {"nope": 1}}, 400, "bad_request"),
        ({"json": {"images": "SECRET"}}, 400, "bad_request"),
        ({"json": {"images": []}}, 400, "bad_request"),
        ({"content": b"{"}, 400, "bad_request"),
        ({"json": {"images": ["AAAA"]}}, 422, "invalid_image"),
        ({"json": {"images": ["http://127.0.0.1/a.png"]}}, 422, "invalid_image"),
        ({"json": {"images": ["AAAA"] * 9}}, 413, "too_large"),
        ({"content": b"x" * 200_001}, 413, "too_large"),
        ({"content": [b"x" * 150_000] * 2}, 413, "too_large"),
        ({"files": {"images": b"x"}}, 415, "unsupported_body"),
        ({"content": b"{}", "headers": {"content-type": "application/vnd.bentoml+pickle"}}, 415, "unsupported_body"),
        ({"content": b"{}", "headers": {"content-encoding": "gzip"}}, 415, "unsupported_body"),
    ],
)
def test_they_refuse_as_the_routes_do(
    client: TestClient, path: str, body: dict[str, Any], status: int, code: str, error_of
) -> None:
    if isinstance(body.get("content"), list):  # in chunks
        body = {"content": iter(body["content"])}
    error = error_of(client.post(path, **body), status)
    assert error["code"] == code and "SECRET" not in error["message"]


@PATHS
def test_a_full_service_refuses_them_unread_and_says_when_to_ask_again(
    engine: Engine, call, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full() -> None:
        raise OverloadedError("too many images are under way", headers={"Retry-After": "2"})

    async def receive() -> dict[str, Any]:
        raise AssertionError("the body is not read")

    monkeypatch.setattr(engine, "check_room", full)
    start, _ = asyncio.run(call(engine, path, receive))
    assert start["status"] == 429 and (b"retry-after", b"2") in start["headers"]


@PATHS
def test_a_client_that_leaves_ends_their_work(engine: Engine, call, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = []

    async def answer(*_: Any) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(path)

    messages = iter([{"type": "http.request", "body": b'{"images": ["AAAA"]}'}])

    async def receive() -> dict[str, Any]:
        return next(messages, {"type": "http.disconnect"})

    monkeypatch.setattr(engine, "answer", answer)
    assert asyncio.run(call(engine, path, receive))[0]["status"] == 499
    assert ended == [path]
