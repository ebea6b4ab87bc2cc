"""The application in this process, on a real bundle, and what tests send to it."""

import base64
import io
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from starlette.testclient import TestClient

from coterie.bundle import Bundle
from coterie.images import Limits
from serving import schemas
from serving.engine import Engine
from serving.limits import RequestLimits
from serving.routes import build_app
from serving.served import Served


@pytest.fixture
def limits() -> RequestLimits:
    return RequestLimits(max_body=200_000, max_images=8, image=Limits(max_pixels=1_000_000))


@pytest.fixture
def engine(tiny_bundle: Bundle, tmp_path: Path, limits: RequestLimits) -> Iterator[Engine]:
    one = Engine(tiny_bundle, state=tmp_path, limits=limits, capacity=64)
    yield one
    one.close()


@pytest.fixture
def client(engine: Engine) -> Iterator[TestClient]:
    app = build_app()
    app.state.served = Served(engine)
    with TestClient(app, raise_server_exceptions=False) as one:
        yield one


@pytest.fixture
def data_uri() -> Callable[[bytes], str]:
    return lambda image: "data:image/png;base64," + base64.b64encode(image).decode()


@pytest.fixture(name="files")
def _files() -> Callable[[Sequence[bytes]], list[tuple[str, tuple[str, bytes]]]]:
    """A multipart form's files."""
    return lambda images: [("images", (f"{i}.png", image)) for i, image in enumerate(images)]


@pytest.fixture
def as_npy() -> Callable[[Any], bytes]:
    """An array as NumPy writes it."""

    def write(array: Any) -> bytes:
        buffer = io.BytesIO()
        np.save(buffer, array)
        return buffer.getvalue()

    return write


@pytest.fixture(name="error_of")
def _error_of() -> Callable[[Any, int], dict[str, Any]]:
    """The error in an answer of a given status, which is OpenAI's and tells nothing of the house."""

    def check(response: Any, status: int) -> dict[str, Any]:
        assert response.status_code == status, response.text
        assert response.headers["content-type"] == "application/json"
        answer = schemas.ErrorAnswer.model_validate(response.json())
        assert response.json() == answer.model_dump()
        for forbidden in ("Traceback", "/home", "/tmp", ".py", "onnx", "PIL", "Pillow", "pydantic", "starlette"):
            assert forbidden not in response.text
        return response.json()["error"]

    return check


@pytest.fixture(name="call")
def _call() -> Callable[..., Any]:
    """Calls the application as a server does."""
    return call


async def call(engine: Engine, path: str, receive: Any, headers: dict[str, str] | None = None) -> list[dict[str, Any]]:
    """Call the application as a server does."""
    app = build_app()
    app.state.served = Served(engine)
    sent: list[dict[str, Any]] = []
    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "scheme": "http",
        "query_string": b"",
        "headers": [(name.encode(), value.encode()) for name, value in (headers or {}).items()],
        "server": ("test", 80),
        "client": ("test", 1),
    }

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    await app(scope, receive, send)
    return sent


@dataclass(frozen=True)
class Running:
    """A service in processes of its own.

    Attributes:
        process: the parent of its workers.
    """

    port: int
    process: psutil.Process
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def workers(self) -> list[psutil.Process]:
        """The processes that answer, as many as live."""
        found = []
        for child in self.process.children():
            try:
                if "worker" in " ".join(child.cmdline()):
                    found.append(child)
            except psutil.Error:
                continue  # it ended meanwhile
        return found

    def ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/readyz", trust_env=False).status_code == 200
        except httpx.TransportError:
            return False


@pytest.fixture
def run_service(tmp_path: Path) -> Callable[..., AbstractContextManager[Running]]:
    """Runs `coterie serve` as users do: `with run_service(bundle, workers=2, COTERIE_…="…") as service:`."""

    @contextmanager
    def run(bundle: Bundle, *, workers: int = 1, **changes: str) -> Iterator[Running]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("COTERIE_", "BENTOML_"))}
        own = {"BENTOML_HOME": str(tmp_path / "bentoml"), "COTERIE_STATE": str(tmp_path / "service")}
        command = [sys.executable, "-m", "coterie_cli", "serve", str(bundle.path), "--port", str(port)]
        command += ["--workers", str(workers)]
        log = tmp_path / "service.log"
        with log.open("a") as output:
            process = subprocess.Popen(command, env=inherited | own | changes, stdout=output, stderr=subprocess.STDOUT)
        try:
            service = Running(port, psutil.Process(process.pid), log)
            end = time.monotonic() + 60
            while not (service.ready() and log.read_text().count(f"serving {bundle.manifest.name} (") >= workers):
                assert time.monotonic() < end and process.poll() is None, log.read_text()
                time.sleep(0.05)
            yield service
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                code = process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
        assert code == 0, log.read_text()

    return run
