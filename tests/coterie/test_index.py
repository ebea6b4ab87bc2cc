"""Exact search against a plain matrix product."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from coterie.index import ExactIndex, check_unit_vectors

# The 24 corners of the 24-cell: unit vectors whose products are exactly -1, -1/2, 0, 1/2 or 1, so that ties abound and
# no rounding blurs them.
CORNERS = np.asarray(
    [sign * axis for axis in np.eye(4) for sign in (1, -1)] + list(product((0.5, -0.5), repeat=4)), dtype=np.float32
)
corners = st.lists(st.integers(0, 23), min_size=1, max_size=70).map(lambda rows: CORNERS[rows])


@given(vectors=corners, queries=corners, k=st.integers(1, 80))
def test_the_nearest_come_first_and_ties_in_row_order(
    vectors: NDArray[np.float32], queries: NDArray[np.float32], k: int
) -> None:
    similarities, rows = ExactIndex(vectors).search(queries, k)
    exact = queries @ vectors.T
    expected = np.argsort(-exact, axis=1, kind="stable")[:, :k]
    assert rows.tolist() == expected.tolist()
    assert similarities.tolist() == np.take_along_axis(exact, expected, 1).tolist()
    assert (similarities.dtype, rows.dtype) == (np.float32, np.int64)


@given(vectors=corners, queries=corners, k=st.integers(1, 20))
def test_an_answer_does_not_depend_on_the_other_queries_of_its_batch(
    vectors: NDArray[np.float32], queries: NDArray[np.float32], k: int
) -> None:
    index = ExactIndex(vectors)
    _, together = index.search(queries, k)
    alone = [index.search(query[None], k)[1][0].tolist() for query in queries]
    assert together.tolist() == alone


@pytest.mark.parametrize("queries", [1, 3, 4, 50])
@pytest.mark.parametrize("dim", [1, 7, 128])
def test_any_vectors_are_found_as_by_a_matrix_product(queries: int, dim: int) -> None:
    rng = np.random.default_rng(dim)
    vectors, asked = _unit(rng.normal(size=(500, dim))), _unit(rng.normal(size=(queries, dim)))
    similarities, rows = ExactIndex(vectors).search(asked, 20)
    exact = asked.astype(np.float64) @ vectors.T.astype(np.float64)
    np.testing.assert_allclose(similarities, -np.sort(-exact, axis=1)[:, :20], atol=2e-6)
    np.testing.assert_allclose(np.take_along_axis(exact, rows, 1), similarities, atol=2e-6)
    assert all(len(set(found)) == 20 for found in rows.tolist())


def test_more_equal_rows_than_asked_for_give_the_first() -> None:
    vectors = np.repeat(CORNERS[:1], 1000, axis=0)
    vectors[500] = CORNERS[8]
    _, rows = ExactIndex(vectors).search(np.repeat(CORNERS[8:9], 5, axis=0), 4)
    assert rows.tolist() == [[500, 0, 1, 2]] * 5


def test_more_neighbours_than_rows_gives_all_rows() -> None:
    similarities, rows = ExactIndex(CORNERS[:3]).search(CORNERS[:2], 10)
    assert similarities.shape == rows.shape == (2, 3)


def test_an_empty_index_finds_nothing_and_no_query_finds_nothing() -> None:
    empty = ExactIndex(np.empty((0, 4), dtype=np.float32))
    assert len(empty) == 0
    assert empty.search(CORNERS[:2], 5)[1].shape == (2, 0)
    assert ExactIndex(CORNERS).search(CORNERS[:0], 5)[1].shape == (0, 5)


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        (np.full((1, 4), np.nan), "row 0 has length nan"),
        (np.asarray([[1, 0], [0, np.inf]]), "row 1 has length inf"),
        (np.asarray([[1, 0], [0, 0]]), "row 1 has length 0.0"),
        (np.asarray([[3.0, 4.0]]), "row 0 has length 5.0"),
        (np.ones(4), "shape"),
        (np.ones((1, 1, 1)), "shape"),
    ],
)
def test_vectors_that_are_not_of_unit_length_are_refused(vectors: NDArray[np.float64], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExactIndex(vectors.astype(np.float32))


def test_wrong_queries_are_refused() -> None:
    index = ExactIndex(CORNERS)
    with pytest.raises(ValueError, match=r"\(n, 4\), not \(1, 3\)"):
        index.search(np.asarray([[1, 0, 0]], dtype=np.float32), 1)
    with pytest.raises(ValueError, match="row 0 has length nan"):
        index.search(np.full((1, 4), np.nan, dtype=np.float32), 1)
    with pytest.raises(ValueError, match="k is 0"):
        index.search(CORNERS, 0)


def test_checked_vectors_become_contiguous_float32() -> None:
    checked = check_unit_vectors(np.eye(4)[:, ::-1], 4)
    assert checked.dtype == np.float32
    assert checked.flags.c_contiguous


def test_many_threads_may_search_at_once() -> None:
    rng = np.random.default_rng(0)
    vectors, queries = _unit(rng.normal(size=(2000, 16))), _unit(rng.normal(size=(64, 16)))
    index = ExactIndex(vectors)
    alone = [index.search(queries[row : row + 2], 10)[1].tolist() for row in range(0, 64, 2)]
    with ThreadPoolExecutor(8) as pool:
        at_once = list(pool.map(lambda row: index.search(queries[row : row + 2], 10)[1].tolist(), range(0, 64, 2)))
    assert at_once == alone


@pytest.mark.parametrize(("setting", "threads"), [(None, 1), ("2", 2)])
def test_a_search_takes_one_thread_unless_the_environment_says_otherwise(setting: str | None, threads: int) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    if setting:
        environment["OMP_NUM_THREADS"] = setting
    code = "import coterie.index, faiss; print(faiss.omp_get_max_threads())"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert int(done.stdout) == threads


def _unit(vectors: NDArray[np.float64]) -> NDArray[np.float32]:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
