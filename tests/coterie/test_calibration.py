"""Calibration: thresholds that keep a stated rate, probabilities that mean what they say, and what decides."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pydantic import ValidationError
from scipy.optimize import minimize
from scipy.special import log_softmax

from coterie.calibration import FALSE_REJECT_RATES, calibrate
from coterie.classifier import Calibration, score
from coterie.errors import CoterieError
from coterie.gallery import Snapshot
from coterie.likelihood import MOST_VOTE, fit_weights
from coterie.metrics import expected_calibration_error
from coterie.reference import LabelledVectors

Labelled = tuple[NDArray[np.float32], NDArray[np.str_]]
MakeSnapshot = Callable[..., Snapshot]


@pytest.fixture
def held_out(clouds: Any) -> Labelled:
    return clouds.draw(np.random.default_rng(2), [50] * 6)  # type: ignore[no-any-return]


@pytest.fixture
def snapshot(clouds: Any, snapshot_of: MakeSnapshot, held_out: Labelled) -> Snapshot:
    return snapshot_of(clouds.draw(np.random.default_rng(1), [30] * 6), held_out)


# Thresholds


def test_a_larger_false_reject_rate_is_stricter(snapshot: Snapshot, held_out: Labelled) -> None:
    calibration = calibrate(snapshot, *held_out)
    limits = [calibration.limit(rate) for rate in FALSE_REJECT_RATES]
    assert limits == sorted(limits, reverse=True)
    assert len(set(limits)) == len(limits)
    assert calibration.images == 300


@pytest.mark.parametrize("radii_from", ["the gallery", "the same held-out images"])
def test_the_stated_rate_of_new_known_images_is_rejected(
    cloud_class: Any, snapshot_of: MakeSnapshot, radii_from: str
) -> None:
    """On average over calibrations, whether or not the images that measured the classes also draw the limits."""
    rng = np.random.default_rng(5)
    rejected = []
    for _ in range(20):
        clouds = cloud_class.make(rng, 4, 8, 0.55)
        gallery, held_out = clouds.draw(rng, [15] * 4), clouds.draw(rng, [60] * 4)
        snapshot = snapshot_of(gallery, held_out if radii_from == "the same held-out images" else None)
        calibration = calibrate(snapshot, *held_out)
        new = score(clouds.draw(rng, [500] * 4)[0], snapshot, calibration)
        rejected.append([np.mean(~new.accepted(calibration.limit(rate))) for rate in FALSE_REJECT_RATES])
    # l of 241 may lie above: Beta(l, 241 − l), whose mean over 20 is good to three standard errors.
    for rate, found in zip(FALSE_REJECT_RATES, np.mean(rejected, axis=0).tolist(), strict=True):
        expected = np.floor(241 * rate) / 241
        assert found == pytest.approx(expected, abs=3 * np.sqrt(rate / 241 / 20) + 0.004)


def test_an_image_does_not_count_for_the_radius_that_it_is_measured_by(
    cloud_class: Any, snapshot_of: MakeSnapshot
) -> None:
    rng = np.random.default_rng(7)
    clouds = cloud_class.make(rng, 4, 8, 0.15)
    gallery, (embeddings, labels) = clouds.draw(rng, [20] * 4), clouds.draw(rng, [10] * 4)
    snapshot = snapshot_of(gallery, (embeddings, labels))
    # So few images cannot promise one in a hundred, and that limit is the largest deviation.
    calibration = calibrate(snapshot, embeddings, labels)
    deviations = []
    for row in range(40):
        others = np.arange(40) != row
        without = snapshot_of(gallery, (embeddings[others], labels[others]))
        deviations.append(score(embeddings[row : row + 1], without, calibration).deviations[0])
    assert calibration.limit(0.01) == pytest.approx(max(deviations), abs=0.02)
    helped = score(embeddings, snapshot, calibration).deviations
    assert max(helped) < max(deviations) - 0.03


def test_a_few_wrong_labels_do_not_open_the_door(cloud_class: Any, snapshot_of: MakeSnapshot) -> None:
    rng = np.random.default_rng(6)
    clouds = cloud_class.make(rng, 6, 8, 0.2)
    snapshot = snapshot_of(clouds.draw(rng, [30] * 6))
    embeddings, labels = clouds.draw(rng, [50] * 6)
    mislabelled = labels.copy()
    mislabelled[:30] = np.roll(clouds.names, 1)[np.searchsorted(clouds.names, labels[:30])]
    clean, noisy = calibrate(snapshot, embeddings, labels), calibrate(snapshot, embeddings, mislabelled)
    assert noisy.limit(0.05) < clean.limit(0.05) + 0.5


def test_too_few_images_for_a_promise_leave_the_largest_deviation(snapshot: Snapshot, held_out: Labelled) -> None:
    calibration = calibrate(snapshot, held_out[0][:8], held_out[1][:8])
    assert calibration.limit(0.01) == calibration.limit(0.1)
    assert score(held_out[0][:8], snapshot, calibration).deviations.max() <= calibration.limit(0.01) + 1e-9


@pytest.mark.parametrize(("examples", "most_let_in"), [(1, 0.4), (5, 0.2), (20, 0.2)])
def test_thresholds_of_a_class_enrolled_later_are_sound(
    cloud_class: Any, snapshot_of: MakeSnapshot, examples: int, most_let_in: float
) -> None:
    """Few of its own images are refused at 5 %, and few of a class that nobody has enrolled get its label."""
    rng = np.random.default_rng(8)
    refused, let_in = [], []
    for _ in range(6):
        clouds = cloud_class.make(rng, 8, 32, 0.6)
        gallery, held_out = clouds.draw(rng, [40] * 6 + [0, 0]), clouds.draw(rng, [30] * 6 + [0, 0])
        base = snapshot_of(gallery, held_out)
        calibration = calibrate(base, *held_out)
        reference = LabelledVectors(base.items.embeddings, base.classes, base.clusters)
        young = reference.with_class("g", clouds.draw(rng, [0] * 6 + [examples, 0])[0])
        own = score(clouds.draw(rng, [0] * 6 + [200, 0])[0], young, calibration)
        right = own.best == 6
        refused.append(1 - np.mean(own.accepted(calibration.limit(0.05))[right]))
        strange = score(clouds.draw(rng, [0] * 7 + [200])[0], young, calibration)
        let_in.append(np.mean((strange.best == 6) & strange.accepted(calibration.limit(0.05))))
    assert np.mean(refused) < 0.12
    assert np.mean(let_in) < most_let_in


# Probabilities


def test_probabilities_mean_what_they_say(snapshot: Snapshot, clouds: Any, held_out: Labelled) -> None:
    queries, truth = clouds.draw(np.random.default_rng(9), [2000] * 6)
    scores = score(queries, snapshot, calibrate(snapshot, *held_out))
    right = np.asarray(snapshot.clusters.labels)[scores.best] == truth
    assert 0.8 < right.mean() < 0.95
    assert expected_calibration_error(scores.probabilities.max(axis=1), right) < 0.02


def test_errors_of_calibration_before_and_after_are_of_held_out_images(
    cloud_class: Any, snapshot_of: MakeSnapshot
) -> None:
    """A gallery that the encoder was trained on lies tighter than new images, and its plain vote boasts."""
    rng = np.random.default_rng(13)
    clouds = cloud_class.make(rng, 6, 8, 0.7)
    tight = cloud_class(clouds.centres, clouds.spreads / 20)
    held_out = clouds.draw(rng, [300] * 6)
    snapshot = snapshot_of(tight.draw(rng, [30] * 6), held_out)
    calibration = calibrate(snapshot, *held_out)
    assert calibration.ece < 0.04 < calibration.ece_of_vote
    similarities, rows = snapshot.index.search(held_out[0], 20)
    shares = np.exp(similarities.astype(np.float64) / 0.07)
    own = np.asarray(
        [
            [row[classes == c].sum() for c in range(6)]
            for row, classes in zip(shares, snapshot.classes[rows], strict=True)
        ]
    )
    right = np.asarray(snapshot.clusters.labels)[own.argmax(axis=1)] == held_out[1]
    boast = expected_calibration_error(own.max(axis=1) / own.sum(axis=1), right)
    assert calibration.ece_of_vote == pytest.approx(boast)


def test_classes_that_are_told_apart_without_error_leave_some_doubt(
    cloud_class: Any, snapshot_of: MakeSnapshot
) -> None:
    rng = np.random.default_rng(10)
    clouds = cloud_class.make(rng, 4, 16, 0.05)
    held_out = clouds.draw(rng, [10] * 4)
    snapshot = snapshot_of(clouds.draw(rng, [20] * 4), held_out)
    probabilities = score(held_out[0], snapshot, calibrate(snapshot, *held_out)).probabilities.max(axis=1)
    # Forty without a mistake: the next is expected to be wrong once in 42.
    assert probabilities.mean() == pytest.approx(1 - 1 / 42, abs=0.01)


def test_weights_have_the_smallest_loss_there_is() -> None:
    """Newton's method against scipy's, where the optimum lies within and where it lies on the edge."""
    rng = np.random.default_rng(14)
    on_the_edge = 0
    for _ in range(20):
        m, n, c = (int(rng.integers(*ends)) for ends in ((1, 3), (5, 100), (2, 6)))
        features = [rng.normal(size=(m, n, c)) * rng.uniform(0.1, 5) for _ in range(rng.integers(1, 4))]
        truth = rng.integers(c, size=n)
        for feature in features:
            feature[0, np.arange(n), truth] += rng.uniform(0, 6)
        doubt = 1 / (n + 2)
        target = np.full((n, c), doubt / (c - 1))
        target[np.arange(n), truth] = 1 - doubt

        def loss(weights, features=features, target=target):  # type: ignore[no-untyped-def]
            each = [
                -(target * log_softmax(np.tensordot(weights, f, axes=1), axis=1)).sum(axis=1).mean() for f in features
            ]
            return each[0] + (np.mean(each[1:]) if len(each) > 1 else 0)

        value, weights = fit_weights(features, truth)
        best = minimize(loss, np.ones(m), bounds=[(0, None)] * m, method="L-BFGS-B", options={"ftol": 1e-14})
        assert value == pytest.approx(loss(weights))
        assert value <= best.fun + 1e-6
        on_the_edge += bool((weights == 0).any())
    assert 0 < on_the_edge < 20


def test_neighbours_do_not_outweigh_clusters(snapshot: Snapshot, held_out: Labelled) -> None:
    calibration = calibrate(snapshot, *held_out)
    assert 0 < calibration.vote_weight <= MOST_VOTE * calibration.cluster_weight * (1 + 1e-9)


def test_neighbours_weigh_freely_where_clusters_say_little(snapshot_of: MakeSnapshot) -> None:
    """Classes that are long arcs crossing each other: their middles coincide, their items do not."""
    rng = np.random.default_rng(15)

    def draw(count: int) -> Labelled:
        labels = np.repeat(list("abc"), count)
        angles = rng.uniform(-1.2, 1.2, len(labels))
        vectors = np.zeros((len(labels), 4))
        vectors[:, 0] = np.cos(angles)
        vectors[np.arange(len(labels)), 1 + np.searchsorted(list("abc"), labels)] = np.sin(angles)
        return vectors.astype(np.float32), labels

    held_out = draw(60)
    snapshot = snapshot_of(draw(100), held_out)
    calibration = calibrate(snapshot, *held_out)
    assert calibration.vote_weight > MOST_VOTE * calibration.cluster_weight
    queries, truth = draw(200)
    assert np.mean(np.asarray(snapshot.clusters.labels)[score(queries, snapshot, calibration).best] == truth) > 0.9


# What decides on unknown


def test_what_rejects_is_recorded_with_what_it_was_chosen_by(snapshot: Snapshot, held_out: Labelled) -> None:
    calibration = calibrate(snapshot, *held_out)
    assert calibration.neighbor_share in (0.0, 0.5, 1.0)
    assert list(calibration.left_out_auroc) == ["0", "0.5", "1"]
    assert all(0.5 < value <= 1 for value in calibration.left_out_auroc.values())


def test_the_nearest_item_decides_alone_where_that_is_clearly_better(snapshot_of: MakeSnapshot) -> None:
    """Dots in the middle of spheres: the middle of a sphere is where its members are not."""
    rng = np.random.default_rng(11)

    def draw(count: int) -> Labelled:
        labels = np.repeat(list("abcdefgh"), count)
        rows = np.searchsorted(list("abcdefgh"), labels)
        around = rng.normal(size=(len(labels), 5))
        vectors = np.zeros((len(labels), 9))
        vectors[:, 4:] = around / np.linalg.norm(around, axis=1, keepdims=True) * np.where(rows % 2, 1.5, 0.1)[:, None]
        vectors[np.arange(len(labels)), rows // 2] = 1
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32), labels

    held_out = draw(40)
    chosen = calibrate(snapshot_of(draw(60), held_out), *held_out)
    assert chosen.left_out_auroc["1"] > chosen.left_out_auroc["0.5"] > chosen.left_out_auroc["0"]
    assert chosen.neighbor_share == 1.0


def test_a_single_class_is_calibrated_without_leaving_it_out(cloud_class: Any, snapshot_of: MakeSnapshot) -> None:
    rng = np.random.default_rng(12)
    clouds = cloud_class.make(rng, 1, 8, 0.2)
    held_out = clouds.draw(rng, [20])
    calibration = calibrate(snapshot_of(clouds.draw(rng, [10]), held_out), *held_out)
    assert (calibration.neighbor_share, calibration.left_out_auroc) == (0.5, {})


# What it is


def test_labels_that_the_gallery_lacks_do_not_count(snapshot: Snapshot, held_out: Labelled) -> None:
    embeddings, labels = held_out
    strangers = np.where(np.arange(300) % 3 == 0, "a longer name than the others", labels)
    kept = np.arange(300) % 3 != 0
    assert calibrate(snapshot, embeddings, strangers) == calibrate(snapshot, embeddings[kept], labels[kept])


def test_nothing_to_calibrate_with_is_an_error(snapshot: Snapshot, held_out: Labelled) -> None:
    strangers = np.full(300, "stranger")
    with pytest.raises(CoterieError, match="no held-out image belongs to a class"):
        calibrate(snapshot, held_out[0], strangers)


def test_the_same_images_give_the_same_calibration(snapshot: Snapshot, held_out: Labelled) -> None:
    assert calibrate(snapshot, *held_out) == calibrate(snapshot, *held_out)


def test_a_calibration_survives_json_and_refuses_nonsense(snapshot: Snapshot, held_out: Labelled) -> None:
    calibration = calibrate(snapshot, *held_out)
    assert Calibration.model_validate_json(calibration.model_dump_json()) == calibration
    for wrong in ({"n_neighbors": 0}, {"temperature": 0.0}, {"vote_weight": -1.0}, {"neighbor_share": 2}, {"extra": 1}):
        with pytest.raises(ValidationError):
            Calibration.model_validate(json.loads(calibration.model_dump_json()) | wrong)


def test_the_id_is_that_of_the_values(snapshot: Snapshot, held_out: Labelled) -> None:
    calibration = calibrate(snapshot, *held_out)
    again = Calibration.model_validate_json(calibration.model_dump_json())
    assert again.id == calibration.id
    assert len(again.id) == 12
    assert calibration.model_copy(update={"images": 301}).id != calibration.id
