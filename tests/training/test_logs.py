"""Metrics beside metrics.jsonl."""

import sys
from types import SimpleNamespace

import pytest

from coterie.errors import RecipeError
from training.logs import MetricsLog
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
    log.write(ROWS[:1])
    log.write(ROWS)
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
    log.write(ROWS[:1])
    log.close()
    assert logged == [(0, {"loss": 5.0, "knn_top1": 0.25}), "end"]
    assert settings["project"] == "boots"
    assert settings["id"] == "run"
    assert settings["config"]["name"] == "digits"


def test_weights_and_biases_is_asked_for_where_it_is_not_installed(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(RecipeError, match="pip install wandb"):
        MetricsLog(run, load_recipe("digits"), wandb="boots")
