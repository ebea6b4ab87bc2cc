"""Offline evaluation of a real bundle: the numbers are those of the served answers, and of scikit-learn on them."""

import json
import shlex
import shutil
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    confusion_matrix,
    f1_score,
    precision_recall_fscore_support,
    silhouette_score,
    top_k_accuracy_score,
)

from coterie.classifier import score
from coterie.errors import DataError
from evaluation.evaluate import _knn, evaluate
from evaluation.queries import embed_folder


@pytest.fixture(scope="module")
def queries(tiny_bundle, digit_tree_of, tmp_path_factory):
    folder = tmp_path_factory.mktemp("queries")
    known = digit_tree_of(folder / "known", classes=range(8), per_class=12, skip=100)
    unknown = digit_tree_of(folder / "unknown", classes=(8, 9), per_class=12)
    return embed_folder(tiny_bundle, known), embed_folder(tiny_bundle, unknown)


@pytest.fixture(scope="module")
def result(tiny_bundle, queries):
    return evaluate(tiny_bundle, *queries, held_out=[("1", "5")])


def test_the_numbers_are_those_of_the_served_answers(tiny_bundle, queries, result):
    known, _ = queries
    pixels = list(known.images.pixels)
    closed, accepted = [], []
    for answer in tiny_bundle.classify(pixels):
        closed.append(answer.classes[0].label)
        accepted.append(answer.label)
    truth = known.labels.tolist()
    assert result.top1 == pytest.approx(accuracy_score(truth, closed))
    assert result.accepted_top1 == pytest.approx(np.mean([a == t for a, t in zip(accepted, truth, strict=True)]))
    assert result.false_rejected == pytest.approx(np.mean([a is None for a in accepted]))
    expected = confusion_matrix(truth, closed, labels=list(result.classes))
    np.testing.assert_array_equal(result.confusion, expected)


def test_classes_are_measured_as_scikit_learn_does(queries, result):
    truth, predicted = queries[0].labels, result.answers.predicted
    rates = precision_recall_fscore_support(truth, predicted, labels=list(result.classes), zero_division=np.nan)
    for name, expected in zip(("precision", "recall", "f1", "images"), rates, strict=True):
        found = [getattr(row, name) for row in result.per_class]
        np.testing.assert_allclose(found, expected, atol=1e-6)
    assert result.balanced_accuracy == pytest.approx(balanced_accuracy_score(truth, predicted))
    assert result.macro_f1 == pytest.approx(np.nanmean(rates[2]))


def test_macro_f1_counts_classes_that_were_only_answered(tiny_bundle, queries):
    known = queries[0].select(np.isin(queries[0].labels, ["1", "2", "5"]))
    of_five = known.images.labels == known.images.classes.index("5")
    wrong = np.where(of_five, known.images.classes.index("1"), known.images.labels)
    known = replace(known, images=replace(known.images, labels=wrong))
    found = evaluate(tiny_bundle, known)
    predicted = found.answers.predicted
    assert set(predicted) - set(known.labels)
    assert found.macro_f1 == pytest.approx(f1_score(known.labels, predicted, average="macro"))


def test_top5_is_scikit_learns(tiny_bundle, queries, result):
    scores = score(queries[0].embeddings, tiny_bundle.base, tiny_bundle.manifest.calibration)
    labels = tiny_bundle.manifest.classes
    expected = top_k_accuracy_score(queries[0].labels, scores.probabilities, k=5, labels=list(labels))
    assert result.top5 == pytest.approx(expected, abs=1e-6)


def test_the_vote_is_dinos_over_the_whole_range_of_k(tiny_bundle, queries, result):
    """The published procedure: similarities, the k largest, exp(s / T) scattered over one-hot classes, sorted."""
    gallery = tiny_bundle.base
    similarities = queries[0].embeddings.astype(np.float64) @ gallery.items.embeddings.T
    truth = np.searchsorted(gallery.clusters.labels, queries[0].labels)
    for found in result.knn:
        nearest = np.argsort(-similarities, axis=1, kind="stable")[:, : found.k]
        one_hot = np.eye(len(gallery.clusters))[gallery.classes[nearest]]  # (n, k, c)
        weights = np.exp(np.take_along_axis(similarities, nearest, 1) / 0.07)
        order = np.argsort(-(one_hot * weights[:, :, None]).sum(axis=1), axis=1, kind="stable")
        assert found.top1 == pytest.approx((order[:, 0] == truth).mean(), abs=1e-6)
        assert found.top5 == pytest.approx((order[:, : min(5, found.k)] == truth[:, None]).any(axis=1).mean(), abs=1e-6)
    assert [found.k for found in result.knn] == [1, 5, 10, 20, 50, 100, 200]
    assert result.knn_top1 == next(found.top1 for found in result.knn if found.k == 20)


def test_votes_of_many_classes_are_held_for_one_k_at_a_time():
    n, classes, k = 1000, 1000, 200
    rng = np.random.default_rng(0)
    similarities = -np.sort(-rng.random((n, k), dtype=np.float32), axis=1)
    scores = SimpleNamespace(neighbors=rng.integers(classes, size=(n, k)), similarities=similarities)
    snapshot = SimpleNamespace(classes=np.arange(classes), clusters=range(classes))
    tracemalloc.start()
    found = _knn(scores, snapshot, rng.integers(classes, size=n), 0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(found) == 7
    assert peak < 4 * 8 * n * classes


@pytest.fixture(scope="module")
def mislabelled(queries):
    """Every third image under the label of the next class, so that there is something to get wrong."""
    images = queries[0].images
    labels = np.where(np.arange(len(images)) % 3 == 0, (images.labels + 1) % len(images.classes), images.labels)
    return replace(queries[0], images=replace(images, labels=labels))


def calibration_error(confidences, right):
    """Bin by bin, as the definition has it."""
    error = 0.0
    for number in range(15):
        own = (confidences > number / 15) & (confidences <= (number + 1) / 15)
        if own.any():
            error += own.mean() * abs(right[own].mean() - confidences[own].mean())
    return error


def test_vote_clusters_and_calibration_are_what_their_definitions_say(tiny_bundle, mislabelled):
    found, gallery = evaluate(tiny_bundle, mislabelled), tiny_bundle.base
    embeddings = mislabelled.embeddings.astype(np.float64)
    names, truth = np.asarray(gallery.clusters.labels), mislabelled.labels
    clusters = gallery.clusters
    nearest_cluster = names[clusters.owners[(embeddings @ clusters.prototypes.T).argmax(axis=1)]]
    similarities = embeddings @ gallery.items.embeddings.T
    votes = np.zeros((len(truth), len(names)))
    for row, nearest in enumerate(np.argsort(-similarities, axis=1, kind="stable")[:, :20]):
        np.add.at(votes[row], gallery.classes[nearest], np.exp(similarities[row, nearest] / 0.07))
    by_vote = names[votes.argmax(axis=1)]
    scores = score(mislabelled.embeddings, gallery, tiny_bundle.manifest.calibration)
    assert 0.5 < found.top1 < 0.8
    assert found.cluster_top1 == pytest.approx((nearest_cluster == truth).mean())
    assert found.agreement == pytest.approx((nearest_cluster == by_vote).mean())
    confidences = scores.probabilities.max(axis=1)
    assert found.ece == pytest.approx(calibration_error(confidences, names[scores.best] == truth), abs=1e-6)
    of_vote = votes.max(axis=1) / votes.sum(axis=1)
    assert found.ece_of_vote == pytest.approx(calibration_error(of_vote, by_vote == truth), abs=1e-4)


def test_retrieval_is_what_its_definitions_say(tiny_bundle, mislabelled):
    found, gallery = evaluate(tiny_bundle, mislabelled), tiny_bundle.base
    similarities = np.round(mislabelled.embeddings.astype(np.float64) @ gallery.items.embeddings.T, 6)
    order = np.argsort(-similarities, axis=1, kind="stable")
    hits = gallery.items.labels[order] == mislabelled.labels[:, None]
    for k in (1, 5, 10):
        assert getattr(found, f"recall_at_{k}") == pytest.approx(hits[:, :k].any(axis=1).mean())
    ranks, relevant = np.arange(1, hits.shape[1] + 1), hits.sum(axis=1, keepdims=True)
    first = hits & (ranks <= relevant)
    precisions = np.cumsum(hits, axis=1) / ranks
    assert found.r_precision == pytest.approx((first.sum(axis=1) / relevant[:, 0]).mean())
    assert found.map_at_r == pytest.approx(((precisions * first).sum(axis=1) / relevant[:, 0]).mean())


def test_the_probe_and_the_silhouette_are_scikit_learns(tiny_bundle, queries, result):
    items, known = tiny_bundle.base.items, queries[0]
    scale = np.sqrt(items.dim)
    order = np.argsort(items.labels, kind="stable")
    probe = LogisticRegression(max_iter=200).fit(items.embeddings[order] * scale, items.labels[order])
    assert result.probe_top1 == pytest.approx(probe.score(known.embeddings * scale, known.labels), abs=1e-6)
    expected = silhouette_score(known.embeddings, known.labels, metric="cosine")
    assert result.silhouette == pytest.approx(expected, abs=1e-6)


def test_every_number_lies_within_its_interval(result):
    for name, (low, high) in result.intervals.items():
        if name not in ("ece", "ece_of_vote"):  # drawn errors are larger than the sample's
            assert low - 1e-6 <= getattr(result, name) <= high + 1e-6
        assert low <= high
    for row in result.per_class:
        for name, (low, high) in row.intervals.items():
            assert low - 1e-6 <= getattr(row, name) <= high + 1e-6


def test_the_most_confident_are_right_more_often(result):
    shares = [one.accuracy for one in result.selective]
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] == pytest.approx(result.top1)
    assert all(one.interval[0] <= one.accuracy <= one.interval[1] + 1e-9 for one in result.selective)


def test_unknown_images_score_lower_than_known_ones(result):
    assert result.unknown is not None
    assert result.unknown.auroc > 0.6
    low, high = result.unknown.intervals["auroc"]
    assert low < result.unknown.auroc < high


def test_a_class_taken_from_the_gallery_is_never_answered(tiny_bundle, queries, result):
    (split,) = result.held_out
    assert split.classes == ("1", "5")
    assert (split.known, split.unknown.images) == (72, 24)
    assert split.top1 >= result.top1 - 0.02
    assert result.held_out_auroc == split.unknown.auroc


@pytest.mark.parametrize(("classes", "message"), [(("8",), "no class '8'"), (tuple("01234567"), "leaves no class")])
def test_a_split_that_cannot_be_is_refused(tiny_bundle, queries, classes, message):
    with pytest.raises(DataError, match=message):
        evaluate(tiny_bundle, queries[0], held_out=[classes])


def test_one_class_only(tiny_bundle, queries):
    threes = queries[0].select(queries[0].labels == "3")
    found = evaluate(tiny_bundle, threes)
    assert found.images == 12
    assert np.isnan(found.silhouette)
    assert found.to_json()["silhouette"] is None
    json.dumps(found.to_json(), allow_nan=False)


def test_k_beyond_the_gallery_is_the_gallery(tiny_bundle, queries):
    few = tiny_bundle.base.items.select(np.arange(0, len(tiny_bundle.base.items), 40))
    snapshot = tiny_bundle.base.with_items(
        few, removed=[item for item in tiny_bundle.base.items.ids if item not in few.ids]
    )
    own = queries[0].select(np.isin(queries[0].labels, snapshot.clusters.labels))
    found = evaluate(tiny_bundle, own, snapshot=snapshot)
    assert [knn.k for knn in found.knn] == [1, 5, 10, len(few)]


def test_a_label_that_the_gallery_lacks_is_refused(tiny_bundle, queries):
    _, unknown = queries
    with pytest.raises(DataError, match="'8', '9'"):
        evaluate(tiny_bundle, unknown)


def test_images_that_the_gallery_holds_are_found(tiny_bundle, digit_tree_of, tmp_path):
    """The gallery holds the first 60 of each class: of images 55 to 64, five byte for byte."""
    tree = digit_tree_of(tmp_path / "leaky", classes=(0, 1), per_class=10, skip=55)
    found = evaluate(tiny_bundle, embed_folder(tiny_bundle, tree)).leaks
    assert found.same_bytes == 10
    assert all(leak.truth == leak.label for leak in found.shown)


@pytest.mark.parametrize("suffix", [".bmp", ".jpg"])
def test_the_same_picture_in_another_file_is_found(tiny_bundle, tmp_path, digit_tree_of, suffix):
    from PIL import Image

    tree = digit_tree_of(tmp_path / "again", classes=(0, 1), per_class=4)
    for path in tree.rglob("*.png"):
        Image.open(path).save(path.with_suffix(suffix), quality=90)
        path.unlink()
    found = evaluate(tiny_bundle, embed_folder(tiny_bundle, tree)).leaks
    assert (found.same_bytes, found.near) == (0, 8)


def test_other_images_are_no_leak(result):
    assert (result.leaks.same_bytes, result.leaks.near) == (0, 0)


def test_the_script_prints_the_same_numbers(tiny_bundle, digit_tree_of, tmp_path, result):
    known = digit_tree_of(tmp_path / "known", classes=range(8), per_class=12, skip=100)
    more = ("--hold-out", "1,5", "--max-ece", "0", "--threads", "1")
    command = [sys.executable, "-m", "evaluation.knn", str(tiny_bundle.path), str(known), *more]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    printed, expected = json.loads(done.stdout), result.to_json()
    for name in ("top1", "knn_top1", "map_at_r", "intervals", "per_class", "data", "bundle", "knn", "reliability"):
        assert printed[name] == expected[name]
    assert printed["provenance"]["command"] == shlex.join(["python", *command[1:]])
    assert done.returncode == 1
    assert "above --max-ece 0" in done.stderr


def test_the_script_says_what_is_wrong_in_one_line(tmp_path):
    command = [sys.executable, "-m", "evaluation.knn", str(tmp_path), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_a_bundle_of_another_version_is_one_line(tiny_bundle, tmp_path):
    other = shutil.copytree(tiny_bundle.path, tmp_path / "bundle")
    manifest = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps(manifest | {"format": 99}))
    command = [sys.executable, "-m", "evaluation.knn", str(other), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "bundle format 99" in done.stderr
    assert done.stderr.count("\n") == 1
