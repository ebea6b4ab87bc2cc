"""Stage 2 on a small run: a linear classifier on frozen features, judged on images nobody trained on."""

import hashlib
import json
import shutil

import pytest
import torch
from torch import Generator

from coterie import dataset
from coterie.errors import DataError, RecipeError
from coterie_cli.main import main
from training import linear
from training.linear import RECIPES, ProbeSettings, fit_linear
from training.probe import probe, probe_settings

FAST = ProbeSettings(augment=False)
SHORT = ProbeSettings(epochs=2)


def content(run):
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in run.path.rglob("*") if file.is_file()}


def held_out(run, tree):
    """The images of `tree` that the run held out."""
    record = run.dataset()
    return [file for file in tree.rglob("*.png") if record.held_out(hashlib.sha256(file.read_bytes()).hexdigest())]


def replace_in_recipe(run, old, new):
    path = run.path / "recipe.yaml"
    text = path.read_text("utf-8")
    assert old in text
    path.write_text(text.replace(old, new), "utf-8")


def test_the_last_epoch_is_near_nearest_neighbours_and_far_from_chance(tiny_run_copy, tiny_run_tree):
    result = probe(tiny_run_copy, tiny_run_tree, FAST)
    assert result.top1 > 0.4  # chance is 0.125
    assert result.top1 > tiny_run_copy.metrics()[-1]["knn_top1"] - 0.1
    assert result.top5 > result.top1


def test_evaluated_is_what_the_run_held_out_and_nothing_else(tiny_run_copy, tiny_run_tree):
    result = probe(tiny_run_copy, tiny_run_tree, SHORT)
    record = tiny_run_copy.dataset()
    assert result.images == len(record.calibration)
    assert result.train_images == len(record.train)
    assert result.rejected == ()


def test_the_encoder_and_all_that_training_wrote_stay_as_they_were(tiny_run_copy, tiny_run_tree):
    before = content(tiny_run_copy)
    probe(tiny_run_copy, tiny_run_tree, SHORT)
    after = content(tiny_run_copy)
    assert after.pop("probe.json")
    assert after == before


def test_the_run_keeps_what_was_found_and_how(tiny_run_copy, tiny_run_tree):
    result = probe(tiny_run_copy, tiny_run_tree, SHORT)
    written = json.loads((tiny_run_copy.path / "probe.json").read_text("utf-8"))
    assert written["top1"] == result.top1
    assert written["settings"] == SHORT.model_dump()
    assert set(written["versions"]) == {"coterie", "torch", "timm"}


def test_whitening_plays_no_part(tiny_run_copy, tiny_run_tree):
    whitened = probe(tiny_run_copy, tiny_run_tree, SHORT)
    encoder, spec = tiny_run_copy.load_encoder()
    assert not encoder.whitener.equal(torch.eye(encoder.dim))
    encoder.reset_whitening()
    tiny_run_copy.save_encoder(encoder, spec)
    assert probe(tiny_run_copy, tiny_run_tree, SHORT).loss == whitened.loss


@pytest.mark.parametrize("augment", [True, False])
def test_the_same_seed_gives_the_same_loss(tiny_run_copy, tiny_run_tree, augment):
    settings = ProbeSettings(epochs=3, batch=64, augment=augment)
    first, second = (probe(tiny_run_copy, tiny_run_tree, settings) for _ in range(2))
    assert (first.loss, first.top1, first.top5) == (second.loss, second.top1, second.top5)
    other = probe(tiny_run_copy, tiny_run_tree, settings.model_copy(update={"seed": 1}))
    assert other.loss != first.loss


def test_views_are_cut_from_the_size_that_training_kept_and_evaluated_is_the_encoders_own(
    tiny_run_copy, tiny_run_tree, monkeypatch
):
    sizes = []

    def read_pixels(found, form, **options):
        sizes.append(form.input_size)
        return dataset.read_pixels(found, form, **options)

    monkeypatch.setattr("training.probe.read_pixels", read_pixels)
    replace_in_recipe(tiny_run_copy, "cache_size: null", "cache_size: [20, 20]")
    probe(tiny_run_copy, tiny_run_tree, SHORT)
    assert sizes == [(20, 20), (16, 16)]


@pytest.mark.parametrize("augment", [True, False])
def test_images_beyond_memory_give_the_same(tiny_run_copy, tiny_run_tree, monkeypatch, augment):
    settings = ProbeSettings(epochs=3, batch=64, augment=augment)
    kept = probe(tiny_run_copy, tiny_run_tree, settings)
    monkeypatch.setattr("training.probe.fits_in_memory", lambda *_: False)
    replace_in_recipe(tiny_run_copy, "workers: null", "workers: 0")
    streamed = probe(tiny_run_copy, tiny_run_tree, settings)
    assert (streamed.loss, streamed.top1, streamed.top5) == (kept.loss, kept.top1, kept.top5)


def test_test_images_replace_those_held_out(tiny_run_copy, tiny_run_tree, digit_tree_of, tmp_path):
    test = digit_tree_of(tmp_path / "test", classes=range(8), per_class=20, skip=40)
    result = probe(tiny_run_copy, tiny_run_tree, FAST, test=test)
    assert result.images == 160
    assert result.top1 > 0.3


def test_test_images_that_were_trained_on_are_left_out_and_named(tiny_run_copy, tiny_run_tree, digit_tree_of, tmp_path):
    overlapping = digit_tree_of(tmp_path / "test", classes=range(8), per_class=20, skip=30)
    trained_on = tiny_run_copy.dataset().train
    seen = {
        file.name
        for file in overlapping.rglob("*.png")
        if hashlib.sha256(file.read_bytes()).hexdigest()[:16] in trained_on
    }
    result = probe(tiny_run_copy, tiny_run_tree, SHORT, test=overlapping)
    assert seen
    assert {entry.path.name for entry in result.rejected} == seen
    assert result.images == 160 - len(seen)


def test_a_probe_is_not_evaluated_on_what_it_was_trained_on_itself(tiny_run_copy, digit_tree_of, tmp_path):
    new = digit_tree_of(tmp_path / "new", classes=range(8), per_class=20, skip=40)
    with pytest.raises(DataError, match="was trained on, none is left"):
        probe(tiny_run_copy, new, SHORT, test=new)


def test_data_of_which_nothing_was_held_out_needs_test_images(tiny_run_copy, digit_tree_of, tmp_path):
    new = digit_tree_of(tmp_path / "new", classes=range(8), per_class=20, skip=40)
    with pytest.raises(DataError, match="--test"):
        probe(tiny_run_copy, new, SHORT)
    assert not (tiny_run_copy.path / "probe.json").exists()


def test_other_classes_than_the_runs_can_be_probed(tiny_run_copy, digit_tree_of, tmp_path):
    data = digit_tree_of(tmp_path / "data", classes=(8, 9), per_class=40)
    test = digit_tree_of(tmp_path / "test", classes=(8, 9), per_class=40, skip=40)
    result = probe(tiny_run_copy, data, SHORT, test=test)
    assert result.classes == ("8", "9")
    assert result.top5 is None
    assert result.images == 80


def test_a_class_without_an_image_to_train_on_is_refused(tiny_run_copy, tiny_run_tree, digit_tree_of, tmp_path):
    test = digit_tree_of(tmp_path / "test", classes=(7, 8), per_class=5, skip=40)
    with pytest.raises(DataError, match="class '8'"):
        probe(tiny_run_copy, tiny_run_tree, SHORT, test=test)


def test_held_out_images_alone_are_nothing_to_train_on(tiny_run_copy, tiny_run_tree, tmp_path):
    for file in held_out(tiny_run_copy, tiny_run_tree):
        (tmp_path / "data" / file.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(file, tmp_path / "data" / file.parent.name)
    with pytest.raises(DataError, match="fewer than two classes"):
        probe(tiny_run_copy, tmp_path / "data", SHORT)


def test_a_loss_that_is_not_finite_stops_with_a_remedy(tiny_run_copy, tiny_run_tree):
    with pytest.raises(RecipeError, match="lower base_lr"):
        probe(tiny_run_copy, tiny_run_tree, ProbeSettings(augment=False, base_lr=1e38))
    assert not (tiny_run_copy.path / "probe.json").exists()


def test_the_input_size_decides_whose_settings_are_taken(tiny_run_copy):
    assert probe_settings(tiny_run_copy) == RECIPES["cifar"]
    replace_in_recipe(tiny_run_copy, "input_size:\n    - 16\n    - 16\n", "input_size: [96, 96]\n")
    assert probe_settings(tiny_run_copy) == RECIPES["imagenet"]
    assert probe_settings(tiny_run_copy, ["recipe=cifar"]) == RECIPES["cifar"]


def test_single_settings_are_replaced(tiny_run):
    settings = probe_settings(tiny_run, ["epochs=10", "recipe=imagenet", "augment=false", "base_lr=1e-2"])
    assert settings == RECIPES["imagenet"].model_copy(update={"epochs": 10, "augment": False, "base_lr": 0.01})


@pytest.mark.parametrize("setting", ["epoch=10", "epochs", "epochs=0", "recipe=svhn", "augment=perhaps"])
def test_a_setting_that_does_not_fit_is_named(tiny_run, setting):
    with pytest.raises(RecipeError, match=setting.partition("=")[0]):
        probe_settings(tiny_run, [setting])


@pytest.mark.parametrize("name", ["cifar", "imagenet"])
def test_a_linear_problem_is_solved(name):
    """Three classes a line apart in a plane; 0.05 smoothed labels keep their order."""
    points = torch.randn(300, 2, generator=Generator().manual_seed(0))
    labels = (points @ torch.tensor([[1.0, -1.0, 0.0], [0.0, 0.0, 1.0]])).argmax(1)
    settings = RECIPES[name]
    classifier, loss = fit_linear(
        lambda batches: (points[batch] for batch in batches), labels, 2, settings, Generator().manual_seed(0)
    )
    assert (classifier(points).argmax(1) == labels).float().mean() > 0.95
    assert loss < 1


@pytest.fixture
def rates(monkeypatch):
    """The learning rates of all steps of a fit to 100 images, and the batches of each epoch."""

    def fit(settings):
        rates, epochs = [], []

        class Recorded(torch.optim.SGD):
            def __init__(self, parameters, **_):
                super().__init__(parameters)

            def step(self):
                rates.append(self.param_groups[0]["lr"])

        def features_in(batches):
            epochs.append(batches)
            return (torch.zeros(len(batch), 2) for batch in batches)

        monkeypatch.setattr(linear, "SGD", Recorded)
        monkeypatch.setattr(linear, "RMSpropTF", Recorded)
        fit_linear(features_in, torch.arange(100) % 2, 2, settings, Generator().manual_seed(0))
        return rates, epochs

    return fit


def test_an_epoch_uses_every_image_once_in_batches_of_equal_size(rates):
    _, epochs = rates(ProbeSettings(batch=40, epochs=3))
    assert [[len(batch) for batch in batches] for batches in epochs] == [[34, 33, 33]] * 3
    assert all(torch.cat(batches).sort().values.equal(torch.arange(100)) for batches in epochs)


def test_the_rate_follows_the_batch_and_falls_in_steps(rates):
    peak = 2.5 * 50 / 256  # two batches of 50
    expected = [peak] * 24 + [peak * 0.2] * 6 + [peak * 0.04] * 6 + [peak * 0.008] * 4
    assert rates(ProbeSettings(batch=64, epochs=20))[0] == pytest.approx(expected)


def test_the_rate_warms_up_and_falls_twice_an_epoch(rates):
    peak = 0.05 * 50 / 256
    warm = [peak * step / 24 for step in range(24)]  # 12 of 90 epochs
    expected = warm + [peak * 0.97**step for step in range(156)]
    assert rates(RECIPES["imagenet"].model_copy(update={"batch": 64}))[0] == pytest.approx(expected)


def test_the_command_prints_what_it_found_on_one_line(tiny_run_copy, tiny_run_tree, monkeypatch, capsys):
    arguments = ["probe", str(tiny_run_copy.path), str(tiny_run_tree), "--set", "augment=false", "--set", "epochs=2"]
    monkeypatch.setattr("sys.argv", ["coterie", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert not stopped.value.code
    written = json.loads((tiny_run_copy.path / "probe.json").read_text("utf-8"))
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.startswith(f"Linear top-1 {written['top1']:.4f}, top-5 {written['top5']:.4f} on 80 images, in ")
