"""The real service in its processes: who is let in, what is counted, how it begins and ends."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from coterie.bundle import Bundle
from serving.keys import create_key, revoke_key
from serving.safety import metrics_folder
from serving.settings import Settings

PROJECT = Path(__file__).resolve().parents[2]
DEADLINE = 60.0


def environment(home: Path, **changes: str) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("COTERIE_", "BENTOML_"))}
    return inherited | {"BENTOML_HOME": str(home / "bentoml"), "COTERIE_STATE": str(home / "state")} | changes


class Service:
    """A running service."""

    def __init__(self, home: Path, bundle: Bundle, host: str, **changes: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.log, self.state = home / "log", home / "state"
        command = [sys.executable, "-m", "bentoml", "serve", "serving.service:Coterie", "--port", str(self.port)]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*command, "--host", host],
                cwd=PROJECT,
                env=environment(home, COTERIE_BUNDLE=str(bundle.path), **changes),
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self.url = f"http://127.0.0.1:{self.port}"
        self.until(lambda: self.get("/readyz") == 200)

    def get(self, path: str, token: str | None = None) -> int | None:
        """The status of an answer over a connection of its own, so that any worker may give it; None without one."""
        try:
            return self.ask("GET", path, token).status_code
        except httpx.TransportError:
            return None

    def ask(self, method: str, path: str, token: str | None = None, **content: object) -> httpx.Response:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        with httpx.Client(base_url=self.url, timeout=20, trust_env=False, headers=headers) as client:
            return client.request(method, path, **content)  # type: ignore[arg-type]

    def until(self, true: Callable[[], bool], seconds: float = DEADLINE) -> None:
        end = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < end and self.process.poll() is None, self.log.read_text()
            time.sleep(0.02)

    def workers(self) -> list[psutil.Process]:
        found = []
        for child in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if any("worker" in word for word in child.cmdline()):
                    found.append(child)
            except psutil.NoSuchProcess:  # a zombie, too
                continue
        return found

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)


@contextmanager
def running(home: Path, bundle: Bundle, host: str = "127.0.0.1", **changes: str) -> Iterator[Service]:
    service = Service(home, bundle, host, **changes)
    try:
        yield service
        service.stop()
        assert service.process.wait(30) == 0, service.log.read_text()
    finally:
        service.process.kill()


def test_two_workers_obey_the_same_keys_and_count_together(tiny_bundle: Bundle, digit_images, tmp_path: Path) -> None:
    two = {"BENTOML_CONFIG_OPTIONS": "services.Coterie.workers=2"}
    with running(tmp_path, tiny_bundle, **two) as service:
        service.until(lambda: service.log.read_text().count("Service Coterie initialized") == 2)
        for _ in range(30):
            assert service.ask("POST", "/v1/classify", content=digit_images.images[0]).status_code == 200
        assert service.ask("DELETE", "/v1/classes/3").status_code == 200
        # Notes are written down soon, not at once.
        wanted = 'coterie_requests_total{method="POST",route="/v1/classify",status="200"} 30.0'
        service.until(lambda: wanted in service.ask("GET", "/metrics").text)
        assert re.search(r"coterie_bundle_workers{.*} 2.0", service.ask("GET", "/metrics").text)

        key, token = create_key(service.state / "keys.json", "change")
        service.until(lambda: {service.get("/v1/classes") for _ in range(20)} == {401})
        for _ in range(20):
            assert (service.get("/v1/classes"), service.get("/v1/classes", token)) == (401, 200)
            assert service.ask("POST", "/embed", json={"images": []}).status_code == 401
        assert service.ask("DELETE", "/v1/classes/4", token).status_code == 200
        revoke_key(service.state / "keys.json", key.id)
        service.until(lambda: {service.get("/v1/classes", token) for _ in range(20)} == {401})

        killed = service.workers()[0]
        killed.kill()
        # Of a process that looks every 3 seconds; BentoML by itself would take more than 10.
        service.until(lambda: len(service.workers()) == 2 and killed not in service.workers(), seconds=10)
        service.until(lambda: service.log.read_text().count("Service Coterie initialized") == 3)
    rows = [json.loads(line) for line in (service.state / "audit.jsonl").read_text().splitlines()]
    changes = [(row["action"], row["target"], row["key"]) for row in rows]
    assert changes == [("forget", "3", None), ("forget", "4", key.id)]
    lines = [json.loads(line) for line in service.log.read_text().splitlines() if line.startswith("{")]
    assert sum(line["route"] == "/v1/classify" for line in lines) == 30
    assert not list(service.state.glob(".metrics-*"))


def test_on_all_interfaces_nobody_changes_anything_without_a_key(
    tiny_bundle: Bundle, digit_images, tmp_path: Path
) -> None:
    with running(tmp_path, tiny_bundle, "0.0.0.0", COTERIE_REQUEST_LOG="0") as service:
        assert service.ask("POST", "/v1/classify", content=digit_images.images[0]).status_code == 200
        assert service.ask("DELETE", "/v1/classes/3").status_code == 401
        assert service.ask("POST", "/v1/bundle", json={"bundle": "x"}).status_code == 401
    assert not [line for line in service.log.read_text().splitlines() if line.startswith("{")]


def test_what_is_under_way_when_the_service_is_told_to_end_is_finished(
    tiny_bundle: Bundle, digit_images, tmp_path: Path
) -> None:
    image = digit_images.images[0]
    with (
        running(tmp_path, tiny_bundle) as service,
        socket.create_connection(("127.0.0.1", service.port), timeout=20) as connection,
    ):
        head = f"POST /v1/classify HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(image)}\r\n\r\n"
        connection.sendall(head.encode() + image[:50])
        service.until(lambda: service.get("/readyz") == 200)
        service.stop()
        service.until(lambda: service.get("/readyz") != 200)
        connection.sendall(image[50:])
        assert connection.makefile("rb").readline().startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    "harm", ["no key file", "a damaged key file", "a damaged default key file", "no state folder", "a damaged store"]
)
def test_what_would_keep_it_from_starting_ends_it_with_one_line(tiny_bundle: Bundle, tmp_path: Path, harm: str) -> None:
    file = tmp_path / "state" / "keys.json"
    file.parent.mkdir()
    changes = {"COTERIE_KEYS": str(file)} if harm in ("no key file", "a damaged key file") else {}
    if harm == "a damaged store":
        file = tmp_path / "state" / tiny_bundle.manifest.name / "gallery.sqlite"
        file.parent.mkdir()
        file.write_bytes(b"no database" * 1000)
    elif "damaged" in harm:
        file.write_text("{")
    elif harm == "no state folder":
        file.write_text("a file")
        changes = {"COTERIE_STATE": str(file / "state")}
    done = subprocess.run(
        [sys.executable, "-m", "bentoml", "serve", "serving.service:Coterie"],
        cwd=PROJECT,
        env=environment(tmp_path, COTERIE_BUNDLE=str(tiny_bundle.path), **changes),
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("coterie: ") and str(file) in line


def test_counts_that_a_killed_service_left_are_cleared_away_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    kept = [f".metrics-{os.getpid()}-abcdefgh", "metrics-1-x", f"metrics-{ended.pid}-abcdefgh", ".metrics-x-abcdefgh"]
    for name in [f".metrics-{ended.pid}-abcdefgh", *kept]:
        (tmp_path / name).mkdir()
    monkeypatch.setenv("COTERIE_METRICS", "")
    metrics_folder(Settings.from_environment({"COTERIE_STATE": str(tmp_path)}))
    made = Path(os.environ["COTERIE_METRICS"])
    assert made.is_dir() and {entry.name for entry in tmp_path.iterdir()} == {*kept, made.name}


def test_usage_is_not_reported_unless_somebody_wants_it() -> None:
    script = (
        "import serving.service; from bentoml._internal.utils.analytics.usage_stats import do_not_track;"
        "print(do_not_track())"
    )
    for changes, silent in (({}, "True"), ({"BENTOML_DO_NOT_TRACK": "False"}, "False")):
        told = subprocess.run(
            [sys.executable, "-c", script],
            cwd=PROJECT,
            env=environment(PROJECT, **changes),
            capture_output=True,
            text=True,
            check=True,
        )
        assert told.stdout.strip() == silent
