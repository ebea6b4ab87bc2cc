"""The HTTP application in this process, on a real bundle."""

import asyncio
import base64
import io
import json
import threading
from typing import Any

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from coterie.bundle import Bundle
from coterie.errors import StoreBusyError, StoreError
from coterie.store import StoredItem
from serving import engine as engine_module
from serving import schemas
from serving.engine import Engine
from serving.limits import RequestLimits
from serving.routes import build_app
from serving.served import Served


def jpeg(png: bytes) -> bytes:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(png)).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


# --- answers ---------------------------------------------------------------------------------------------------------


def test_classify_answers_what_the_bundle_says_offline(
    client: TestClient, tiny_bundle: Bundle, digit_images, files
) -> None:
    images = digit_images.images[:8]
    response = client.post("/v1/classify", files=files(images))
    assert response.status_code == 200
    answer = response.json()
    assert schemas.AnswerList.model_validate(answer).model_dump() == answer
    assert answer["bundle"] == response.headers["x-bundle-id"] == tiny_bundle.manifest.id
    for index, (entry, expected) in enumerate(zip(answer["data"], tiny_bundle.classify(images), strict=True)):
        assert entry["index"] == index
        assert (entry["label"], entry["known"]) == (expected.label, expected.known)
        assert entry["probability"] == pytest.approx(expected.probability, abs=1e-6)
        assert entry["threshold"] == pytest.approx(expected.threshold, abs=1e-6)
        assert entry["similarity"] == pytest.approx(expected.similarity, abs=1e-6)
        assert [near["id"] for near in entry["neighbors"]] == [near.id for near in expected.neighbors]
        assert [near["similarity"] for near in entry["neighbors"]] == pytest.approx(
            [near.similarity for near in expected.neighbors], abs=1e-6
        )


def test_most_digits_are_told_apart_and_unknown_ones_have_no_label(client: TestClient, digit_images, files) -> None:
    known = digit_images.of(*"01234567")
    answers = []
    for start in range(0, 64, 8):
        answers += client.post("/v1/classify", files=files(known.images[start : start + 8])).json()["data"]
    right = [entry["classes"][0]["label"] == label for entry, label in zip(answers, known.labels, strict=False)]
    assert np.mean(right) > 0.9
    for entry in answers:
        assert (entry["label"] is None) == (not entry["known"])
        assert entry["classes"]


@pytest.mark.parametrize("content_type", ["image/png", "image/jpg", "IMAGE/*", "application/octet-stream", None])
def test_the_bytes_of_a_raw_body_decide(client: TestClient, digit_images, content_type: str | None) -> None:
    headers = {} if content_type is None else {"content-type": content_type}
    png = digit_images.images[0]
    answers = [client.post("/v1/classify", content=body, headers=headers).json()["data"] for body in (png, jpeg(png))]
    assert answers[0][0]["classes"][0]["label"] == answers[1][0]["classes"][0]["label"]


def test_every_kind_of_body_gives_the_same_embeddings(
    client: TestClient, tiny_bundle: Bundle, digit_images, files, data_uri
) -> None:
    images = digit_images.images[:3]
    bodies = [
        {"files": files(images)},
        {"json": {"input": [data_uri(image) for image in images], "model": "tiny-digits", "user": "someone"}},
        {"json": {"input": [base64.b64encode(image).decode() for image in images], "encoding_format": "base64"}},
        {"files": files(images), "params": {"encoding_format": "base64"}},
    ]
    vectors = []
    for body in bodies:
        response = client.post("/v1/embeddings", **body)
        answer = response.json()
        assert response.status_code == 200, answer
        assert schemas.EmbeddingList.model_validate(answer).model_dump() == answer
        assert [entry["index"] for entry in answer["data"]] == [0, 1, 2]
        vectors.append([read_vector(entry["embedding"]) for entry in answer["data"]])
    for other in vectors[1:]:
        np.testing.assert_array_equal(vectors[0], other)
    np.testing.assert_allclose(vectors[0], tiny_bundle.embed(images), atol=1e-6)


def read_vector(written: list[float] | str) -> np.ndarray:
    if isinstance(written, str):
        return np.frombuffer(base64.b64decode(written), dtype="<f4")
    return np.asarray(written, dtype=np.float32)


def test_one_image_as_a_single_string(client: TestClient, digit_images, data_uri) -> None:
    answer = client.post("/v1/classify", json={"input": data_uri(digit_images.images[0])}).json()
    assert len(answer["data"]) == 1


def test_top_and_neighbors_shorten_the_lists(client: TestClient, digit_images) -> None:
    (entry,) = client.post("/v1/classify?top=2&neighbors=1", content=digit_images.images[0]).json()["data"]
    assert (len(entry["classes"]), len(entry["neighbors"])) == (2, 1)


def test_a_lower_false_reject_rate_accepts_more(client: TestClient, digit_images) -> None:
    thresholds = [
        client.post(f"/v1/classify?false_reject={rate}", content=digit_images.images[0]).json()["data"][0]["threshold"]
        for rate in (0.01, 0.2)
    ]
    assert thresholds[0] < thresholds[1]


def test_requests_with_different_options_share_batches(engine: Engine, client: TestClient, digit_images) -> None:
    def ask(top: int, answers: list[int]) -> None:
        response = client.post(f"/v1/classify?top={top}", content=digit_images.images[0])
        answers.append(len(response.json()["data"][0]["classes"]))

    answers: dict[int, list[int]] = {top: [] for top in range(1, 9)}
    threads = [threading.Thread(target=ask, args=item) for item in answers.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert answers == {top: [top] for top in range(1, 9)}


def test_thumbnails_of_neighbours_are_pictures(client: TestClient, digit_images, error_of) -> None:
    (entry,) = client.post("/v1/classify", content=digit_images.images[0]).json()["data"]
    response = client.get(entry["neighbors"][0]["thumbnail"])
    assert response.headers["content-type"] == "image/webp"
    assert Image.open(io.BytesIO(response.content)).size == (8, 8)
    error_of(client.get("/v1/gallery/none/thumbnail"), 404)


def test_what_is_enrolled_counts_at_the_next_request(
    engine: Engine, client: TestClient, digit_images, error_of
) -> None:
    eights = digit_images.of("8")
    embeddings = engine.bundle.embed(eights.images[:5])
    engine._gallery.add([StoredItem(f"item{i}", "8", row, {}, b"") for i, row in enumerate(embeddings)])
    (entry,) = client.post("/v1/classify", content=eights.images[0]).json()["data"]
    assert entry["label"] == "8"
    assert {row["label"]: row["count"] for row in client.get("/v1/classes").json()["data"]}["8"] == 5
    error_of(client.get("/v1/gallery/item0/thumbnail"), 404)


@pytest.mark.parametrize(
    ("error", "code", "retry_after"),
    [(StoreBusyError("/secret is held"), "gallery_busy", "1"), (StoreError("/secret"), "gallery_unavailable", None)],
)
def test_a_gallery_that_cannot_be_read_is_503(
    engine: Engine,
    client: TestClient,
    digit_images,
    monkeypatch: pytest.MonkeyPatch,
    error: StoreError,
    code: str,
    retry_after: str | None,
    error_of,
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(engine._gallery, "snapshot", fail)
    for response in (client.post("/v1/classify", content=digit_images.images[0]), client.get("/v1/classes")):
        assert error_of(response, 503)["code"] == code
        assert response.headers.get("Retry-After") == retry_after
        assert "secret" not in response.text


def test_what_is_served_can_be_read(client: TestClient, tiny_bundle: Bundle) -> None:
    assert client.get("/v1/bundle").json() == tiny_bundle.manifest.model_dump(mode="json")
    assert [entry["id"] for entry in client.get("/v1/models").json()["data"]] == ["tiny-digits"]
    classes = client.get("/v1/classes").json()
    assert schemas.ClassList.model_validate(classes).model_dump() == classes
    assert [entry["label"] for entry in classes["data"]] == list("01234567")
    assert {entry["count"] for entry in classes["data"]} == {60}
    assert "POST /v1/classify" in client.get("/").json()["routes"]


# --- refusals --------------------------------------------------------------------------------------------------------


def png_header_of(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("1", (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("body", [b"garbage", b"\x89PNG\r\n\x1a\n", png_header_of(2000, 2000), b"GIF89a"])
@pytest.mark.parametrize("path", ["/v1/classify", "/v1/embeddings"])
def test_an_unusable_image_is_named_by_its_index(
    client: TestClient, digit_images, path: str, body: bytes, error_of, files
) -> None:
    good = digit_images.images[0]
    error = error_of(client.post(path, files=files([good, body, good])), 422)
    assert error["param"] == "input[1]" and error["message"].startswith("image 1: ")
    assert error_of(client.post(path, content=body), 422)["param"] == "input[0]"


def test_an_image_that_is_cut_short_is_refused(client: TestClient, error_of) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    error_of(client.post("/v1/classify", content=buffer.getvalue()[:-4000]), 422)


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({}, 400, "input"),
        ({"input": []}, 400, "input"),
        ({"input": [1]}, 400, "input"),
        ({"input": "AAAA", "color": 1}, 400, "color"),
        ({"input": "AAAA", "encoding_format": "npy"}, 400, "encoding_format"),
        ({"input": "AAAA", "dimensions": 7}, 400, "dimensions"),
        ({"input": "AAAA", "model": "another"}, 404, "model"),
        ({"input": ["AAAA", "***"]}, 422, "input[1]"),
        ({"input": "AAA"}, 422, "input[0]"),
        ({"input": "é"}, 422, "input[0]"),
        ({"input": "data:image/png,AAAA"}, 422, "input[0]"),
        ({"input": "http://127.0.0.1/x.png"}, 422, "input[0]"),
        ({"input": ["AAAA"] * 9}, 413, "input"),
    ],
)
def test_json_that_is_wrong_says_where(client: TestClient, body: Any, status: int, param: str, error_of) -> None:
    assert error_of(client.post("/v1/embeddings", json=body), status)["param"] == param


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("color=1", "color"),
        ("top=x", "top"),
        ("top=-1", "top"),
        ("neighbors=1e9", "neighbors"),
        ("false_reject=0", "false_reject"),
        ("false_reject=nan", "false_reject"),
        ("false_reject=0.03", "false_reject"),
    ],
)
def test_a_query_value_that_is_not_known_is_refused(
    client: TestClient, digit_images, query: str, param: str, error_of
) -> None:
    error = error_of(client.post(f"/v1/classify?{query}", content=digit_images.images[0]), 400)
    assert error["param"] == param
    if query.endswith("0.03"):
        assert "0.05" in error["message"]


@pytest.mark.parametrize(
    ("content", "headers", "status"),
    [
        (b"", {}, 400),
        (b"not json", {"content-type": "application/json"}, 400),
        (b"[]", {"content-type": "application/json"}, 400),
        (b"\xff\xfe", {"content-type": "application/json"}, 400),
        (b"--x\r\n\r\n", {"content-type": "multipart/form-data"}, 400),
        (b"not a form", {"content-type": "multipart/form-data; boundary=x"}, 400),
        (b"", {"content-type": "multipart/form-data; boundary=x"}, 400),
        (b"--x--\r\n", {"content-type": "multipart/form-data; boundary=x"}, 400),
        (
            b'--x\r\nContent-Disposition: form-data; name="a"; filename="b"\r\n\r\nAAAA',
            {"content-type": "multipart/form-data; boundary=x"},
            400,
        ),
        (
            b'--x\r\nContent-Disposition: form-data; name="top"\r\n\r\n3\r\n--x--\r\n',
            {"content-type": "multipart/form-data; boundary=x"},
            400,
        ),
        (b"hello", {"content-type": "text/plain"}, 415),
        (b"hello", {"content-type": "image/png", "content-encoding": "gzip"}, 415),
        (b"x" * 200_001, {}, 413),
        (b"x" * 200_001, {"content-type": "multipart/form-data; boundary=x"}, 413),
    ],
)
def test_a_body_of_the_wrong_kind_is_refused(
    client: TestClient, content: bytes, headers: dict[str, str], status: int, error_of
) -> None:
    error_of(client.post("/v1/classify", content=content, headers=headers), status)


def test_a_body_without_a_stated_length_is_counted_as_it_comes(
    engine: Engine, call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.envelope.LINGER_SECONDS", 0.0)  # until the answer, not after it
    read = 0

    async def receive() -> dict[str, Any]:
        nonlocal read
        read += 100_000
        return {"type": "http.request", "body": b"x" * 100_000, "more_body": True}

    sent = asyncio.run(asyncio.wait_for(call(engine, "/v1/classify", receive), 20))
    assert sent[0]["status"] == 413
    assert read == 300_000


def test_too_many_files_are_refused(client: TestClient, digit_images, error_of, files) -> None:
    error_of(client.post("/v1/classify", files=files(digit_images.images[:9])), 413)


def test_unknown_paths_and_methods_get_json(client: TestClient, error_of) -> None:
    assert error_of(client.get("/nope"), 404)["code"] == "unknown_route"
    assert error_of(client.get("/v1/bundle/"), 404)["code"] == "unknown_route"
    response = client.get("/v1/classify")
    assert error_of(response, 405)["code"] == "method_not_allowed"
    assert response.headers["allow"] == "POST"


# --- trouble ---------------------------------------------------------------------------------------------------------


def test_more_images_than_there_is_room_for_get_429(tiny_bundle: Bundle, digit_images, error_of, files, limits) -> None:
    app = build_app()
    app.state.served = Served(Engine(tiny_bundle, limits=limits, capacity=2))
    with TestClient(app) as client:
        response = client.post("/v1/classify", files=files(digit_images.images[:3]))
        assert error_of(response, 429)["type"] == "rate_limit_error"
        assert int(response.headers["retry-after"]) >= 1
        assert client.post("/v1/classify", files=files(digit_images.images[:2])).status_code == 200
    app.state.served.close()


@pytest.mark.parametrize("path", ["/v1/classify", "/v1/classes/8/examples"])
def test_what_there_is_no_room_for_is_not_read(tiny_bundle: Bundle, limits, call, path: str) -> None:
    async def receive() -> dict[str, Any]:
        raise AssertionError("the body was read")

    engine = Engine(tiny_bundle, limits=limits, capacity=0)
    sent = asyncio.run(asyncio.wait_for(call(engine, path, receive), 20))
    assert sent[0]["status"] == 429
    engine.close()


def test_a_broken_encoder_turns_readiness_off_until_it_answers_again(
    engine: Engine, client: TestClient, digit_images, monkeypatch: pytest.MonkeyPatch, error_of
) -> None:
    def ready() -> bool:
        return client.portal.call(engine.ready)  # type: ignore[union-attr]

    assert ready()
    with monkeypatch.context() as patch:
        patch.setattr(engine._encoder, "embed", broken)
        error = error_of(client.post("/v1/classify", content=digit_images.images[0]), 503)
        assert error["code"] == "encoder_failed" and "secret" not in error["message"]
        assert not ready()
    assert ready()


def broken(*_: Any) -> Any:
    raise RuntimeError("secret detail in /srv/somebody")


def test_an_encoder_that_hangs_turns_readiness_off(
    engine: Engine, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    for name, value in (("FRESH_SECONDS", 0.0), ("PROBE_SECONDS", 0.05), ("PATIENCE_SECONDS", 0.0)):
        monkeypatch.setattr(engine_module, name, value)
    monkeypatch.setattr(engine._encoder, "embed", lambda _: gate.wait(20))
    assert not client.portal.call(engine.ready)  # type: ignore[union-attr]
    gate.set()


def test_an_image_on_which_the_encoder_fails_does_not_harm_its_batch(
    engine: Engine, client: TestClient, digit_images, monkeypatch: pytest.MonkeyPatch, error_of, files
) -> None:
    real = engine._encoder.embed

    def embed(pixels: np.ndarray) -> np.ndarray:
        return real(pixels) if pixels.any(axis=(1, 2, 3)).all() else broken()  # a black image is poison

    monkeypatch.setattr(engine._encoder, "embed", embed)
    good = digit_images.images[0]
    error = error_of(client.post("/v1/classify", files=files([good, png_header_of(4, 4)])), 503)
    assert error["param"] == "input[1]"
    assert client.post("/v1/classify", content=good).status_code == 200


def test_our_own_failures_are_json_without_detail(
    engine: Engine, client: TestClient, digit_images, monkeypatch: pytest.MonkeyPatch, error_of
) -> None:
    monkeypatch.setattr(engine, "answer", broken)
    error = error_of(client.post("/v1/classify", content=digit_images.images[0]), 500)
    assert error["code"] == "internal_error" and "secret" not in error["message"]


def test_an_answer_that_would_come_too_late_is_504_and_its_room_is_given_back(
    tiny_bundle: Bundle, digit_images, monkeypatch: pytest.MonkeyPatch, error_of
) -> None:
    app = build_app()
    one = Engine(tiny_bundle, limits=RequestLimits(seconds=0.05))
    app.state.served = Served(one)
    gate, real = threading.Event(), one._encoder.embed
    monkeypatch.setattr(one._encoder, "embed", lambda pixels: real(pixels) if gate.wait(20) else None)
    with TestClient(app) as client:
        error_of(client.post("/v1/classify", content=digit_images.images[0]), 504)
        assert one._batcher.under_way == 0
        gate.set()
    one.close()


def test_the_work_of_a_client_that_leaves_is_dropped(
    engine: Engine, digit_images, monkeypatch: pytest.MonkeyPatch, call
) -> None:
    gate = threading.Event()
    monkeypatch.setattr(engine._encoder, "embed", lambda _: gate.wait(20))
    messages = iter([{"type": "http.request", "body": digit_images.images[0]}])

    async def receive() -> dict[str, Any]:
        if (message := next(messages, None)) is not None:
            return message
        while engine._batcher.under_way == 0:
            await asyncio.sleep(0)
        return {"type": "http.disconnect"}

    sent = asyncio.run(asyncio.wait_for(call(engine, "/v1/classify", receive), 20))
    gate.set()
    assert sent[0]["status"] == 499
    assert engine._batcher.under_way == 0


def test_error_bodies_are_openais(client: TestClient) -> None:
    assert json.loads(client.get("/nope").text) == {
        "error": {"message": "Not Found", "type": "invalid_request_error", "param": None, "code": "unknown_route"}
    }
