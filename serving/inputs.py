"""The images of a request, in the order sent, from whichever kind of body they came in.

A raw body is one image whatever its header says, for the bytes decide; a multipart form brings a file for each image;
JSON brings data URIs, base64 strings or, from hosts that are allowed, URLs; an npy array brings pixels of the encoder's
size. Nothing is decoded to pixels here.
"""

import asyncio
import base64
import binascii
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError
from python_multipart.multipart import parse_options_header
from starlette.requests import Request

from serving.errors import BadRequestError, RejectedImageError, UnsupportedBodyError
from serving.fetch import FetchError
from serving.limits import LARGE_BODY, RequestLimits, check_count, read_body
from serving.requests import in_time
from serving.schemas import ImagesBody, StringsBody, first_complaint
from serving.tensors import NPY, read_pixels

__all__ = ["Sent", "read_images", "read_sent", "read_strings"]

Body = TypeVar("Body", bound=ImagesBody | StringsBody)
Result = TypeVar("Result")

# The images of a request as they were sent; an error stands for one that is refused already.
Sent = list[bytes | RejectedImageError] | NDArray[np.uint8]

# What is sent for a plain file: nothing at all, or what curl's --data-binary says by itself.
RAW_TYPES = frozenset({"", "application/octet-stream", "application/x-www-form-urlencoded"})

# Of a form's part, as python-multipart has them: how many headers, and bytes of each.
MAX_HEADERS, MAX_HEADER = 8, 4224
MALFORMED = "the multipart body is malformed"
NOWHERE = -1  # what bytes.find says


@dataclass(frozen=True)
class _Url:
    """A string that is the address of an image."""

    address: str


async def read_images(request: Request, limits: RequestLimits, schema: type[Body]) -> tuple[list[bytes], Body | None]:
    """The encoded images of a request and, where they came as JSON, the rest of that body.

    Raises:
        BadRequestError: the body is not what its content type says, or holds no image.
        TooLargeError: too many bytes or images.
        UnsupportedBodyError: a content type that no image comes in.
        RejectedImageError: a string is neither a data URI nor base64.
        TimedOutError: a large body took too long to be parsed.
    """
    sent, body = await read_sent(request, limits, schema)
    for image in sent:
        if isinstance(image, RejectedImageError):
            raise image
    return sent, body  # type: ignore[return-value]


async def read_sent(
    request: Request, limits: RequestLimits, schema: type[Body], *, size: tuple[int, int] | None = None
) -> tuple[Sent, Body | None]:
    """As `read_images`, but with an error in the place of each string that is no image.

    Args:
        size: height and width of the arrays that are taken, too, as uint8 (n, height, width, 3); None for none.

    Raises:
        WrongTensorError: an array does not hold images of that size.
        and what `read_images` raises but the last.
    """
    content_type = request.headers.get("content-type", "")
    media_type = content_type.partition(";")[0].strip().lower()
    raw = media_type in RAW_TYPES or media_type.startswith("image/")
    if not raw and media_type not in ("multipart/form-data", "application/json", NPY if size else ""):
        raise UnsupportedBodyError(
            f"images come as image/*, multipart/form-data{f', {NPY}' if size else ''} or application/json, "
            f"not {media_type[:100]}",
            param="content-type",
        )
    _check_encoding(request)
    if media_type == "application/json":
        return await _read_json(request, limits, schema)
    body = await read_body(request, limits)
    if media_type == "multipart/form-data":
        return await _off_loop(request, body, lambda: list(_from_form(body, content_type, limits))), None
    if not body:
        raise BadRequestError("the body is empty: send an image")
    if media_type == NPY and size:
        return read_pixels(body, size, limits), None
    return [body], None


async def read_strings(request: Request, limits: RequestLimits, schema: type[Body]) -> tuple[Sent, Body]:
    """As `read_sent`, from a body of JSON alone."""
    if request.headers.get("content-type", "application/json").partition(";")[0].strip().lower() != "application/json":
        raise UnsupportedBodyError(
            "images come as application/json here, and as files and forms under /v1", param="content-type"
        )
    _check_encoding(request)
    return await _read_json(request, limits, schema)


def _check_encoding(request: Request) -> None:
    if request.headers.get("content-encoding", "identity") != "identity":
        raise UnsupportedBodyError("send the body without content-encoding", param="content-encoding")


async def _read_json(request: Request, limits: RequestLimits, schema: type[Body]) -> tuple[Sent, Body]:
    body = await read_body(request, limits)
    images, parsed = await _off_loop(request, body, lambda: _from_json(body, schema, limits))
    return await _fetched(images, limits), parsed


async def _off_loop(request: Request, body: bytes, parse: Callable[[], Result]) -> Result:
    return parse() if len(body) < LARGE_BODY else await in_time(request, asyncio.to_thread(parse))


async def _fetched(
    images: Sequence[bytes | RejectedImageError | _Url], limits: RequestLimits
) -> list[bytes | RejectedImageError]:
    """Images with those of an address fetched, where that is allowed."""
    addresses = {index: image.address for index, image in enumerate(images) if isinstance(image, _Url)}
    if not addresses:
        return images  # type: ignore[return-value]
    if limits.fetcher is None:
        reason = FetchError("URLs are not fetched: send the image itself, as a data URI or base64")
        found: list[bytes | FetchError] = [reason] * len(addresses)
    else:
        found = await limits.fetcher.fetch_all(list(addresses.values()))
    merged = list(images)
    for index, image in zip(addresses, found, strict=True):
        merged[index] = RejectedImageError(index, str(image)) if isinstance(image, FetchError) else image
    return merged  # type: ignore[return-value]


def _decoded(strings: Sequence[str]) -> list[bytes | RejectedImageError | _Url]:
    return [_from_text(index, text) for index, text in enumerate(strings)]


def _from_json(
    body: bytes, schema: type[Body], limits: RequestLimits
) -> tuple[list[bytes | RejectedImageError | _Url], Body]:
    try:
        parsed = schema.model_validate_json(body)
    except ValidationError as error:
        param, message = first_complaint(error)
        raise BadRequestError(f"{param or 'the body'}: {message}", param=param) from error
    strings = parsed.images()
    if not strings:
        raise BadRequestError("there are no images: send at least one", param="input")
    check_count(len(strings), limits)
    return _decoded(strings), parsed


def _from_text(index: int, text: str) -> bytes | RejectedImageError | _Url:
    if text.startswith("data:"):
        header, comma, text = text.partition(",")
        if not comma or not header.endswith(";base64"):
            return RejectedImageError(index, "a data URI reads data:image/png;base64,…")
    elif text[:8].lower().startswith(("http://", "https://")):
        return _Url(text)
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):  # ValueError: characters beyond ASCII
        return RejectedImageError(index, "neither a data URI nor base64")


def _from_form(body: bytes, content_type: str, limits: RequestLimits) -> list[bytes]:
    """The files of a multipart body, whose parts are found by at most one search each."""
    boundary = parse_options_header(content_type)[1].get(b"boundary")
    if not boundary:
        raise BadRequestError("multipart/form-data needs a boundary", param="content-type")
    delimiter, files = b"\r\n--" + boundary, list[bytes]()
    # The first delimiter needs no line before it.
    end = -2 if body.startswith(delimiter[2:]) else body.find(delimiter)
    while True:
        if end == NOWHERE:
            raise BadRequestError("the multipart body is cut short" if files else MALFORMED)
        place = end + len(delimiter)
        if body.startswith(b"--", place):
            break
        start = _skip_headers(body, _next_line(body, place))
        check_count(len(files) + 1, limits)
        end = body.find(delimiter, start)
        files.append(body[start:end])
    if not files:
        raise BadRequestError("the form has no files: send one for each image")
    return files


def _next_line(body: bytes, place: int) -> int:
    """Where the line after a boundary begins; what follows the boundary may be blank."""
    end = body.find(b"\r\n", place, place + MAX_HEADER)
    if end == NOWHERE or body[place:end].strip(b" \t"):
        raise BadRequestError(MALFORMED)
    return end + 2


def _skip_headers(body: bytes, place: int) -> int:
    """Where the content of a file begins, whose headers begin at `place`.

    Raises:
        BadRequestError: they are malformed, larger than any that mean something, or those of no file.
    """
    disposition = b""
    for _ in range(MAX_HEADERS + 1):
        end = body.find(b"\r\n", place, place + MAX_HEADER)
        name, colon, value = body[place:end].partition(b":")
        place, empty = end + 2, place == end
        if empty:
            break
        if end == NOWHERE or not colon or not name or name.strip() != name:
            raise BadRequestError(MALFORMED)
        if name.lower() == b"content-disposition":
            disposition = value
    else:
        raise BadRequestError(f"a part of the multipart body has more than {MAX_HEADERS} headers")
    options = parse_options_header(disposition.strip())[1]
    if b"filename" not in options:
        field = options.get(b"name", b"").decode("utf-8", "replace")[:100]
        raise BadRequestError(f"the form field {field!r} is no file: options belong in the query", param=field or None)
    return place
