"""What an image that cannot be used does to its request."""

import base64
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from serving import schemas
from serving.engine import Engine

PATHS = ("/v1/embeddings", "/v1/classify", "/v1/search", "/v1/verify?label=3")


def with_query(path: str, query: str) -> str:
    return f"{path}{'&' if '?' in path else '?'}{query}"


@pytest.mark.parametrize("path", PATHS)
def test_by_default_the_first_bad_image_fails_the_request(
    client: TestClient, digit_images, path: str, files, error_of
) -> None:
    good = digit_images.images[0]
    for url in (path, with_query(path, "on_error=fail")):
        error = error_of(client.post(url, files=files([good, b"garbage", good, b"junk"])), 422)
        assert (error["param"], error["code"]) == ("input[1]", "invalid_image")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("place", ["query", "body"])
def test_partial_answers_have_an_error_where_an_image_failed(
    client: TestClient, digit_images, path: str, place: str, data_uri
) -> None:
    strings = [data_uri(digit_images.images[0]), "AAAA", "***", data_uri(digit_images.images[1]), "http://a.b/c.png"]
    body: dict[str, Any] = {"input": strings}
    url = path
    if place == "query":
        url = with_query(path, "on_error=partial")
    else:
        body["on_error"] = "partial"
    response = client.post(url, json=body)
    assert response.status_code == 200, response.text
    data = response.json()["data"]
    assert [entry["index"] for entry in data] == [0, 1, 2, 3, 4]
    assert [entry["object"] == "error" for entry in data] == [False, True, True, False, True]
    for index in (1, 2, 4):
        assert schemas.ErrorItem.model_validate(data[index]).model_dump() == data[index]
        error = data[index]["error"]
        assert (error["param"], error["code"]) == (f"input[{index}]", "invalid_image")
        assert error["message"].startswith(f"image {index}: ")
    alone = client.post(path, json={"input": [strings[0], strings[3]]}).json()["data"]
    assert [data[0], data[3] | {"index": 1}] == alone


def test_what_the_body_says_counts_more_than_the_query(client: TestClient, error_of) -> None:
    body = {"input": ["AAAA"], "on_error": "fail"}
    error_of(client.post("/v1/classify?on_error=partial", json=body), 422)


@pytest.mark.parametrize("path", PATHS)
def test_a_request_of_bad_images_alone_is_answered_too(client: TestClient, path: str, files) -> None:
    response = client.post(with_query(path, "on_error=partial"), files=files([b"garbage", b"junk"]))
    assert response.status_code == 200
    assert [entry["object"] for entry in response.json()["data"]] == ["error", "error"]


def test_an_array_has_no_place_for_errors(client: TestClient, digit_images, error_of) -> None:
    response = client.post(
        "/v1/embeddings?on_error=partial", content=digit_images.images[0], headers={"accept": "application/x-npy"}
    )
    assert error_of(response, 400)["param"] == "on_error"


def test_an_image_on_which_the_encoder_fails_stands_as_an_error_too(
    engine: Engine, client: TestClient, monkeypatch: pytest.MonkeyPatch, as_npy
) -> None:
    real = engine._encoder.embed

    def embed(pixels: np.ndarray) -> np.ndarray:
        if not pixels.any(axis=(1, 2, 3)).all():  # a black image is poison
            raise RuntimeError("secret")
        return real(pixels)

    monkeypatch.setattr(engine._encoder, "embed", embed)
    pixels = np.full((5, 16, 16, 3), 200, dtype=np.uint8)
    pixels[3] = 0
    headers = {"content-type": "application/x-npy"}
    for path in PATHS:
        url = with_query(path, "on_error=partial")
        data = client.post(url, content=as_npy(pixels), headers=headers).json()["data"]
        assert [entry["object"] == "error" for entry in data] == [False, False, False, True, False]
        assert (data[3]["error"]["code"], data[3]["error"]["param"]) == ("encoder_failed", "input[3]")


def test_what_fails_the_whole_question_fails_the_request_all_the_same(client: TestClient, files, error_of) -> None:
    image = base64.b64decode("R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7")
    error_of(client.post("/v1/verify?label=none&on_error=partial", files=files([image, b"garbage"])), 404)


def test_another_wish_is_refused(client: TestClient, digit_images, error_of) -> None:
    error = error_of(client.post("/v1/classify?on_error=ignore", content=digit_images.images[0]), 400)
    assert error["param"] == "on_error"
