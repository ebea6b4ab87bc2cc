"""What a request may cost, held against a real server's socket."""

import asyncio
import io
import json
import select
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from hypothesis import assume, given
from hypothesis.strategies import binary, lists, sampled_from

from coterie.bundle import Bundle
from coterie.images import Limits
from serving import envelope
from serving.access import Access, Policy
from serving.engine import Engine
from serving.errors import RequestError
from serving.inputs import _from_form
from serving.keys import Keyring
from serving.limits import LARGE_BODY, RequestLimits
from serving.routes import build_app
from serving.served import Served

LIMITS = RequestLimits(max_body=100_000, max_images=4, image=Limits(max_pixels=1_000_000), body_seconds=0.3)

Say = Callable[..., tuple[int, dict[str, object], bool]]


@pytest.fixture
def engine(tiny_bundle: Bundle) -> Iterator[Engine]:
    one = Engine(tiny_bundle, limits=LIMITS, capacity=8)
    yield one
    one.close()


@pytest.fixture
def port(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Where the application listens, with the server that BentoML runs it in."""
    monkeypatch.setattr(envelope, "LINGER_SECONDS", 0.5)  # many of the clients here wait for the end
    app = build_app()
    app.state.served = Served(engine)
    around = Access(app, lambda: Policy(Keyring(tmp_path / "keys.json")))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(around, log_config=None, lifespan="off"))
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([listening])))
        thread.start()
        yield listening.getsockname()[1]
        server.should_exit = True
        thread.join()


@pytest.fixture
def say(port: int) -> Say:
    """Send pieces of bytes, and read one answer: its status, its error, and whether the connection is then closed."""

    def one(*pieces: bytes) -> tuple[int, dict[str, object], bool]:
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            for piece in pieces:
                connection.sendall(piece)
            answer = connection.makefile("rb")
            status = int(answer.readline().split()[1])
            headers = dict(line.decode().lower().strip().split(": ", 1) for line in iter(answer.readline, b"\r\n"))
            body = answer.read(int(headers["content-length"]))
            closed = headers.get("connection") == "close" and answer.read() == b""
            return status, json.loads(body).get("error", {}), closed

    return one


def head(target: str = "/v1/classify", method: str = "POST", **headers: str) -> bytes:
    lines = [f"{method} {target} HTTP/1.1", "Host: localhost"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode()


def posted(body: bytes, content_type: str) -> bytes:
    return head(content_type=content_type, content_length=str(len(body))) + body


def test_a_body_that_does_not_arrive_in_time_is_given_up(say: Say, engine: Engine) -> None:
    for start in (head(content_length="50000") + b"x" * 100, head(transfer_encoding="chunked") + b"3\r\nxxx\r\n"):
        began = time.monotonic()
        status, error, closed = say(start)
        assert (status, error["code"], closed) == (408, "slow_body", True)
        assert time.monotonic() - began >= LIMITS.body_seconds
    assert engine.under_way == 0


def test_a_body_that_drips_is_given_up_too(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(head(content_length="50000"))
        while not select.select([connection], [], [], 0.01)[0]:
            connection.send(b"x")
        received = connection.recv(4096)
    assert received.startswith(b"HTTP/1.1 408")


def test_a_body_that_says_it_is_too_large_is_not_waited_for(say: Say) -> None:
    status, error, closed = say(head(content_length=str(LIMITS.max_body + 1)))
    assert (status, error["code"], closed) == (413, "too_large", True)


@pytest.mark.parametrize("path", ["/v1/classify", "/v1/bundle", "/embed"])
def test_a_length_of_thousands_of_digits_is_too_large_however_small_it_is(say: Say, path: str) -> None:
    status, error, closed = say(head(path, content_length="0" * 5000 + "2", content_type="application/json") + b"{}")
    assert (status, error["code"], closed) == (413, "too_large", True)


def test_a_body_that_turns_out_too_large_is_cut_off(say: Say) -> None:
    chunk = b"%x\r\n%s\r\n" % (50_000, b"x" * 50_000)
    status, error, closed = say(head(transfer_encoding="chunked"), chunk, chunk, b"1\r\nx\r\n")
    assert (status, error["code"], closed) == (413, "too_large", True)


@pytest.mark.parametrize(("limit", "chunks", "status"), [("body", 3, b"413"), ("bodies", 2, b"429")])
def test_a_client_in_the_middle_of_a_body_that_is_too_large_gets_to_read_that(
    port: int, engine: Engine, limit: str, chunks: int, status: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    if limit == "bodies":
        monkeypatch.setattr(engine.limits.bodies, "most", 60_000)
    chunk = b"%x\r\n%s\r\n" % (50_000, b"x" * 50_000)
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(head(transfer_encoding="chunked") + chunks * chunk)
        answer = connection.makefile("rb")
        assert answer.readline().split()[1] == status
        for _ in range(100):
            connection.sendall(chunk)  # fails where the connection is cut off
        connection.sendall(b"0\r\n\r\n")
        assert answer.read().endswith(b"}}")
    assert engine.limits.bodies.held == 0


def test_only_so_many_images_come_in_one_request(say: Say) -> None:
    part = b'--x\r\nContent-Disposition: form-data; name="i"; filename="a"\r\n\r\nimage\r\n'
    for count, status in ((4, 422), (5, 413), (900, 413)):
        assert say(posted(part * count + b"--x--\r\n", "multipart/form-data; boundary=x"))[0] == status
        body = json.dumps({"input": ["aW1hZ2U="] * count}).encode()
        assert say(posted(body, "application/json"))[0] == status


def test_parts_without_a_file_or_with_headers_beyond_reason_are_refused(say: Say) -> None:
    disposition = b'Content-Disposition: form-data; name="i"; filename="a"\r\n'
    for headers in (
        b'Content-Disposition: form-data; name="option"\r\n',
        b"X: y\r\n",
        disposition + b"X: y\r\n" * 1000,
        disposition + b"X: " + b"y" * 50_000 + b"\r\n",
    ):
        body = b"--x\r\n" + headers + b"\r\nimage\r\n--x--\r\n"
        status, error, _ = say(posted(body, "multipart/form-data; boundary=x"))
        assert (status, error["code"]) == (400, "bad_request")
    body = io.BytesIO(b"--x\r\n" * 15_000).getvalue()
    assert say(posted(body, "multipart/form-data; boundary=x"))[0] == 400


class Searched(bytes):
    """Counts how often it is searched, which is what a form's parsing costs."""

    searches = 0

    def find(self, *arguments: Any) -> int:
        self.searches += 1
        return super().find(*arguments)


HEADERS = b'Content-Disposition: form-data; name="a"; filename="a"\r\n\r\n'


@pytest.mark.parametrize(
    "body",
    [
        b"--x\r\n" + HEADERS + b"\r\n--xQ" * 100_000 + b"\r\n--x--\r\n",
        b"--x" + b" " * 500_000 + b"\r\n" + HEADERS + b"\r\n--x--\r\n",
        b"\r\n--x" * 100_000,
        b"--x\r\n" + b"\r\n" * 100_000,
        (b"--x\r\n" + HEADERS + b"\r\n") * 10_000,
    ],
)
def test_what_only_looks_like_a_form_costs_few_searches(body: bytes) -> None:
    searched = Searched(body)
    with pytest.raises(RequestError):
        _from_form(searched, "multipart/form-data; boundary=x", LIMITS)
    assert searched.searches <= 10 * (LIMITS.max_images + 1)


@given(
    files=lists(
        binary(max_size=60) | sampled_from([b"\r\n", b"\r\n--", b"--x", b"\r\n-\r\n\r\n--\r\n", b"\n--x--\r\n"])
    ),
    boundary=sampled_from([b"x", b"--", b"-----WebKitFormBoundary7MA4YWxk", b"q" * 70]),
    blank=sampled_from([b"", b" ", b"\t "]),
    around=sampled_from([(b"", b""), (b"\r\n", b"\r\n"), (b"\r\n", b"epilogue")]),
)
def test_files_of_a_form_come_out_as_they_went_in(
    files: list[bytes], boundary: bytes, blank: bytes, around: tuple[bytes, bytes]
) -> None:
    assume(files and not any(b"\r\n--" + boundary in file + b"\r\n--" for file in files))
    parts = b"".join(b"--" + boundary + blank + b"\r\nX-Y: z\r\n" + HEADERS + file + b"\r\n" for file in files)
    body = around[0] + parts + b"--" + boundary + b"--" + around[1]
    content_type = f'multipart/form-data; boundary="{boundary.decode()}"'
    assert _from_form(body, content_type, RequestLimits()) == files


def test_one_bad_image_harms_none_of_the_requests_beside_it(
    tiny_bundle: Bundle, service_of: Callable[..., str], digit_images
) -> None:
    url, together = f"{service_of(tiny_bundle)}/v1/classify", threading.Barrier(8)
    bad = digit_images.images[3][:-40]

    def ask(image: bytes) -> tuple[int, Any]:
        with httpx.Client() as client:
            client.get(url)  # connected
            together.wait(20)
            answer = client.post(url, content=image)
        return answer.status_code, answer.json()

    images = [*digit_images.images[:3], bad, *digit_images.images[4:8]]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, images))
    assert [status for status, _ in answers] == [200] * 3 + [422] + [200] * 4
    for row, expected in enumerate(tiny_bundle.classify(digit_images.images[:8])):
        if row != 3:
            assert answers[row][1]["data"][0]["label"] == expected.label


def chunk(kind: bytes, content: bytes) -> bytes:
    """A piece of a PNG file."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def test_an_image_of_few_bytes_and_many_pixels_is_refused(
    tiny_bundle: Bundle, service_of: Callable[..., str], error_of
) -> None:
    side = 12_000
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)  # one bit a pixel
    rows = zlib.compress(bytes(side * (1 + side // 8)), 9)
    image = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    assert len(image) < 20_000
    error = error_of(httpx.post(f"{service_of(tiny_bundle)}/v1/classify", content=image), 422)
    assert error["code"] == "invalid_image" and "pixels" in error["message"]


@pytest.mark.parametrize("end", [0, 1, 3, 10, 60, 70, -1, -2, -5])
def test_a_form_that_is_cut_short_is_refused(say: Say, end: int) -> None:
    body = b"--x\r\n" + HEADERS + b"image\r\n--x--"
    status, error, _ = say(posted(body[:end], "multipart/form-data; boundary=x"))
    assert (status, error["code"]) == (400, "bad_request")


def test_a_large_body_that_takes_too_long_to_parse_is_given_up(
    tiny_bundle: Bundle, service_of: Callable[..., str], monkeypatch: pytest.MonkeyPatch, error_of
) -> None:
    over = threading.Event()
    monkeypatch.setattr("serving.inputs._from_json", lambda *_: over.wait(30))
    url = service_of(tiny_bundle, limits=RequestLimits(seconds=0.05))
    try:
        answer = httpx.post(
            f"{url}/v1/classify", content=b" " * LARGE_BODY, headers={"content-type": "application/json"}
        )
        assert error_of(answer, 504)["code"] == "timed_out"
        assert not over.is_set()
    finally:
        over.set()


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 90_000,
        b'{"a":' * 15_000,
        b'{"input": ' + b"[" * 20_000 + b"]" * 20_000 + b"}",
        b'{"input": 1' + b"0" * 80_000 + b"}",
        b'{"input": ["' + b"\\u0000" * 10_000 + b'"]}',
    ],
)
def test_json_that_is_deep_or_odd_is_refused(say: Say, body: bytes) -> None:
    status, error, _ = say(posted(body, "application/json"))
    assert status in (400, 422) and error["code"] in ("bad_request", "invalid_image")


def test_targets_and_heads_beyond_reason_are_refused(say: Say) -> None:
    assert say(head("/v1/classes?" + "a" * 8200, "GET"))[:1] == (414,)
    assert say(head("/" + "%61" * 3000, "GET"))[:1] == (404,)  # counted as it is read
    assert say(head("/v1/classes", "GET", x="a" * 66_000))[:1] == (431,)
    assert say(head("/v1/classes", "GET", **{f"x{i}": "a" * 60 for i in range(1100)}))[:1] == (431,)


def test_a_client_that_leaves_in_the_middle_of_a_body_leaves_nothing_behind(
    port: int, say: Say, engine: Engine, digit_images
) -> None:
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(head(content_length="50000") + b"x" * 100)
    status, _, _ = say(posted(digit_images.images[0], "image/png"))
    assert status == 200 and engine.under_way == 0


@pytest.mark.parametrize("path", ["/v1/classify", "/v1/classes/8/examples", "/v1/bundle"])
def test_bodies_that_are_too_much_together_are_refused_and_leave_room_behind(
    say: Say, engine: Engine, path: str, digit_images, monkeypatch: pytest.MonkeyPatch
) -> None:
    bodies, other = engine.limits.bodies, dict[str, Any]()
    monkeypatch.setattr(bodies, "most", LIMITS.max_body)
    bodies.take(other, 80_000)
    status, error, closed = say(head(path, content_length="90000") + b"x" * 30_000)
    assert (status, error["code"], closed) == (429, "overloaded", True)
    bodies.let_go(other)
    for _ in range(3):
        assert say(posted(b"x" * 90_000, "image/png"))[0] == 422
        assert say(posted(digit_images.images[0], "image/png"))[0] == 200
        assert say(head(content_length="90000") + b"x" * 80_000)[0] == 408
    assert bodies.held == 0


@pytest.mark.parametrize("last", ["http.request", "http.disconnect"])
def test_a_body_counts_from_its_first_byte_to_the_answer(engine: Engine, call, last: str) -> None:
    held = []

    async def receive() -> dict[str, Any]:
        held.append(engine.limits.bodies.held)
        return {"type": last if held[1:] else "http.request", "body": b"x" * 1000, "more_body": not held[1:]}

    asyncio.run(call(engine, "/v1/classify", receive))
    assert held == [0, 1000] and engine.limits.bodies.held == 0


def test_a_refused_request_does_not_lend_its_body_to_the_next(port: int) -> None:
    inner = head("/v1/classes/3", "DELETE")
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(head("/v1/classes/3", "DELETE", host="evil", content_length=str(len(inner))) + inner)
        connection.sendall(head("/nope", "GET"))
        connection.shutdown(socket.SHUT_WR)
        answers = connection.makefile("rb").read()
    assert answers.startswith(b"HTTP/1.1 4") and b"200 OK" not in answers
