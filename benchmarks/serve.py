"""The service against the limit of the machine, and beside other servers of the same encoder.

    python -m benchmarks.serve limit --images CIFAR [--photos PHOTOS] [--runs 5] [--json FILE]
    python -m benchmarks.serve peers --images CIFAR --peers PEERS/bin/python [--runs 5] [--json FILE]

CIFAR holds one folder of images per class, PHOTOS likewise; PEERS is an environment of its own:

    uv venv PEERS
    uv pip install --python PEERS litserve "bentoml>=1.4.39,<1.5" onnxruntime-gpu pillow uvloop httptools

`limit`: images a second over processors ÷ (core-seconds of decoding + core-seconds of the encoder at its best batch)
for an image, both on one thread and measured in the same session, and latencies in open loop at 70 % of that rate.
Service and client share the processors; what the client took is printed. `peers`: requests a second of a light encoder
(the demo's network), one JPEG each, in turns with LitServe and plain BentoML, each at the best of several settings;
99th percentiles in open loop at 70 % of what the slowest of the three manages; and how soon a lone request is as fast
as ever after a burst. Whoever is not asked stands still. Weights are random. Exits with 1 where a goal is missed.
"""

import argparse
import io
import json
import multiprocessing
import os
import statistics
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks.embed import decoding_seconds, encoding_seconds, make_bundle
from benchmarks.load import Load, Measured, drive, request
from benchmarks.servers import EMBED, FORM, JPEG, NPY, PEERS, Server, coterie, form, free_port, peer
from coterie.bundle import Bundle
from coterie.encoder import Encoder
from coterie.files import write_text
from coterie.images import Preprocessing
from coterie.machine import processors, versions

LIGHT, LIGHT_SIDE = "cifar_resnet8", 16
CLIENTS = 32
# What is asked of the service; see docs/acceptance.md.
TIMES_LITSERVE, TIMES_BENTOML, SHARE_OF_CAPACITY = 1.5, 2.0, 0.7
OPEN_SECONDS = 20.0  # so that slow encoders, too, answer some dozens
REST_WITHIN, REST_SECONDS = 1.2, 1.0


@dataclass(frozen=True)
class Kind:
    """How images come, many to a request."""

    name: str
    images: int
    clients: int
    goal: float
    decodes: bool = True


LIMITS = {
    "resnet18": (
        Kind("arrays of 32, arrays back", 32, 4, 0.95, decodes=False),
        Kind("forms of 16 JPEGs", 16, 4, 0.92),
        Kind("one JPEG", 1, CLIENTS, 0.85),
    ),
    "resnet50": (Kind("forms of 8 photographs", 8, 4, 0.95),),
}


def requests_of(kind: Kind, files: Sequence[Path], side: int) -> list[bytes]:
    """Sixteen or more different requests."""
    count = max(16, 64 // kind.images)
    images = [files[row % len(files)].read_bytes() for row in range(count * kind.images)]
    groups = [images[start : start + kind.images] for start in range(0, len(images), kind.images)]
    if not kind.decodes:
        rng, made = np.random.default_rng(0), []
        for _ in range(count):
            buffer = io.BytesIO()
            np.save(buffer, rng.integers(0, 256, (kind.images, side, side, 3), dtype=np.uint8))
            made.append(request(EMBED, buffer.getvalue(), NPY, NPY))
        return made
    if kind.images == 1:
        return [request(EMBED, image, JPEG) for (image,) in groups]
    return [request(f"{EMBED}?encoding_format=base64", form(group), FORM) for group in groups]


class Client:
    """Asks from a process of its own."""

    def __init__(self) -> None:
        self._pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))

    def ask(self, server: Server, seconds: float, **how: Any) -> Measured:
        measured = self._pool.submit(drive, Load(server.port, server.requests, seconds, **how)).result()
        wrong = {status: count for status, count in measured.statuses.items() if status != 200}
        if wrong or not measured.statuses:
            raise SystemExit(f"{server.name} answered {dict(measured.statuses)}")
        return measured

    def close(self) -> None:
        self._pool.shutdown()


def images_in(folder: Path, count: int) -> list[Path]:
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in (".jpg", ".jpeg"))
    np.random.default_rng(0).shuffle(files)  # type: ignore[arg-type]
    return files[:count]


def limit(arguments: argparse.Namespace, folder: Path, client: Client) -> dict[str, Any]:
    """Each kind of request in turns with the limit."""
    found: dict[str, Any] = {}
    cases = [("resnet18", 32, arguments.images)]
    if arguments.photos:
        cases.append(("resnet50", 224, arguments.photos))
    for network, side, data in cases:
        bundle = make_bundle(network, side, data, folder / network)
        files = images_in(data, 512)
        one_thread = Encoder(bundle.path / "model.onnx", device="cpu", threads=1)
        preprocessing: Preprocessing = bundle.manifest.encoder.preprocessing
        kinds = LIMITS[network]
        measured: dict[str, list[Measured]] = {kind.name: [] for kind in kinds}
        opened: dict[str, Measured] = {}
        decoding, encoding = list[float](), list[dict[int, float]]()
        with coterie(bundle.path, folder / f"{network}-service", free_port(), (), arguments.workers) as server:
            asked = {
                kind.name: replace(server, name=kind.name, requests=requests_of(kind, files, side)) for kind in kinds
            }
            for _ in range(arguments.runs):
                server.stand_still(True)
                decoding.append(decoding_seconds(files, preprocessing))
                encoding.append(encoding_seconds(one_thread))
                server.stand_still(False)
                for kind in kinds:
                    run = client.ask(asked[kind.name], arguments.seconds, clients=kind.clients)
                    measured[kind.name].append(run)
            for kind in kinds:
                rate = SHARE_OF_CAPACITY * statistics.median(run.rate for run in measured[kind.name])
                opened[kind.name] = client.ask(asked[kind.name], max(arguments.seconds, OPEN_SECONDS), rate=rate)
        best = min(statistics.median(seconds[batch] for seconds in encoding) for batch in encoding[0])
        for kind in kinds:
            needed = best + (statistics.median(decoding) if kind.decodes else 0.0)
            rates = [kind.images * run.rate for run in measured[kind.name]]
            rate, most = statistics.median(rates), processors() / needed
            found[f"{network} at {side}, {kind.name}"] = {
                "images_per_second": rate,
                "runs": rates,
                "limit": most,
                "share_of_limit": rate / most,
                "goal": kind.goal,
                "clients": kind.clients,
                "workers": arguments.workers,
                "p50_ms": 1e3 * statistics.median(run.percentile(50) for run in measured[kind.name]),
                "p99_ms": 1e3 * statistics.median(run.percentile(99) for run in measured[kind.name]),
                "open_requests_per_second": SHARE_OF_CAPACITY * rate / kind.images,
                "open_p50_ms": 1e3 * opened[kind.name].percentile(50),
                "open_p99_ms": 1e3 * opened[kind.name].percentile(99),
                "client_cores": statistics.median(run.client_seconds / run.seconds for run in measured[kind.name]),
            }
    return found


def peers(arguments: argparse.Namespace, folder: Path, client: Client) -> dict[str, Any]:
    """Closed loop in turns, then open loop in turns, then a lone client after a burst."""
    bundle: Bundle = make_bundle(LIGHT, LIGHT_SIDE, arguments.images, folder / "light")
    jpegs = [file.read_bytes() for file in images_in(arguments.images, 128)]
    with ExitStack() as stack:
        requests = [request(EMBED, jpeg, JPEG) for jpeg in jpegs]
        servers = [
            stack.enter_context(coterie(bundle.path, folder / str(workers), free_port(), requests, workers))
            for workers in (1, 2)
        ]
        for server in servers:
            server.stand_still(True)
        for one in PEERS:
            port = free_port()
            others = peer(one, arguments.peers, bundle.path / "model.onnx", folder, port, jpegs)
            servers.append(stack.enter_context(others))
            servers[-1].stand_still(True)
        closed = in_turns(client, servers, arguments, clients=CLIENTS)
        rates = {name: statistics.median(run.rate for run in runs) for name, runs in closed.items()}
        best = [max((name for name in rates if name.startswith(kind)), key=rates.__getitem__) for kind in KINDS]
        chosen = [server for server in servers if server.name in best or server.name.startswith(KINDS[0])]
        rate = SHARE_OF_CAPACITY * min(rates[name] for name in best)
        opened = in_turns(client, chosen, arguments, rate=rate)
        chosen[0].stand_still(False)
        lone = after_a_burst(client, chosen[0])
    return {
        "requests_per_second": {name: [run.rate for run in runs] for name, runs in closed.items()},
        "medians": rates,
        "best": best,
        "closed_p99_ms": {n: 1e3 * statistics.median(r.percentile(99) for r in runs) for n, runs in closed.items()},
        "open_rate": rate,
        "open_p50_ms": {n: 1e3 * statistics.median(r.percentile(50) for r in runs) for n, runs in opened.items()},
        "open_p99_ms": {n: 1e3 * statistics.median(r.percentile(99) for r in runs) for n, runs in opened.items()},
        "after_a_burst": lone,
    }


KINDS = ("coterie", "LitServe", "BentoML")


def in_turns(
    client: Client, servers: Sequence[Server], arguments: argparse.Namespace, **how: Any
) -> dict[str, list[Measured]]:
    measured: dict[str, list[Measured]] = {server.name: [] for server in servers}
    for _ in range(arguments.runs):
        for server in servers:
            server.stand_still(False)
            measured[server.name].append(client.ask(server, arguments.seconds, **how))
            server.stand_still(True)
    return measured


def after_a_burst(client: Client, server: Server) -> dict[str, Any]:
    """Median milliseconds of a lone client at rest, and in each quarter of a second after a burst."""
    rest = client.ask(server, 3.0).percentile(50)
    client.ask(server, 3.0, clients=4 * CLIENTS, warm_up=0.0)
    lone = client.ask(server, 3.0, warm_up=0.0)
    quarters = [
        statistics.median(
            seconds for when, seconds in zip(lone.began, lone.latencies, strict=True) if start <= when < start + 0.25
        )
        for start in np.arange(0, 3, 0.25)
    ]
    slow = next((number for number, median in enumerate(quarters) if median <= REST_WITHIN * rest), len(quarters))
    return {
        "rest_ms": 1e3 * rest,
        "quarters_ms": [1e3 * median for median in quarters],
        "back_after_seconds": 0.25 * slow,
    }


def missed(result: dict[str, Any]) -> list[str]:
    goals = [
        f"{name}: {one['share_of_limit']:.2f} of the limit, not {one['goal']}"
        for name, one in result.get("limit", {}).items()
        if one["share_of_limit"] < one["goal"]
    ]
    if found := result.get("peers"):
        _, lit_name, bento_name = found["best"]
        ours, lit, bento = (found["medians"][name] for name in found["best"])
        if ours < TIMES_LITSERVE * lit:
            goals.append(f"{ours / lit:.2f} times LitServe, not {TIMES_LITSERVE}")
        if ours < TIMES_BENTOML * bento:
            goals.append(f"{ours / bento:.2f} times BentoML, not {TIMES_BENTOML}")
        opened = found["open_p99_ms"]
        goals += [
            f"p99 in open loop of {own} is above that of {other}"
            for own, p99 in opened.items()
            for other in (lit_name, bento_name)
            if own.startswith(KINDS[0]) and opened[other] < p99
        ]
        if found["after_a_burst"]["back_after_seconds"] > REST_SECONDS:
            goals.append("a lone request is not as fast as at rest a second after a burst")
    return goals


def show(result: dict[str, Any]) -> None:
    for name, one in result.get("limit", {}).items():
        print(
            f"{name:40} {one['images_per_second']:8.0f} of {one['limit']:8.0f} images/s: {one['share_of_limit']:.2f} "
            f"(goal {one['goal']}), p50 {one['p50_ms']:.1f}, p99 {one['p99_ms']:.1f} ms, "
            f"in open loop {one['open_p50_ms']:.1f} and {one['open_p99_ms']:.1f} ms, "
            f"client {one['client_cores']:.2f} cores"
        )
    if found := result.get("peers"):
        for name, rate in found["medians"].items():
            opened = found["open_p99_ms"].get(name)
            more = f", in open loop p99 {opened:.1f} ms" if opened else ""
            print(f"{name:28} {rate:7.0f} requests/s, p99 {found['closed_p99_ms'][name]:6.1f} ms{more}")
        print(f"open loop at {found['open_rate']:.0f} requests/s; after a burst {found['after_a_burst']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["limit", "peers"])
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--photos", type=Path)
    parser.add_argument("--peers", type=Path)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--workers", type=int, default=processors(), help="of the service, for `limit`")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.what == "peers" and not arguments.peers:
        parser.error("--peers is missing: the Python of their environment")
    client = Client()
    with TemporaryDirectory() as folder:
        measure = {"limit": limit, "peers": peers}[arguments.what]
        found = measure(arguments, Path(folder), client)
    client.close()
    result = {arguments.what: found}
    show(result)
    if arguments.json:
        before = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
        circumstances = {
            "processors": processors(),
            "load_average": os.getloadavg(),
            "versions": versions("bentoml", "uvicorn", "starlette", "onnxruntime-gpu", "pillow", "numpy"),
        }
        before[arguments.what] = {"measured": found, "circumstances": circumstances}
        write_text(arguments.json, json.dumps(before, indent=1) + "\n")
    if failures := missed(result):
        sys.exit("\n".join(failures))


if __name__ == "__main__":
    main()
