"""How long each step took: in the answer's headers, and for whoever keeps metrics."""

from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from coterie.bundle import Bundle
from serving.engine import Engine
from serving.observer import Observer
from serving.routes import build_app
from serving.served import Served

NPY = {"content-type": "application/x-npy"}
SIDE = 16


class Steps(Observer):
    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []

    def decoded(self, seconds: float) -> None:
        self.seen.append(("decoded", 1, seconds))

    def waited(self, images: int, seconds: float) -> None:
        self.seen.append(("waited", images, seconds))

    def encoded(self, images: int, seconds: float) -> None:
        self.seen.append(("encoded", images, seconds))

    def searched(self, images: int, seconds: float) -> None:
        self.seen.append(("searched", images, seconds))

    def count(self, step: str) -> int:
        return sum(images for name, images, _ in self.seen if name == step)


def test_answers_say_how_long_they_waited_and_ran(tiny_bundle: Bundle, as_npy) -> None:
    app, steps = build_app(), Steps()
    one = Engine(tiny_bundle, observer=steps)
    app.state.served = Served(one)
    body = as_npy(np.full((70, SIDE, SIDE, 3), 9, dtype=np.uint8))
    with TestClient(app) as client:
        for path in ("/v1/embeddings", "/v1/classify", "/v1/search", "/v1/verify?label=3"):
            steps.seen.clear()
            response = client.post(path, content=body, headers=NPY)
            waited = max(seconds for name, _, seconds in steps.seen if name == "waited")
            encoded = sum(seconds for name, _, seconds in steps.seen if name == "encoded")
            assert float(response.headers["x-queue-time"]) == pytest.approx(1000 * waited, abs=1e-3)
            assert float(response.headers["x-inference-time"]) == pytest.approx(1000 * encoded, abs=1e-3)
            assert encoded > 0
    one.close()


def test_each_step_is_told_of_every_image_once(tiny_bundle: Bundle, digit_images, files, as_npy) -> None:
    app, steps = build_app(), Steps()
    one = Engine(tiny_bundle, observer=steps)
    app.state.served = Served(one)
    with TestClient(app) as client:
        client.post("/v1/classify?on_error=partial", files=files([*digit_images.images[:40], b"garbage"]))
        assert [steps.count(step) for step in ("decoded", "waited", "encoded", "searched")] == [41, 40, 40, 40]
        client.post("/v1/embeddings", content=as_npy(tiny_bundle.pixels(digit_images.images[:3])), headers=NPY)
        assert [steps.count(step) for step in ("decoded", "waited", "encoded", "searched")] == [41, 43, 43, 40]
    assert all(seconds >= 0 for _, _, seconds in steps.seen)
    one.close()
