"""Twice as much as the service can do, for minutes: it refuses what is too much, answers the rest soon and stays ready.

    uv run pytest -m acceptance tests/serving/test_overload.py -s

OVERLOAD_SECONDS says how long each encoder is loaded, 600 by default.
"""

import io
import multiprocessing
import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from benchmarks.embed import make_bundle
from benchmarks.load import Load, drive, request
from coterie.bundle import Bundle

SECONDS = float(os.environ.get("OVERLOAD_SECONDS", "600"))
CLIENTS = 32
# Enough for what is under way and what is being refused at once, and fewer than the 2,048 that the system lets wait for
# a busy process to take them; of more it resets some.
CONNECTIONS = 1500
ACCEPTED, REFUSED = frozenset({200, 201}), 429


def mixed(images: list[bytes]) -> list[bytes]:
    """Whole requests, in mixed order: embeddings and classes of one image and of eight, enrolments, lists."""
    generator = np.random.default_rng(0)
    requests = []
    for number, kind in enumerate(generator.choice(5, 2000, p=(0.5, 0.3, 0.05, 0.1, 0.05))):
        image = images[number % len(images)]
        if kind == 0:
            requests.append(request("/v1/embeddings?encoding_format=base64", image, "image/jpeg"))
        elif kind == 1:
            requests.append(request("/v1/classify", image, "image/jpeg"))
        elif kind == 2:
            several = [images[(number + row) % len(images)] for row in range(8)]
            requests.append(request("/v1/classify", form(several), "multipart/form-data; boundary=x"))
        elif kind == 3:
            requests.append(request(f"/v1/classes/new-{number % 20}/examples", image, "image/jpeg"))
        else:
            path = ("/v1/classes", "/v1/models", "/v1/bundle")[number % 3]
            requests.append(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
    return requests


def form(images: list[bytes]) -> bytes:
    head = b'--x\r\nContent-Disposition: form-data; name="images"; filename="i.jpg"\r\n\r\n'
    return b"".join(head + image + b"\r\n" for image in images) + b"--x--\r\n"


def photographs(side: int) -> list[bytes]:
    generator, images = np.random.default_rng(1), []
    for _ in range(2000):
        coarse = Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        coarse.resize((side, side)).save(buffer, "JPEG")
        images.append(buffer.getvalue())
    return images


class Readiness:
    """Asks every second whether the service is ready, until the block ends."""

    def __init__(self, url: str) -> None:
        self.answers: Counter[Any] = Counter()
        self.slow: dict[int, float] = {}  # by the second it was asked in
        self._began = time.monotonic()
        self._url, self._over = url, threading.Event()
        self._thread = threading.Thread(target=self._ask)

    def __enter__(self) -> "Readiness":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _ask(self) -> None:
        while not self._over.wait(1):
            began = time.monotonic()
            try:
                self.answers[httpx.get(f"{self._url}/readyz", timeout=5, trust_env=False).status_code] += 1
            except httpx.TransportError as error:
                self.answers[type(error).__name__] += 1
            if (took := time.monotonic() - began) > 1:
                self.slow[round(began - self._began)] = round(took, 1)


@pytest.fixture(params=["light", "heavy"])
def bundle(request: pytest.FixtureRequest, tiny_bundle: Bundle, digit_tree: Path, tmp_path: Path) -> Bundle:
    """A matrix that costs nothing, and a network of which two processors encode some thirty images a second."""
    if request.param == "light":
        return tiny_bundle
    return make_bundle("resnet50", 224, digit_tree, tmp_path / "heavy")


@pytest.mark.acceptance
@pytest.mark.timeout(3600)
def test_twice_the_capacity_is_refused_in_part_and_the_rest_answered_soon(
    bundle: Bundle, run_service: Callable[..., AbstractContextManager[Any]]
) -> None:
    side = 32 if bundle.manifest.encoder.input_size[0] < 32 else 320
    requests = mixed(photographs(side))
    with (
        run_service(bundle) as service,
        ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as client,
    ):
        (worker,) = service.workers()
        capacity = client.submit(drive, Load(service.port, requests, 10, clients=CLIENTS, warm_up=5)).result()
        done = sum(capacity.statuses[status] for status in ACCEPTED) / capacity.seconds
        load = Load(service.port, requests, SECONDS, rate=2 * done, warm_up=10, connections=CONNECTIONS)
        with Readiness(service.url) as readiness:
            measured = client.submit(drive, load).result()
        accepted = [
            seconds for seconds, code in zip(measured.latencies, measured.codes, strict=True) if code in ACCEPTED
        ]
        refused = [seconds for seconds, code in zip(measured.latencies, measured.codes, strict=True) if code == REFUSED]
        print(
            f"\n{bundle.manifest.name}: {done:.0f} requests/s in closed loop, then {2 * done:.0f}/s for {SECONDS:g} s; "
            f"{dict(measured.statuses)}; accepted {len(accepted) / SECONDS:.0f}/s, "
            f"p50 {np.percentile(accepted, 50):.2f} s, p99 {np.percentile(accepted, 99):.2f} s; "
            f"refused p99 {np.percentile(refused, 99):.2f} s; "
            f"readiness {dict(readiness.answers)}, over a second {readiness.slow}"
        )
        assert set(measured.statuses) <= ACCEPTED | {REFUSED}
        assert set(readiness.answers) == {200}
        assert service.workers() == [worker]
