"""Training over two ranks as torchrun starts them, on CPUs."""

import contextlib
import os
import signal
import subprocess
import sys

import psutil
import pytest

from training.recipe import load_recipe
from training.run import Run

SETTINGS = ["encoder.width=8", "schedule.epochs=4", "schedule.warmup_epochs=1", "batch.size=64"]


def launch(tree, out, *words, settings=SETTINGS):
    chosen = [word for setting in settings for word in ("--set", setting)]
    command = ["--standalone", "--nproc-per-node=2", "-m", "coterie_cli", "train", str(tree), "--recipe", "digits"]
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *command, "--out", str(out), *chosen, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def finish(process):
    try:
        output, _ = process.communicate(timeout=150)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, output


@pytest.mark.timeout(200)
def test_two_ranks_train_one_run(tiny_run_tree, tmp_path):
    code, output = finish(launch(tiny_run_tree, tmp_path / "run"))
    assert code == 0, output
    run = Run.open(tmp_path / "run")
    rows = run.metrics()
    assert [row["epoch"] for row in rows] == [0, 1, 2, 3]
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert rows[-1]["knn_top1"] > 0.4  # eight classes: chance is 0.125
    assert run.recipe() == load_recipe("digits", SETTINGS)
    assert output.count("Trained on") == 1  # the first rank speaks for all


@pytest.mark.timeout(200)
def test_bad_input_ends_every_rank_with_one_message(tmp_path):
    (tmp_path / "empty").mkdir()
    code, output = finish(launch(tmp_path / "empty", tmp_path / "run"))
    assert code != 0
    assert output.count("has no class folders") == 1


@pytest.mark.timeout(300)
def test_a_rank_that_is_killed_ends_the_others_and_the_run_goes_on_when_resumed(tiny_run_tree, tmp_path):
    settings = [*SETTINGS, "schedule.epochs=6"]
    process = launch(tiny_run_tree, tmp_path / "run", settings=settings)
    try:
        while not (tmp_path / "run" / "checkpoint.pt").exists():
            with contextlib.suppress(subprocess.TimeoutExpired):
                pytest.fail(f"ended before its first checkpoint: {process.communicate(timeout=0.1)[0]}")
        workers = [child for child in psutil.Process(process.pid).children() if "coterie_cli" in child.cmdline()]
        workers[-1].kill()
    finally:
        code, _ = finish(process)
    assert len(workers) == 2
    assert code != 0
    assert not any(worker.is_running() for worker in workers)
    code, output = finish(launch(tiny_run_tree, tmp_path / "run", "--resume", settings=settings))
    assert code == 0, output
    assert len(Run.open(tmp_path / "run").metrics()) == 6
