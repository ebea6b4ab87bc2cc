"""Class clusters: prototypes, radii, spacings, and what an enrolment changes."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from coterie.clusters import WIDEST_GAP, ClassClusters, left_out_gaps, typical_gaps
from coterie.prototypes import SMALLEST_GAP, gaps, prototype

NOTHING = np.empty((0, 8), dtype=np.float32)
FIELDS = ("counts", "spacings", "bounds", "prototypes", "radii")
Labelled = tuple[NDArray[np.float32], NDArray[np.str_]]
Drawn = tuple[Any, Labelled, Labelled]


@pytest.fixture
def drawn(cloud_class: Any) -> Drawn:
    """Three classes of different spreads: the clouds, their gallery, and held-out images."""
    rng = np.random.default_rng(0)
    clouds = cloud_class(cloud_class.make(rng, 3, 8, 1).centres, np.asarray([0.1, 0.3, 0.6]))
    return clouds, clouds.draw(rng, [40, 40, 40]), clouds.draw(rng, [200, 200, 200])


@pytest.fixture
def two_looks(cloud_class: Any) -> Drawn:
    """Classes "a" of two looks and "b" of one: the clouds, their gallery, and held-out images."""
    rng = np.random.default_rng(1)
    clouds = cloud_class(cloud_class.make(rng, 3, 8, 1).centres, np.asarray([0.15, 0.15, 0.15]))

    def draw(count: int) -> Labelled:
        embeddings, labels = clouds.draw(rng, [count] * 3)
        return embeddings, np.where(labels == "c", "a", labels)

    return clouds, draw(30), draw(100)


def nearest_members(members: NDArray[np.float32], others: NDArray[np.float32]) -> list[float]:
    """The gap of each to the nearest of the others."""
    return [min(float(gaps(row @ other)) for other in others) for row in members]


# All classes at once


def test_a_class_of_one_look_lies_at_its_normalised_mean(drawn: Drawn) -> None:
    _, (embeddings, labels), _ = drawn
    clusters = ClassClusters.fit(embeddings, labels)
    assert clusters.labels == ("a", "b", "c")
    assert clusters.counts.tolist() == [40, 40, 40]
    assert clusters.owners.tolist() == [0, 1, 2]
    for row, label in enumerate(clusters.labels):
        np.testing.assert_allclose(clusters.prototypes[row], prototype(embeddings[labels == label]), atol=1e-6)
    assert (clusters.prototypes.dtype, clusters.radii.dtype, clusters.spacings.dtype) == (np.float32,) * 3
    assert not clusters.enrolled.any()


def test_a_class_of_two_looks_has_two_prototypes(two_looks: Drawn) -> None:
    clouds, gallery, held_out = two_looks
    for clusters in (ClassClusters.fit(*gallery), ClassClusters.fit(*gallery, held_out)):
        assert clusters.labels == ("a", "b")
        assert clusters.owners.tolist() == [0, 0, 1]
        near = clouds.centres @ clusters.prototypes.T  # (3, 3)
        assert set(near[[0, 2]].argmax(axis=1).tolist()) == {0, 1}
        assert near[1].argmax() == 2
        assert near.max(axis=1).min() > 0.99


def test_the_similarity_of_a_class_is_that_of_its_best_prototype(two_looks: Drawn) -> None:
    _, gallery, (unseen, _) = two_looks
    clusters = ClassClusters.fit(*gallery)
    similarities, radii = clusters.similarities(unseen)
    for row, query in enumerate(unseen[:50]):
        each = [float(query @ placed) for placed in clusters.prototypes]
        best = 0 if each[0] >= each[1] else 1
        assert similarities[row].tolist() == pytest.approx([each[best], each[2]], abs=1e-6)
        assert radii[row].tolist() == [clusters.radii[best], clusters.radii[2]]


def test_radii_and_spacings_tell_narrow_classes_from_wide_ones(drawn: Drawn) -> None:
    _, gallery, held_out = drawn
    for clusters in (ClassClusters.fit(*gallery), ClassClusters.fit(*gallery, held_out)):
        for narrow, middle, wide in (clusters.radii, clusters.spacings, clusters.reaches):
            assert narrow < middle < wide


def test_radius_and_spacing_are_the_typical_gaps_of_images_that_are_no_items(drawn: Drawn) -> None:
    clouds, (embeddings, labels), held_out = drawn
    new, new_labels = clouds.draw(np.random.default_rng(1), [500] * 3)
    # Forty members of its own say less than two hundred held-out images.
    for seen, tolerance in ((None, 0.4), (held_out, 0.15)):
        clusters = ClassClusters.fit(embeddings, labels, seen)
        for row, label in enumerate(clusters.labels):
            own = new[new_labels == label]
            radius = np.exp(np.log(gaps(own @ clusters.prototypes[row])).mean())
            spacing = np.exp(np.log(nearest_members(own, embeddings[labels == label])).mean())
            assert clusters.radii[row] == pytest.approx(radius, rel=tolerance)
            assert clusters.spacings[row] == pytest.approx(spacing, rel=tolerance)


def test_a_class_without_held_out_images_is_held_against_itself(drawn: Drawn) -> None:
    _, gallery, (unseen, labels) = drawn
    partly = ClassClusters.fit(*gallery, (unseen[labels != "c"], labels[labels != "c"]))
    assert partly.radii[2] == pytest.approx(ClassClusters.fit(*gallery).radii[2], rel=0.1)
    assert partly.spacings[2] == pytest.approx(ClassClusters.fit(*gallery).spacings[2], rel=0.1)


def test_identical_members_keep_a_finite_radius() -> None:
    same = np.repeat(np.eye(4, dtype=np.float32)[:1], 5, axis=0)
    clusters = ClassClusters.fit(same, np.asarray(["a"] * 5))
    assert clusters.radii[0] == clusters.spacings[0] == pytest.approx(SMALLEST_GAP)


def test_classes_of_one_example_each_have_clusters() -> None:
    clusters = ClassClusters.fit(np.eye(3, dtype=np.float32), np.asarray(["c", "a", "b"]))
    assert clusters.labels == ("a", "b", "c")
    np.testing.assert_array_equal(clusters.prototypes, np.eye(3)[[1, 2, 0]])
    assert np.isfinite(clusters.radii).all()
    assert np.isfinite(clusters.spacings).all()


@given(st.integers(2, 12), st.integers(0, 1000))
def test_left_out_gaps_are_those_to_the_prototype_of_the_others(count: int, seed: int) -> None:
    members = np.random.default_rng(seed).normal(size=(count, 5)) + 1
    members = (members / np.linalg.norm(members, axis=1, keepdims=True)).astype(np.float32)
    one_by_one = [gaps(prototype(np.delete(members, row, axis=0)) @ members[row]) for row in range(count)]
    np.testing.assert_allclose(left_out_gaps(members), one_by_one, atol=1e-5)


def test_fewer_than_two_members_leave_nothing_to_measure() -> None:
    assert left_out_gaps(np.eye(3, dtype=np.float32)[:1]).shape == (0,)
    assert left_out_gaps(np.eye(3, dtype=np.float32)[:0]).shape == (0,)


def test_few_members_are_drawn_towards_the_typical_gap_of_all() -> None:
    narrow, wide = np.log(0.01), np.log(1.0)
    few = typical_gaps(np.asarray([narrow, wide, wide]), np.asarray([0, 1, 1]), 2)
    many = typical_gaps(np.repeat([narrow, wide], 500), np.repeat([0, 1], 500), 2)
    assert many.tolist() == pytest.approx([0.01, 1.0], rel=0.05)
    assert 0.1 < few[0] < few[1] < 1
    own = typical_gaps(np.asarray([narrow, wide, wide]), np.asarray([0, 1, 1]), 3, prior=0)
    assert own.tolist() == pytest.approx([0.01, 1.0, 0.01 ** (1 / 3)])


# Parts


def test_joining_what_was_selected_gives_it_back(two_looks: Drawn) -> None:
    _, gallery, _ = two_looks
    clusters = ClassClusters.fit(*gallery)
    again = ClassClusters.joined([clusters.select([1]), clusters.select([0])])
    assert again.labels == clusters.labels
    for name in (*FIELDS, "owners"):
        np.testing.assert_array_equal(getattr(again, name), getattr(clusters, name))
    turned = clusters.select([1, 0])
    assert turned.labels == ("b", "a")
    assert turned.owners.tolist() == [0, 1, 1]
    np.testing.assert_array_equal(turned.prototypes, clusters.prototypes[[2, 0, 1]])


# One class placed anew


@pytest.mark.parametrize("label", ["A", "bb", "z"])
def test_a_new_class_takes_its_place_in_the_order_and_leaves_the_others_alone(drawn: Drawn, label: str) -> None:
    _, gallery, (unseen, _) = drawn
    before = ClassClusters.fit(*gallery)
    after = before.with_class(label, unseen[:5], gallery[0])
    assert after.labels == tuple(sorted([*before.labels, label]))
    rows = [after.labels.index(name) for name in before.labels]
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(after, name)[rows], getattr(before, name))
    new = after.labels.index(label)
    np.testing.assert_allclose(after.prototypes[new], prototype(unseen[:5]), atol=1e-6)
    assert after.counts[new] == 5
    assert after.enrolled.tolist() == [name == label for name in after.labels]


def test_the_order_in_which_examples_came_does_not_matter(two_looks: Drawn) -> None:
    _, (embeddings, labels), (unseen, unseen_labels) = two_looks
    known = ClassClusters.fit(embeddings[labels == "b"], labels[labels == "b"])
    members = unseen[unseen_labels == "a"][:40]
    first = known.with_class("new", members, embeddings)
    again = known.with_class("new", members[::-1].copy(), embeddings)
    assert len(first.owners) == 3
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))


def test_a_young_class_is_as_wide_as_its_own_members_say(drawn: Drawn) -> None:
    _, (embeddings, labels), _ = drawn
    known = ClassClusters.fit(embeddings[labels == "a"], labels[labels == "a"])
    wide = embeddings[labels == "c"][:6]
    young = known.with_class("c", wide, embeddings[labels == "a"])
    assert young.radii[1] == pytest.approx(np.exp(np.log(left_out_gaps(wide)).mean()))
    nearest = [nearest_members(wide[[row]], np.delete(wide, row, axis=0))[0] for row in range(6)]
    assert young.spacings[1] == pytest.approx(np.exp(np.log(nearest).mean()))
    assert young.radii[1] > 5 * young.radii[0]


def test_a_single_example_reaches_to_where_other_classes_begin(drawn: Drawn) -> None:
    _, gallery, (unseen, _) = drawn
    known = ClassClusters.fit(*gallery)
    alone = known.with_class("new", unseen[:1], gallery[0]).select([3])
    to_others = gaps(gallery[0] @ unseen[0])
    assert alone.radii[0] == alone.spacings[0] == pytest.approx(np.quantile(to_others, 0.05), rel=1e-6)
    assert (alone.radii[0] < alone.bounds[0]).all()


def test_a_single_example_without_any_other_class_has_a_cluster() -> None:
    none = ClassClusters.fit(np.eye(8, dtype=np.float32)[:1], np.asarray(["a"])).select([])
    alone = none.with_class("b", np.eye(8, dtype=np.float32)[:1], NOTHING)
    assert alone.labels == ("b",)
    assert np.isfinite([*alone.radii, *alone.spacings, *alone.bounds[0]]).all()


def test_a_class_that_grows_does_not_shrink_to_what_the_encoder_was_trained_on(drawn: Drawn) -> None:
    clouds, _, held_out = drawn
    # Trained images of "b" lie ten times closer than new ones do.
    tight, tight_labels = type(clouds)(clouds.centres, clouds.spreads / 10).draw(np.random.default_rng(2), [30] * 3)
    before = ClassClusters.fit(tight, tight_labels, held_out)
    members = tight[tight_labels == "b"]
    one_more = held_out[0][held_out[1] == "b"][:1]
    after = before.with_class("b", np.concatenate([members, one_more]), tight[tight_labels != "b"])
    assert after.radii[1] == before.radii[1]
    assert after.spacings[1] == before.spacings[1]
    assert after.counts[1] == 31
    assert not after.enrolled.any()


def test_a_class_that_gets_a_second_look_gets_a_second_prototype(drawn: Drawn) -> None:
    _, (embeddings, labels), _ = drawn
    before = ClassClusters.fit(embeddings, labels)
    both = embeddings[(labels == "a") | (labels == "b")]
    after = before.with_class("a", both, embeddings[labels == "c"])
    assert after.owners.tolist() == [0, 0, 1, 2]
    near = before.prototypes[:2] @ after.prototypes[:2].T
    assert sorted(near.argmax(axis=1).tolist()) == [0, 1]
    assert near.max(axis=1).min() > 0.99
    one_look_again = after.with_class("a", embeddings[labels == "a"], embeddings[labels == "c"])
    assert one_look_again.similarities(embeddings[labels == "b"])[0][:, 0].max() < 0.9


def test_a_class_may_become_wider(drawn: Drawn) -> None:
    clouds, (embeddings, labels), _ = drawn
    before = ClassClusters.fit(embeddings, labels)
    wide, _ = type(clouds)(clouds.centres[:1], np.asarray([0.5])).draw(np.random.default_rng(3), [40])
    after = before.with_class("a", np.concatenate([embeddings[labels == "a"], wide]), embeddings[labels != "a"])
    assert after.radii[0] > 2 * before.radii[0]


def test_a_class_without_members_vanishes(drawn: Drawn) -> None:
    _, gallery, _ = drawn
    clusters = ClassClusters.fit(*gallery)
    assert clusters.with_class("b", NOTHING, NOTHING).labels == ("a", "c")
    assert clusters.with_class("no such class", NOTHING, NOTHING).labels == clusters.labels
    none = clusters
    for label in "abc":
        none = none.with_class(label, NOTHING, NOTHING)
    assert (len(none), none.prototypes.shape) == (0, (0, 8))
    again = none.with_class("a", gallery[0][:2], NOTHING)
    assert (again.labels, again.prototypes.shape) == (("a",), (1, 8))


def test_a_young_class_ends_where_other_classes_begin_and_a_calibrated_one_does_not(drawn: Drawn) -> None:
    _, (embeddings, labels), _ = drawn
    strangers = embeddings[labels != "c"]
    known = ClassClusters.fit(strangers, labels[labels != "c"])
    young = embeddings[labels == "c"][:3]
    after = known.with_class("c", young, strangers)
    to_cluster, to_item = after.bounds[2]
    assert np.mean(1 - strangers @ prototype(young) <= to_cluster) == pytest.approx(0.2, abs=0.02)
    assert np.mean(np.asarray(nearest_members(strangers, young)) <= to_item) == pytest.approx(0.2, abs=0.02)
    assert (after.bounds[:2] == WIDEST_GAP).all()
    grown = after.with_class("a", embeddings[labels == "a"], embeddings[labels != "a"])
    assert (grown.bounds[0] == WIDEST_GAP).all()
