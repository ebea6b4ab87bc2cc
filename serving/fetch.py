"""Images fetched from the hosts that are allowed, and from nowhere else.

Whoever sends an address would have this service look at it, from inside its network. So: https alone, a host of the
list by its exact name, an address that is public, to which the connection is held, no redirects, and of what is found
there nothing but the image's pixels ever reaches the client.
"""

import asyncio
import ipaddress
import socket
import ssl
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import h11

__all__ = ["FetchError", "Fetcher", "is_public"]

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]

# Connections of one request at a time.
TOGETHER = 8
CHUNK = 64 * 2**10
# Of addresses in version 6 only those handed out to networks, without the ones that carry an address of version 4.
UNICAST = ipaddress.IPv6Network("2000::/3")
CARRIERS = (ipaddress.IPv6Network("2002::/16"), ipaddress.IPv6Network("2001::/23"))


class FetchError(Exception):
    """An image that is not fetched. The message is written for the client and tells nothing of what was found."""


def is_public(text: str) -> bool:
    """Whether an IP address is one of the open internet."""
    address = ipaddress.ip_address(text)
    if address.version == 6 and (address not in UNICAST or any(address in network for network in CARRIERS)):
        return False
    return address.is_global and not address.is_multicast


async def resolve(host: str, port: int) -> list[str]:
    """The addresses of a host, as the system's resolver has them."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(entry[4][0]) for entry in found]


async def connect(address: str, port: int, context: ssl.SSLContext, host: str) -> Connection:
    """A connection to an address, whose certificate is the host's."""
    return await asyncio.open_connection(address, port, ssl=context, server_hostname=host)


@dataclass
class _Budget:
    bytes: int


@dataclass(frozen=True)
class Fetcher:
    """Fetches images.

    Attributes:
        hosts: lower-case names, with `:port` where it is not 443.
        max_image, max_total: bytes of one image and of all of one request.
        seconds: for all of one request, from the first question for an address to the last byte.
        context, resolve, connect: how connections are made.
    """

    hosts: frozenset[str]
    max_image: int = 20 * 2**20
    max_total: int = 64 * 2**20
    seconds: float = 10.0
    context: ssl.SSLContext = field(default_factory=ssl.create_default_context)
    resolve: Callable[[str, int], Awaitable[list[str]]] = resolve
    connect: Callable[[str, int, ssl.SSLContext, str], Awaitable[Connection]] = connect

    async def fetch(self, url: str) -> bytes:
        """The image at an address.

        Raises:
            FetchError: it is not allowed, or not to be had within the limits.
        """
        (found,) = await self.fetch_all([url])
        if isinstance(found, FetchError):
            raise found
        return found

    async def fetch_all(self, urls: Sequence[str]) -> list[bytes | FetchError]:
        """The images of one request, with an error in the place of each that could not be had."""
        together, budget = asyncio.Semaphore(TOGETHER), _Budget(self.max_total)
        end = asyncio.get_running_loop().time() + self.seconds

        async def one(url: str) -> bytes | FetchError:
            try:
                async with asyncio.timeout_at(end), together:
                    return await self._fetch(url, budget)
            except FetchError as error:
                return error
            except TimeoutError:
                return FetchError("it could not be fetched in time")
            except (OSError, UnicodeError, ssl.CertificateError, h11.ProtocolError, asyncio.IncompleteReadError):
                return FetchError("it could not be fetched")

        return list(await asyncio.gather(*map(one, urls)))

    async def _fetch(self, url: str, budget: _Budget) -> bytes:
        host, port, target = self._parts(url)
        addresses = await self.resolve(host, port)
        # A name with one address inside and one outside is no mistake of anybody's.
        if not addresses or not all(map(is_public, addresses)):
            raise FetchError("its host is not to be reached from here")
        reader, writer = await self.connect(addresses[0], port, self.context, host)
        try:
            name = host if port == 443 else f"{host}:{port}"
            return await self._get(reader, writer, name, target, budget)
        finally:
            # Not closed in good order: a server that does not answer must not hold us.
            writer.transport.abort()

    def _parts(self, url: str) -> tuple[str, int, str]:
        try:
            parts = urlsplit(url) if url.isascii() and url.isprintable() and " " not in url else None
            host, port = (parts.hostname or "", parts.port or 443) if parts else ("", 443)
        except ValueError:
            parts = None
        if parts is None or parts.scheme != "https" or "@" in parts.netloc or "\\" in url:
            raise FetchError("only plain https addresses are fetched")
        if (host if port == 443 else f"{host}:{port}") not in self.hosts:
            raise FetchError("images are not fetched from this host")
        return host, port, (parts.path or "/") + (f"?{parts.query}" if parts.query else "")

    async def _get(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        name: str,
        target: str,
        budget: _Budget,
    ) -> bytes:
        http = h11.Connection(h11.CLIENT)
        headers = [("Host", name), ("Accept", "image/*"), ("Accept-Encoding", "identity"), ("Connection", "close")]
        for sent in (h11.Request(method="GET", target=target, headers=headers), h11.EndOfMessage()):
            writer.write(http.send(sent) or b"")
        await writer.drain()
        body = bytearray()
        while not isinstance(event := http.next_event(), h11.EndOfMessage):
            if event is h11.NEED_DATA:
                http.receive_data(await reader.read(CHUNK))
            elif isinstance(event, h11.Response) and event.status_code != 200:
                raise FetchError("its host does not have it")
            elif isinstance(event, h11.Data):
                body += event.data
                budget.bytes -= len(event.data)
                if len(body) > self.max_image or budget.bytes < 0:
                    raise FetchError("it is over the limit of bytes")
            elif isinstance(event, h11.ConnectionClosed):
                raise FetchError("it could not be fetched")
        return bytes(body)
