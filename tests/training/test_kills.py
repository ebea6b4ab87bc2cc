"""A run that is killed again and again ends as if nothing had happened. Slow: `uv run pytest -m acceptance`."""

import contextlib
import hashlib
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from training.run import Run

KILLS = 10


@pytest.mark.acceptance
@pytest.mark.timeout(1800)
def test_ten_kills_at_random_moments_do_not_change_the_weights(tiny_run_tree, tmp_path):
    settings = ["encoder.width=16", "schedule.epochs=300"]

    def command(out):
        words = ["train", str(tiny_run_tree), "--recipe", "digits", "--out", str(tmp_path / out), "--resume"]
        chosen = [word for setting in settings for word in ("--set", setting)]
        return [sys.executable, "-c", "from coterie_cli.main import main; main()", *words, *chosen]

    def start(out):
        return subprocess.Popen(command(out), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def weights(out):
        return hashlib.sha256((tmp_path / out / "encoder.safetensors").read_bytes()).hexdigest()

    def epochs():
        return len(Run(tmp_path / "killed").metrics()) if (tmp_path / "killed/metrics.jsonl").exists() else 0

    began = time.monotonic()
    whole = start("whole")
    _, errors = whole.communicate()
    assert whole.returncode == 0, errors
    seconds = time.monotonic() - began

    moments = random.Random(0)
    killed_at = []
    for kill in range(KILLS):
        process, before = start("killed"), epochs()
        # But for the first, which may come before anything is done, each comes at most a tenth of the run after an
        # epoch was done.
        while kill and epochs() == before and process.poll() is None:
            os.sched_yield()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=moments.uniform(0, seconds / KILLS))
            pytest.fail(f"the run ended before it was killed {KILLS} times, after epochs {killed_at}")
        process.send_signal(signal.SIGKILL)
        process.communicate()
        checkpoint = Run(tmp_path / "killed").load_checkpoint()
        killed_at.append(checkpoint["epochs_done"] if checkpoint else 0)

    last = start("killed")
    _, errors = last.communicate()
    assert last.returncode == 0, errors
    print(f"killed after epochs {killed_at}")
    assert killed_at[-1] > 0
    assert weights("killed") == weights("whole")
