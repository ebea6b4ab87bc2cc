"""What one request may cost, and how that is held while its body still streams in."""

import asyncio
from dataclasses import dataclass, field

from starlette.requests import Request
from starlette.types import Scope

from coterie.images import Limits
from serving.errors import OverloadedError, SlowBodyError, TooLargeError
from serving.fetch import Fetcher

__all__ = ["LARGE_BODY", "Bodies", "RequestLimits", "check_count", "read_body"]

# Copying or parsing less than this on the event loop takes under a millisecond, and a thread's hop a tenth of one.
LARGE_BODY = 2**20
# Of a Content-Length; servers take leading zeros, and int() no thousands of digits.
MAX_DIGITS = 20


@dataclass
class Bodies:
    """Bytes of bodies that a worker holds, whole or still arriving; for the event loop alone.

    Attributes:
        most: beyond these nothing is taken in.
    """

    most: int = 512 * 2**20
    held: int = field(default=0, init=False, compare=False)

    def take(self, scope: Scope, size: int) -> None:
        """Count bytes that have come for a request.

        Raises:
            OverloadedError: there is no room for them; the rest of the body is left unread.
        """
        if self.held + size > self.most:
            raise OverloadedError(
                f"requests of {self.most:,} bytes are on their way: try again in a second",
                headers={"Retry-After": "1", "Connection": "close"},
            )
        self.held += size
        scope["coterie.body"] = scope.get("coterie.body", 0) + size

    def let_go(self, scope: Scope) -> None:
        """Count what a request has brought no longer."""
        self.held -= scope.pop("coterie.body", 0)


@dataclass(frozen=True)
class RequestLimits:
    """Upper bounds for a request.

    Attributes:
        max_body: bytes of the body, counted as they arrive.
        bodies: of all requests together.
        max_images: images in it.
        image: bytes and pixels of each.
        seconds: from the complete body to the answer.
        body_seconds: from the head of a request to its last byte.
        fetcher: of images that are sent as URLs; None refuses them.
    """

    max_body: int = 64 * 2**20
    bodies: Bodies = field(default_factory=Bodies)
    max_images: int = 256
    image: Limits = field(default_factory=Limits)
    seconds: float = 30.0
    body_seconds: float = 60.0
    fetcher: Fetcher | None = None


async def read_body(request: Request, limits: RequestLimits) -> bytes:
    """The whole body, if it is within the limits; it counts among the worker's until the answer begins.

    Raises:
        OverloadedError: the bodies of all requests are too much.
        TooLargeError: it says, or turns out, to be larger; the rest is left unread.
        SlowBodyError: it takes too long to arrive.
    """
    declared = request.headers.get("content-length")
    if declared is not None and not _within(declared, limits.max_body):
        raise _too_large(limits)
    chunks, size = [], 0
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for chunk in request.stream():
                size += len(chunk)
                if size > limits.max_body:
                    raise _too_large(limits)
                limits.bodies.take(request.scope, len(chunk))
                chunks.append(chunk)
    except TimeoutError:
        raise SlowBodyError(
            f"the body did not arrive within {limits.body_seconds:g} seconds", headers={"Connection": "close"}
        ) from None
    return b"".join(chunks) if size < LARGE_BODY else await asyncio.to_thread(b"".join, chunks)


def check_count(count: int, limits: RequestLimits, *, of: str = "images", param: str = "input") -> None:
    """Hold the number of images in a request, or what is asked about as many, to its limit.

    Raises:
        TooLargeError: there are more.
    """
    if count > limits.max_images:
        raise TooLargeError(f"more than {limits.max_images} {of} in one request: send them in several", param=param)


def _within(length: str, most: int) -> bool:
    """Whether a Content-Length is a number up to `most`."""
    return length.isdecimal() and len(length) <= MAX_DIGITS and int(length) <= most


def _too_large(limits: RequestLimits) -> TooLargeError:
    # The connection cannot serve another request before the rest of this body has been read away.
    return TooLargeError(
        f"the body is over the limit of {limits.max_body:,} bytes: send fewer or smaller images",
        headers={"Connection": "close"},
    )
