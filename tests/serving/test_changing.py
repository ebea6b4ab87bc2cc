"""Routes that change something, on a real bundle and a real store."""

import base64
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from coterie.bundle import Bundle
from coterie.errors import StoreBusyError, StoreError
from coterie.items import item_id
from coterie.store import StoreOptions
from serving import changing_schemas as schemas
from serving.audit import Change
from serving.engine import Engine
from serving.limits import RequestLimits
from serving.routes import build_app
from serving.served import Served

EIGHT, BOOT = "/v1/classes/8/examples", "/v1/classes/boot/examples"


@pytest.fixture
def eights(digit_images) -> list[bytes]:
    return list(digit_images.of("8").images[:5])


@pytest.fixture
def client_of(tmp_path: Path, tiny_bundle: Bundle) -> Iterator[Callable[..., TestClient]]:
    """Workers of one service: clients of engines of their own, on one state folder."""
    engines: list[Engine] = []

    def make(**options: Any) -> TestClient:
        app = build_app()
        engine = Engine(tiny_bundle, state=tmp_path / "state", limits=RequestLimits(max_images=8), **options)
        engines.append(engine)
        app.state.served = Served(engine)
        return TestClient(app, raise_server_exceptions=False)

    yield make
    for engine in engines:
        engine.close()


def counts(client: TestClient) -> dict[str, tuple[int, int]]:
    return {row["label"]: (row["count"], row["enrolled"]) for row in client.get("/v1/classes").json()["data"]}


def ids(images: list[bytes]) -> list[str]:
    return [item_id(image) for image in images]


# --- examples --------------------------------------------------------------------------------------------------------


def test_five_examples_make_a_class_that_every_worker_knows_at_once(client_of, eights, digit_images, files) -> None:
    one, two = client_of(), client_of()
    unseen = digit_images.of("8").images[10]
    before = two.post("/v1/classify", content=unseen).json()["data"][0]
    assert before["label"] is None and "8" not in counts(two)
    response = one.post(EIGHT, files=files(eights))
    assert response.status_code == 201
    assert schemas.NewItemList.model_validate(response.json()).model_dump() == response.json()
    assert [(row["id"], row["label"]) for row in response.json()["data"]] == [(name, "8") for name in ids(eights)]
    for client in (two, one):
        answer = client.post("/v1/classify", content=unseen).json()["data"][0]
        assert (answer["label"], answer["known"]) == ("8", True)
        assert counts(client)["8"] == (5, 5) and counts(client)["0"] == (60, 0)


def test_what_was_enrolled_survives_a_restart_with_its_image_and_picture(client_of, eights, tmp_path: Path) -> None:
    client_of().post(EIGHT, content=eights[0], headers={"content-type": "image/png"}, params={"metadata": '{"n": 1}'})
    client = client_of()
    item = client.get(f"/v1/gallery/{item_id(eights[0])}").json()
    assert schemas.ItemEntry.model_validate(item).model_dump() == item
    assert (item["label"], item["metadata"], item["enrolled"]) == ("8", {"n": 1}, True)
    assert client.get(item["thumbnail"]).headers["content-type"] == "image/webp"
    (original,) = (file for file in (tmp_path / "state/tiny-digits/originals").rglob("*") if file.is_file())
    assert original.read_bytes() == eights[0]


def test_every_kind_of_body_enrols_the_same_items(client_of, eights, files, data_uri) -> None:
    client = client_of()
    texts = [base64.b64encode(image).decode() for image in eights]
    bodies: list[dict[str, Any]] = [
        {"files": files(eights)},
        {"json": {"input": texts, "model": "tiny-digits"}},
        {"json": {"input": [data_uri(image) for image in eights]}},
    ]
    for body in bodies:
        answer = client.post(EIGHT, **body).json()
        assert [row["id"] for row in answer["data"]] == ids(eights)
        assert client.delete("/v1/classes/8").json() == {
            "object": "class.deleted",
            "label": "8",
            "deleted": True,
            "items": 5,
        }


def test_metadata_may_be_one_object_or_one_for_each_image(client_of, eights, files) -> None:
    client = client_of()
    body = {"input": [base64.b64encode(image).decode() for image in eights[:2]], "metadata": [{"n": 1}, {"n": 2}]}
    client.post(EIGHT, json=body)
    client.post(EIGHT, files=files(eights[2:4]), params={"metadata": '{"by": "größe"}'})
    found = client.get("/v1/gallery", params={"id": [*ids(eights), "nowhere"]}).json()["data"]
    assert [row["metadata"] for row in found] == [{"n": 1}, {"n": 2}, {"by": "größe"}, {"by": "größe"}]


def test_an_image_sent_twice_is_one_item_and_moves_to_the_label_it_is_sent_under(client_of, eights, files) -> None:
    client = client_of()
    answer = client.post(EIGHT, files=files([eights[0], eights[0]])).json()
    assert len(answer["data"]) == 2 and counts(client)["8"] == (1, 1)
    client.post(BOOT, content=eights[0])
    assert "8" not in counts(client) and counts(client)["boot"] == (1, 1)


def test_one_bad_image_enrols_none_of_its_request(client_of, eights, files, error_of) -> None:
    client = client_of()
    error = error_of(client.post(EIGHT, files=files([*eights[:2], b"no image"])), 422)
    assert (error["code"], error["param"]) == ("invalid_image", "input[2]")
    assert "8" not in counts(client)


def test_with_partial_the_good_images_are_enrolled_and_the_bad_ones_named(client_of, eights, files) -> None:
    client = client_of()
    sent = [b"no image", eights[0], b"", eights[1]]
    headers = {"idempotency-key": "k"}
    answers = [
        client.post(EIGHT, files=files(sent), params={"on_error": "partial"}, headers=headers).json() for _ in range(2)
    ]
    assert answers[0] == answers[1]
    rows = answers[0]["data"]
    assert [row["object"] for row in rows] == ["error", "gallery.item", "error", "gallery.item"]
    assert rows[0]["error"]["code"] == "invalid_image" and rows[0]["index"] == 0
    assert [rows[1]["id"], rows[3]["id"]] == ids(eights[:2])
    assert counts(client)["8"] == (2, 2)


@pytest.mark.parametrize(
    ("label", "status"),
    [("%00", 400), ("..%00", 400), ("a%0Ab", 400), ("x" * 129, 400), ("%FF", 400), ("a%2Fb", 404), ("größe", 201)],
)
def test_labels_are_checked_where_they_enter(client_of, eights, label: str, status: int) -> None:
    client = client_of()
    assert client.post(f"/v1/classes/{label}/examples", content=eights[0]).status_code == status
    assert len(counts(client)) == 8 + (status == 201)


@pytest.mark.parametrize(
    "metadata",
    ["[]", "1", "{", '{"a": NaN}', '[{"a": 1}, {"a": 2}]', json.dumps({"a": "x" * 17_000}), "[" * 100_000, "\ud800"],
)
def test_bad_metadata_is_refused(client_of, eights, error_of, metadata: str) -> None:
    body = f'{{"input": "{base64.b64encode(eights[0]).decode()}", "metadata": {metadata}}}'
    response = client_of().post(
        EIGHT, content=body.encode("utf-8", "surrogatepass"), headers={"content-type": "application/json"}
    )
    error_of(response, 400)


def test_metadata_of_the_query_is_json(client_of, eights, error_of) -> None:
    for text in ("{", "7", "x", '{"a": NaN}'):
        error = error_of(client_of().post(EIGHT, content=eights[0], params={"metadata": text}), 400)
        assert error["param"] == "metadata"


def test_arrays_are_refused_because_the_image_itself_is_kept(client_of, error_of, as_npy) -> None:
    body = as_npy(np.zeros((1, 16, 16, 3), dtype=np.uint8))
    error_of(client_of().post(EIGHT, content=body, headers={"content-type": "application/x-npy"}), 415)


def test_a_full_class_is_409_and_names_the_setting(client_of, eights, files, error_of) -> None:
    client = client_of(store=StoreOptions(class_quota=3))
    client.post(EIGHT, files=files(eights[:2]))
    error = error_of(client.post(EIGHT, files=files(eights)), 409)
    assert error["code"] == "conflict" and "COTERIE_CLASS_QUOTA" in error["message"]
    assert counts(client)["8"] == (2, 2)


@pytest.mark.parametrize(
    ("failure", "code", "retry"), [(StoreBusyError, "gallery_busy", "1"), (StoreError, "gallery_unavailable", None)]
)
def test_a_store_that_cannot_be_written_is_503(
    client_of, eights, error_of, monkeypatch: pytest.MonkeyPatch, failure: type[Exception], code: str, retry: str | None
) -> None:
    client = client_of()

    def fail(*_: Any) -> Any:
        raise failure("/secret/gallery.sqlite")

    monkeypatch.setattr(client.app.state.served.engine.live_gallery._store, "add", fail)
    response = client.post(EIGHT, content=eights[0])
    error = error_of(response, 503)
    assert error["code"] == code and "secret" not in error["message"]
    assert response.headers.get("retry-after") == retry


# --- retries ---------------------------------------------------------------------------------------------------------


def test_a_retry_gets_the_first_answer_and_changes_nothing_in_any_worker(client_of, eights, files) -> None:
    one, two = client_of(), client_of()
    headers = {"idempotency-key": "a key"}
    first = one.post(EIGHT, files=files(eights), headers=headers)
    one.delete(f"/v1/gallery/{item_id(eights[0])}")
    one.post(BOOT, content=eights[1])
    for client in (one, two, client_of()):
        again = client.post(EIGHT, files=files(eights), headers=headers)
        assert (again.status_code, again.json()) == (201, first.json())
        assert counts(client)["8"] == (3, 3) and counts(client)["boot"] == (1, 1)


def test_the_same_key_for_another_request_is_422(client_of, eights, files, error_of) -> None:
    client = client_of()
    headers = {"idempotency-key": "a key"}
    client.post(EIGHT, files=files(eights[:2]), headers=headers)
    for path, images, query in (
        (EIGHT, eights[:3], {}),
        (BOOT, eights[:2], {}),
        (EIGHT, eights[:2], {"metadata": '{"a": 1}'}),
        (EIGHT, eights[:2], {"on_error": "partial"}),
    ):
        error = error_of(client.post(path, files=files(images), headers=headers, params=query), 422)
        assert error["code"] == "idempotency_key_reused"
    assert counts(client)["8"] == (2, 2)


def test_a_retry_that_overtakes_its_first_is_answered_alike(
    client_of, eights, files, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = client_of(), client_of()
    headers = {"idempotency-key": "a key"}
    first = one.post(EIGHT, files=files(eights), headers=headers)
    # As for a request that had looked before the first was durable.
    monkeypatch.setattr(two.app.state.served.engine.live_gallery, "receipt", lambda key: None)
    sequence = two.app.state.served.engine.gallery().sequence
    assert two.post(EIGHT, files=files(eights), headers=headers).json() == first.json()
    assert two.app.state.served.engine.gallery().sequence == sequence


def test_a_refused_request_leaves_its_key_free(client_of, eights, files) -> None:
    client = client_of()
    headers = {"idempotency-key": "a key"}
    assert client.post(EIGHT, files=files([b"no image"]), headers=headers).status_code == 422
    assert client.post(EIGHT, files=files(eights), headers=headers).status_code == 201


@pytest.mark.parametrize("key", ["", "x" * 201])
def test_a_key_has_1_to_200_characters(client_of, eights, error_of, key: str) -> None:
    error = error_of(client_of().post(EIGHT, content=eights[0], headers={"idempotency-key": key}), 400)
    assert error["param"] == "idempotency-key"


# --- away ------------------------------------------------------------------------------------------------------------


def test_a_class_is_forgotten_in_every_worker_and_its_bytes_are_in_no_file(
    client_of, eights, files, error_of, tmp_path: Path
) -> None:
    one, two = client_of(), client_of()
    one.post("/v1/classes/gone-class/examples", files=files(eights), headers={"idempotency-key": "k"})
    assert two.delete("/v1/classes/gone-class").json()["items"] == 5
    assert "gone-class" not in counts(one)
    error_of(one.get(f"/v1/gallery/{item_id(eights[0])}"), 404)
    error_of(one.delete("/v1/classes/gone-class"), 404)
    contents = [file.read_bytes() for file in (tmp_path / "state").rglob("*") if file.is_file()]
    assert not any(eights[0] in content or b"gone-class" in content for content in contents)


def test_a_class_that_another_request_forgets_meanwhile_is_not_there(
    client_of, eights, error_of, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = client_of(), client_of()
    one.post(EIGHT, content=eights[0])
    gallery = one.app.state.served.engine.live_gallery
    remove = gallery.remove

    def remove_later(**which: Any) -> Any:
        assert two.delete("/v1/classes/8").json()["items"] == 1
        return remove(**which)

    monkeypatch.setattr(gallery, "remove", remove_later)
    assert error_of(one.delete("/v1/classes/8"), 404)["param"] == "label"


def test_the_bundles_own_classes_and_items_can_be_forgotten_too(client_of, error_of, tiny_bundle: Bundle) -> None:
    one, two = client_of(), client_of()
    identifier = tiny_bundle.base.items.ids[0]
    label = tiny_bundle.base.items.label(0)
    item = two.get(f"/v1/gallery/{identifier}").json()
    assert (item["label"], item["enrolled"]) == (label, False)
    response = one.delete(f"/v1/gallery/{identifier}")
    assert response.json() == {"object": "gallery.item.deleted", "id": identifier, "deleted": True}
    error_of(two.get(f"/v1/gallery/{identifier}"), 404)
    error_of(two.delete(f"/v1/gallery/{identifier}"), 404)
    assert counts(two)[label] == (59, 0)
    assert two.delete(f"/v1/classes/{label}").json()["items"] == 59
    assert label not in counts(one)


def test_no_more_items_are_asked_for_than_images_may_be_sent(client_of, error_of) -> None:
    error = error_of(client_of().get("/v1/gallery", params={"id": [str(number) for number in range(9)]}), 413)
    assert error["param"] == "id" and "8 ids" in error["message"]
    error_of(client_of().get("/v1/gallery"), 400)


# --- records ---------------------------------------------------------------------------------------------------------


def test_each_change_is_told_to_whoever_keeps_records(
    client_of, eights, files, caplog: pytest.LogCaptureFixture
) -> None:
    client = client_of()
    told: list[Change | None] = []
    inner = client.app

    async def recording(scope: Any, receive: Any, send: Any) -> None:
        await inner(scope, receive, send)
        told.append(scope.get("state", {}).get("audit"))

    outside = TestClient(recording)
    caplog.set_level(logging.INFO, "coterie.serving")
    headers = {"idempotency-key": "k"}
    for _ in range(2):
        outside.post(EIGHT, files=files([*eights, eights[0]]), headers=headers)
    outside.delete(f"/v1/gallery/{item_id(eights[0])}")
    outside.delete("/v1/classes/8")
    outside.delete("/v1/classes/8")
    assert told == [
        Change("enroll", "8", 5),
        Change("replay", "8", 5),
        Change("delete", item_id(eights[0]), 1),
        Change("forget", "8", 4),
        None,
    ]
    assert "forget '8' (4)" in caplog.text
