"""Workers killed while examples come in: what was acknowledged is there, and the service goes on.

uv run pytest -m acceptance tests/serving/test_kills.py -s
"""

import io
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any
from uuid import uuid4

import httpx
import numpy as np
import pytest
from PIL import Image

from coterie.bundle import Bundle

EXAMPLES, KILLS, BACK_SECONDS = 1000, 5, 10.0
ENROLLERS, ASKERS, TRIES = 4, 4, 100


def picture(number: int) -> bytes:
    """An image that no other number has, nor resembles."""
    pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def until_answered(client: httpx.Client, method: str, path: str, **options: Any) -> httpx.Response:
    """Ask again, as clients do, where a connection breaks or the service says that it is busy."""
    for _ in range(TRIES):
        try:
            answer = client.request(method, path, **options)
        except httpx.TransportError:
            time.sleep(0.1)
            continue
        if answer.status_code not in (429, 503):
            return answer
        time.sleep(0.1)
    raise AssertionError(f"{method} {path} was not answered in {TRIES} tries")


@pytest.mark.acceptance
@pytest.mark.timeout(900)
def test_what_was_acknowledged_survives_the_killing_of_workers(
    tiny_bundle: Bundle, run_service: Callable[..., AbstractContextManager[Any]]
) -> None:
    images = [picture(number) for number in range(EXAMPLES)]
    acknowledged: dict[int, str] = {}
    asked: Counter[Any] = Counter()
    over = threading.Event()
    with run_service(tiny_bundle, workers=2) as service:

        def connect() -> httpx.Client:
            return httpx.Client(base_url=service.url, timeout=30, trust_env=False)

        def enroll(number: int) -> None:
            key = {"Idempotency-Key": str(uuid4())}
            with connect() as client:
                path = f"/v1/classes/kind-{number % 10}/examples"
                answer = until_answered(client, "POST", path, content=images[number], headers=key)
            assert answer.status_code == 201, answer.text
            acknowledged[number] = answer.json()["data"][0]["id"]

        def classify() -> None:
            with connect() as client:
                while not over.is_set():
                    try:
                        asked[client.post("/v1/classify", content=images[0]).status_code] += 1
                    except httpx.TransportError as error:
                        asked[type(error).__name__] += 1

        askers = [threading.Thread(target=classify) for _ in range(ASKERS)]
        for asker in askers:
            asker.start()
        back = []
        with ThreadPoolExecutor(ENROLLERS) as pool:
            enrolments = [pool.submit(enroll, number) for number in range(EXAMPLES)]
            for kill in range(1, KILLS + 1):
                while len(acknowledged) < kill * EXAMPLES / (KILLS + 1):
                    assert not any(done.exception() for done in enrolments if done.done())
                    time.sleep(0.01)
                before, started = service.workers(), service.log.read_text().count("serving tiny-digits (")
                before[kill % 2].kill()
                began = time.monotonic()
                while service.log.read_text().count("serving tiny-digits (") <= started:
                    assert time.monotonic() - began < 60
                    time.sleep(0.02)
                back.append(time.monotonic() - began)
            for enrolment in enrolments:
                enrolment.result()
        over.set()
        for asker in askers:
            asker.join()
        with connect() as client:
            for number, identifier in acknowledged.items():
                item = until_answered(client, "GET", f"/v1/gallery/{identifier}")
                assert (item.status_code, item.json()["label"]) == (200, f"kind-{number % 10}")
                found = until_answered(client, "POST", "/v1/classify?neighbors=1", content=images[number])
                (nearest,) = found.json()["data"][0]["neighbors"]
                assert nearest["id"] == identifier and nearest["similarity"] == pytest.approx(1, abs=1e-5)
    print(
        f"\n{len(acknowledged)} examples acknowledged and found again; workers were back after "
        f"{', '.join(f'{seconds:.1f}' for seconds in back)} s; meanwhile classify answered {dict(asked)}"
    )
    assert len(acknowledged) == EXAMPLES
    assert max(back) <= BACK_SECONDS
    assert set(asked) <= {200, 429, "RemoteProtocolError", "ReadError", "ConnectError", "WriteError"}
