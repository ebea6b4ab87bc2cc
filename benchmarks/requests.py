"""What a request costs beside the encoder: processor time by kind of body and answer, without a network.

    python -m benchmarks.requests BUNDLE [--runs 5] [--concurrency 16] [--json FILE]

The application runs in this process and requests are handed to it as a server would, so many at a time. Each cell is
the median of --runs, in microseconds of processor time for a request and for each of its images, all threads of the
process together: decoding, encoding and serialising are in it, parsing HTTP is not. Two cores of a shared AVX-512
machine beside other work, JPEGs of 32 pixels, an encoder of 16 pixels that is one matrix product, 480 gallery items:

    a JPEG → float                                   278     278
    a JPEG → classification                          292     292
    JSON with a JPEG → base64                        226     226
    JSON with 32 JPEGs → base64                     3486     109
    a form with 32 JPEGs → base64                   3628     113
    an array of 32 → float                           423      13
    an array of 32 → base64                          426      13
    an array of 32 → array                           236       7
    an array of 32 → classifications                2787      87
    an array of 32 → verifications                   927      29
    the engine alone, one job of 32                  189       6
    the engine alone, 32 jobs of one                 516      16
"""

import argparse
import asyncio
import base64
import io
import json
import statistics
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import uvloop
from PIL import Image
from starlette.applications import Starlette

from coterie.bundle import Bundle
from coterie.files import write_text
from serving.engine import Engine
from serving.routes import build_app
from serving.served import Served

MANY = 32
SIDE = 32  # of the JPEGs
NPY, FORM, JSON = "application/x-npy", "multipart/form-data; boundary=x", "application/json"


@dataclass(frozen=True)
class Kind:
    """One kind of request."""

    name: str
    path: str
    body: bytes
    content_type: str
    accept: str = "*/*"


@dataclass(frozen=True)
class Cell:
    """What one kind costs: microseconds of processor time for a request, and for each of its images."""

    name: str
    images: int
    request: float
    image: float


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    app = build_app()
    engine = Engine(Bundle.open(arguments.bundle, device="cpu"))
    app.state.served = Served(engine)
    size = engine.manifest.encoder.input_size
    cells = []
    for kind, images in kinds(size, quote(engine.manifest.classes[0])):
        ask = asking(app, kind)
        cells.append(await measured(kind.name, images, ask, arguments.runs, arguments.concurrency))
        print(f"{kind.name:44} {cells[-1].request:7.0f} {cells[-1].image:7.0f}", flush=True)
    pixels = np.zeros((MANY, *size, 3), dtype=np.uint8)

    async def apart() -> None:
        await asyncio.gather(*(engine.embed(pixels[row : row + 1]) for row in range(MANY)))

    async def together() -> None:
        await engine.embed(pixels)

    for name, work in (("the engine alone, one job of 32", together), ("the engine alone, 32 jobs of one", apart)):
        cells.append(await measured(name, MANY, work, arguments.runs, 1))
        print(f"{name:44} {cells[-1].request:7.0f} {cells[-1].image:7.0f}", flush=True)
    if arguments.json:
        write_text(arguments.json, json.dumps([asdict(cell) for cell in cells], indent=1))
    engine.close()


def kinds(size: tuple[int, int], label: str) -> list[tuple[Kind, int]]:
    """The kinds of request, each with its number of images."""
    rng = np.random.default_rng(0)
    jpegs = [encoded(rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)) for _ in range(MANY)]
    array = io.BytesIO()
    np.save(array, rng.integers(0, 256, (MANY, *size, 3), dtype=np.uint8))
    parts = [b'--x\r\nContent-Disposition: form-data; name="i"; filename="i"\r\n\r\n' + one + b"\r\n" for one in jpegs]
    form = b"".join(parts) + b"--x--\r\n"
    one_json, many_json = (
        json.dumps({"input": [base64.b64encode(jpeg).decode() for jpeg in some], "encoding_format": "base64"}).encode()
        for some in (jpegs[:1], jpegs)
    )
    embed, classify = "/v1/embeddings", "/v1/classify"
    return [
        (Kind("a JPEG → float", embed, jpegs[0], "image/jpeg"), 1),
        (Kind("a JPEG → classification", classify, jpegs[0], "image/jpeg"), 1),
        (Kind("JSON with a JPEG → base64", embed, one_json, JSON), 1),
        (Kind("JSON with 32 JPEGs → base64", embed, many_json, JSON), MANY),
        (Kind("a form with 32 JPEGs → base64", f"{embed}?encoding_format=base64", form, FORM), MANY),
        (Kind("an array of 32 → float", embed, array.getvalue(), NPY), MANY),
        (Kind("an array of 32 → base64", f"{embed}?encoding_format=base64", array.getvalue(), NPY), MANY),
        (Kind("an array of 32 → array", embed, array.getvalue(), NPY, NPY), MANY),
        (Kind("an array of 32 → classifications", classify, array.getvalue(), NPY), MANY),
        (Kind("an array of 32 → verifications", "/v1/verify?label=" + label, array.getvalue(), NPY), MANY),
    ]


def encoded(pixels: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def asking(app: Starlette, kind: Kind) -> Callable[[], Awaitable[None]]:
    """Sends one such request to the application."""
    path, _, query = kind.path.partition("?")
    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "scheme": "http",
        "query_string": query.encode(),
        "headers": [(b"content-type", kind.content_type.encode()), (b"accept", kind.accept.encode())],
        "server": ("here", 80),
        "client": ("here", 1),
    }

    async def ask() -> None:
        messages = iter([{"type": "http.request", "body": kind.body}])

        async def receive() -> Any:
            return next(messages, None) or await asyncio.Event().wait()

        async def send(message: Any) -> None:
            if message.get("status", 200) != 200:
                raise SystemExit(f"{kind.name}: answered with {message['status']}")

        await app(dict(scope), receive, send)

    return ask


async def measured(
    name: str, images: int, ask: Callable[[], Awaitable[None]], runs: int, concurrency: int, seconds: float = 1.0
) -> Cell:
    """Run for about `seconds` a few times; the first does not count."""
    times = []
    for run in range(runs + 1):
        end, began = time.perf_counter() + seconds, time.process_time()

        async def work(end: float) -> int:
            asked = 0
            while time.perf_counter() < end:
                await ask()
                asked += 1
            return asked

        count = sum(await asyncio.gather(*(work(end) for _ in range(concurrency))))
        if run:
            times.append((time.process_time() - began) / count * 1e6)
    typical = statistics.median(times)
    return Cell(name, images, typical, typical / images)


if __name__ == "__main__":
    uvloop.run(main())
