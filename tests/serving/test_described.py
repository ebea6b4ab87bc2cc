"""Requests made from the service's own description by schemathesis: none of 10,000 is answered with a server error.

uv run pytest -m acceptance tests/serving/test_described.py -s
"""

import re
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import psutil
import pytest

from coterie.bundle import Bundle

REQUESTS, EXAMPLES, WARM_UP_EXAMPLES = 10_000, 700, 30
SETTLED_SECONDS, GROWTH = 5.0, 1.1


def describe(url: str, examples: int, folder: Path) -> int:
    """Have every operation asked; how many requests that were."""
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json", "--no-color", "--seed", "1"]
    command += ["--max-examples", str(examples), "--checks", "not_a_server_error"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:]
    (count,) = re.findall(r"([\d,]+) generated", done.stdout)
    return int(count.replace(",", ""))


def settled(worker: psutil.Process) -> int:
    """Bytes that the worker holds once it rests."""
    time.sleep(SETTLED_SECONDS)
    return worker.memory_info().rss


@pytest.mark.acceptance
@pytest.mark.timeout(3600)
def test_whatever_the_description_allows_or_forbids_is_answered(
    tiny_bundle: Bundle, run_service: Callable[..., AbstractContextManager[Any]], tmp_path: Path
) -> None:
    with run_service(tiny_bundle) as service:
        (worker,) = service.workers()
        first = describe(service.url, WARM_UP_EXAMPLES, tmp_path)
        before = settled(worker)
        asked = describe(service.url, EXAMPLES, tmp_path)
        after = settled(worker)
        print(f"\n{first} and {asked} requests; {before / 2**20:.0f} MiB between them, {after / 2**20:.0f} after")
        assert asked >= REQUESTS
        assert service.workers() == [worker] and service.ready()
        assert after <= GROWTH * before
