"""Two workers of the real service: what one is told, the other knows."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from coterie.bundle import Bundle, write_bundle

PROJECT = Path(__file__).resolve().parents[2]
DEADLINE = 60.0
# Each asks over a connection of its own, which either worker may take.
ASKED = 30


@contextmanager
def two_workers(home: Path, **changes: str) -> Iterator[str]:
    """Run the service with two workers until the block ends; yields its URL once it is ready."""
    home.mkdir(exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("COTERIE_", "BENTOML_"))}
    environment = {
        "BENTOML_HOME": str(home / "bentoml"),
        "BENTOML_CONFIG_OPTIONS": "services.Coterie.workers=2",
        "COTERIE_STATE": str(home / "state"),
        "COTERIE_THREADS": "1",
    }
    command = [sys.executable, "-m", "bentoml", "serve", "serving.service:Coterie", "--port", str(port)]
    with (home / "log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=PROJECT, env=inherited | environment | changes, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            url = f"http://127.0.0.1:{port}"
            # Each worker says so once.
            until(lambda: (home / "log").read_text().count("serving tiny-digits (") >= 2 and answered(url))
            yield url
        except BaseException:
            print((home / "log").read_text())
            raise
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(20)


def answered(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz", trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def ask(url: str, path: str, **options: Any) -> list[httpx.Response]:
    """Answers over as many connections."""
    answers = [httpx.request("GET", url + path, trust_env=False, **options) for _ in range(ASKED)]
    assert {answer.status_code for answer in answers} == {200}
    return answers


def ids(url: str) -> set[str]:
    return {answer.headers["x-bundle-id"] for answer in ask(url, "/v1/models")}


@pytest.fixture
def bundles(tiny_bundle: Bundle, tmp_path: Path) -> Path:
    folder = tmp_path / "bundles"
    shutil.copytree(tiny_bundle.path, folder / "first")
    manifest = tiny_bundle.manifest.model_copy(update={"provenance": {"made_by": "the tests, once more"}})
    write_bundle(
        folder / "second",
        model=(tiny_bundle.path / "model.onnx").read_bytes(),
        snapshot=tiny_bundle.base,
        card="# Second\n",
        manifest=manifest,
    )
    return folder


def test_what_one_worker_is_told_counts_in_both_and_after_a_restart(
    bundles: Path, digit_images, tmp_path: Path
) -> None:
    first, second = (Bundle.open(bundles / name, verify=False).manifest.id for name in ("first", "second"))
    settings = {"COTERIE_BUNDLE": str(bundles / "first"), "COTERIE_BUNDLES": str(bundles)}
    files = [("images", (f"{row}.png", image)) for row, image in enumerate(digit_images.of("8").images[:5])]
    with two_workers(tmp_path / "home", **settings) as url:
        assert ids(url) == {first}
        enrolled = httpx.post(f"{url}/v1/classes/8/examples", files=files, trust_env=False)
        assert enrolled.status_code == 201
        for answer in ask(url, f"/v1/gallery/{enrolled.json()['data'][0]['id']}"):
            assert answer.json()["label"] == "8"
        swapped = httpx.post(f"{url}/v1/bundle", json={"bundle": "second"}, timeout=60, trust_env=False)
        assert swapped.json()["id"] == second
        until(lambda: ids(url) == {second})
        refused = httpx.post(f"{url}/v1/bundle", json={"bundle": "../home"}, trust_env=False)
        assert refused.status_code == 422
    with two_workers(tmp_path / "home", **settings) as url:
        assert ids(url) == {second}
        assert {row["label"] for row in ask(url, "/v1/classes")[0].json()["data"]} >= {"8"}
    with two_workers(tmp_path / "home", **settings | {"COTERIE_BUNDLE": str(bundles / "second")}) as url:
        assert ids(url) == {second}
    with two_workers(tmp_path / "home", **settings) as url:  # the operator's newer word
        assert ids(url) == {first}
