"""Requests by the thousand that nobody meant: each gets an answer that the documentation knows, and nothing is kept.

    uv run pytest -m acceptance tests/serving/test_fuzz.py -s

A request is a sensible one, of which method, path, query, headers or body were changed at random; its number makes it
again.
"""

import base64
import io
import json
import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

import numpy as np
import psutil
import pytest
from numpy.random import Generator
from PIL import Image

from coterie.bundle import Bundle
from serving.access import Access, Policy
from serving.keys import Keyring

REQUESTS = int(os.environ.get("FUZZ_REQUESTS", "10000"))
WARM_UP, SETTLED_SECONDS, GROWTH = 2000, 5.0, 1.1
# Statuses of ours that say whose fault it is.
SERVER_ERRORS = {503: {"encoder_failed", "gallery_busy", "gallery_unavailable"}, 504: {"timed_out"}}
NATIVE = ("/embed", "/classify")
NO_HTTP = b"Invalid HTTP request received."
NUMBERS = ("0", "-1", "1", "1e400", "NaN", "99999999999999999999", "0.05", "true", "null", "", "\u0663", "1" * 5000)
TEXTS = ("", "3", "é", "\u202e", "../..", "a" * 300, "%00", "\ud83d\ude00", "' OR 1=1 --", "{{7*7}}")
METHODS = ("GET", "POST", "DELETE", "PUT", "PATCH", "HEAD", "OPTIONS", "TRACE", "BREW")
PATHS = (
    "/v1/embeddings", "/v1/classify", "/v1/search", "/v1/verify", "/v1/classes", "/v1/gallery", "/v1/models",
    "/v1/bundle", "/", "/docs", "/openapi.json", "/metrics", "/v1", "/v1/", "//", "/v1/gallery/%ff",
    "/v1/gallery/0/thumbnail", "/v1/classes/%2e%2e/examples", "/v1/classes/%F0%9F%98%80",
    "/readyz", "/static/../../etc/passwd", *NATIVE,
)  # fmt: skip
OPTIONS = (
    "encoding_format", "k", "top", "neighbors", "false_reject", "label", "metadata.row", "on_error", "dimensions",
    "model", "limit", "after", "metadata", "nonsense",
)  # fmt: skip


@dataclass(frozen=True)
class Asked:
    """A request before it is written out; `zeros` stand before its Content-Length."""

    method: str
    path: str
    query: tuple[tuple[str, str], ...]
    headers: tuple[tuple[str, str], ...]
    body: bytes
    zeros: int = 0

    def on_the_wire(self) -> bytes:
        target = self.path + ("?" + urlencode(self.query, errors="surrogatepass") if self.query else "")
        lines = [f"{self.method} {target} HTTP/1.1", "Host: 127.0.0.1"]
        lines.append(f"Content-Length: {'0' * self.zeros}{len(self.body)}")
        lines += [f"{name}: {value}" for name, value in self.headers]
        return "\r\n".join(lines).encode("utf-8", "replace") + b"\r\n\r\n" + self.body


def sensible(images: Sequence[bytes], side: int) -> list[Asked]:
    """One of each kind."""
    uri = "data:image/png;base64," + base64.b64encode(images[0]).decode()
    strings = json.dumps({"input": [uri, base64.b64encode(images[1]).decode()], "encoding_format": "float"}).encode()
    form = b"".join(
        b'--x\r\nContent-Disposition: form-data; name="f"; filename="i"\r\n\r\n' + image + b"\r\n"
        for image in images[:3]
    )
    buffer = io.BytesIO()
    np.save(buffer, np.zeros((2, side, side, 3), dtype=np.uint8))
    kinds = [(image, "image/png") for image in images]
    kinds += [(strings, "application/json"), (form + b"--x--\r\n", "multipart/form-data; boundary=x")]
    kinds += [(buffer.getvalue(), "application/x-npy")]
    routes: list[tuple[str, tuple[tuple[str, str], ...]]] = [
        ("/v1/embeddings", (("encoding_format", "base64"),)),
        ("/v1/classify", (("top", "3"), ("false_reject", "0.1"))),
        ("/v1/search", (("k", "3"), ("label", "3"), ("metadata.row", "7"))),
        ("/v1/verify", (("label", "3"),)),
        ("/v1/classes/fuzz/examples", (("metadata", '{"a": 1}'),)),
    ]
    made = [
        Asked("POST", path, query, (("Content-Type", kind),), body) for path, query in routes for body, kind in kinds
    ]
    native = json.dumps({"images": [uri]}).encode()
    made += [Asked("POST", path, (), (("Content-Type", "application/json"),), native) for path in NATIVE]
    made += [Asked("GET", path, (), (), b"") for path in ("/v1/classes", "/v1/gallery", "/v1/models", "/v1/bundle")]
    made += [Asked("DELETE", path, (), (), b"") for path in ("/v1/classes/fuzz", "/v1/gallery/00")]
    swap = b'{"bundle": "coterie-bundle:none"}'
    return [*made, Asked("POST", "/v1/bundle", (), (("Content-Type", "application/json"),), swap)]


def changed(asked: Asked, generator: Generator, others: Sequence[Asked]) -> Asked:
    """With one to three of its parts made something else."""
    for part in generator.choice(5, size=generator.integers(1, 4), p=(0.08, 0.12, 0.2, 0.15, 0.45)):
        if part == 0:
            asked = replace(asked, method=str(generator.choice(METHODS)))
        elif part == 1:
            asked = replace(asked, path=str(generator.choice(PATHS)))
        elif part == 2:
            value = str(generator.choice(NUMBERS if generator.random() < 0.5 else TEXTS))
            asked = replace(asked, query=(*asked.query, (str(generator.choice(OPTIONS)), value)))
        elif part == 3 and generator.random() < 0.05:
            asked = replace(asked, zeros=int(generator.integers(1, 6000)))
        elif part == 3:
            asked = replace(asked, headers=_other_headers(asked, generator, others))
        else:
            asked = replace(asked, body=_other_body(asked.body, generator, others))
    return asked


def _other_headers(asked: Asked, generator: Generator, others: Sequence[Asked]) -> tuple[tuple[str, str], ...]:
    kinds = [
        "image/jpg",
        "text/plain",
        "multipart/form-data",
        "multipart/form-data; boundary=",
        "application/json; x",
        "",
    ]
    one: tuple[str, str] = [
        ("Content-Type", kinds[generator.integers(len(kinds))]),
        ("Accept", "application/x-npy"),
        ("Accept", ";;q=,*"),
        ("Content-Encoding", "gzip"),
        ("Idempotency-Key", "k" * int(generator.integers(0, 300))),
        ("X-Request-Id", "\u00ff" * 40),
        ("Authorization", "Bearer " + "a" * int(generator.integers(0, 100))),
        ("X-Forwarded-For", "8.8.8.8"),
        ("Origin", "https://elsewhere.example"),
        ("Origin", "http://[x"),
        ("X-Large", "a" * int(generator.integers(0, 70_000))),
        ("Range", "bytes=0-1"),
        ("Expect", "100-continue"),
    ][generator.integers(13)]
    swapped = others[generator.integers(len(others))].headers
    return (*(swapped if generator.random() < 0.5 else asked.headers), one)


def _other_body(body: bytes, generator: Generator, others: Sequence[Asked]) -> bytes:
    """Cut, flipped, spliced, doubled, or with another number or a deep structure in it."""
    kind, other = generator.integers(7), others[generator.integers(len(others))].body
    place = int(generator.integers(len(body) + 1))
    if kind == 0:
        return body[:place]
    if kind == 1 and body:
        flipped = np.frombuffer(body, dtype=np.uint8).copy()
        places = generator.integers(len(body), size=generator.integers(1, 30))
        flipped[places] ^= np.left_shift(1, generator.integers(8, size=len(places))).astype(np.uint8)
        return flipped.tobytes()
    if kind == 2:
        return body[:place] + other[place:]
    if kind == 3:
        return body * int(generator.integers(2, 40))
    if kind == 4:
        return body[:place] + str(generator.choice(NUMBERS)).encode() + body[place:]
    if kind == 5:
        depth = int(generator.integers(1, 3000))
        return b'{"input": ' + b"[" * depth + b"1" + b"]" * int(generator.integers(depth + 1)) + b"}"
    value = json.dumps([generator.choice(TEXTS), 1e308, None, {"a": []}, True][generator.integers(5)])
    return f'{{"input": {value}, "{generator.choice(OPTIONS)}": {value}}}'.encode("utf-8", "replace")


def ask(port: int, asked: Asked) -> tuple[int, str, bytes]:
    """Status, content type and body of the answer."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        with suppress(OSError):  # refused before it was all read; the answer is there
            connection.sendall(asked.on_the_wire())
        answer = HTTPResponse(connection, method=asked.method)
        answer.begin()
        return answer.status, answer.headers.get("content-type", ""), answer.read()


def complaint(asked: Asked, status: int, kind: str, content: bytes) -> str | None:
    """What is wrong with an answer."""
    if status < 400 or asked.method == "HEAD":
        return None if status < 500 else "a server error"
    if status == 400 and content == NO_HTTP:
        return None
    code = ""
    try:
        found = json.loads(content)
        code = found["error"]["code"]
        assert found["error"].keys() == {"message", "type", "param", "code"} and kind == "application/json"
    except (ValueError, LookupError, TypeError, AssertionError):
        return "no error as they are documented"
    if status >= 500 and code not in SERVER_ERRORS.get(status, ()):
        return "a server error"
    return None


def fuzz(port: int, requests: Sequence[Asked], numbers: range) -> tuple[Counter[int], list[str]]:
    """Ask the requests of these numbers; statuses, and what was wrong."""
    statuses, wrong = Counter[int](), []
    for number in numbers:
        generator = np.random.default_rng(number)
        asked = changed(requests[generator.integers(len(requests))], generator, requests)
        try:
            status, kind, content = ask(port, asked)
        except (OSError, HTTPException) as error:
            wrong.append(f"{number}: {type(error).__name__} for {asked.on_the_wire()[:200]!r}")
            continue
        statuses[status] += 1
        if (said := complaint(asked, status, kind, content)) is not None:
            wrong.append(f"{number}: {status}, {said}: {content[:200]!r} for {asked.on_the_wire()[:200]!r}")
    return statuses, wrong


def pictures(digits: Sequence[bytes]) -> list[bytes]:
    """Images of several formats."""
    images = list(digits[:2])
    for kind in ("JPEG", "WEBP", "GIF", "TIFF"):
        buffer = io.BytesIO()
        Image.open(io.BytesIO(digits[2])).convert("RGB").resize((64, 48)).save(buffer, kind)
        images.append(buffer.getvalue())
    return images


def test_whatever_is_asked_is_answered_as_documented(
    tiny_bundle: Bundle, digit_images, service_of: Callable[..., str], tmp_path: Path
) -> None:
    def guarded(app: Any) -> Access:
        return Access(app, lambda: Policy(Keyring(tmp_path / "keys.json"), on_loopback=lambda: True))

    port = urlsplit(service_of(tiny_bundle, wrap=guarded)).port
    # There is no swapper.
    requests = [
        one for one in sensible(pictures(digit_images.images), 16) if (one.method, one.path) != ("POST", "/v1/bundle")
    ]
    assert port is not None
    statuses, wrong = fuzz(port, requests, range(400))
    assert not wrong, "\n".join(wrong)
    assert statuses[200] > 20 and statuses[400] > 20 and statuses[422] > 20


@pytest.mark.acceptance
@pytest.mark.timeout(3600)
def test_the_real_service_survives_ten_thousand_requests_and_keeps_nothing(
    tiny_bundle: Bundle, digit_images, run_service: Callable[..., AbstractContextManager[Any]]
) -> None:
    requests = sensible(pictures(digit_images.images), 16)
    with run_service(tiny_bundle) as service:
        (worker,) = service.workers()
        first, wrong = fuzz(service.port, requests, range(WARM_UP))
        before = settled(worker)
        statuses, more = fuzz(service.port, requests, range(WARM_UP, WARM_UP + REQUESTS))
        after = settled(worker)
        print(
            f"\n{REQUESTS} requests: {dict(sorted((first + statuses).items()))}; "
            f"{before / 2**20:.0f} MiB before, {after / 2**20:.0f} after"
        )
        assert not wrong + more, "\n".join(wrong + more)
        assert service.workers() == [worker] and service.ready()
        assert after <= GROWTH * before


def settled(worker: psutil.Process) -> int:
    """Bytes that the worker holds once it rests."""
    time.sleep(SETTLED_SECONDS)
    return worker.memory_info().rss
