"""What every request leaves behind: an id in its answer, a line in the log, counts, and a row of what it changed.

The event loop only takes the notes; a thread formats, counts and writes them some milliseconds later, many at once.
"""

import asyncio
import io
import logging
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from pydantic_core import to_json
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.journal import Journal
from serving.metrics import Measures

__all__ = ["Note", "Recorder", "Records", "note_images"]

logger = logging.getLogger("coterie.serving")

PROBES = frozenset({"/healthz", "/livez", "/readyz"})
REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")
# Under load, how long notes are gathered before they are written together.
GATHER_SECONDS = 0.05
# Beyond so many unwritten notes, whatever reads the log has stopped reading, and lines are dropped instead of memory.
MAX_WAITING = 50_000
# A pipe takes so many bytes in one piece, so that lines of several workers do not mix.
PIPE_BYTES = 4096

# No answer is for a cache that others share, a frame, or a guess at its type.
HEADERS = {
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
    b"x-frame-options": b"DENY",
    b"cache-control": b"no-store",
}
PAGE_POLICY = (
    b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    b"base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
DATA_POLICY = b"default-src 'none'; frame-ancestors 'none'"


@dataclass(eq=False, slots=True)
class Note:
    """What is known of one request once it is answered; field by field what the log shows."""

    time: float
    method: str
    route: str
    status: int
    seconds: float
    images: int
    bytes_in: int
    bytes_out: int
    key: str | None
    id: str
    error: str | None


def note_images(scope: Scope, images: int) -> None:
    """Have the log say how many images a request brought."""
    scope.setdefault("state", {})["images"] = images


class Records:
    """Writes notes down, in a thread of its own.

    Args:
        measures: counts them.
        write: takes whole lines of the log, at most `PIPE_BYTES` together where they are shorter; None writes none.
        refresh: is called after notes were written, at most every `GATHER_SECONDS`.
    """

    def __init__(
        self, measures: Measures, *, write: Callable[[bytes], Any] | None, refresh: Callable[[], None] = lambda: None
    ) -> None:
        self._measures, self._write, self._refresh = measures, write, refresh
        self._notes: queue.SimpleQueue[Note | threading.Event] = queue.SimpleQueue()
        self._dropped = 0
        self._closed = threading.Event()
        threading.Thread(target=self._work, name="records", daemon=True).start()

    def take(self, note: Note) -> None:
        """Have a note written down soon; returns at once."""
        if self._notes.qsize() < MAX_WAITING:
            self._notes.put(note)
        else:
            self._dropped += 1

    def flush(self) -> None:
        """Return when every note that was taken before is written down."""
        done = threading.Event()
        self._notes.put(done)
        done.wait(1.0)

    def close(self) -> None:
        """Write what is left."""
        self._closed.set()
        self.flush()

    def _work(self) -> None:
        while True:
            gathered: list[Note | threading.Event] = [self._notes.get()]
            if isinstance(gathered[0], Note):
                self._closed.wait(GATHER_SECONDS)
            while not self._notes.empty():
                gathered.append(self._notes.get())
            try:
                self._record([note for note in gathered if isinstance(note, Note)])
            except Exception:  # a full disk, a closed pipe: the service goes on without its log
                logger.exception("requests could not be recorded")
            for done in gathered:
                if isinstance(done, threading.Event):
                    done.set()

    def _record(self, notes: list[Note]) -> None:
        for note in notes:
            self._measures.requested(note.method, note.route, note.status, note.seconds)
        self._refresh()
        if self._write is not None:
            for piece in _pieces(map(_line, notes)):
                self._write(piece)


class Recorder:
    """Middleware that takes the notes, and adds what every answer's head has.

    Args:
        records: gives the `Records`; called when they are needed, for an application is made before its settings are
            read.
        journal: likewise gives where changes are written down.
    """

    def __init__(self, app: ASGIApp, records: Callable[[], Records], journal: Callable[[], Journal]) -> None:
        self._app, self._records, self._journal = app, records, journal

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in PROBES:
            await self._app(scope, receive, send)
            return
        began, request_id = time.perf_counter(), _request_id(scope)
        state = scope.setdefault("state", {})
        state["request_id"] = request_id.decode()
        status = bytes_in = bytes_out = 0

        async def receive_counted() -> Message:
            nonlocal bytes_in
            message = await receive()
            if message["type"] == "http.request":
                bytes_in += len(message.get("body", b""))
            return message

        async def send_counted(message: Message) -> None:
            nonlocal status, bytes_out
            if message["type"] == "http.response.start":
                status = message["status"]
                if "audit" in state:
                    await self._keep(state)
                _complete(message["headers"], request_id)
            else:
                bytes_out += len(message.get("body", b""))
            await send(message)

        try:
            await self._app(scope, receive_counted, send_counted)
        finally:
            seconds = time.perf_counter() - began
            self._records().take(
                Note(
                    time=time.time(),
                    method=scope["method"] if scope["method"] in METHODS else "OTHER",
                    route=getattr(scope.get("route"), "path", None) or "other",
                    status=status or 500,
                    seconds=seconds,
                    images=state.get("images", 0),
                    bytes_in=bytes_in,
                    bytes_out=bytes_out,
                    key=state.get("key"),
                    id=state["request_id"],
                    error=state.get("error"),
                )
            )

    async def _keep(self, state: dict[str, Any]) -> None:
        try:
            await asyncio.to_thread(
                self._journal().append, state["audit"], key=state.get("key"), request=state["request_id"]
            )
        except OSError:  # what has been changed stays so, and is answered
            logger.exception("a change could not be written to the audit: %s", state["audit"])


METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


def to_standard_output(lines: bytes) -> None:
    """Write lines of the log to standard output, past whatever buffers it."""
    while lines:
        lines = lines[os.write(1, lines) :]


def _request_id(scope: Scope) -> bytes:
    """The id that the client gave, if it is one, or a new one."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and REQUEST_ID.fullmatch(value):
            return bytes(value)
    return os.urandom(8).hex().encode()


def _complete(headers: list[tuple[bytes, bytes]], request_id: bytes) -> None:
    """Add to an answer's head what it lacks."""
    there = dict(headers)
    page = there.get(b"content-type", b"").startswith(b"text/html")
    headers += [(name, value) for name, value in HEADERS.items() if name not in there]
    if b"content-security-policy" not in there:
        headers.append((b"content-security-policy", PAGE_POLICY if page else DATA_POLICY))
    headers.append((b"x-request-id", request_id))


def _line(note: Note) -> bytes:
    """One line of the log. Query, body and headers are not in it, for they may hold images and secrets."""
    return (
        to_json(
            {
                "time": datetime.fromtimestamp(note.time, UTC).isoformat(timespec="milliseconds"),
                "method": note.method,
                "route": note.route,
                "status": note.status,
                "ms": round(note.seconds * 1000, 3),
                "images": note.images,
                "bytes_in": note.bytes_in,
                "bytes_out": note.bytes_out,
                "key": note.key,
                "id": note.id,
                "error": note.error,
            }
        )
        + b"\n"
    )


def _pieces(lines: Iterable[bytes]) -> Iterable[bytes]:
    """Lines joined, as many as go through a pipe in one piece."""
    piece = io.BytesIO()
    for line in lines:
        if piece.tell() and piece.tell() + len(line) > PIPE_BYTES:
            yield piece.getvalue()
            piece = io.BytesIO()
        piece.write(line)
    if piece.tell():
        yield piece.getvalue()
