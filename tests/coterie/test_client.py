"""The client against a real service, and against answers made up for it."""

import asyncio
import io
import json
import random
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from coterie.bundle import Bundle
from coterie.classifier import verify
from coterie.client import AsyncClient, Client, Retries
from coterie.errors import ImageError, ServiceError
from coterie.items import item_id

NEVER = Retries(times=0)


@pytest.fixture
def url(service_of: Callable[..., str], tiny_bundle: Bundle) -> str:
    return service_of(tiny_bundle)


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long clients would have waited, without the waiting; the random part is the whole."""
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    monkeypatch.setattr(random, "uniform", lambda low, high: high)
    return waits


def answering(*answers: httpx.Response | Exception) -> tuple[httpx.MockTransport, list[httpx.Request]]:
    """A transport that gives these answers in turn, and the requests it got."""
    left, requests = list(answers), []

    def handle(request: httpx.Request) -> httpx.Response:
        request.read()
        requests.append(request)
        answer = left.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    return httpx.MockTransport(handle), requests


def refusal(status: int, code: str = "overloaded", param: str | None = None, **headers: str) -> httpx.Response:
    error = {"message": f"image 3: {code}", "type": "t", "param": param, "code": code}
    return httpx.Response(status, json={"error": error}, headers=headers)


CLASSES = {"data": [{"label": "boot", "count": 3, "enrolled": 1, "radius": 0.25}]}

# --- a real service --------------------------------------------------------------------------------------------------


def test_answers_are_what_the_bundle_says_offline(url: str, tiny_bundle: Bundle, digit_images, tmp_path: Path) -> None:
    images = digit_images.images[:20]
    path = tmp_path / "0.png"
    path.write_bytes(images[0])
    opened = Image.open(io.BytesIO(images[2]))
    mixed = [path, str(path), images[1], opened, np.asarray(opened)]
    with Client(url, batch=7) as client:
        embeddings = client.embed(images)
        assert embeddings.dtype == np.float32
        np.testing.assert_allclose(embeddings, tiny_bundle.embed(images), atol=1e-6)
        pixels = tiny_bundle.pixels(images)
        np.testing.assert_allclose(client.embed(pixels), embeddings, atol=1e-6)
        np.testing.assert_allclose(client.embed(mixed), embeddings[[0, 0, 1, 2, 2]], atol=1e-6)
        for answer, expected in zip(
            client.classify(images, top=2, neighbors=1), tiny_bundle.classify(images), strict=True
        ):
            assert (answer.label, answer.known, answer.calibration) == (
                expected.label,
                expected.known,
                expected.calibration,
            )
            assert answer.classes[0].probability == pytest.approx(expected.classes[0].probability, abs=1e-6)
            assert (len(answer.classes), len(answer.neighbors)) == (2, 1)
            assert answer.neighbors[0].id == expected.neighbors[0].id
        found = client.search(images, k=3, labels=["1", "2"])
        assert [[near.label in "12" for near in nearest] for nearest in found] == [[True] * 3] * 20
        assert client.search(images[:1], metadata={"row": 5})[0][0].metadata == {"row": 5}
        for answer, wanted in zip(
            client.verify(images, "3"),
            verify(tiny_bundle.embed(images), tiny_bundle.base, tiny_bundle.manifest.calibration, "3"),
            strict=True,
        ):
            assert (answer.label, answer.match) == ("3", wanted.match)
            assert (answer.similarity, answer.threshold) == pytest.approx(
                (wanted.similarity, wanted.threshold), abs=1e-6
            )
        assert client.embed([]).shape[0] == 0 and client.classify([]) == []
        assert client.bundle() == tiny_bundle.manifest


def test_a_class_is_enrolled_listed_and_forgotten(url: str, digit_images) -> None:
    eights = list(digit_images.of("8").images[:5])
    with Client(url, batch=2) as client:
        done = client.enroll("8", eights, metadata=[{"n": n} for n in range(5)])
        assert [(item.index, item.id, item.label) for item in done.items] == [
            (n, item_id(image), "8") for n, image in enumerate(eights)
        ]
        assert not done.refused
        item = client.item(item_id(eights[3]))
        assert item is not None and (item.label, item.metadata, item.enrolled) == ("8", {"n": 3}, True)
        counts = {entry.label: (entry.count, entry.enrolled) for entry in client.classes()}
        assert counts["8"] == (5, 5) and counts["0"] == (60, 0)
        assert client.classify([digit_images.of("8").images[10]])[0].label == "8"
        assert client.delete(item_id(eights[3])) and not client.delete(item_id(eights[3]))
        assert client.item(item_id(eights[3])) is None
        assert client.forget("8") == 4 and client.forget("8") == 0
        some = client.enroll("größe / 1".replace("/", "+"), [b"no image", eights[0], b"x", eights[1]], partial=True)
        assert [item.index for item in some.items] == [1, 3]
        assert [(bad.index, bad.code) for bad in some.refused] == [(0, "invalid_image"), (2, "invalid_image")]
        assert client.forget("größe + 1") == 2


@pytest.mark.parametrize(
    "one", ["1.png", b"bytes", Path("1.png"), np.zeros((4, 5, 3), np.uint8), Image.new("L", (1, 1))]
)
def test_a_single_image_is_not_taken_for_a_sequence(one: Any) -> None:
    transport, requests = answering()
    with Client("http://x", transport=transport) as client:
        for method in (client.embed, client.classify, lambda images: client.enroll("8", images)):
            with pytest.raises(TypeError, match=r"\[image\]"):
                method(one)
    assert not requests


def test_metadata_that_are_not_one_for_each_image_enrol_nothing(digit_images) -> None:
    transport, requests = answering()
    with Client("http://x", batch=2, transport=transport) as client, pytest.raises(ValueError, match="3 objects for 4"):
        client.enroll("8", digit_images.images[:4], metadata=[{"n": 1}] * 3)
    assert not requests


def test_a_key_is_sent_without_what_its_file_ends_with(monkeypatch: pytest.MonkeyPatch) -> None:
    for given, environment in (("secret\n", ""), (None, " secret\r\n")):
        monkeypatch.setenv("COTERIE_KEY", environment)
        transport, requests = answering(httpx.Response(200, json=CLASSES))
        with Client("http://x", given, transport=transport) as client:
            client.classes()
        assert requests[0].headers["authorization"] == "Bearer secret"


@pytest.mark.parametrize("key", ["schlüssel", "two\nlines", "nul\0"])
def test_what_cannot_be_a_key_is_refused_and_not_shown(key: str) -> None:
    for kind in (Client, AsyncClient):
        with pytest.raises(ServiceError, match="API key") as caught:
            kind("http://x", key)
        assert key not in str(caught.value)


def test_a_bad_image_is_named_by_its_place_among_all(url: str, digit_images) -> None:
    images = [*digit_images.images[:9], b"no image"]
    with Client(url, batch=4) as client, pytest.raises(ServiceError) as caught:
        client.classify(images)
    assert (caught.value.status, caught.value.code, caught.value.index) == (422, "invalid_image", 9)
    assert str(caught.value).startswith("image 9: ")


def test_errors_stand_in_the_place_of_images_where_they_are_asked_for(url: str, digit_images) -> None:
    images = [b"no image", *digit_images.images[:4], b"x"]

    async def ask(name: str, *arguments: Any, **options: Any) -> Any:
        async with AsyncClient(url, batch=4) as client:
            return await getattr(client, name)(images, *arguments, partial=True, **options)

    with Client(url, batch=4) as client:
        for name, arguments, options, told in (
            ("classify", (), {}, lambda answer: answer.label),
            ("search", (), {"k": 2}, lambda nearest: [near.id for near in nearest]),
            ("verify", ("3",), {}, lambda answer: answer.match),
        ):
            method = getattr(client, name)
            wanted = method(images[1:5], *arguments, **options)
            for found in (
                method(images, *arguments, partial=True, **options),
                asyncio.run(ask(name, *arguments, **options)),
            ):
                assert [told(one) for one in found[1:5]] == [told(one) for one in wanted]
                assert [(found[row].index, found[row].code) for row in (0, 5)] == [
                    (0, "invalid_image"),
                    (5, "invalid_image"),
                ]
                assert found[5].message.startswith("image 5: ")


def test_as_many_items_vote_as_are_asked_for(url: str, tiny_bundle: Bundle, digit_images) -> None:
    with Client(url) as client:
        for k, same in ((None, True), (1, False)):
            (answer,) = client.classify(digit_images.images[:1], k=k)
            assert (answer.calibration == tiny_bundle.manifest.calibration.id) is same


def test_asyncio_gets_the_same(url: str, tiny_bundle: Bundle, digit_images) -> None:
    images = digit_images.images[:10]
    eights = list(digit_images.of("8").images[:3])

    async def scene() -> None:
        async with AsyncClient(url, batch=3, concurrency=2) as client:
            with Client(url) as other:  # whose images share other batches, which the last digits tell
                np.testing.assert_allclose(await client.embed(images), other.embed(images), atol=1e-6)
                for one, two in zip(await client.classify(images), other.classify(images), strict=True):
                    assert (one.label, one.probability) == (two.label, pytest.approx(two.probability, abs=1e-6))
                for one, two in zip(await client.search(images, k=2), other.search(images, k=2), strict=True):
                    assert [near.id for near in one] == [near.id for near in two]
                for one, two in zip(await client.verify(images, "1"), other.verify(images, "1"), strict=True):
                    assert (one.match, one.threshold) == (two.match, pytest.approx(two.threshold, abs=1e-6))
            assert await client.bundle() == tiny_bundle.manifest
            assert len((await client.enroll("8", eights)).items) == 3
            assert (await client.item(item_id(eights[0]))).label == "8"  # type: ignore[union-attr]
            assert {entry.label for entry in await client.classes()} >= {"8"}
            assert await client.delete(item_id(eights[0]))
            assert await client.forget("8") == 2
            with pytest.raises(ServiceError, match="image 4: "):
                await client.classify([*images[:4], b"no image"])

    asyncio.run(asyncio.wait_for(scene(), 60))


def test_no_more_requests_than_allowed_are_under_way(digit_images) -> None:
    most, now, lock, both = 0, 0, threading.Lock(), threading.Barrier(2)

    def handle(request: httpx.Request) -> httpx.Response:
        nonlocal most, now
        with lock:
            now += 1
            most = max(most, now)
        both.wait(20)  # passes only where two are under way
        with lock:
            now -= 1
        return httpx.Response(200, json={"data": []})

    with Client("http://x", batch=1, concurrency=2, transport=httpx.MockTransport(handle)) as client:
        client.classify(digit_images.images[:8])
    assert most == 2


# --- trouble ---------------------------------------------------------------------------------------------------------


def test_what_is_refused_for_now_is_tried_again_when_the_service_says(slept: list[float]) -> None:
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=9), usegmt=True)
    answers = (
        httpx.ConnectError("refused"),
        refusal(429, **{"retry-after": "7"}),
        refusal(503, **{"retry-after": later}),
        httpx.Response(503, text="<html>"),
        httpx.ReadTimeout("slow"),
        httpx.Response(200, json=CLASSES),
    )
    transport, requests = answering(*answers)
    with Client("http://x", transport=transport) as client:
        (found,) = client.classes()
    assert (found.label, found.count, found.enrolled, found.radius) == ("boot", 3, 1, 0.25)
    assert len(requests) == 6
    assert slept == [0.5, 7.0, pytest.approx(9, abs=1.5), 4.0, 8.0]


def test_waiting_has_an_end_and_a_bound(slept: list[float]) -> None:
    transport, requests = answering(*[refusal(429, **{"retry-after": "86400"}) for _ in range(3)])
    with (
        Client("http://x", transport=transport, retries=Retries(times=2, longest=11)) as client,
        pytest.raises(ServiceError) as caught,
    ):
        client.classes()
    assert (caught.value.status, caught.value.code, slept, len(requests)) == (429, "overloaded", [11, 11], 3)


def test_the_random_part_is_at_most_half() -> None:
    waits = [Retries().wait(2, None) for _ in range(200)]
    assert all(wait is not None and 1.0 <= wait <= 2.0 for wait in waits) and len(set(waits)) > 100


@pytest.mark.parametrize("status", [400, 401, 404, 409, 413, 422, 500, 504])
def test_what_would_fail_again_is_not_tried_again(slept: list[float], status: int) -> None:
    transport, requests = answering(refusal(status, "why"))
    with Client("http://x", transport=transport) as client, pytest.raises(ServiceError) as caught:
        client.classes()
    assert (caught.value.status, caught.value.code) == (status, "why")
    assert (len(requests), slept) == (1, [])


def test_a_change_is_made_again_under_the_same_key(slept: list[float], digit_images) -> None:
    done = httpx.Response(201, json={"data": [{"object": "gallery.item", "index": 0, "id": "i", "label": "a"}]})
    transport, requests = answering(httpx.ReadError("gone"), done, httpx.ReadError("gone"), done)
    with Client("http://x", transport=transport, batch=1, concurrency=1) as client:
        assert [item.index for item in client.enroll("a", digit_images.images[:2]).items] == [0, 1]
    keys = [request.headers["idempotency-key"] for request in requests]
    assert keys[0] == keys[1] != keys[2] == keys[3]
    assert requests[0].content == requests[1].content
    body = json.loads(requests[0].content)
    assert (requests[0].url.path, body["on_error"], body["metadata"]) == ("/v1/classes/a/examples", "fail", {})


def test_a_deletion_whose_first_answer_was_lost_has_happened(slept: list[float]) -> None:
    gone = refusal(404, "not_found")
    transport, _ = answering(
        httpx.ReadError("gone"), gone, httpx.ReadError("gone"), gone, refusal(404, "unknown_route")
    )
    with Client("http://x", transport=transport) as client:
        assert client.forget("a") == 0
        assert client.delete("i") is False
        with pytest.raises(ServiceError):  # no Coterie service at all
            client.delete("i")


def test_swapping_waits_for_the_service_to_load() -> None:
    transport, requests = answering(httpx.Response(200, json={"id": "sha256:b", "name": "n", "previous": "sha256:a"}))
    with Client("http://x", transport=transport) as client:
        swapped = client.swap("coterie-bundle:abc")
    assert (swapped.id, swapped.name, swapped.previous) == ("sha256:b", "n", "sha256:a")
    assert json.loads(requests[0].content) == {"bundle": "coterie-bundle:abc"}
    assert requests[0].extensions["timeout"]["read"] >= 600


@pytest.mark.parametrize(("argument", "variable", "sent"), [("k", "v", "k"), (None, "v", "v"), (None, "", None)])
def test_the_key_is_sent(
    monkeypatch: pytest.MonkeyPatch, argument: str | None, variable: str, sent: str | None
) -> None:
    monkeypatch.setenv("COTERIE_KEY", variable)
    transport, requests = answering(httpx.Response(200, json=CLASSES))
    with Client("http://x", argument, transport=transport) as client:
        client.classes()
    assert requests[0].headers.get("authorization") == (None if sent is None else f"Bearer {sent}")


def test_errors_are_one_clear_sentence(tmp_path: Path) -> None:
    with pytest.raises(ServiceError, match="begins with http"):
        Client("localhost:3000")
    with (
        Client("http://127.0.0.1:9", retries=NEVER) as client,
        pytest.raises(ServiceError, match=r"http://127.0.0.1:9 cannot be reached \(.+\): is the service running there"),
    ):
        client.classes()
    for answer in (httpx.Response(200, text="<html>"), httpx.Response(200, json=[]), httpx.Response(200, json={})):
        transport, _ = answering(answer)
        with Client("http://x", transport=transport) as client, pytest.raises(ServiceError, match="does not answer as"):
            client.classes()
    transport, _ = answering()
    with Client("http://x", transport=transport) as client:
        with pytest.raises(ImageError, match="cannot be read"):
            client.embed([tmp_path / "nowhere.png"])
        for single in (b"x", "a.png", np.zeros((4, 4, 3), np.uint8)):
            with pytest.raises(TypeError, match=r"\[image\] for a single one"):
                client.embed(single)  # type: ignore[arg-type]


def test_the_first_failure_ends_a_large_job(digit_images) -> None:
    requests: list[Any] = []

    def handle(request: httpx.Request) -> httpx.Response:
        requests.append(request)
        return refusal(422, "invalid_image", "input[0]")

    with (
        Client("http://x", batch=1, concurrency=1, transport=httpx.MockTransport(handle)) as client,
        pytest.raises(ServiceError),
    ):
        client.embed(digit_images.images[:30])
    assert len(requests) < 30
