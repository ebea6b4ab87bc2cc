"""Probabilities, and an "unknown" that keeps its promise."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from coterie.bundle import Bundle
from coterie.calibration import calibrate
from coterie.classifier import OWN_SHARE, RADIUS_WEIGHT, Calibration, classify, score, verify
from coterie.errors import CoterieError, DataError
from coterie.gallery import GalleryItems, Snapshot

Labelled = tuple[NDArray[np.float32], NDArray[np.str_]]
MakeSnapshot = Callable[..., Snapshot]
SETTINGS = Calibration(
    n_neighbors=10,
    temperature=0.1,
    vote_weight=0.5,
    cluster_weight=2.0,
    neighbor_share=0.5,
    typical_gap=0.1,
    limits={"0.05": 1.0, "0.2": 0.5},
    images=100,
    ece_of_vote=0.1,
    ece=0.02,
    left_out_auroc={},
)


@pytest.fixture
def snapshot(clouds: Any, snapshot_of: MakeSnapshot) -> Snapshot:
    return snapshot_of(clouds.draw(np.random.default_rng(1), [30] * 6))


@pytest.fixture
def held_out(clouds: Any) -> Labelled:
    return clouds.draw(np.random.default_rng(2), [50] * 6)  # type: ignore[no-any-return]


# Scores


def slow_gap(query: NDArray[np.float32], snapshot: Snapshot, row: int) -> tuple[float, float]:
    """The gap to a class's nearest prototype, and that one's radius."""
    clusters = snapshot.clusters
    own = [number for number, owner in enumerate(clusters.owners) if owner == row]
    nearest = max(own, key=lambda number: float(query @ clusters.prototypes[number]))
    return 1 - float(query @ clusters.prototypes[nearest]), float(clusters.radii[nearest])


def slow_joint(query: NDArray[np.float32], snapshot: Snapshot, settings: Calibration, row: int) -> tuple[float, float]:
    """Joint similarity to a class, and the threshold at a false-reject rate of 5 %."""
    clusters, share = snapshot.clusters, settings.neighbor_share
    gap, radius = slow_gap(query, snapshot, row)
    similarities = sorted(((float(query @ item), number) for number, item in enumerate(snapshot.items.embeddings)))[
        ::-1
    ]
    near = similarities[: settings.n_neighbors]
    own = [similarity for similarity, number in near if snapshot.items.labels[number] == clusters.labels[row]]
    nearest = own[0] if own else near[-1][0]
    typical = radius ** (1 - share) * float(clusters.spacings[row]) ** share
    if not clusters.enrolled[row]:
        typical = typical**OWN_SHARE * settings.typical_gap ** (1 - OWN_SHARE)
    bound = float(clusters.bounds[row, 0]) ** (1 - share) * float(clusters.bounds[row, 1]) ** share
    return 1 - gap ** (1 - share) * (1 - nearest) ** share, 1 - min(typical * np.exp(settings.limit(0.05)), bound)


def slow_probabilities(query: NDArray[np.float32], snapshot: Snapshot, settings: Calibration) -> list[float]:
    """The formula of the module, one class and one item at a time."""
    similarities = [float(query @ item) for item in snapshot.items.embeddings]
    nearest = sorted(range(len(similarities)), key=lambda row: -similarities[row])[: settings.n_neighbors]
    farthest = similarities[nearest[-1]]
    logits = []
    for row, label in enumerate(snapshot.clusters.labels):
        own = [similarities[near] for near in nearest if snapshot.items.labels[near] == label]
        size = int((snapshot.items.labels == label).sum())
        vote = sum(np.exp((similarity - farthest) / settings.temperature) - 1 for similarity in own) / size
        gap, radius = slow_gap(query, snapshot, row)
        distance = np.log(gap) - RADIUS_WEIGHT * np.log(radius)
        logits.append(settings.vote_weight * np.log(1 + vote) - settings.cluster_weight * distance)
    weights = [np.exp(logit) for logit in logits]
    return [float(weight / sum(weights)) for weight in weights]


def test_probabilities_follow_the_formula(snapshot: Snapshot, held_out: Labelled) -> None:
    scores = score(held_out[0], snapshot, SETTINGS)
    for row in range(0, 300, 15):
        expected = slow_probabilities(held_out[0][row], snapshot, SETTINGS)
        assert scores.probabilities[row].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("look", ["one", "two, and enrolled"])
def test_similarity_and_threshold_follow_the_formula(
    snapshot: Snapshot, held_out: Labelled, items: Callable[..., GalleryItems], share: float, look: str
) -> None:
    embeddings, labels = held_out
    if look != "one":
        both = np.concatenate([embeddings[labels == "d"][:12], -embeddings[labels == "a"][:12]])
        snapshot = snapshot.with_items(items(both, ["new"] * 24, "new "))
        assert snapshot.clusters.enrolled.sum() == 1
        assert len(snapshot.clusters.owners) == 8
    settings = SETTINGS.model_copy(update={"neighbor_share": share})
    asked = np.concatenate([embeddings[::12], -embeddings[::12]])
    seen = set()
    for query, answer in zip(asked, classify(asked, snapshot, settings), strict=True):
        row = snapshot.clusters.labels.index(answer.classes[0].label)
        similarity, threshold = slow_joint(query, snapshot, settings, row)
        assert answer.similarity == pytest.approx(similarity, abs=1e-5)
        assert answer.threshold == pytest.approx(threshold, abs=1e-5)
        seen.add(answer.classes[0].label)
    assert len(seen) > 3


def test_probabilities_sum_to_one_and_the_best_is_the_largest(snapshot: Snapshot, held_out: Labelled) -> None:
    scores = score(held_out[0], snapshot, SETTINGS)
    assert scores.probabilities.shape == (300, 6)
    np.testing.assert_allclose(scores.probabilities.sum(axis=1), 1)
    assert (scores.probabilities >= 0).all()
    assert (scores.best == scores.probabilities.argmax(axis=1)).all()


def test_an_answer_does_not_depend_on_the_other_images_of_its_batch(snapshot: Snapshot, held_out: Labelled) -> None:
    together = classify(held_out[0][:40], snapshot, SETTINGS)
    for row, answer in enumerate(together):
        (alone,) = classify(held_out[0][row : row + 1], snapshot, SETTINGS)
        assert (alone.label, alone.known) == (answer.label, answer.known)
        assert alone.probability == pytest.approx(answer.probability, abs=1e-5)
        assert [near.id for near in alone.neighbors] == [near.id for near in answer.neighbors]


def test_no_images_give_no_answers(snapshot: Snapshot) -> None:
    assert classify(np.empty((0, 8), dtype=np.float32), snapshot, SETTINGS) == []


@pytest.mark.parametrize("counts", [[3], [1], [1, 1, 1], [1, 30]])
def test_small_galleries_are_classified_and_calibrated(
    cloud_class: Any, snapshot_of: MakeSnapshot, counts: list[int]
) -> None:
    rng = np.random.default_rng(3)
    clouds = cloud_class.make(rng, len(counts), 8, 0.2)
    snapshot = snapshot_of(clouds.draw(rng, counts))
    queries, labels = clouds.draw(rng, [20] * len(counts))
    calibration = calibrate(snapshot, queries, labels)
    answers = classify(queries, snapshot, calibration, false_reject=0.01)
    assert np.mean([answer.label == label for answer, label in zip(answers, labels.tolist(), strict=True)]) > 0.9
    for answer in answers:
        assert sum(entry.probability for entry in answer.classes) == pytest.approx(1)
        assert len(answer.neighbors) == min(5, sum(counts))


def test_an_empty_gallery_says_what_to_do(snapshot: Snapshot, held_out: Labelled) -> None:
    empty = snapshot.with_items(GalleryItems.enrolled((), 8), snapshot.items.ids)
    with pytest.raises(DataError, match="empty: add examples"):
        classify(held_out[0], empty, SETTINGS)


# Answers


def test_an_answer_says_what_it_rests_on(snapshot: Snapshot, held_out: Labelled) -> None:
    embeddings, _ = held_out
    scores = score(embeddings, snapshot, SETTINGS)
    for row, answer in enumerate(classify(embeddings, snapshot, SETTINGS, top=3, neighbors=4)):
        best = snapshot.clusters.labels[scores.best[row]]
        assert answer.label == (best if answer.known else None)
        assert answer.known == (scores.deviations[row] <= SETTINGS.limit(0.05))
        assert (answer.calibration, answer.snapshot) == (SETTINGS.id, snapshot.sequence)
        assert answer.classes[0].label == best
        probabilities = [entry.probability for entry in answer.classes]
        assert probabilities == sorted(probabilities, reverse=True)
        assert probabilities[0] == answer.probability
        assert answer.classes[0].cluster_similarity == scores.cluster_similarities[row, scores.best[row]]
        assert (len(answer.classes), len(answer.neighbors)) == (3, 4)
        assert answer.neighbors[0].similarity == pytest.approx(
            (snapshot.items.embeddings @ embeddings[row]).max(), abs=1e-6
        )
        for near in answer.neighbors:
            place = snapshot.rows[near.id]
            assert (near.label, near.metadata) == (snapshot.items.labels[place], {"row": place})


@pytest.mark.parametrize("rate", [0.05, 0.2])
def test_known_is_to_reach_the_threshold(snapshot: Snapshot, held_out: Labelled, rate: float) -> None:
    answers = classify(held_out[0], snapshot, SETTINGS, false_reject=rate)
    assert {answer.known for answer in answers} == {True, False}
    for answer in answers:
        assert answer.known == (answer.similarity >= answer.threshold)


def test_a_query_far_from_every_cluster_is_unknown_but_still_has_nearest_classes(snapshot: Snapshot) -> None:
    opposite = -snapshot.clusters.prototypes.sum(axis=0, keepdims=True)
    opposite /= np.linalg.norm(opposite)
    (answer,) = classify(opposite, snapshot, SETTINGS)
    assert (answer.label, answer.known) == (None, False)
    assert len(answer.classes) == 5


def test_more_classes_or_neighbours_than_there_are_gives_all(snapshot: Snapshot, held_out: Labelled) -> None:
    (answer,) = classify(held_out[0][:1], snapshot, SETTINGS, top=100, neighbors=100_000)
    assert len(answer.classes) == 6
    assert len(answer.neighbors) == len(snapshot.items)


def test_a_rate_that_was_not_calibrated_is_refused_with_those_that_were(snapshot: Snapshot, held_out: Labelled) -> None:
    with pytest.raises(CoterieError, match=r"rate of 0.03: choose one of 0.05, 0.2"):
        classify(held_out[0], snapshot, SETTINGS, false_reject=0.03)


# Classes of different sizes


def test_a_young_class_is_not_drowned_by_large_ones(cloud_class: Any, snapshot_of: MakeSnapshot) -> None:
    rng = np.random.default_rng(4)
    clouds = cloud_class(cloud_class.make(rng, 5, 8, 1).centres, np.full(5, 0.5))
    embeddings, labels = clouds.draw(rng, [200, 200, 200, 200, 5])
    snapshot = snapshot_of((embeddings, labels))
    held_out = clouds.draw(rng, [50, 50, 50, 50, 0])
    calibration = calibrate(snapshot, *held_out)
    queries, truth = clouds.draw(rng, [200] * 5)
    found = np.asarray(snapshot.clusters.labels)[score(queries, snapshot, calibration).best]
    recalls = [np.mean(found[truth == label] == label) for label in "abcde"]
    assert min(recalls) > 0.8
    assert recalls[4] > np.mean(recalls[:4]) - 0.1


def test_a_digit_is_known_from_five_examples(tiny_bundle: Bundle, digit_images: Any) -> None:
    calibration, base = tiny_bundle.manifest.calibration, tiny_bundle.base
    eights = tiny_bundle.embed(digit_images.of("8").images)
    young = GalleryItems(
        ids=tuple(f"eight {row}" for row in range(5)),
        labels=np.asarray(["8"] * 5),
        embeddings=eights[:5],
        positions=np.zeros((5, 2), dtype=np.float32),
        thumbnails=(b"",) * 5,
        metadata=({},) * 5,
    )
    snapshot = base.with_items(young)
    names = np.asarray(snapshot.clusters.labels)
    assert np.mean(names[score(eights[5:], snapshot, calibration).best] == "8") > 0.6  # by chance: 1/9
    known = digit_images.of(*base.clusters.labels)
    found = names[score(tiny_bundle.embed(known.images), snapshot, calibration).best]
    assert np.mean(found == known.labels) > 0.95


def test_digits_are_named_and_unknown_ones_are_rejected_more_often(tiny_bundle: Bundle, digit_images: Any) -> None:
    answers = tiny_bundle.classify(digit_images.images, false_reject=0.1)
    known = np.asarray([answer.known for answer in answers])
    best = np.asarray([answer.classes[0].label for answer in answers])
    belongs = np.isin(digit_images.labels, tiny_bundle.manifest.classes)
    assert np.mean(best[belongs] == digit_images.labels[belongs]) > 0.95
    assert np.mean(~known[belongs]) < 0.15
    assert np.mean(~known[~belongs]) > 0.5


def test_more_neighbors_may_be_listed_than_vote(tiny_bundle, digit_images) -> None:  # type: ignore[no-untyped-def]
    embeddings = tiny_bundle.embed(digit_images.images[:4])
    calibration = tiny_bundle.manifest.calibration
    few = classify(embeddings, tiny_bundle.base, calibration, neighbors=3)
    many = classify(embeddings, tiny_bundle.base, calibration, neighbors=calibration.n_neighbors + 30)
    assert [len(answer.neighbors) for answer in many] == [calibration.n_neighbors + 30] * 4
    for less, more in zip(few, many, strict=True):
        assert more.neighbors[:3] == less.neighbors
        assert (more.label, more.probability, more.classes) == (less.label, less.probability, less.classes)


# One class


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("look", ["one", "two, and enrolled"])
def test_verification_follows_the_formula_for_every_class(
    snapshot: Snapshot, held_out: Labelled, items: Callable[..., GalleryItems], share: float, look: str
) -> None:
    embeddings, labels = held_out
    if look != "one":
        both = np.concatenate([embeddings[labels == "d"][:12], -embeddings[labels == "a"][:12]])
        snapshot = snapshot.with_items(items(both, ["new"] * 24, "new "))
    # Among as many neighbours as there are items, the nearest of every class is found.
    settings = SETTINGS.model_copy(update={"neighbor_share": share, "n_neighbors": len(snapshot.items)})
    asked = np.concatenate([embeddings[200::8], -embeddings[200::8]])
    seen = set()
    for row, label in enumerate(snapshot.clusters.labels):
        for query, answer in zip(asked, verify(asked, snapshot, settings, label), strict=True):
            similarity, threshold = slow_joint(query, snapshot, settings, row)
            assert answer.similarity == pytest.approx(similarity, abs=1e-5)
            assert answer.threshold == pytest.approx(threshold, abs=1e-5)
            assert answer.match == (answer.similarity >= answer.threshold)
            assert (answer.label, answer.calibration, answer.snapshot) == (label, settings.id, snapshot.sequence)
            seen.add(answer.match)
    assert seen == {True, False}


@pytest.mark.parametrize("rate", [0.05, 0.2])
def test_the_most_probable_class_is_verified_where_it_is_known(
    snapshot: Snapshot, held_out: Labelled, rate: float
) -> None:
    compared = 0
    for query, answer in zip(held_out[0], classify(held_out[0], snapshot, SETTINGS, false_reject=rate), strict=True):
        label = answer.classes[0].label
        if any(near.label == label for near in answer.neighbors):
            (verified,) = verify(query[None], snapshot, SETTINGS, label, false_reject=rate)
            assert verified.match == answer.known
            assert verified.similarity == pytest.approx(answer.similarity, abs=1e-6)
            assert verified.threshold == pytest.approx(answer.threshold, abs=1e-6)
            compared += 1
    assert compared > 200


def test_an_item_far_away_does_not_pass_for_near_because_no_nearer_one_was_found(
    snapshot: Snapshot, held_out: Labelled
) -> None:
    """A class that has none of the k nearest items is held to its own nearest, not to the k-th of all."""
    settings = SETTINGS.model_copy(update={"neighbor_share": 1.0, "n_neighbors": 1})
    query = held_out[0][held_out[1] == "a"][:1]
    for label in "bcdef":
        (answer,) = verify(query, snapshot, settings, label)
        own = snapshot.items.embeddings[snapshot.members(label)]
        assert answer.similarity == pytest.approx(float((own @ query[0]).max()), abs=1e-6)


def test_the_stated_share_of_new_images_of_a_class_is_refused(cloud_class: Any, snapshot_of: MakeSnapshot) -> None:
    rng = np.random.default_rng(5)
    clouds = cloud_class.make(rng, 6, 16, 0.4)
    snapshot = snapshot_of(clouds.draw(rng, [60] * 6), clouds.draw(rng, [60] * 6))
    calibration = calibrate(snapshot, *clouds.draw(rng, [80] * 6))
    queries, labels = clouds.draw(rng, [200] * 6)
    for rate in (0.05, 0.2):
        refused = [
            not answer.match
            for label in "abcdef"
            for answer in verify(queries[labels == label], snapshot, calibration, label, false_reject=rate)
        ]
        assert np.mean(refused) == pytest.approx(rate, abs=0.03)


def test_no_images_are_verified_without_answers(snapshot: Snapshot) -> None:
    assert verify(np.empty((0, 8), dtype=np.float32), snapshot, SETTINGS, "a") == []


def test_a_class_or_rate_that_is_not_there_is_refused(snapshot: Snapshot, held_out: Labelled) -> None:
    with pytest.raises(DataError, match="no class 'z'"):
        verify(held_out[0], snapshot, SETTINGS, "z")
    with pytest.raises(CoterieError, match=r"choose one of 0\.05, 0\.2"):
        verify(held_out[0], snapshot, SETTINGS, "a", false_reject=0.07)
