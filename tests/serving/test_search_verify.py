"""Nearest items, and whether an image belongs to one class."""

import asyncio
import itertools
import threading
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from coterie.bundle import Bundle
from coterie.store import StoredItem
from serving import schemas
from serving.engine import Engine
from serving.questions import Search


@pytest.fixture
def coloured(engine: Engine, digit_images) -> list[str]:
    """Ids of eights enrolled with metadata of every kind."""
    values: list[Any] = ["red", "7", 7, True, 1, None, 1.5, "a b"]
    embeddings = engine.bundle.embed(digit_images.of("8").images[:8])
    items = [
        StoredItem(f"item{i}", "8", row, {"colour": value, "même clé": i}, b"")
        for i, (row, value) in enumerate(zip(embeddings, values, strict=True))
    ]
    engine._gallery.add(items)
    return [item.id for item in items]


def ids(response: Any) -> list[str]:
    assert response.status_code == 200, response.text
    (entry,) = response.json()["data"]
    return [near["id"] for near in entry["neighbors"]]


# --- search ----------------------------------------------------------------------------------------------------------


def test_search_lists_the_nearest_items(client: TestClient, tiny_bundle: Bundle, digit_images, files) -> None:
    images = digit_images.images[:8]
    answer = client.post("/v1/search?k=7", files=files(images)).json()
    assert schemas.AnswerList.model_validate(answer).model_dump() == answer
    similarities = tiny_bundle.embed(images) @ tiny_bundle.base.items.embeddings.T
    for entry, row in zip(answer["data"], similarities, strict=True):
        near = entry["neighbors"]
        assert [one["similarity"] for one in near] == pytest.approx(np.sort(row)[::-1][:7].tolist(), abs=1e-6)
        for one in near:
            place = tiny_bundle.base.rows[one["id"]]
            assert one["label"] == tiny_bundle.base.items.labels[place] and one["metadata"] == {"row": place}
            assert one["similarity"] == pytest.approx(row[place], abs=1e-6)


def test_search_is_the_neighbours_of_classify_alone(client: TestClient, digit_images) -> None:
    image = digit_images.images[0]
    (searched,) = client.post("/v1/search?k=5", content=image).json()["data"]
    (classified,) = client.post("/v1/classify?neighbors=5", content=image).json()["data"]
    assert searched["neighbors"] == classified["neighbors"]
    assert searched["snapshot"] == classified["snapshot"]


def test_filters_by_label_leave_the_nearest_of_these(client: TestClient, tiny_bundle: Bundle, digit_images) -> None:
    image = digit_images.of("0").images[0]
    base = tiny_bundle.base
    row = (tiny_bundle.embed([image]) @ base.items.embeddings.T)[0]
    for labels in (["3"], ["3", "5"]):
        own = np.flatnonzero(np.isin(base.items.labels, labels))
        wanted = [base.items.ids[i] for i in own[np.argsort(-row[own], kind="stable")]][:9]
        query = "&".join(f"label={label}" for label in labels)
        assert ids(client.post(f"/v1/search?k=9&{query}", content=image)) == wanted


def test_fewer_items_than_asked_for_are_all_listed(client: TestClient, digit_images) -> None:
    assert len(ids(client.post("/v1/search?k=1000&label=3", content=digit_images.images[0]))) == 60


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("metadata.colour=red", [0]),
        ('metadata.colour="red"', [0]),
        ('metadata.colour="7"', [1]),
        ("metadata.colour=7", [2]),
        ("metadata.colour=true", [3]),
        ("metadata.colour=1", [4]),
        ("metadata.colour=1.0", [4]),
        ("metadata.colour=null", [5]),
        ("metadata.colour=1.5", [6]),
        ("metadata.colour=a%20b", [7]),
        ("metadata.colour=NaN", []),
        ("metadata.colour=blue", []),
        ("metadata.none=1", []),
        ("metadata.m%C3%AAme%20cl%C3%A9=2", [2]),
        ("metadata.colour=red&metadata.m%C3%AAme%20cl%C3%A9=0", [0]),
        ("metadata.colour=red&metadata.m%C3%AAme%20cl%C3%A9=1", []),
        ("metadata.colour=red&label=8", [0]),
        ("metadata.colour=red&label=3", []),
        ("metadata.colour=" + "[" * 5000, []),
    ],
)
def test_filters_by_metadata_are_exact(
    client: TestClient, digit_images, coloured: list[str], query: str, found: list[int]
) -> None:
    response = client.post(f"/v1/search?{query}", content=digit_images.images[0])
    assert ids(response) == [coloured[i] for i in found]


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ({"metadata": {"colour": "7"}}, [1]),
        ({"metadata": {"colour": 7}}, [2]),
        ({"metadata": {"colour": True}, "label": "8"}, [3]),
        ({"metadata": {"colour": 1}, "label": ["3", "8"], "k": 1}, [4]),
        ({"metadata": {"colour": True}, "label": "3"}, []),
    ],
)
def test_filters_may_stand_in_the_json_body(
    client: TestClient, digit_images, coloured: list[str], body: dict[str, Any], found: list[int], data_uri
) -> None:
    body |= {"input": data_uri(digit_images.images[0])}
    assert ids(client.post("/v1/search", json=body)) == [coloured[i] for i in found]


def test_equal_looking_filters_of_different_types_are_not_answered_as_one(digit_images, engine: Engine) -> None:
    """1 and true are equal in Python; what waits together must not be taken for the same."""
    embeddings = engine.bundle.embed(digit_images.of("8").images[:2])
    engine._gallery.add(
        [
            StoredItem(str(value), "8", row, {"flag": value}, b"")
            for value, row in zip([1, True], embeddings, strict=True)
        ]
    )

    async def ask() -> list[Any]:
        image = digit_images.images[0]
        gate, real, held = threading.Event(), engine._encoder.embed, []

        def embed(pixels: Any) -> Any:
            held.append(pixels)
            return gate.wait(20) and real(pixels)

        engine._encoder.embed = embed  # type: ignore[method-assign]
        first = []
        while len(first) < engine._encoder.concurrency:  # one after the other, for each is to keep a thread of its own
            first.append(asyncio.ensure_future(engine.answer([image], None)))
            while len(held) < len(first):
                await asyncio.sleep(0)
        both = [asyncio.ensure_future(engine.answer([image], Search.of(5, [], {"flag": flag}))) for flag in (1, True)]
        while engine.waiting < 2:
            await asyncio.sleep(0)
        gate.set()
        return (await asyncio.gather(*first, *both))[len(first) :]

    answers = asyncio.run(asyncio.wait_for(ask(), 20))
    assert [[near.id for near in answer.rows[0].neighbors] for answer in answers] == [["1"], ["True"]]


@pytest.mark.parametrize(
    ("query", "status", "param"),
    [
        ("k=0", 400, "k"),
        ("k=1001", 400, "k"),
        ("k=1&k=2", 400, "k"),
        ("top=1", 400, "top"),
        ("metadata.a=1&metadata.a=2", 400, None),
        ("label=nobody", 404, "label"),
        ("label=3&label=", 404, "label"),
    ],
)
def test_a_search_that_cannot_be_answered_says_why(
    client: TestClient, digit_images, query: str, status: int, param: str | None, error_of
) -> None:
    error = error_of(client.post(f"/v1/search?{query}", content=digit_images.images[0]), status)
    assert error["param"] == param
    assert "None" not in error["message"] and "Value error" not in error["message"]
    if "nobody" in query:
        assert "'nobody'" in error["message"]


# --- verify ----------------------------------------------------------------------------------------------------------


def test_verify_agrees_with_classify(client: TestClient, digit_images, files) -> None:
    images = digit_images.of(*"01234567").images
    seen = set()
    for start, rate in itertools.product(range(0, 48, 8), (0.01, 0.05, 0.2)):
        part = images[start : start + 8]
        classified = client.post(f"/v1/classify?false_reject={rate}", files=files(part)).json()["data"]
        for image, entry in zip(part, classified, strict=True):
            label = entry["classes"][0]["label"]
            answer = client.post(f"/v1/verify?label={label}&false_reject={rate}", content=image).json()
            assert schemas.AnswerList.model_validate(answer).model_dump() == answer
            (verified,) = answer["data"]
            assert (verified["label"], verified["match"]) == (label, entry["known"])
            for name in ("similarity", "threshold"):
                assert verified[name] == pytest.approx(entry[name], abs=1e-6)
            assert (verified["calibration"], verified["snapshot"]) == (entry["calibration"], entry["snapshot"])
            seen.add(entry["known"])
    assert seen == {True, False}


def test_most_images_match_their_class_and_few_another(client: TestClient, digit_images, files) -> None:
    known = digit_images.of(*"01234567")
    matches = {True: [], False: []}  # type: ignore[var-annotated]
    for label in "01234567":
        for start in range(0, 120, 8):
            part = files(known.images[start : start + 8])
            for entry, truth in zip(
                client.post(f"/v1/verify?label={label}", files=part).json()["data"], known.labels[start:], strict=False
            ):
                matches[bool(truth == label)].append(entry["match"])
    assert np.mean(matches[True]) > 0.85
    assert np.mean(matches[False]) < 0.1


def test_images_are_held_against_one_class_whatever_they_resemble_more(client: TestClient, digit_images) -> None:
    image = digit_images.of("0").images[0]
    similarities = {}
    for label in "01234567":
        (entry,) = client.post(f"/v1/verify?label={label}", content=image).json()["data"]
        assert entry["match"] == (entry["similarity"] >= entry["threshold"])
        similarities[label] = entry["similarity"]
    assert max(similarities, key=similarities.__getitem__) == "0"
    assert len(set(similarities.values())) == 8


def test_label_and_rate_may_stand_in_the_json_body(client: TestClient, digit_images, data_uri) -> None:
    image = digit_images.images[0]
    body = {"input": data_uri(image), "label": "3", "false_reject": 0.2}
    answer = client.post("/v1/verify?label=4", json=body).json()
    assert answer == client.post("/v1/verify?label=3&false_reject=0.2", content=image).json()


@pytest.mark.parametrize(
    ("query", "status", "param"),
    [
        ("", 400, "label"),
        ("label=nobody", 404, "label"),
        ("label=3&label=4", 400, "label"),
        ("label=3&false_reject=0.03", 400, "false_reject"),
    ],
)
def test_a_verification_that_cannot_be_made_says_why(
    client: TestClient, digit_images, query: str, status: int, param: str, error_of
) -> None:
    error = error_of(client.post(f"/v1/verify?{query}", content=digit_images.images[0]), status)
    assert error["param"] == param
    if "nobody" in query:
        assert "'nobody'" in error["message"] and "/v1/classes" in error["message"]


def test_a_class_enrolled_now_can_be_verified_at_the_next_request(
    client: TestClient, digit_images, coloured: list[str], error_of
) -> None:
    (entry,) = client.post("/v1/verify?label=8", content=digit_images.of("8").images[0]).json()["data"]
    assert entry["match"]


def test_an_empty_gallery_says_what_to_do(engine: Engine, client: TestClient, digit_images, error_of) -> None:
    for label in "01234567":
        engine._gallery.remove([engine.gallery().items.ids[i] for i in engine.gallery().members(label)])
    image = digit_images.images[0]
    assert "add examples" in error_of(client.post("/v1/classify", content=image), 404)["message"]
    assert ids(client.post("/v1/search", content=image)) == []


# --- classify with another k -----------------------------------------------------------------------------------------


def test_k_says_how_many_neighbours_vote(client: TestClient, tiny_bundle: Bundle, digit_images) -> None:
    image, calibration = digit_images.images[0], tiny_bundle.manifest.calibration

    def ask(query: str) -> dict[str, Any]:
        return client.post(f"/v1/classify?{query}", content=image).json()["data"][0]

    assert ask(f"k={calibration.n_neighbors}") == ask("")
    one, many = ask("k=1"), ask("k=400")
    assert one["classes"] != many["classes"]
    assert len({one["calibration"], many["calibration"], calibration.id}) == 3
