"""Asks an HTTP server as fast as it answers, or at a given rate, at little cost of its own.

Requests are bytes that were made before; of an answer only status and length are read. Closed loop: each of so many
clients asks again when it is answered. Open loop: requests are due at random moments (Poisson) of a given rate, whether
the server keeps up or not, and each one's latency counts from when it was due.
"""

import asyncio
import random
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import uvloop

__all__ = ["Load", "Measured", "drive", "request"]

HOST = "127.0.0.1"
IDLE_SECONDS = 4.0  # most servers close connections after 5


@dataclass(frozen=True)
class Load:
    """What to ask of the server at `port`.

    Attributes:
        requests: whole requests, asked in turn.
        clients: how many ask at once in closed loop.
        rate: requests a second, for open loop.
        warm_up: seconds before anything is counted.
        seconds: how long is counted.
        connections: at most, in open loop; what is due while all are busy waits, and its latency counts.
    """

    port: int
    requests: Sequence[bytes]
    seconds: float
    clients: int = 1
    rate: float | None = None
    warm_up: float = 1.0
    connections: int = 512


@dataclass
class Measured:
    """Answers that came within the time counted.

    Attributes:
        statuses: how many of each; 0 where the connection ended in an answer's stead.
        codes: the status of each, in the order of `latencies`.
        began: when each was sent, or due, from the beginning of what is counted; seconds.
        latencies: of each, in seconds.
        client_seconds: processor time of the client.
    """

    seconds: float
    statuses: Counter[int] = field(default_factory=Counter)
    codes: list[int] = field(default_factory=list)
    began: list[float] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)
    client_seconds: float = 0.0

    @property
    def rate(self) -> float:
        """Requests a second that were answered with 200."""
        return self.statuses[200] / self.seconds

    def percentile(self, q: float) -> float:
        return float(np.percentile(self.latencies, q)) if self.latencies else float("inf")


def request(path: str, body: bytes, content_type: str, accept: str = "*/*") -> bytes:
    """A POST request as it goes over the wire."""
    head = f"POST {path} HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: {content_type}\r\nAccept: {accept}\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def drive(load: Load) -> Measured:
    """Ask, and say what came back. To be run in a process of its own."""
    return uvloop.run(_drive(load))


async def _drive(load: Load) -> Measured:
    measured = Measured(load.seconds)
    start = time.perf_counter() + load.warm_up
    end = start + load.seconds
    number = 0

    def next_request() -> bytes:
        nonlocal number
        number += 1
        return load.requests[number % len(load.requests)]

    def answered(status: int, began: float) -> None:
        now = time.perf_counter()
        if start <= now < end or not status:
            measured.statuses[status] += 1
            measured.codes.append(status)
            measured.began.append(began - start)
            measured.latencies.append(now - began)

    if load.rate is None:
        clients = [await _connect(load.port) for _ in range(load.clients)]

        async def ask_on(client: _Client) -> None:
            while (began := time.perf_counter()) < end:
                answered(await client.ask(next_request()), began)
                if not client.open:
                    client = await _connect(load.port)

        work = [asyncio.ensure_future(ask_on(client)) for client in clients]
    else:
        free = deque([await _connect(load.port) for _ in range(8)])
        due, work, opened = deque[float](), list[asyncio.Future[None]](), len(free)

        async def serve_due() -> None:
            nonlocal opened
            client = free.pop() if free else await _connect(load.port)
            while due:
                began = due.popleft()
                answered(await client.ask(next_request()), began)
                if not client.open:
                    client = await _connect(load.port)
            client.idle_since = time.perf_counter()
            free.append(client)
            # As other clients do, before the server does it while a request is on its way.
            while client.idle_since - free[0].idle_since > IDLE_SECONDS:
                free.popleft().close()
                opened -= 1

        async def fall_due() -> None:
            nonlocal opened
            moments, when = random.Random(0), time.perf_counter()
            while when < end:
                when += moments.expovariate(load.rate or 1.0)
                if (pause := when - time.perf_counter()) > 0:
                    await asyncio.sleep(pause)
                due.append(when)
                if free or opened < load.connections:
                    opened += not free
                    work.append(asyncio.ensure_future(serve_due()))

        work.append(asyncio.ensure_future(fall_due()))
    await asyncio.sleep(start - time.perf_counter())
    used = time.process_time()
    await asyncio.sleep(end - time.perf_counter())
    measured.client_seconds = time.process_time() - used
    await asyncio.wait(work, timeout=60)
    for task in work:
        if task.done():
            task.result()
        else:
            task.cancel()
    return measured


class _Client(asyncio.Protocol):
    """One connection, on which one request at a time is asked."""

    def __init__(self) -> None:
        self.idle_since = time.perf_counter()

    @property
    def open(self) -> bool:
        return not self._transport.is_closing()

    def close(self) -> None:
        self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._answer: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def ask(self, request: bytes) -> "asyncio.Future[int]":
        self._answer = asyncio.get_running_loop().create_future()
        self._head, self._left, self._status = b"", -1, 0
        self._transport.write(request)
        return self._answer

    def data_received(self, data: bytes) -> None:
        if self._left < 0:
            self._head += data
            head, end, body = self._head.partition(b"\r\n\r\n")
            if not end:
                return
            self._status = int(head[9:12])
            length = head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0]
            self._left = int(length) - len(body)
        else:
            self._left -= len(data)
        if not self._left and not self._answer.done():
            self._answer.set_result(self._status)

    def connection_lost(self, error: Exception | None) -> None:
        if not self._answer.done():
            self._answer.set_result(0)


async def _connect(port: int) -> _Client:
    _, client = await asyncio.get_running_loop().create_connection(_Client, HOST, port)
    return client
