"""Every index against an oracle that multiplies everything in double precision and sorts it all."""

from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from coterie.index import ExactIndex, Index, InvertedIndex

Vectors = NDArray[np.float32]

# The 24 corners of the 24-cell: unit vectors whose products are exactly -1, -1/2, 0, 1/2 or 1, so that ties abound.
CORNERS = np.asarray(
    [sign * axis for axis in np.eye(4) for sign in (1, -1)] + list(product((0.5, -0.5), repeat=4)), dtype=np.float32
)


@st.composite
def unit_vectors(draw: st.DrawFn, most: int = 400) -> Vectors:
    """Corners, or random directions of which many are near copies of others; (1 to `most`, 4)."""
    n = draw(st.integers(1, most))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    if draw(st.booleans()):
        return CORNERS[rng.integers(0, 24, n)]
    directions = rng.normal(size=(n, 4))
    copies = directions[rng.integers(0, n, n)] + 10.0 ** -draw(st.integers(3, 9)) * rng.normal(size=(n, 4))
    return unit(np.where(rng.random((n, 1)) < draw(st.sampled_from([0, 0.5, 0.95])), copies, directions))


def unit(vectors: NDArray[np.float64]) -> Vectors:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def searched_everywhere(vectors: Vectors, *, quantized: bool = False) -> InvertedIndex:
    index = InvertedIndex(vectors, quantized=quantized)
    index.probes = index.lists
    return index


def true_similarities(vectors: Vectors, queries: Vectors) -> Vectors:
    """Of six decimals, (m, n)."""
    return np.round(queries.astype(np.float64) @ vectors.astype(np.float64).T, 6).astype(np.float32)


def oracle(vectors: Vectors, queries: Vectors, k: int) -> tuple[Vectors, NDArray[np.int64]]:
    similarities = true_similarities(vectors, queries)
    rows = np.argsort(-similarities, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(similarities, rows, 1), rows


def assert_equal(found: tuple[Vectors, NDArray[np.int64]], expected: tuple[Vectors, NDArray[np.int64]]) -> None:
    assert found[1].tolist() == expected[1].tolist()
    assert found[0].tolist() == expected[0].tolist()
    assert (found[0].dtype, found[1].dtype) == (np.float32, np.int64)


@pytest.mark.parametrize("build", [ExactIndex, searched_everywhere])
@settings(deadline=None)
@given(vectors=unit_vectors(), queries=unit_vectors(60), k=st.integers(1, 80))
def test_looking_everywhere_gives_the_oracles_answer(
    build: Callable[[Vectors], Index], vectors: Vectors, queries: Vectors, k: int
) -> None:
    assert_equal(build(vectors).search(queries, k), oracle(vectors, queries, k))


@pytest.mark.parametrize("build", [ExactIndex, InvertedIndex, lambda vectors: InvertedIndex(vectors, quantized=True)])
@settings(deadline=None)
@given(
    vectors=unit_vectors(),
    queries=unit_vectors(30),
    k=st.integers(1, 80),
    share=st.sampled_from([0, 0.01, 0.1, 0.25, 0.3, 0.6, 0.9, 1]),
    seed=st.integers(0, 1000),
    block=st.sampled_from([64, 1000, 1 << 22]),
)
def test_a_filtered_search_is_exact_at_every_share(
    build: Callable[[Vectors], Index],
    vectors: Vectors,
    queries: Vectors,
    k: int,
    share: float,
    seed: int,
    block: int,
) -> None:
    mask = np.random.default_rng(seed).random(len(vectors)) < share
    index, allowed = build(vectors), np.flatnonzero(mask)
    similarities, places = oracle(vectors[mask], queries, k)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("coterie.neighbors.BLOCK", block)
        patch.setattr("coterie.ranking.BLOCK", block)
        assert_equal(index.search(queries, k, allowed=mask), (similarities, allowed[places]))
        assert_equal(index.search(queries[:1], k, allowed=mask), (similarities[:1], allowed[places[:1]]))
        shuffled = np.random.default_rng(seed).permutation(np.append(allowed, allowed))
        assert_equal(index.search(queries, k, allowed=shuffled), (similarities, allowed[places]))


@pytest.mark.parametrize("quantized", [False, True])
@settings(deadline=None)
@given(vectors=unit_vectors(), queries=unit_vectors(30), k=st.integers(1, 80), probes=st.integers(1, 12))
def test_what_few_lists_give_is_true_unique_ordered_and_complete(
    quantized: bool, vectors: Vectors, queries: Vectors, k: int, probes: int
) -> None:
    index = InvertedIndex(vectors, quantized=quantized, probes=probes)
    similarities, rows = index.search(queries, k)
    assert rows.shape == similarities.shape == (len(queries), min(k, len(vectors)))
    assert all(len(set(found)) == len(found) for found in rows.tolist())
    assert similarities.tolist() == np.take_along_axis(true_similarities(vectors, queries), rows, 1).tolist()
    order = np.lexsort((rows, -similarities), axis=1)
    assert (order == np.arange(rows.shape[1])).all()


@pytest.mark.parametrize("build", [ExactIndex, InvertedIndex, lambda vectors: InvertedIndex(vectors, quantized=True)])
@settings(deadline=None)
@given(vectors=unit_vectors(), queries=unit_vectors(20), k=st.integers(1, 40))
def test_an_answer_does_not_depend_on_the_other_queries_of_its_batch(
    build: Callable[[Vectors], Index], vectors: Vectors, queries: Vectors, k: int
) -> None:
    index = build(vectors)
    together = index.search(queries, k)
    alone = [index.search(query[None], k) for query in queries]
    assert_equal(together, (np.concatenate([one[0] for one in alone]), np.concatenate([one[1] for one in alone])))


@pytest.mark.parametrize("build", [ExactIndex, InvertedIndex])
@settings(deadline=None, max_examples=50)
@given(
    vectors=unit_vectors(),
    changes=st.lists(st.tuples(unit_vectors(60), st.floats(0, 1)), min_size=1, max_size=4),
    seed=st.integers(0, 1000),
)
def test_rows_that_come_and_go_are_found_as_in_a_new_index(
    build: Callable[[Vectors], Index], vectors: Vectors, changes: list[tuple[Vectors, float]], seed: int
) -> None:
    rng, index = np.random.default_rng(seed), build(vectors)
    if isinstance(index, InvertedIndex):
        index.probes = index.lists
    for added, share in changes:
        before = (index.vectors, index.search(CORNERS, 5))
        kept = np.flatnonzero(rng.random(len(index)) < share)
        vectors = np.concatenate([index.vectors[kept], added])
        changed = index.updated(vectors, kept)
        assert_equal(changed.search(CORNERS, 30), oracle(vectors, CORNERS, 30))
        assert (len(changed), changed.report.n) == (len(vectors), len(vectors))
        assert_equal(index.search(CORNERS, 5), before[1])
        index = changed


@pytest.mark.parametrize("dim", [1, 7, 128, 2048])
@pytest.mark.parametrize("build", [ExactIndex, searched_everywhere])
def test_vectors_of_any_width_are_found_in_any_batch(build: Callable[[Vectors], Index], dim: int) -> None:
    rng = np.random.default_rng(dim)
    vectors, queries = unit(rng.normal(size=(500, dim))), unit(rng.normal(size=(50, dim)))
    index = build(vectors)
    for batch in (queries[:1], queries[:3], queries):
        assert_equal(index.search(batch, 20), oracle(vectors, batch, 20))


@pytest.mark.parametrize("build", [ExactIndex, searched_everywhere])
def test_rows_that_differ_by_less_than_single_precision_stand_in_row_order(build: Callable[[Vectors], Index]) -> None:
    rng = np.random.default_rng(0)
    vectors = unit(rng.normal(size=128) + 1e-7 * rng.normal(size=(1000, 128)))
    queries = np.concatenate([vectors[::100], unit(rng.normal(size=(30, 128)))])
    index, some = build(vectors), np.arange(0, 1000, 3)
    assert_equal(index.search(queries, 5), oracle(vectors, queries, 5))
    similarities, places = oracle(vectors[some], queries, 5)
    assert_equal(index.search(queries, 5, allowed=some), (similarities, some[places]))


def test_more_equal_rows_than_fetched_give_the_first() -> None:
    vectors = np.repeat(CORNERS[:1], 3000, axis=0)
    vectors[2000] = CORNERS[8]
    queries = np.repeat(CORNERS[8:9], 5, axis=0)
    for index in (ExactIndex(vectors), searched_everywhere(vectors), searched_everywhere(vectors, quantized=True)):
        assert index.search(queries, 4)[1].tolist() == [[2000, 0, 1, 2]] * 5
        assert index.search(queries, 2, allowed=np.arange(3000) > 1)[1].tolist() == [[2000, 2]] * 5
