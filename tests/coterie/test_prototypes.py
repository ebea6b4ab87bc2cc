"""Prototypes: one for a class of one look, as many as it has looks otherwise."""

import numpy as np
import pytest
from numpy.typing import NDArray

from coterie.prototypes import FEWEST_MEMBERS, MOST_PROTOTYPES, gaps, nearest_prototypes, place, prototype


def unit(vectors: NDArray[np.floating]) -> NDArray[np.float32]:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def looks(rng: np.random.Generator, counts: list[int], *, dim: int = 16, spread: float = 0.3) -> NDArray[np.float32]:
    """Round clouds about random directions, one for each of `counts`, mixed."""
    centres = unit(rng.normal(size=(len(counts), dim)))
    rows = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    return unit(centres[rows] + rng.normal(size=(len(rows), dim)) * spread / np.sqrt(dim))


def test_a_prototype_is_the_normalised_mean() -> None:
    members = looks(np.random.default_rng(0), [30])
    mean = members.mean(axis=0)
    np.testing.assert_allclose(prototype(members), mean / np.linalg.norm(mean), atol=1e-6)
    assert prototype(members).dtype == np.float32


def test_vectors_that_cancel_still_have_a_prototype() -> None:
    opposite = np.asarray([[0, 1], [0, -1]], dtype=np.float32)
    assert prototype(opposite).tolist() == [0, 1]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("count", [1, 2, 5, 12, 200, 1500])
def test_a_round_class_has_one_prototype(seed: int, count: int) -> None:
    members = looks(np.random.default_rng(seed), [count])
    placed = place(members)
    assert placed.shape == (1, 16)
    np.testing.assert_allclose(placed[0], prototype(members), atol=1e-6)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("counts", [[20, 20], [60, 25], [40, 40, 40], [400, 300, 200, 100]])
def test_a_class_has_a_prototype_for_each_look(seed: int, counts: list[int]) -> None:
    rng = np.random.default_rng(seed)
    members = looks(rng, counts)
    placed = place(members)
    assert len(placed) == len(counts)
    sizes = np.bincount(nearest_prototypes(members, placed))
    assert sorted(sizes.tolist()) == sorted(counts)
    np.testing.assert_allclose(np.linalg.norm(placed, axis=1), 1, atol=1e-6)


def test_unseen_images_decide_where_there_are_any() -> None:
    rng = np.random.default_rng(1)
    both = looks(rng, [40, 40])
    first = both[nearest_prototypes(both, place(both)) == 0]
    assert len(place(both, both[::2])) == 2
    # The second look is never met: a prototype for it would bring images of the first no nearer.
    tight = unit(np.repeat(first[:1], 40, axis=0) + rng.normal(size=(40, 16)) * 1e-3)
    assert len(place(tight, first)) == 1


def test_the_order_of_members_does_not_decide_where_prototypes_lie() -> None:
    rng = np.random.default_rng(2)
    members = looks(rng, [50, 30])
    placed, mixed = place(members), place(members[rng.permutation(80)])
    np.testing.assert_allclose(placed[nearest_prototypes(mixed, placed)], mixed, atol=1e-6)


def test_an_odd_picture_is_no_look() -> None:
    rng = np.random.default_rng(3)
    members = np.concatenate([looks(rng, [30]), looks(rng, [FEWEST_MEMBERS - 1], spread=0.01)])
    assert len(place(members)) == 1


def test_no_more_prototypes_than_are_worthwhile_or_allowed() -> None:
    assert len(place(looks(np.random.default_rng(4), [50] * 8, spread=0.05))) == MOST_PROTOTYPES


def test_as_many_as_known_to_be_needed_where_members_suffice() -> None:
    members = looks(np.random.default_rng(5), [30])
    assert len(place(members, least=2)) == 2
    assert len(place(members[: 2 * FEWEST_MEMBERS - 1], least=2)) == 1


def test_identical_members_have_one_prototype() -> None:
    same = np.repeat(np.eye(4, dtype=np.float32)[:1], 20, axis=0)
    np.testing.assert_array_equal(place(same), same[:1])


def test_gaps_are_finite_in_logarithm() -> None:
    assert np.isfinite(np.log(gaps(np.asarray([1.0, 1.0000005, -1.0])))).all()
    np.testing.assert_allclose(gaps(np.asarray([0.25, -1.0])), [0.75, 2.0])
