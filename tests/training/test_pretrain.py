"""Training on real digits, for an epoch or three: what is written, what resumes, what is refused."""

import hashlib
import json
import os
import signal

import pytest
import torch

from coterie.errors import DataError, RecipeError, TrainingStopped
from export.package import export_run
from training.encoders import CifarResNet
from training.learner import Learner
from training.objectives import Objective
from training.pretrain import train
from training.recipe import load_recipe
from training.run import Run

SMALL = ["encoder.name=cifar_resnet8", "encoder.width=8", "schedule.epochs=3", "schedule.warmup_epochs=0"]


@pytest.fixture
def recipe():
    return load_recipe("digits", SMALL)


def weights(run):
    return hashlib.sha256((run.path / "encoder.safetensors").read_bytes()).hexdigest()


def test_a_run_holds_everything_the_contract_names(tiny_run):
    names = {file.name for file in tiny_run.path.iterdir() if file.name != "tensorboard"}
    assert names == {
        "recipe.yaml",
        "dataset.json",
        "metrics.jsonl",
        "curves.png",
        "checkpoint.pt",
        "encoder.safetensors",
        "encoder.json",
    }
    rows = tiny_run.metrics()
    assert [row["epoch"] for row in rows] == list(range(len(rows)))
    assert rows[-1]["loss"] < rows[0]["loss"]
    # Random encoders put all images near one point; training spreads them out.
    assert rows[-1]["uniformity"] < rows[0]["uniformity"] < 0
    assert all(0 < row["alignment"] < 4 for row in rows)  # squared distances of unit vectors
    assert rows[-1]["knn_top1"] > 0.5  # eight classes: chance is 0.125
    assert rows[-1]["linear_top1"] > 0.5
    assert rows[-1]["share_without_positives"] == 0  # there are two views of each image
    dataset = json.loads((tiny_run.path / "dataset.json").read_text())
    assert dataset["classes"] == list("01234567")
    assert not set(dataset["split"]["train"]) & set(dataset["split"]["calibration"])


def test_the_checkpoint_holds_no_pickled_objects(tiny_run):
    state = torch.load(tiny_run.path / "checkpoint.pt", weights_only=True)
    assert state["epochs_done"] == len(tiny_run.metrics())


def test_a_run_that_was_interrupted_ends_with_the_same_weights(digit_tree, recipe, tmp_path, monkeypatch):
    whole, _ = train(digit_tree, recipe, tmp_path / "whole")

    save = Run.save_checkpoint

    def save_and_die(run, state):
        save(run, state)
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "save_checkpoint", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        train(digit_tree, recipe, tmp_path / "broken")
    with pytest.raises(RecipeError, match="not finished"):
        Run.open(tmp_path / "broken")
    monkeypatch.undo()

    with pytest.raises(RecipeError, match="--resume"):
        train(digit_tree, recipe, tmp_path / "broken")
    resumed, _ = train(digit_tree, recipe, tmp_path / "broken", resume=True)
    assert weights(resumed) == weights(whole)
    assert [row["loss"] for row in resumed.metrics()] == [row["loss"] for row in whole.metrics()]


def test_a_run_that_is_told_to_stop_saves_its_place_within_the_epoch(digit_tree, tmp_path):
    recipe = load_recipe("digits", [*SMALL, "batch.size=64", "schedule.epochs=2"])
    whole, _ = train(digit_tree, recipe, tmp_path / "whole")
    broken = tmp_path / "broken"
    for place in [(0, 1), (0, 2)]:
        with pytest.raises(TrainingStopped, match="--resume"):
            train(digit_tree, recipe, broken, time_limit=0, resume=True)
        state = Run(broken).load_checkpoint()
        assert (state["epochs_done"], state["steps_done"]) == place
    resumed, _ = train(digit_tree, recipe, broken, resume=True)
    assert weights(resumed) == weights(whole)
    assert [row["loss"] for row in resumed.metrics()] == [row["loss"] for row in whole.metrics()]


def test_sigterm_saves_and_stops(digit_tree, recipe, tmp_path, monkeypatch):
    step = Learner.step

    def step_and_terminate(*given, **named):
        os.kill(os.getpid(), signal.SIGTERM)
        return step(*given, **named)

    monkeypatch.setattr(Learner, "step", step_and_terminate)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(TrainingStopped) as stopped:
        train(digit_tree, recipe, tmp_path / "run")
    assert stopped.value.exit_code == 143
    assert signal.getsignal(signal.SIGTERM) is before
    assert Run(tmp_path / "run").load_checkpoint() is not None


def test_streamed_images_train_the_same_weights_as_images_in_memory(digit_tree, tmp_path):
    runs = [
        train(digit_tree, load_recipe("digits", [*SMALL, *settings]), tmp_path / settings[0])[0]
        for settings in (["data.storage=memory"], ["data.storage=stream", "data.workers=1"])
    ]
    assert weights(runs[0]) == weights(runs[1])
    assert [row["knn_top1"] for row in runs[0].metrics()] == [row["knn_top1"] for row in runs[1].metrics()]


def test_a_test_part_is_kept_apart_and_measured_once_at_the_end(digit_tree, tmp_path):
    recipe = load_recipe("digits", [*SMALL, "data.test=0.2", "data.calibration=0.2"])
    run, images = train(digit_tree, recipe, tmp_path / "run")
    parts = run.dataset().split
    assert {name: len(part) for name, part in parts.items()} == {"train": 192, "calibration": 64, "test": 64}
    assert len(frozenset.union(*parts.values())) == len(images) == 320
    rows = run.metrics()
    assert rows[-1]["test_knn_top1"] > 0.3
    assert not any("test_knn_top1" in row for row in rows[:-1])


def test_export_leaves_the_test_part_out_of_the_gallery(digit_tree, tmp_path):
    recipe = load_recipe("digits", [*SMALL, "data.test=0.2", "data.calibration=0.2"])
    run, images = train(digit_tree, recipe, tmp_path / "run")
    items = export_run(run, digit_tree, tmp_path / "bundle").bundle.base.items
    gallery = {digest for digest in images.hashes if digest[:24] in items.ids}
    assert len(gallery) == len(items) == 192
    assert not any(run.dataset().set_apart(digest) for digest in gallery)


def test_images_of_one_group_stay_on_one_side(digit_tree, recipe, tmp_path):
    # The first three digits of a file's name: up to ten pictures each.
    run, images = train(digit_tree, recipe, tmp_path / "run", group=r"^(\d{3})")
    held_out = {
        group: {run.dataset().held_out(images.hashes[row]) for row in range(len(images)) if images.groups[row] == group}
        for group in set(images.groups)
    }
    assert all(len(sides) == 1 for sides in held_out.values())
    assert {side for sides in held_out.values() for side in sides} == {True, False}


def test_a_run_starts_from_another_runs_weights(digit_tree, tiny_run, tmp_path):
    settings = [
        "encoder.width=8",
        "schedule={epochs: 1, warmup_epochs: 0}",
        "optimizer.lr=0.000001",
        f"encoder.start={tiny_run.path}",
    ]
    run, _ = train(digit_tree, load_recipe("digits", settings), tmp_path / "run")
    assert run.metrics()[0]["knn_top1"] > tiny_run.metrics()[-1]["knn_top1"] - 0.15


def test_a_set_too_small_to_hold_anything_out_is_refused(digit_tree_of, recipe, tmp_path):
    tree = digit_tree_of(tmp_path / "few", classes=range(3), per_class=2)
    with pytest.raises(DataError, match=r"raise data\.calibration"):
        train(tree, load_recipe("digits", [*SMALL, "data.calibration=0.1"]), tmp_path / "run")


def test_a_damaged_checkpoint_is_one_clear_error(tiny_run_copy, tiny_run_tree):
    file = tiny_run_copy.path / "checkpoint.pt"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(RecipeError, match="is damaged"):
        train(tiny_run_tree, tiny_run_copy.recipe(), tiny_run_copy.path, resume=True)


def test_a_run_is_measured_as_often_as_it_asks_for_and_at_the_end(digit_tree, tmp_path):
    settings = [*SMALL, "schedule.epochs=4", "monitor={every: 3, gallery: 50}"]
    run, _ = train(digit_tree, load_recipe("digits", settings), tmp_path / "run")
    assert ["knn_top1" in row for row in run.metrics()] == [False, False, True, True]


def test_resuming_with_another_recipe_or_other_images_is_refused(digit_tree, tiny_run, tmp_path):
    with pytest.raises(RecipeError, match="another recipe"):
        train(digit_tree, load_recipe("digits"), tiny_run.path, resume=True)
    next((digit_tree / "3").iterdir()).unlink()
    with pytest.raises(RecipeError, match="other images"):
        train(digit_tree, tiny_run.recipe(), tiny_run.path, resume=True)


def test_a_loss_that_is_not_finite_stops_the_run_with_a_remedy(digit_tree, recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("training.losses.SupConLoss.forward", lambda self, z, labels, **_: z.sum() * float("nan"))
    with pytest.raises(RecipeError, match=r"lower optimizer\.lr"):
        train(digit_tree, recipe, tmp_path / "run")


@pytest.mark.parametrize("objective", Objective)
def test_every_objective_trains(objective, digit_tree, tmp_path):
    views = 1 if objective is Objective.N_PAIRS else 2
    settings = [f"loss={{objective: {objective.value}}}", f"batch.views={views}", *SMALL]
    run, _ = train(digit_tree, load_recipe("digits", settings), tmp_path / "run")
    # Nine steps lower the loss of most, not of all; what an objective is for shows in the held-out neighbours.
    assert run.metrics()[-1]["knn_top1"] > 0.3  # eight classes: chance is 0.125


def test_one_class_or_one_image_is_refused(digit_tree, recipe, tmp_path):
    for label in "1234567":
        for file in (digit_tree / label).iterdir():
            file.unlink()
        (digit_tree / label).rmdir()
    with pytest.raises(DataError, match="only 1 class"):
        train(digit_tree, recipe, tmp_path / "run")
    (digit_tree / "1").mkdir()
    next((digit_tree / "0").iterdir()).rename(digit_tree / "1" / "lonely.png")
    with pytest.raises(DataError, match=r"'1' .* only 1 image"):
        train(digit_tree, recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_saved_encoder_gives_the_trained_ones_features(tiny_run):
    encoder, spec = tiny_run.load_encoder()
    assert not encoder.training
    assert spec.preprocessing.input_size == (16, 16)
    assert encoder(torch.zeros(2, 3, 16, 16)).shape == (2, encoder.dim)
    assert not torch.equal(encoder.whitener, torch.eye(encoder.dim))


def test_a_damaged_encoder_is_one_clear_error(tiny_run_copy):
    weights_file = tiny_run_copy.path / "encoder.safetensors"
    weights_file.write_bytes(weights_file.read_bytes()[:100])
    with pytest.raises(RecipeError, match="cannot be read"):
        tiny_run_copy.load_encoder()


@pytest.mark.parametrize(("depth", "convolutions"), [(8, 7 + 2), (20, 19 + 2)])
def test_resnets_have_the_depth_in_their_name(depth, convolutions):
    # 6n+2 layers: a stem, 6n convolutions in blocks, a classifier we do not have; and two projections on shortcuts.
    net = CifarResNet(depth)
    assert sum(isinstance(module, torch.nn.Conv2d) for module in net.modules()) == convolutions


def test_unknown_encoders_are_refused_with_names_to_choose_from(digit_tree, tmp_path):
    with pytest.raises(RecipeError, match="cifar_resnet8"):
        train(digit_tree, load_recipe("digits", ["encoder.name=resnet9000"]), tmp_path / "run")
    with pytest.raises(RecipeError, match="resnet18"):
        train(digit_tree, load_recipe("digits", ["encoder.name=timm:resnet18x"]), tmp_path / "other")
