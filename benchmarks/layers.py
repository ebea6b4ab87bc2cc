"""What the layers around the application cost a request: keys, counts, log.

A no-op ASGI application is called bare and wrapped, in turn; reported is the processor time of the whole process, the
thread that writes included, as the least and the median of `ROUNDS` rounds.

    python -m benchmarks.layers

On two shared cores (AVX-512): access with a key 2.3 µs, counts 4.8 µs, counts and log 7.8 µs, all 10.3 µs a request;
each of the engine's four steps 0.5 µs.
"""

import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from serving.access import Access, Policy
from serving.journal import Journal
from serving.keys import Keyring, create_key
from serving.metrics import Measures
from serving.records import Recorder, Records

ROUNDS, REQUESTS, CALLS = 9, 2000, 20_000


async def no_op(scope: Any, receive: Any, send: Any) -> None:
    await receive()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
    await send({"type": "http.response.body", "body": b"{}"})


async def receive() -> dict[str, Any]:
    return {"type": "http.request", "body": b"x" * 300}


async def send(_: Any) -> None:
    return


async def ask(app: Any, headers: list[tuple[bytes, bytes]]) -> None:
    for _ in range(REQUESTS):
        scope = {"type": "http", "method": "POST", "path": "/v1/classify", "query_string": b"", "headers": headers}
        await app(scope, receive, send)


def microseconds(work: Callable[[], Any], count: int) -> float:
    began = time.process_time()
    work()
    return (time.process_time() - began) / count * 1e6


def main() -> None:
    with tempfile.TemporaryDirectory() as name, Path(os.devnull).open("wb") as nowhere:
        folder = Path(name)
        measures = Measures()
        counting, logging = Records(measures, write=None), Records(measures, write=nowhere.write)
        journal = Journal(folder / "audit.jsonl")
        _, token = create_key(folder / "keys.json", "ask")
        open_, keys = Policy(Keyring(folder / "none")), Policy(Keyring(folder / "keys.json"))
        forms: dict[str, tuple[Any, Records | None]] = {
            "bare": (no_op, None),
            "access, no keys": (Access(no_op, lambda: open_), None),
            "access, a key": (Access(no_op, lambda: keys), None),
            "counts": (Recorder(no_op, lambda: counting, lambda: journal), counting),
            "counts, log": (Recorder(no_op, lambda: logging, lambda: journal), logging),
            "all": (Recorder(Access(no_op, lambda: keys), lambda: logging, lambda: journal), logging),
        }
        headers = [
            (b"host", b"localhost"),
            (b"user-agent", b"x" * 40),
            (b"accept", b"*/*"),
            (b"content-length", b"300"),
        ]
        headers.append((b"authorization", f"Bearer {token}".encode()))

        def run(app: Any, records: Records | None) -> None:
            asyncio.run(ask(app, headers))
            if records is not None:
                records.flush()

        times: dict[str, list[float]] = {form: [] for form in forms}
        for _ in range(ROUNDS):
            for form, (app, records) in forms.items():
                times[form].append(microseconds(lambda app=app, records=records: run(app, records), REQUESTS))
        bare = times.pop("bare")
        for form, took in times.items():
            least, median = min(took) - min(bare), statistics.median(took) - statistics.median(bare)
            print(f"{form:16} {least:6.2f} µs least {median:6.2f} µs median")

        def step() -> None:
            for _ in range(CALLS):
                measures.decoded(0.003)

        print(f"{'one step':16} {min(microseconds(step, CALLS) for _ in range(ROUNDS)):6.2f} µs least")


if __name__ == "__main__":
    main()
