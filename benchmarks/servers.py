"""Servers to be measured, each in processes of its own: the service, and others with the same encoder."""

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.load import request

__all__ = ["EMBED", "FORM", "JPEG", "NPY", "PEERS", "Peer", "Server", "coterie", "form", "free_port", "peer"]

NPY, FORM, JPEG, JSON = "application/x-npy", "multipart/form-data; boundary=x", "image/jpeg", "application/json"
EMBED = "/v1/embeddings"


@dataclass(frozen=True)
class Server:
    """A server that is running, and what it is asked."""

    name: str
    process: "subprocess.Popen[bytes]"
    port: int
    requests: Sequence[bytes]

    def stand_still(self, still: bool) -> None:
        signal_all(self.process.pid, signal.SIGSTOP if still else signal.SIGCONT)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def signal_all(pid: int, what: signal.Signals) -> None:
    """Send a signal to a process and all that it started."""
    with suppress(psutil.NoSuchProcess):
        parent = psutil.Process(pid)
        for process in (*parent.children(recursive=True), parent):
            with suppress(psutil.NoSuchProcess):
                process.send_signal(what)


@contextmanager
def running(name: str, command: list[str], environment: dict[str, str], port: int, ready: str) -> Iterator[Any]:
    """A server in a process group of its own, once it answers."""
    Path(environment["LOG"]).parent.mkdir(parents=True, exist_ok=True)
    log = Path(environment["LOG"]).open("wb")  # noqa: SIM115  closed at the end
    process = subprocess.Popen(
        command, env={**os.environ, **environment}, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        for _ in range(600):
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}{ready}", timeout=2) as answer:
                    if answer.status == 200:
                        break
            except OSError:
                time.sleep(0.1)
            if process.poll() is not None:
                break
        else:
            raise SystemExit(f"{name} did not start: see {log.name}")
        if process.poll() is not None:
            raise SystemExit(f"{name} ended: {Path(log.name).read_text()[-2000:]}")
        yield process
    finally:
        signal_all(process.pid, signal.SIGCONT)
        signal_all(process.pid, signal.SIGKILL)
        process.wait()
        log.close()


@contextmanager
def coterie(bundle: Path, folder: Path, port: int, requests: Sequence[bytes], workers: int = 1) -> Iterator[Server]:
    command = [sys.executable, "-m", "coterie_cli", "serve", str(bundle), "--port", str(port)]
    command += ["--workers", str(workers)]
    name = "coterie" if workers == 1 else f"coterie, {workers} workers"
    environment = {
        "LOG": str(folder / f"coterie-{port}.log"),
        "COTERIE_STATE": str(folder / "state"),
        "COTERIE_DEVICE": "cpu",
        "BENTOML_HOME": str(folder / "bentoml"),
    }
    with running(name, command, environment, port, "/readyz") as process:
        yield Server(name, process, port, requests)


@dataclass(frozen=True)
class Peer:
    """Another server with its settings."""

    name: str
    kind: str
    body: str
    settings: dict[str, str] = field(default_factory=dict)


PEERS = (
    Peer("LitServe, no delay", "litserve", "form", {"PEER_TIMEOUT": "0"}),
    Peer("LitServe, no delay, JSON", "litserve", "json", {"PEER_TIMEOUT": "0"}),
    Peer("LitServe, 2 ms, JSON", "litserve", "json", {"PEER_TIMEOUT": "0.002"}),
    Peer("LitServe, 2 workers, JSON", "litserve", "json", {"PEER_TIMEOUT": "0", "PEER_WORKERS": "2"}),
    Peer("LitServe, ZeroMQ, JSON", "litserve", "json", {"PEER_TIMEOUT": "0", "PEER_FAST_QUEUE": "1"}),
    Peer("BentoML, batchable", "bentoml", "form"),
    Peer("BentoML, batchable, 2 workers", "bentoml", "form", {"PEER_WORKERS": "2"}),
)


@contextmanager
def peer(one: Peer, python: Path, model: Path, folder: Path, port: int, jpegs: Sequence[bytes]) -> Iterator[Server]:
    code = Path(__file__).parent / "peers"
    environment = {
        "LOG": str(folder / f"{one.kind}-{port}.log"),
        "PYTHONPATH": str(code),
        "PEER_MODEL": str(model),
        "PEER_BATCH": "32",
        "PEER_PORT": str(port),
        "BENTOML_HOME": str(folder / "bentoml-peer"),
        "BENTOML_DO_NOT_TRACK": "True",
        **one.settings,
    }
    if one.kind == "bentoml":
        command = ["-m", "bentoml", "serve", "bento:Embed", "--working-dir", str(code), "--host", "127.0.0.1"]
        command, ready, path, name = [*command, "--port", str(port)], "/readyz", "/embed", "images"
    else:
        command, ready, path, name = [str(code / "lit.py")], "/health", "/predict", "image"
    if one.body == "json":
        bodies = [json.dumps({"image": base64.b64encode(jpeg).decode()}).encode() for jpeg in jpegs]
        requests = [request(path, body, JSON) for body in bodies]
    else:
        requests = [request(path, form([jpeg], name), FORM) for jpeg in jpegs]
    with running(one.name, [str(python), *command], environment, port, ready) as process:
        yield Server(one.name, process, port, requests)


def form(images: Sequence[bytes], name: str = "images") -> bytes:
    head = f'--x\r\nContent-Disposition: form-data; name="{name}"; filename="i.jpg"\r\nContent-Type: {JPEG}\r\n\r\n'
    return b"".join(head.encode() + image + b"\r\n" for image in images) + b"--x--\r\n"
