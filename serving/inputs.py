"""The images of a request, in the order sent, from whichever kind of body they came in.

A raw body is one image whatever its header says, for the bytes decide; a multipart form brings a file for each image;
JSON brings data URIs or base64 strings. Nothing is decoded to pixels here, and no URL is ever fetched.
"""

import asyncio
import base64
import binascii
from collections.abc import Callable
from typing import TypeVar

from pydantic import ValidationError
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from serving.errors import BadRequestError, RejectedImageError, UnsupportedBodyError
from serving.limits import RequestLimits, check_count, read_body
from serving.schemas import ClassifyBody, first_complaint

__all__ = ["read_images"]

Body = TypeVar("Body", bound=ClassifyBody)
Result = TypeVar("Result")

# What is sent for a plain file: nothing at all, or what curl's --data-binary says by itself.
RAW_TYPES = frozenset({"", "application/octet-stream", "application/x-www-form-urlencoded"})
# Parsing less than this on the event loop takes under a millisecond, and a thread's hop a tenth of one.
LARGE_BODY = 2**20


async def read_images(request: Request, limits: RequestLimits, schema: type[Body]) -> tuple[list[bytes], Body | None]:
    """The encoded images of a request and, where they came as JSON, the rest of that body.

    Raises:
        BadRequestError: the body is not what its content type says, or holds no image.
        TooLargeError: too many bytes or images.
        UnsupportedBodyError: a content type that no image comes in.
        RejectedImageError: a string is neither a data URI nor base64.
    """
    content_type = request.headers.get("content-type", "")
    media_type = content_type.partition(";")[0].strip().lower()
    known = media_type in RAW_TYPES or media_type.startswith("image/")
    if not known and media_type not in ("multipart/form-data", "application/json"):
        raise UnsupportedBodyError(
            f"images come as image/*, multipart/form-data or application/json, not {media_type[:100]}",
            param="content-type",
        )
    if request.headers.get("content-encoding", "identity") != "identity":
        raise UnsupportedBodyError("send the body without content-encoding", param="content-encoding")
    body = await read_body(request, limits)
    if media_type == "application/json":
        return await _off_loop(body, lambda: _from_json(body, schema, limits))
    if media_type == "multipart/form-data":
        return await _off_loop(body, lambda: _from_form(body, content_type, limits)), None
    if not body:
        raise BadRequestError("the body is empty: send an image")
    return [body], None


async def _off_loop(body: bytes, parse: Callable[[], Result]) -> Result:
    return parse() if len(body) < LARGE_BODY else await asyncio.to_thread(parse)


def _from_json(body: bytes, schema: type[Body], limits: RequestLimits) -> tuple[list[bytes], Body]:
    try:
        parsed = schema.model_validate_json(body)
    except ValidationError as error:
        param, message = first_complaint(error)
        raise BadRequestError(f"{param or 'the body'}: {message}", param=param) from error
    strings = parsed.images()
    if not strings:
        raise BadRequestError("input is empty: send at least one image", param="input")
    check_count(len(strings), limits)
    return [_from_text(index, text) for index, text in enumerate(strings)], parsed


def _from_text(index: int, text: str) -> bytes:
    if text.startswith("data:"):
        header, comma, text = text.partition(",")
        if not comma or not header.endswith(";base64"):
            raise RejectedImageError(index, "a data URI reads data:image/png;base64,…")
    elif text[:8].lower().startswith(("http://", "https://")):
        raise RejectedImageError(index, "URLs are not fetched: send the image itself, as a data URI or base64")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:  # ValueError: characters beyond ASCII
        raise RejectedImageError(index, "neither a data URI nor base64") from error


def _from_form(body: bytes, content_type: str, limits: RequestLimits) -> list[bytes]:
    boundary = parse_options_header(content_type)[1].get(b"boundary")
    if not boundary:
        raise BadRequestError("multipart/form-data needs a boundary", param="content-type")
    form = _Form(boundary, limits)
    try:
        form.parser.write(body)
        form.parser.finalize()
    except FormParserError as error:
        raise BadRequestError("the multipart body is malformed") from error
    if not form.complete:
        raise BadRequestError("the multipart body is cut short")
    if not form.files:
        raise BadRequestError("the form has no files: send one for each image")
    return [bytes(file) for file in form.files]


class _Form:
    """Collects the files of a multipart body in memory, which `read_body` has bounded."""

    def __init__(self, boundary: bytes, limits: RequestLimits) -> None:
        self.files: list[bytearray] = []
        self.complete = False
        self._limits = limits
        self._name = self._value = b""
        self._disposition = b""
        self.parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin,
                "on_header_field": self._on_name,
                "on_header_value": self._on_value,
                "on_header_end": self._on_header,
                "on_headers_finished": self._on_headers,
                "on_part_data": self._on_data,
                "on_end": self._on_end,
            },
        )

    def _begin(self) -> None:
        self._disposition = b""

    def _on_name(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def _on_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _on_header(self) -> None:
        if self._name.lower() == b"content-disposition":
            self._disposition = self._value
        self._name = self._value = b""

    def _on_headers(self) -> None:
        options = parse_options_header(self._disposition)[1]
        if b"filename" not in options:
            name = options.get(b"name", b"").decode("utf-8", "replace")[:100]
            raise BadRequestError(
                f"the form field {name!r} is no file: options belong in the query", param=name or None
            )
        check_count(len(self.files) + 1, self._limits)
        self.files.append(bytearray())

    def _on_data(self, data: bytes, start: int, end: int) -> None:
        self.files[-1] += data[start:end]

    def _on_end(self) -> None:
        self.complete = True
