"""A sweep trains each combination from each seed once, goes on where it was stopped, and tells what failed."""

import json

import pytest
from typer.testing import CliRunner

from coterie.errors import RecipeError, TrainingStopped
from coterie_cli.main import app
from training.run import Run
from training.sweep import Sweep, Trial, parse_variation, plan, run_sweep, summarise

SMALL = ("encoder.width=8", "schedule.epochs=1", "schedule.warmup_epochs=0", "batch.size=64")
RATES = ("optimizer.lr", [0.01, 0.1])


def test_all_combinations_come_from_one_seed_before_the_next():
    trials = plan([RATES, ("loss", [{"objective": "supcon"}, {"objective": "cross_entropy"}])], 2)
    assert [trial.seed for trial in trials] == [0] * 4 + [1] * 4
    assert len({trial.name for trial in trials}) == 8
    assert trials[1].settings == {"optimizer.lr": 0.01, "loss": {"objective": "cross_entropy"}}
    assert trials[1].recipe("digits", SMALL).loss.objective == "cross_entropy"


def test_one_at_a_time_tries_the_recipe_as_it_is_and_each_value_alone():
    trials = plan([RATES, ("loss.temperature", [0.2])], 1, one_at_a_time=True)
    assert [trial.settings for trial in trials] == [
        {},
        {"optimizer.lr": 0.01},
        {"optimizer.lr": 0.1},
        {"loss.temperature": 0.2},
    ]
    assert trials[0].name == "as-given_seed=0"


def test_a_value_given_twice_is_tried_once():
    assert len(plan([("optimizer.lr", [0.1, 0.1])], 2)) == 2


@pytest.mark.parametrize("values", [{"objective": "supcon", "temperature": 0.1}, "a/b", "../..", None, "x" * 300])
def test_a_name_is_a_folder_of_its_own_whatever_the_value(values):
    one, other = Trial({"loss": values}, 0), Trial({"loss": [values]}, 0)
    assert one.name != other.name
    for trial in (one, other):
        assert "/" not in trial.name
        assert len(trial.name) < 120


@pytest.mark.parametrize("text", ["optimizer.lr", "optimizer.lr=0.1", "=[1]", "optimizer.lr=[]", "a=[1", "seed=[1, 2]"])
def test_a_variation_that_is_none_is_refused(text):
    with pytest.raises(RecipeError, match="--vary"):
        parse_variation(text)


def test_a_sweep_goes_on_where_it_was_stopped(digit_tree, tmp_path, monkeypatch):
    sweep = Sweep("digits", SMALL, plan([RATES], 2))
    running = run_sweep(digit_tree, sweep, tmp_path / "sweep")
    first = next(running)
    running.close()
    before = (first.run / "encoder.safetensors").stat().st_mtime_ns

    from training import sweep as module

    trained = []
    train = module.train
    monkeypatch.setattr(
        module, "train", lambda data, recipe, out, **more: trained.append(out) or train(data, recipe, out, **more)
    )
    outcomes = list(run_sweep(digit_tree, sweep, tmp_path / "sweep"))
    assert [outcome.run for outcome in outcomes[1:]] == trained
    assert (first.run / "encoder.safetensors").stat().st_mtime_ns == before
    assert outcomes[0].metrics == first.metrics

    written = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert len(written["trials"]) == 4
    assert (tmp_path / "sweep" / "sweep.png").stat().st_size > 1000
    for entry in written["trials"]:
        metrics = Run.open(tmp_path / "sweep" / entry["run"]).metrics()[-1]
        assert entry["metrics"]["knn_top1"] == metrics["knn_top1"]
    for summary in summarise(outcomes):
        own = [one.metrics["knn_top1"] for one in outcomes if one.trial.settings == summary.settings]
        assert summary.accuracies == tuple(own)
        assert min(own) <= summary.mean <= max(own)


def test_another_recipe_or_other_images_in_the_folder_are_refused(digit_tree, digit_tree_of, tmp_path):
    trials = plan([("optimizer.lr", [0.01])], 1)
    list(run_sweep(digit_tree, Sweep("digits", SMALL, trials), tmp_path / "sweep"))
    with pytest.raises(RecipeError, match="another recipe"):
        list(run_sweep(digit_tree, Sweep("digits", (*SMALL, "batch.size=32"), trials), tmp_path / "sweep"))
    others = digit_tree_of(tmp_path / "others", classes=range(3), per_class=40)
    with pytest.raises(RecipeError, match="other images"):
        list(run_sweep(others, Sweep("digits", SMALL, plan([RATES], 1)), tmp_path / "sweep"))


def test_nothing_is_trained_if_one_recipe_is_not_valid(digit_tree, tmp_path):
    sweep = Sweep("digits", SMALL, plan([("optimizer.lr", [0.01, "fast"])], 1))
    with pytest.raises(RecipeError, match=r"optimizer\.lr"):
        list(run_sweep(digit_tree, sweep, tmp_path / "sweep"))
    assert not (tmp_path / "sweep").exists()


def test_a_run_that_fails_is_told_of_and_the_others_are_trained(digit_tree, tmp_path, monkeypatch):
    from training import sweep as module

    train = module.train

    def failing(data, recipe, out, **more):
        if recipe.optimizer.lr == 0.1:
            raise RecipeError("the loss is nan: lower optimizer.lr")
        return train(data, recipe, out, **more)

    monkeypatch.setattr(module, "train", failing)
    arguments = ["sweep", str(digit_tree), "--recipe", "digits", "--vary", "optimizer.lr=[0.1, 0.01]"]
    arguments += ["--seeds", "1", "--out", str(tmp_path / "sweep"), *(part for one in SMALL for part in ("--set", one))]
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, RecipeError)
    assert "1 of 2 runs failed" in str(result.exception)
    assert "the loss is nan" in result.output and "1 failed" in result.output
    written = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert [bool(entry["error"]) for entry in written["trials"]] == [True, False]
    assert [entry["failed"] for entry in written["summary"]] == [0, 1]


def test_stopping_stops_the_sweep(digit_tree, tmp_path, monkeypatch):
    def stopped(*_, **__):
        raise TrainingStopped("stopped and saved: go on with --resume")

    monkeypatch.setattr("training.sweep.train", stopped)
    with pytest.raises(TrainingStopped, match="same command again"):
        list(run_sweep(digit_tree, Sweep("digits", SMALL, plan([RATES], 1)), tmp_path / "sweep"))


def test_under_torchrun_it_is_refused(digit_tree, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RecipeError, match="CUDA_VISIBLE_DEVICES"):
        list(run_sweep(digit_tree, Sweep("digits", SMALL, plan([RATES], 1)), tmp_path / "sweep"))
