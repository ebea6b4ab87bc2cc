"""Class clusters: prototypes, radii, and what an enrolment changes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coterie.clusters import (
    SMALLEST_GAP,
    ClassClusters,
    cluster_similarities,
    gaps,
    left_out_gaps,
    left_out_radii,
    prototype,
    shrunken_radii,
)

NOTHING = np.empty((0, 8), dtype=np.float32)


@pytest.fixture
def drawn(cloud_class):  # type: ignore[no-untyped-def]
    """Three classes of different spreads: the clouds, their gallery, and held-out images."""
    rng = np.random.default_rng(0)
    clouds = cloud_class(cloud_class.make(rng, 3, 8, 1).centres, np.asarray([0.1, 0.3, 0.6]))
    return clouds, clouds.draw(rng, [40, 40, 40]), clouds.draw(rng, [200, 200, 200])


def test_a_prototype_is_the_normalised_mean(drawn) -> None:  # type: ignore[no-untyped-def]
    _, (embeddings, labels), _ = drawn
    clusters = ClassClusters.fit(embeddings, labels)
    assert clusters.labels == ("a", "b", "c")
    assert clusters.counts.tolist() == [40, 40, 40]
    for row, label in enumerate(clusters.labels):
        mean = embeddings[labels == label].mean(axis=0)
        np.testing.assert_allclose(clusters.prototypes[row], mean / np.linalg.norm(mean), atol=1e-6)
    assert (clusters.prototypes.dtype, clusters.radii.dtype) == (np.float32, np.float32)


def test_vectors_that_cancel_still_have_a_prototype() -> None:
    opposite = np.asarray([[0, 1], [0, -1]], dtype=np.float32)
    assert prototype(opposite).tolist() == [0, 1]


def test_radii_tell_narrow_classes_from_wide_ones(drawn) -> None:  # type: ignore[no-untyped-def]
    _, gallery, held_out = drawn
    for clusters in (ClassClusters.fit(*gallery), ClassClusters.fit(*gallery, held_out)):
        narrow, middle, wide = clusters.radii
        assert narrow < middle < wide


def test_a_radius_is_the_typical_gap_of_images_that_the_prototype_has_not_seen(drawn) -> None:  # type: ignore[no-untyped-def]
    clouds, gallery, held_out = drawn
    new, labels = clouds.draw(np.random.default_rng(1), [2000] * 3)
    # Forty members of its own say less than two hundred held-out images.
    for clusters, tolerance in ((ClassClusters.fit(*gallery), 0.4), (ClassClusters.fit(*gallery, held_out), 0.15)):
        for row, label in enumerate(clusters.labels):
            typical = np.exp(np.log(gaps(new[labels == label] @ clusters.prototypes[row])).mean())
            assert clusters.radii[row] == pytest.approx(typical, rel=tolerance)


def test_a_class_without_held_out_images_is_held_against_itself(drawn) -> None:  # type: ignore[no-untyped-def]
    _, gallery, (unseen, labels) = drawn
    partly = ClassClusters.fit(*gallery, (unseen[labels != "c"], labels[labels != "c"]))
    assert partly.radii[2] == pytest.approx(ClassClusters.fit(*gallery).radii[2], rel=0.1)


@given(st.integers(2, 12), st.integers(0, 1000))
def test_left_out_gaps_are_those_to_the_prototype_of_the_others(count: int, seed: int) -> None:
    members = np.random.default_rng(seed).normal(size=(count, 5)) + 1
    members = (members / np.linalg.norm(members, axis=1, keepdims=True)).astype(np.float32)
    one_by_one = [gaps(prototype(np.delete(members, row, axis=0)) @ members[row]) for row in range(count)]
    np.testing.assert_allclose(left_out_gaps(members), one_by_one, atol=1e-5)


def test_fewer_than_two_members_leave_nothing_to_measure() -> None:
    assert left_out_gaps(np.eye(3, dtype=np.float32)[:1]).shape == (0,)
    assert left_out_gaps(np.eye(3, dtype=np.float32)[:0]).shape == (0,)


def test_left_out_radii_are_those_without_the_member() -> None:
    log_gaps, owners = np.log([0.1, 0.2, 0.4, 0.3, 0.5]), np.asarray([0, 0, 0, 1, 1])
    found = left_out_radii(log_gaps, owners, 2)
    # The prior stays where all members put it, so each is fitted with its own log gap replaced by nothing.
    for row, owner in enumerate(owners.tolist()):
        rest = np.delete(log_gaps, row)[np.delete(owners, row) == owner]
        prior = 5 * log_gaps.mean()
        assert found[row] == pytest.approx(np.exp((rest.sum() + prior) / (len(rest) + 5)), rel=1e-5)


def test_few_members_are_drawn_towards_the_radius_of_all() -> None:
    narrow, wide = np.log(0.01), np.log(1.0)
    few = shrunken_radii(np.asarray([narrow, wide, wide]), np.asarray([0, 1, 1]), 2)
    many = shrunken_radii(np.repeat([narrow, wide], 500), np.repeat([0, 1], 500), 2)
    assert many.tolist() == pytest.approx([0.01, 1.0], rel=0.05)
    assert 0.1 < few[0] < few[1] < 1


def test_identical_members_keep_a_finite_radius() -> None:
    same = np.repeat(np.eye(4, dtype=np.float32)[:1], 5, axis=0)
    clusters = ClassClusters.fit(same, np.asarray(["a"] * 5))
    assert clusters.radii[0] == pytest.approx(SMALLEST_GAP)


def test_classes_of_one_example_each_have_clusters() -> None:
    clusters = ClassClusters.fit(np.eye(3, dtype=np.float32), np.asarray(["c", "a", "b"]))
    assert clusters.labels == ("a", "b", "c")
    np.testing.assert_array_equal(clusters.prototypes, np.eye(3)[[1, 2, 0]])
    assert np.isfinite(clusters.radii).all()


def test_similarities_are_cosines_to_prototypes(drawn) -> None:  # type: ignore[no-untyped-def]
    _, gallery, (unseen, _) = drawn
    clusters = ClassClusters.fit(*gallery)
    np.testing.assert_array_equal(cluster_similarities(unseen, clusters), unseen @ clusters.prototypes.T)


# One class placed anew


@pytest.mark.parametrize("label", ["A", "bb", "z"])
def test_a_new_class_takes_its_place_in_the_order_and_leaves_the_others_alone(drawn, label: str) -> None:  # type: ignore[no-untyped-def]
    _, gallery, (unseen, _) = drawn
    before = ClassClusters.fit(*gallery)
    after = before.with_class(label, unseen[:5], NOTHING)
    assert after.labels == tuple(sorted([*before.labels, label]))
    rows = [after.labels.index(name) for name in before.labels]
    for name in ("prototypes", "radii", "counts", "bounds"):
        np.testing.assert_array_equal(getattr(after, name)[rows], getattr(before, name))
    new = after.labels.index(label)
    np.testing.assert_array_equal(after.prototypes[new], prototype(unseen[:5]))
    assert after.counts[new] == 5


def test_a_young_class_is_as_wide_as_its_own_members_say(drawn) -> None:  # type: ignore[no-untyped-def]
    _, (embeddings, labels), _ = drawn
    known = ClassClusters.fit(embeddings[labels == "a"], labels[labels == "a"])
    wide = embeddings[labels == "c"][:6]
    young = known.with_class("c", wide, NOTHING)
    assert young.radii[1] == pytest.approx(np.exp(np.log(left_out_gaps(wide)).mean()))
    assert young.radii[1] > 5 * young.radii[0]


def test_a_single_example_is_thought_as_wide_as_the_widest_class(drawn) -> None:  # type: ignore[no-untyped-def]
    _, gallery, (unseen, _) = drawn
    known = ClassClusters.fit(*gallery)
    assert known.with_class("new", unseen[:1], NOTHING).radii[-1] == known.radii.max()


def test_a_class_that_grows_does_not_shrink_to_what_the_encoder_was_trained_on(drawn) -> None:  # type: ignore[no-untyped-def]
    clouds, _, held_out = drawn
    # Trained images of "b" lie ten times closer than new ones do.
    tight, tight_labels = type(clouds)(clouds.centres, clouds.spreads / 10).draw(np.random.default_rng(2), [30] * 3)
    before = ClassClusters.fit(tight, tight_labels, held_out)
    members = tight[tight_labels == "b"]
    one_more = held_out[0][held_out[1] == "b"][:1]
    after = before.with_class("b", np.concatenate([members, one_more]), NOTHING)
    assert after.radii[1] == before.radii[1]
    assert after.counts[1] == 31


def test_a_class_that_grows_may_become_wider(drawn) -> None:  # type: ignore[no-untyped-def]
    _, (embeddings, labels), _ = drawn
    before = ClassClusters.fit(embeddings, labels)
    after = before.with_class("a", np.concatenate([embeddings[labels == "a"], embeddings[labels == "c"]]), NOTHING)
    assert after.radii[0] > before.radii[0]


def test_a_class_without_members_vanishes(drawn) -> None:  # type: ignore[no-untyped-def]
    _, gallery, _ = drawn
    clusters = ClassClusters.fit(*gallery)
    assert clusters.with_class("b", NOTHING, NOTHING).labels == ("a", "c")
    assert clusters.with_class("no such class", NOTHING, NOTHING).labels == clusters.labels
    none = (
        clusters.with_class("a", NOTHING, NOTHING).with_class("b", NOTHING, NOTHING).with_class("c", NOTHING, NOTHING)
    )
    assert (len(none), none.prototypes.shape) == (0, (0, 8))
    again = none.with_class("a", gallery[0][:2], NOTHING)
    assert (again.labels, again.prototypes.shape) == (("a",), (1, 8))


def test_a_young_class_ends_where_other_classes_begin_and_a_calibrated_one_does_not(drawn) -> None:  # type: ignore[no-untyped-def]
    _, (embeddings, labels), _ = drawn
    known = ClassClusters.fit(embeddings[labels != "c"], labels[labels != "c"])
    young = embeddings[labels == "c"][:3]
    strangers = embeddings[labels != "c"]
    after = known.with_class("c", young, strangers)
    within = np.mean(1 - strangers @ prototype(young) <= after.bounds[2])
    assert within == pytest.approx(0.2, abs=0.02)
    assert (after.bounds[:2] == 2).all()
    # However large the limit, nothing farther than the bound is accepted; a calibrated class follows the limit alone.
    far = after.thresholds(limit=10.0)
    assert far[2] == pytest.approx(1 - after.bounds[2])
    assert far[0] == -1
    near = after.thresholds(limit=0.5)
    np.testing.assert_allclose(near[:2], 1 - after.radii[:2] * np.exp(0.5), rtol=1e-6)
    grown = after.with_class("a", embeddings[labels == "a"], embeddings[labels != "a"])
    assert grown.bounds[0] == 2
