"""Images and embeddings as npy arrays: the same numbers, and nothing but arrays of the encoder's size."""

import asyncio
import base64
import io
import pickle
import threading
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.lib import format as npy
from starlette.testclient import TestClient

from coterie.bundle import Bundle
from serving.engine import Engine
from serving.errors import RequestError
from serving.limits import RequestLimits
from serving.routes import build_app
from serving.served import Served
from serving.tensors import read_pixels

NPY = {"content-type": "application/x-npy"}
ACCEPT = {"accept": "application/x-npy"}
SIDE = 16


def arrays_in(response: Any) -> np.ndarray:
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/x-npy"
    return np.load(io.BytesIO(response.content), allow_pickle=False)


# --- in --------------------------------------------------------------------------------------------------------------


def test_pixels_get_the_answers_that_their_encoded_images_get(
    client: TestClient, tiny_bundle: Bundle, digit_images, files, as_npy
) -> None:
    images = digit_images.images[:5]
    body = as_npy(tiny_bundle.pixels(images))
    for path in ("/v1/embeddings", "/v1/classify", "/v1/search", "/v1/verify?label=3"):
        as_array = client.post(path, content=body, headers=NPY)
        assert as_array.status_code == 200, as_array.text
        assert as_array.json() == client.post(path, files=files(images)).json()


def test_one_image_needs_no_first_axis(client: TestClient, tiny_bundle: Bundle, digit_images, as_npy) -> None:
    pixels = tiny_bundle.pixels(digit_images.images[:1])
    one, many = (
        client.post("/v1/embeddings", content=as_npy(body), headers=NPY).json() for body in (pixels[0], pixels)
    )
    assert one == many and len(one["data"]) == 1


def test_headers_of_version_two_are_read(client: TestClient, tiny_bundle: Bundle, digit_images, as_npy) -> None:
    pixels = tiny_bundle.pixels(digit_images.images[:2])
    buffer = io.BytesIO()
    npy.write_array(buffer, pixels, version=(2, 0))
    assert buffer.getvalue()[6] == 2
    answers = [client.post("/v1/embeddings", content=body, headers=NPY) for body in (buffer.getvalue(), as_npy(pixels))]
    assert answers[0].json() == answers[1].json()


def images_of(*shape: int, dtype: Any = np.uint8) -> np.ndarray:
    return np.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("array", "status", "words"),
    [
        (images_of(2, SIDE, SIDE, 3, dtype=np.float32), 422, ["float32", "uint8 N×16×16×3"]),
        (images_of(2, SIDE, SIDE, 3, dtype=np.int8), 422, ["int8", "uint8 N×16×16×3"]),
        (images_of(2, SIDE, SIDE, 3, dtype=np.bool_), 422, ["bool", "uint8 N×16×16×3"]),
        (images_of(2, 3, SIDE, SIDE), 422, ["2×3×16×16", "uint8 N×16×16×3"]),
        (images_of(2, SIDE, SIDE, 4), 422, ["2×16×16×4", "uint8 N×16×16×3"]),
        (images_of(2, SIDE, SIDE + 1, 3), 422, ["2×16×17×3", "uint8 N×16×16×3"]),
        (images_of(SIDE, SIDE), 422, ["16×16", "16×16×3 for one"]),
        (images_of(1, 1, SIDE, SIDE, 3), 422, ["1×1×16×16×3"]),
        (images_of(), 422, ["shape ()"]),
        (np.asfortranarray(images_of(2, SIDE, SIDE, 3)), 422, ["Fortran", "ascontiguousarray"]),
        (images_of(0, SIDE, SIDE, 3), 400, ["empty"]),
        (images_of(9, SIDE, SIDE, 3), 413, ["more than 8"]),
        (np.zeros(2, dtype=[("a", "u1"), ("b", "f4")]), 422, ["uint8"]),
    ],
    ids=lambda value: f"{value.dtype}{value.shape}" if isinstance(value, np.ndarray) else None,
)
def test_an_array_of_something_else_is_refused_with_what_is_wanted(
    client: TestClient, array: np.ndarray, status: int, words: list[str], as_npy, error_of
) -> None:
    message = error_of(client.post("/v1/embeddings", content=as_npy(array), headers=NPY), status)["message"]
    for word in words:
        assert word in message


def header_of(shape: tuple[int, ...], descr: str = "|u1") -> bytes:
    buffer = io.BytesIO()
    npy.write_array_header_1_0(buffer, {"descr": descr, "fortran_order": False, "shape": shape})
    return buffer.getvalue()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\x93NUMPY",
        b"\x93NUMPY\x01\x00\xff\xff{",
        b"\x93NUMPY\x03\x00" + header_of((1, SIDE, SIDE, 3))[8:],
        b"\x93NUMPY\x01\x00\x10\x00" + b"(" * 16,
        b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + b"[" * 4000,
        header_of((1, SIDE, SIDE, 3)),
        header_of((1, SIDE, SIDE, 3)) + b"x" * (SIDE * SIDE * 3 - 1),
        header_of((1, SIDE, SIDE, 3)) + b"x" * (SIDE * SIDE * 3 + 1),
        header_of((-1, SIDE, SIDE, 3)) + b"x" * (SIDE * SIDE * 3),
        b"PK\x03\x04",
        pickle.dumps(np.zeros(3)),
    ],
)
def test_what_is_no_npy_file_or_not_as_long_as_it_says_is_refused(client: TestClient, body: bytes, error_of) -> None:
    error_of(client.post("/v1/embeddings", content=body, headers=NPY), 400)


def test_a_header_that_promises_more_than_there_is_costs_no_memory(client: TestClient, error_of) -> None:
    error_of(client.post("/v1/embeddings", content=header_of((2**40, SIDE, SIDE, 3)), headers=NPY), 413)


def test_objects_are_never_unpickled(client: TestClient, as_npy, error_of) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return (pytest.fail, ("unpickled",))

    buffer = io.BytesIO()
    np.save(buffer, np.asarray([Trap()] * SIDE, dtype=object), allow_pickle=True)
    assert "object" in error_of(client.post("/v1/embeddings", content=buffer.getvalue(), headers=NPY), 422)["message"]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_any_damage_to_a_file_is_refused_or_harmless(data: st.DataObject) -> None:
    whole = header_of((1, SIDE, SIDE, 3)) + bytes(SIDE * SIDE * 3)
    body = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, 139))
        cut = data.draw(st.integers(0, 3))
        body[place : place + cut] = data.draw(st.binary(max_size=4))
    with suppress(RequestError):
        assert read_pixels(bytes(body), (SIDE, SIDE), RequestLimits()).shape[1:] == (SIDE, SIDE, 3)


def test_arrays_are_not_copied() -> None:
    body = header_of((2, SIDE, SIDE, 3)) + bytes(2 * SIDE * SIDE * 3)
    pixels = read_pixels(body, (SIDE, SIDE), RequestLimits())
    assert np.shares_memory(pixels, np.frombuffer(body, dtype=np.uint8))


def test_a_whole_batch_of_pixels_reaches_the_encoder_as_it_came(
    engine: Engine, client: TestClient, as_npy, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, real = [], engine._encoder.embed
    monkeypatch.setattr(engine._encoder, "embed", lambda pixels: seen.append(pixels) or real(pixels))
    pixels = np.random.default_rng(0).integers(0, 256, (8, SIDE, SIDE, 3), dtype=np.uint8)
    assert client.post("/v1/embeddings", content=as_npy(pixels), headers=NPY).status_code == 200
    assert len(seen) == 1 and not seen[0].flags.owndata
    np.testing.assert_array_equal(seen[0], pixels)


# --- out -------------------------------------------------------------------------------------------------------------


def test_numbers_base64_and_arrays_agree_to_the_last_bit(
    client: TestClient, tiny_bundle: Bundle, digit_images, files, as_npy
) -> None:
    images = digit_images.images[:6]
    bodies = [{"files": files(images)}, {"content": as_npy(tiny_bundle.pixels(images)), "headers": NPY}]
    for body in bodies:
        headers = body.pop("headers", {})
        numbers = client.post("/v1/embeddings", **body, headers=headers).json()["data"]
        text = client.post("/v1/embeddings?encoding_format=base64", **body, headers=headers).json()["data"]
        array = arrays_in(client.post("/v1/embeddings", **body, headers=headers | ACCEPT))
        assert array.dtype == np.dtype("<f4") and array.shape == (6, tiny_bundle.manifest.encoder.embedding_dim)
        assert b"".join(base64.b64decode(one["embedding"]) for one in text) == array.tobytes()
        assert np.asarray([one["embedding"] for one in numbers], dtype=np.float32).tobytes() == array.tobytes()


@pytest.mark.parametrize(
    ("accept", "is_array"),
    [
        ("application/x-npy", True),
        ("application/json;q=0.5, Application/X-NPY;q=1", True),
        ("*/*", False),
        ("application/json", False),
        ("application/x-npyz", False),
        ("", False),
    ],
)
def test_who_asks_for_an_array_by_name_gets_one(client: TestClient, digit_images, accept: str, is_array: bool) -> None:
    response = client.post("/v1/embeddings", content=digit_images.images[0], headers={"accept": accept})
    kind = response.headers["content-type"]
    assert kind == ("application/x-npy" if is_array else "application/json")


def test_errors_stay_json_where_an_array_was_asked_for(client: TestClient, error_of) -> None:
    error_of(client.post("/v1/embeddings", content=b"garbage", headers=ACCEPT), 422)


def test_other_answers_stay_json(client: TestClient, digit_images) -> None:
    response = client.post("/v1/classify", content=digit_images.images[0], headers=ACCEPT)
    assert response.headers["content-type"] == "application/json"


# --- many images are one piece of work -------------------------------------------------------------------------------


def test_an_array_of_a_client_that_leaves_is_dropped(
    engine: Engine, as_npy, call, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, seen = threading.Event(), []

    def embed(pixels: np.ndarray) -> np.ndarray:
        seen.append(len(pixels))
        assert gate.wait(20)
        raise RuntimeError("nobody waits for this")

    monkeypatch.setattr(engine._encoder, "embed", embed)
    engine._batcher.max_batch = 3
    body = as_npy(np.zeros((8, SIDE, SIDE, 3), dtype=np.uint8))
    messages = iter([{"type": "http.request", "body": body}])

    async def receive() -> dict[str, Any]:
        if (message := next(messages, None)) is not None:
            return message
        while not seen:
            await asyncio.sleep(0)
        assert engine.under_way == 8 and engine.waiting == 5
        return {"type": "http.disconnect"}

    sent = asyncio.run(asyncio.wait_for(call(engine, "/v1/classify", receive, NPY), 20))
    assert sent[0]["status"] == 499
    assert engine.under_way == engine.waiting == 0
    assert seen == [3]
    gate.set()


def test_an_array_that_is_not_answered_in_time_gives_its_room_back(
    tiny_bundle: Bundle, as_npy, error_of, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = build_app()
    one = Engine(tiny_bundle, limits=RequestLimits(seconds=0.05), capacity=40)
    app.state.served = Served(one)
    gate, real = threading.Event(), one._encoder.embed
    body = as_npy(np.zeros((40, SIDE, SIDE, 3), dtype=np.uint8))
    with TestClient(app) as client:
        monkeypatch.setattr(one._encoder, "embed", lambda pixels: real(pixels) if gate.wait(20) else None)
        error_of(client.post("/v1/embeddings", content=body, headers=NPY), 504)
        assert one.under_way == one.waiting == 0
        gate.set()
        monkeypatch.setattr(one, "limits", RequestLimits())
        assert client.post("/v1/embeddings", content=body, headers=NPY).status_code == 200
    one.close()


def test_arrays_and_single_images_fill_batches_together(
    tiny_bundle: Bundle, digit_images, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = Engine(tiny_bundle)
    gate, seen, real = threading.Event(), [], one._encoder.embed

    def embed(pixels: np.ndarray) -> np.ndarray:
        seen.append(len(pixels))
        assert gate.wait(20)
        return real(pixels)

    monkeypatch.setattr(one._encoder, "embed", embed)
    images = digit_images.images[:70]
    pixels = tiny_bundle.pixels(images)

    async def scene() -> list[Any]:
        asked: list[Any] = []
        for part in (pixels[:1], pixels[1:31], images[31:32], pixels[32:66], images[66:70]):
            asked.append(asyncio.ensure_future(one.embed(part)))
            while not seen or one.waiting < one.under_way - 1:  # the first has left, the others wait
                await asyncio.sleep(0)
        gate.set()
        return await asyncio.gather(*asked)

    answers = asyncio.run(asyncio.wait_for(scene(), 20))
    assert seen == [1, 32, 32, 5]
    np.testing.assert_allclose(np.concatenate(answers), tiny_bundle.embed(images), atol=1e-6)
    one.close()
