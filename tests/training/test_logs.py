"""Metrics beside metrics.jsonl."""

import sys
from types import SimpleNamespace

import pytest

from coterie.errors import RecipeError
from training.logs import MetricsLog
from training.pretrain import train
from training.recipe import load_recipe
from training.run import Run

ROWS = [{"epoch": 0, "loss": 5.0, "knn_top1": 0.25}, {"epoch": 1, "loss": 4.0}]


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path / "run")


def test_tensorboard_gets_every_number(run):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run.path.mkdir()
    log = MetricsLog(run, load_recipe("digits"))
    log.write(ROWS[:1], ROWS[0])
    log.write(ROWS, ROWS[1])
    log.close()
    # Killed after the second epoch was written and before it was saved, the run goes on with that epoch.
    log = MetricsLog(run, load_recipe("digits"), epoch=1)
    log.write(ROWS, ROWS[1])
    log.close()
    assert run.metrics() == ROWS
    found = events.EventAccumulator(str(run.path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in found.Scalars("loss")] == [(0, 5.0), (1, 4.0)]
    assert [event.step for event in found.Scalars("knn_top1")] == [0]


def test_weights_and_biases_gets_every_number_under_the_runs_name(run, monkeypatch):
    logged, settings = [], {}

    def init(**given):
        settings.update(given)
        return SimpleNamespace(log=lambda row, step: logged.append((step, row)), finish=lambda: logged.append("end"))

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    run.path.mkdir()
    log = MetricsLog(run, load_recipe("digits"), wandb="boots")
    log.write(ROWS[:1], ROWS[0])
    log.close()
    assert logged == [(0, {"loss": 5.0, "knn_top1": 0.25}), "end"]
    assert settings["project"] == "boots"
    first = settings["id"]
    MetricsLog(run, load_recipe("digits"), wandb="boots")
    assert settings["id"] == first
    assert first != "run"
    assert settings["config"]["name"] == "digits"


def test_weights_and_biases_is_asked_for_before_any_work_where_it_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setattr("training.logs.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match="pip install wandb"):
        train(tmp_path / "nothing", load_recipe("digits"), tmp_path / "run", wandb="boots")
    assert not (tmp_path / "run").exists()
