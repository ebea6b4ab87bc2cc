"""Several bundles on the same images, corruptions, few images, gates: as one command asks for them."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from coterie.bundle import Bundle, write_bundle
from coterie.clusters import ClassClusters
from coterie.errors import CoterieError, DataError
from coterie.gallery import Snapshot
from coterie.intervals import bootstrap_counts, bootstrap_means, mcnemar
from evaluation.compare import Difference, check_same_images
from evaluation.corruptions import CORRUPTIONS, corrupt
from evaluation.few_shot import SHOTS
from evaluation.queries import embed_folder
from evaluation.robustness import relative_errors
from evaluation.study import Gate, Study, Wanted, check_wanted, run_study
from evaluation.unknown import mean_auroc


@pytest.fixture(scope="module")
def data(digit_tree_of, tmp_path_factory):
    return digit_tree_of(tmp_path_factory.mktemp("study") / "test", classes=range(8), per_class=8, skip=100)


@pytest.fixture(scope="module")
def poorer(tiny_bundle, tmp_path_factory):
    """The same encoder with three gallery images of each class."""
    items = tiny_bundle.base.items
    rows = np.concatenate([np.flatnonzero(items.labels == label)[:3] for label in tiny_bundle.manifest.classes])
    few = items.select(rows)
    snapshot = Snapshot(few, ClassClusters.fit(few.embeddings, few.labels))
    manifest = tiny_bundle.manifest.model_copy(update={"name": "poorer", "gallery_size": len(few)})
    return write_bundle(
        tmp_path_factory.mktemp("poorer") / "bundle",
        model=(tiny_bundle.path / "model.onnx").read_bytes(),
        snapshot=snapshot,
        card="# Poorer\n",
        manifest=manifest,
    )


@pytest.fixture(scope="module")
def study(tiny_bundle, poorer, data):
    wanted = Wanted(corruptions=True, few_shot=True, hold_out="random", device="cpu", threads=1)
    return run_study(tiny_bundle.path, data, [poorer.path], wanted)


def test_a_comparison_is_paired_and_holds_the_difference(study):
    (comparison,) = study.comparisons
    first, other = study.evaluations
    assert (comparison.first, comparison.other) == ("tiny-digits", "poorer")
    for one in comparison.differences:
        assert one.difference == pytest.approx(one.first - one.other, abs=1e-6)
        if one.measure != "ece":  # whose draws are larger than the sample's
            assert one.low - 1e-6 <= one.difference <= one.high + 1e-6
    for name in ("top1", "knn_top1", "map_at_r", "ece"):
        assert comparison[name].first == pytest.approx(getattr(first, name))
        assert comparison[name].other == pytest.approx(getattr(other, name))
    assert comparison["knn_top1"].p <= 1
    assert comparison["map_at_r"].p is None
    assert comparison["corruption_error"].first == pytest.approx(study.robustness[0].mean_error)


def test_a_bundle_does_not_differ_from_itself(tiny_bundle, data, tmp_path):
    twin = shutil.copytree(tiny_bundle.path, tmp_path / "twin")
    found = run_study(tiny_bundle.path, data, [twin], Wanted(device="cpu"))
    assert found.names == ("bundle", "twin")
    values = found.to_json()
    assert [values["name"], values["compared"][0]["name"]] == ["bundle", "twin"]
    assert values["comparisons"][0]["first"] == values["name"]
    for one in found.comparisons[0].differences:
        assert (one.difference, one.low, one.high) == (0, 0, 0) or one.measure == "ece"
        assert one.p in (None, 1)
    assert not any(one.clear for one in found.comparisons[0].differences)
    assert Gate(max_drop=0).failures(found) == []


@pytest.mark.parametrize(("more", "clear"), [(4, False), (6, True)])
def test_a_difference_that_chance_explains_is_not_clear(more, clear):
    """Four images that only one gets right: the interval leaves out 0, but p is 1/8."""
    other = np.arange(400) >= 50
    first = other | (np.arange(400) < more)
    less = bootstrap_means((first * 1.0 - other)[:, None])[0]
    assert less.low > 0
    found = Difference("top1", first.mean(), other.mean(), less.value, less.low, less.high, mcnemar(first, other))
    assert found.p == pytest.approx(2 * 0.5**more)
    assert found.clear == clear


def test_other_images_are_not_compared(tiny_bundle, data, digit_tree_of, tmp_path):
    queries = embed_folder(tiny_bundle, data)
    with pytest.raises(DataError, match="same images"):
        check_same_images(queries, queries.select(queries.labels != "3"))


def test_errors_under_corruption_are_those_of_one_image_after_another(tiny_bundle, study):
    found, images = study.robustness[0], study.queries.images
    for name, severity in (("gaussian_noise", 5), ("elastic_transform", 1), ("jpeg_compression", 3)):
        corrupted = [corrupt(image, name, severity, seed=0, index=i) for i, image in enumerate(images.pixels)]
        answers = tiny_bundle.classify(corrupted)
        wrong = [answer.classes[0].label != label for answer, label in zip(answers, study.queries.labels, strict=True)]
        assert found.errors[name][severity - 1] == pytest.approx(np.mean(wrong), abs=1e-6)
        refused = np.mean([not answer.known for answer in answers])
        assert found.refused[name][severity - 1] == pytest.approx(refused, abs=1e-6)
    errors = np.asarray(list(found.errors.values()))
    assert errors.shape == (15, 5)
    for shares, intervals in (
        (found.errors, found.error_intervals),
        (found.refused, found.refused_intervals),
        ({"all": found.error_by_severity}, {"all": found.error_by_severity_intervals}),
    ):
        values, bounds = np.asarray(list(shares.values())), np.asarray(list(intervals.values()))
        assert bounds.shape == (*values.shape, 2)
        assert (bounds[..., 0] <= values + 1e-6).all() and (values <= bounds[..., 1] + 1e-6).all()
        assert (bounds[..., 0] < bounds[..., 1]).any()
    ece_bounds = np.asarray(list(found.ece_intervals.values()))  # a calibration error is larger in a draw
    assert (ece_bounds[..., 1] >= np.asarray(list(found.eces.values())) - 1e-6).all()
    of_means = np.asarray(found.ece_by_severity_intervals)
    assert (of_means[:, 0] >= ece_bounds[..., 0].min(axis=0)).all()
    assert (of_means[:, 1] <= ece_bounds[..., 1].max(axis=0)).all()
    assert list(found.errors) == list(CORRUPTIONS)
    assert found.mean_error == pytest.approx(errors.mean(), abs=1e-6)
    np.testing.assert_allclose(found.error_by_severity, errors.mean(axis=0), atol=1e-6)
    assert found.clean_error == pytest.approx(1 - study.first.top1)
    low, high = study.first.intervals["top1"]
    assert found.clean_error_interval == pytest.approx((1 - high, 1 - low), abs=1e-6)


def test_relative_errors_are_ratios_of_sums_and_their_mean(study):
    one, two = study.robustness
    ratios = {name: sum(one.errors[name]) / sum(two.errors[name]) for name in CORRUPTIONS if sum(two.errors[name])}
    found, mean = relative_errors(one, two)
    assert {name: ratio.value for name, ratio in found.items()} == pytest.approx(ratios)
    assert all(ratio.low <= ratio.value <= ratio.high for ratio in found.values())
    assert mean.low < mean.value < mean.high
    (comparison,) = study.comparisons
    assert comparison.relative_errors == pytest.approx(ratios)
    assert comparison.relative_corruption_error == pytest.approx(np.mean(list(ratios.values())))
    assert comparison.relative_corruption_error_interval == mean.bounds
    assert {ratio.bounds for ratio in relative_errors(one, one)[0].values()} == {(1, 1)}
    assert study.to_json()["comparisons"][0]["relative_errors"] == pytest.approx(ratios)


def test_a_draw_leaves_out_corruptions_under_which_the_baseline_errs_nowhere(study):
    """Of 40 images the baseline errs on one under fog: a third of the draws lack it, and none under snow."""
    one, two = (np.zeros((40, len(CORRUPTIONS))) for _ in range(2))
    fog, snow, frost = (list(CORRUPTIONS).index(name) for name in ("fog", "snow", "frost"))
    one[:20, [fog, snow, frost]] = 0.2
    two[:10, frost] = 0.4
    two[0, fog] = 0.2
    errors = [
        {name: (5 * share,) for name, share in zip(CORRUPTIONS, of.mean(axis=0), strict=True)} for of in (one, two)
    ]
    first, other = (
        replace(of, wrong=wrong, errors=shares)
        for of, wrong, shares in zip(study.robustness, (one, two), errors, strict=True)
    )
    ratios, mean = relative_errors(first, other)
    assert {name: ratio.value for name, ratio in ratios.items()} == pytest.approx({"fog": 20, "frost": 1})
    assert mean.value == pytest.approx(10.5)
    (counts,) = bootstrap_counts(40)
    fogs, frosts = counts[:, :20].sum(axis=1) / np.where(counts[:, 0], counts[:, 0], np.nan), counts[:, :20].sum(axis=1)
    frosts = frosts / (2 * counts[:, :10].sum(axis=1))
    assert ratios["fog"].bounds == pytest.approx(np.nanquantile(fogs, [0.025, 0.975]))
    expected = np.where(np.isnan(fogs), frosts, (fogs + frosts) / 2)
    assert mean.bounds == pytest.approx(np.quantile(expected, [0.025, 0.975]))
    none = replace(other, wrong=np.zeros_like(two), errors=dict.fromkeys(CORRUPTIONS, (0.0,)))
    assert relative_errors(first, none)[0] == {}
    assert np.isnan(relative_errors(first, none)[1].bounds).all()


def test_more_gallery_images_serve_better(study):
    for found in study.few_shot:
        assert [few.shots for few in found] == list(SHOTS)
        assert found[-1].classifier >= found[0].classifier
        assert all(0 <= few.cluster <= 1 and few.knn_deviation >= 0 for few in found)


def test_one_image_of_each_class_leaves_nothing_to_the_vote_but_the_nearest(study):
    one = study.few_shot[0][0]
    assert one.knn == pytest.approx(one.cluster, abs=1e-6)


def test_five_splits_hold_out_two_fifths_of_the_classes(study):
    splits = [split.classes for split in study.first.held_out]
    assert len(splits) == 5
    assert all(len(classes) == 3 for classes in splits)
    assert splits == [split.classes for split in study.evaluations[1].held_out]


def test_the_mean_auroc_of_the_splits_is_drawn_with_the_same_images_for_all(study):
    for result in study.evaluations:
        aurocs = [split.unknown.auroc for split in result.held_out]
        assert result.held_out_auroc == pytest.approx(np.mean(aurocs))
        low, high = result.intervals["held_out_auroc"]
        assert low < result.held_out_auroc < high
    first = study.first
    assert mean_auroc([first.held_out[0]] * 2) == mean_auroc(first.held_out[:1])
    less = study.comparisons[0]["held_out_auroc"]
    assert less.difference == pytest.approx(first.held_out_auroc - study.evaluations[1].held_out_auroc)
    assert less.low < less.difference < less.high


def test_the_json_says_what_it_was_made_from(study):
    values = json.loads(json.dumps(study.to_json(), allow_nan=False))
    assert values["bundle"] == study.first.bundle
    assert values["data"] == study.first.data
    assert values["seed"] == 0
    assert values["provenance"]["versions"]["numpy"] == np.__version__
    assert values["compared"][0]["name"] == "poorer"
    assert len(values["robustness"]["errors"]) == 15
    assert len(values["few_shot"]) == 5


def test_the_same_seed_gives_the_same_numbers(tiny_bundle, data, study):
    wanted = Wanted(few_shot=True, hold_out="random", device="cpu", threads=1)
    again = run_study(tiny_bundle.path, data, (), wanted).to_json()
    first = study.to_json()
    for name in ("intervals", "few_shot", "held_out", "knn", "per_class"):
        assert again[name] == first[name]


@pytest.mark.parametrize(
    ("gate", "reason"),
    [
        (Gate(min_top1=1.0), "top-1 is"),
        (Gate(max_ece=0.0), "calibration error is"),
        (Gate(max_drop=0.0), "of tiny-digits, more than --max-drop 0"),
    ],
)
def test_a_gate_that_does_not_hold_gives_its_reason(tiny_bundle, poorer, data, gate, reason):
    found = run_study(poorer.path, data, [tiny_bundle.path], Wanted(device="cpu"))
    (failure,) = gate.failures(found)
    assert reason in failure


def test_gates_that_hold_give_none(study):
    assert Gate(min_top1=study.first.top1, max_ece=study.first.ece, max_drop=0.0).failures(study) == []


@pytest.mark.parametrize(
    ("wanted", "gate", "message"),
    [
        (Wanted(), Gate(max_drop=0.1), "--compare"),
        (Wanted(), Gate(max_ece=5), "--max-ece is 5"),
        (Wanted(), Gate(min_top1=1.01), "--min-top1 is 1.01"),
        (Wanted(), Gate(min_top1=float("nan")), "--min-top1 is nan"),
        (Wanted(seed=-1), Gate(), "--seed is -1"),
    ],
)
def test_what_cannot_be_answered_is_refused_before_any_work(wanted, gate, message):
    with pytest.raises(CoterieError, match=message):
        check_wanted(wanted, gate, ())


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (Wanted(hold_out="1,nine"), "the gallery has no class 'nine'"),
        (Wanted(hold_out="0,1,2,3,4,5,6,7"), "leaves no class"),
        (Wanted(hold_out="5"), "images are needed of these classes and of others"),
        (Wanted(hold_out="3"), "images are needed of these classes and of others"),
        (Wanted(hold_out="random"), "add images of another"),
        (Wanted(unknown=Path("nowhere")), "nowhere is not a folder"),
    ],
)
def test_what_the_images_cannot_answer_is_refused_before_any_is_embedded(
    tiny_bundle, digit_tree_of, tmp_path, monkeypatch, wanted, message
):
    monkeypatch.setattr("evaluation.queries.read_pixels", None)
    threes = digit_tree_of(tmp_path / "threes", classes=(3,), per_class=3, skip=100)
    with pytest.raises(DataError, match=message):
        run_study(tiny_bundle.path, threes, (), wanted)


def test_random_splits_are_of_classes_that_have_images(tiny_bundle, digit_tree_of, tmp_path):
    data = digit_tree_of(tmp_path / "two", classes=(3, 6), per_class=4, skip=100)
    found = run_study(tiny_bundle.path, data, (), Wanted(hold_out="random", device="cpu")).first
    assert {split.classes for split in found.held_out} == {("3",), ("6",)}


def test_unknown_images_need_no_class_folders(tiny_bundle, data, digit_tree_of, tmp_path):
    tree = digit_tree_of(tmp_path / "tree", classes=(8, 9), per_class=4)
    (tmp_path / "flat").mkdir()
    for path in tree.rglob("*.png"):
        shutil.copy(path, tmp_path / "flat" / path.name)
    results = [
        run_study(tiny_bundle.path, data, (), Wanted(unknown=folder, device="cpu")).to_json()["unknown"]
        for folder in (tree, tmp_path / "flat")
    ]
    assert results[0]["images"] == 8
    assert results[0]["data"].startswith("sha256:")
    assert results[0]["data"] == results[1]["data"]
    assert results[0]["accepted"] == results[1]["accepted"]


def test_a_single_evaluation_is_a_study(tiny_bundle, study):
    alone = Study.of(tiny_bundle, study.queries, study.first)
    assert isinstance(alone.bundle, Bundle)
    assert alone.to_json()["robustness"] is None
