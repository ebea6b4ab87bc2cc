"""Fetching images: from the hosts allowed, at public addresses, within limits; a server here is the internet."""

import asyncio
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from coterie.bundle import Bundle
from serving.engine import Engine
from serving.fetch import Fetcher, FetchError, is_public
from serving.limits import RequestLimits
from serving.routes import build_app
from serving.served import Served

TLS = Path(__file__).parent / "tls"
HOST, PUBLIC = "images.example.org", "93.184.215.14"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s"

Answer = Callable[[bytes, asyncio.StreamWriter], Awaitable[None]]


class Internet:
    """A TLS server with the certificate of HOST, which every address leads to; notes what it was asked for."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self.requests: list[bytes] = []
        self.connected: list[tuple[str, int]] = []
        self.addresses = [PUBLIC]

    async def __aenter__(self) -> "Internet":
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(TLS / "server.pem")
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=context)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            request = await reader.readuntil(b"\r\n\r\n")
            self.requests.append(request)
            await self._answer(request, writer)
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def resolve(self, host: str, port: int) -> list[str]:
        assert (host, port) == (HOST, 443)
        return self.addresses

    async def connect(self, address: str, port: int, context: ssl.SSLContext, host: str) -> Any:
        self.connected.append((address, port))
        here = self._server.sockets[0].getsockname()[1]
        return await asyncio.open_connection("127.0.0.1", here, ssl=context, server_hostname=host)

    def fetcher(self, **changes: Any) -> Fetcher:
        context = ssl.create_default_context(cafile=TLS / "authority.pem")
        usual = Fetcher(frozenset({HOST}), context=context, resolve=self.resolve, connect=self.connect)
        return replace(usual, **changes)


def sends(answer: bytes) -> Answer:
    async def write(_: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(answer)
        await writer.drain()

    return write


def fetched(answer: bytes | Answer, url: str = f"https://{HOST}/a.png", **changes: Any) -> bytes:
    async def run() -> bytes:
        async with Internet(sends(answer) if isinstance(answer, bytes) else answer) as internet:
            return await internet.fetcher(**changes).fetch(url)

    return asyncio.run(run())


def test_an_image_of_an_allowed_host_is_fetched_from_the_address_that_was_looked_up() -> None:
    async def run() -> None:
        async with Internet(sends(OK % (5, b"image"))) as internet:
            assert await internet.fetcher().fetch(f"https://{HOST.upper()}/a/b.png?size=2") == b"image"
            assert internet.connected == [(PUBLIC, 443)]
            (request,) = internet.requests
            assert request.startswith(b"GET /a/b.png?size=2 HTTP/1.1\r\n")
            assert f"host: {HOST}\r\n".encode() in request.lower()

    asyncio.run(run())


def test_chunks_and_bodies_that_end_with_the_connection_are_understood() -> None:
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nima\r\n2\r\nge\r\n0\r\n\r\n"
    assert fetched(chunked) == fetched(b"HTTP/1.1 200 OK\r\n\r\nimage") == b"image"


@pytest.mark.parametrize(
    "url",
    [
        f"http://{HOST}/a.png",
        f"https://user@{HOST}/a.png",
        f"https://{HOST}@evil.example/a.png",
        f"https://{HOST}:8443/a.png",
        f"https://{HOST}.evil.example/a.png",
        f"https://sub.{HOST}/a.png",
        f"https://{HOST}./a.png",
        f"https://evil.example\\@{HOST}/a.png",
        f"https://{HOST}/a.png\r\nX-Evil: 1",
        f"https://{HOST}/a b",
        "https://127.0.0.1/",
        "https://[::ffff:7f00:1]/",
        "https://[::1",
        "https:///a.png",
        "https://",
        "file:///etc/passwd",
        "https://imäges.example.org/",
    ],
)
def test_other_hosts_schemes_and_odd_addresses_are_not_even_looked_up(url: str) -> None:
    async def run() -> None:
        async with Internet(sends(OK % (5, b"image"))) as internet:
            with pytest.raises(FetchError, match=r"only plain https|not fetched from this host"):
                await internet.fetcher().fetch(url)
            assert not internet.connected

    asyncio.run(run())


INSIDE = [
    "127.0.0.1",
    "10.1.2.3",
    "172.16.0.1",
    "192.168.1.1",
    "169.254.169.254",
    "100.64.0.1",
    "0.0.0.0",
    "224.0.0.1",
    "255.255.255.255",
    "192.0.2.1",
    "198.18.0.1",
    "240.0.0.1",
    "::1",
    "::",
    "::ffff:7f00:1",
    "::ffff:93.184.215.14",
    "::7f00:1",
    "64:ff9b::7f00:1",
    "64:ff9b:1::7f00:1",
    "2002:7f00:1::",
    "2001:0:7f00:1::1",
    "fe80::1",
    "fe80::1%eth0",
    "fd00::1",
    "fec0::1",
    "ff02::1",
    "2001:db8::1",
]


@pytest.mark.parametrize("address", INSIDE)
def test_an_allowed_host_that_leads_inside_is_not_connected_to(address: str) -> None:
    async def run() -> None:
        async with Internet(sends(OK % (5, b"image"))) as internet:
            for addresses in ([address], [PUBLIC, address]):
                internet.addresses = addresses
                with pytest.raises(FetchError, match="not to be reached") as refused:
                    await internet.fetcher().fetch(f"https://{HOST}/")
                assert address not in str(refused.value)
            assert not internet.connected

    asyncio.run(run())


@pytest.mark.parametrize("address", [PUBLIC, "8.8.8.8", "2606:4700:4700::1111", "2a00:1450:4001:81b::200e"])
def test_addresses_of_the_open_internet_are_public(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize("status", [b"301 Moved", b"302 Found", b"307 Elsewhere", b"404 Gone", b"500 Oh", b"206 Part"])
def test_redirects_are_not_followed_and_errors_not_shown(status: bytes) -> None:
    async def run() -> None:
        answer = b"HTTP/1.1 %s\r\nLocation: https://169.254.169.254/\r\nContent-Length: 6\r\n\r\nsecret" % status
        async with Internet(sends(answer)) as internet:
            with pytest.raises(FetchError, match="does not have it") as refused:
                await internet.fetcher().fetch(f"https://{HOST}/")
            assert len(internet.connected) == 1 and "secret" not in str(refused.value)

    asyncio.run(run())


def test_a_body_over_the_limit_is_left_unread() -> None:
    assert fetched(OK % (10, b"x" * 10), max_image=10, max_total=10) == b"x" * 10
    for changes in ({"max_image": 9}, {"max_total": 9}):
        with pytest.raises(FetchError, match="limit of bytes"):
            fetched(OK % (10, b"x" * 10), **changes)

    async def endless(_: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        while not writer.is_closing():
            writer.write(b"x" * 65_536)
            await asyncio.sleep(0)  # draining a TLS connection here lets nobody else run

    with pytest.raises(FetchError, match="limit of bytes"):
        fetched(endless, max_image=1_000_000)


def test_the_images_of_one_request_share_their_bytes() -> None:
    async def run() -> None:
        async with Internet(sends(OK % (10, b"x" * 10))) as internet:
            found = await internet.fetcher(max_total=25).fetch_all([f"https://{HOST}/{i}" for i in range(4)])
            assert [image for image in found if isinstance(image, bytes)] == [b"x" * 10] * 2

    asyncio.run(run())


def test_a_slow_drip_and_a_silent_server_end_with_the_time() -> None:
    async def drip(_: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        while not writer.is_closing():
            writer.write(b"x")
            await asyncio.sleep(0.01)

    async def silent(_: bytes, writer: asyncio.StreamWriter) -> None:
        await asyncio.Event().wait()

    for answer in (drip, silent):
        with pytest.raises(FetchError, match="in time"):
            fetched(answer, seconds=0.2)


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"nonsense\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nimage",
        b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"a" * 100_000,
    ],
)
def test_what_is_no_whole_answer_is_no_image(answer: bytes) -> None:
    with pytest.raises(FetchError, match=r"could not be fetched$"):
        fetched(answer)


def test_a_certificate_that_is_not_the_hosts_ends_it() -> None:
    with pytest.raises(FetchError, match=r"could not be fetched$"):  # of another authority
        fetched(OK % (5, b"image"), context=ssl.create_default_context())

    async def resolve(host: str, port: int) -> list[str]:
        return [PUBLIC]

    with pytest.raises(FetchError, match=r"could not be fetched$"):  # of another name
        fetched(
            OK % (5, b"image"), "https://other.example.org/", hosts=frozenset({"other.example.org"}), resolve=resolve
        )


def test_a_host_without_an_address_ends_it() -> None:
    async def resolve(host: str, port: int) -> list[str]:
        raise OSError("Name or service not known")

    with pytest.raises(FetchError, match=r"could not be fetched$"):
        fetched(OK % (5, b"image"), resolve=resolve)


def test_images_sent_as_urls_are_classified_like_those_sent_whole(
    tiny_bundle: Bundle, digit_images, data_uri, error_of
) -> None:
    images = {f"/{row}.png": digit_images.images[row] for row in range(2)} | {"/text": b"<html>the secret</html>"}

    async def answer(request: bytes, writer: asyncio.StreamWriter) -> None:
        await sends(OK % (len(image := images[request.split()[1].decode()]), image))(request, writer)

    async def run() -> None:
        async with Internet(answer) as internet:
            app = build_app()
            engine = Engine(tiny_bundle, limits=RequestLimits(fetcher=internet.fetcher()))
            app.state.served = Served(engine)

            def ask(*paths: str) -> Any:
                sent = [f"https://{HOST}{path}" if path.startswith("/") else path for path in paths]
                with TestClient(app) as client:
                    return client.post("/v1/classify", json={"input": sent})

            mixed = await asyncio.to_thread(ask, "/0.png", data_uri(images["/1.png"]), "/1.png")
            assert mixed.status_code == 200
            expected = tiny_bundle.classify([images["/0.png"], images["/1.png"], images["/1.png"]])
            found = [entry["classes"][0]["label"] for entry in mixed.json()["data"]]
            assert found == [entry.classes[0].label for entry in expected]
            refused = await asyncio.to_thread(ask, "/0.png", "/text")
            assert error_of(refused, 422)["param"] == "input[1]" and "secret" not in refused.text
            refused = await asyncio.to_thread(ask, "https://evil.example/")
            assert "not fetched from this host" in error_of(refused, 422)["message"]
            engine.close()

    asyncio.run(run())
