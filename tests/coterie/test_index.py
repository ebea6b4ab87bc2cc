"""What an index accepts, refuses and answers at the edges; test_index_differential.py has the neighbours themselves."""

from itertools import product

import numpy as np
import pytest
from numpy.typing import NDArray

from coterie.index import ExactIndex, Index, InvertedIndex, check_unit_vectors

CORNERS = np.asarray(
    [sign * axis for axis in np.eye(4) for sign in (1, -1)] + list(product((0.5, -0.5), repeat=4)), dtype=np.float32
)


@pytest.fixture(params=["exact", "ivf", "ivf-sq8"])
def corners(request: pytest.FixtureRequest) -> Index:
    if request.param == "exact":
        return ExactIndex(CORNERS)
    return InvertedIndex(CORNERS, quantized=request.param == "ivf-sq8")


def test_more_neighbours_than_rows_gives_all_rows(corners: Index) -> None:
    similarities, rows = corners.search(CORNERS[:2], 100)
    assert similarities.shape == rows.shape == (2, 24)
    assert sorted(rows[0].tolist()) == list(range(24))


def test_fewer_allowed_rows_than_asked_for_give_fewer_columns(corners: Index) -> None:
    similarities, rows = corners.search(CORNERS[:2], 10, allowed=[23, 4])
    assert similarities.shape == (2, 2)
    assert sorted(rows[0].tolist()) == [4, 23]
    for nothing in ([], np.zeros(24, dtype=bool)):
        assert corners.search(CORNERS[:2], 10, allowed=nothing)[1].shape == (2, 0)


def test_no_rows_or_no_queries_find_nothing(corners: Index) -> None:
    empty = corners.updated(CORNERS[:0], [])
    assert (len(empty), len(ExactIndex(CORNERS[:0]))) == (0, 0)
    assert empty.search(CORNERS[:2], 5)[1].shape == (2, 0)
    assert corners.search(CORNERS[:0], 5)[1].shape == (0, 5)
    assert corners.search(CORNERS[:0], 5, allowed=[1])[1].shape == (0, 1)


def test_an_emptied_index_takes_rows_again(corners: Index) -> None:
    index = corners.updated(CORNERS[:0], []).updated(CORNERS[:3], [])
    assert index.search(CORNERS[:1], 1)[1].tolist() == [[0]]


def test_lists_need_rows() -> None:
    with pytest.raises(ValueError, match="no rows to make lists of: use ExactIndex"):
        InvertedIndex(CORNERS[:0])
    with pytest.raises(ValueError, match="probes is 0: search at least one list"):
        InvertedIndex(CORNERS, probes=0)


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        (np.full((1, 4), np.nan), "row 0 has length nan"),
        (np.asarray([[1, 0], [0, np.inf]]), "row 1 has length inf"),
        (np.asarray([[1, 0], [0, 1e300]]), "row 1 has length inf"),
        (np.asarray([[1, 0], [0, 0]]), "row 1 has length 0.0"),
        (np.asarray([[3.0, 4.0]]), "row 0 has length 5.0"),
        (np.ones(4), "shape"),
        (np.ones((1, 1, 1)), "shape"),
    ],
)
def test_vectors_that_are_not_of_unit_length_are_refused(vectors: NDArray[np.float64], message: str) -> None:
    for kind in (ExactIndex, InvertedIndex):
        with pytest.raises(ValueError, match=message):
            kind(vectors)


def test_wrong_queries_are_refused(corners: Index) -> None:
    with pytest.raises(ValueError, match=r"\(n, 4\), not \(1, 3\)"):
        corners.search(np.asarray([[1, 0, 0]], dtype=np.float32), 1)
    with pytest.raises(ValueError, match="row 1 has length nan"):
        corners.search(np.asarray([[1, 0, 0, 0], [1, 0, np.nan, 0]]), 1)


@pytest.mark.parametrize(("k", "message"), [(0, "k is 0"), (-1, "k is -1"), (2.5, "k is 2.5"), ("3", "k is '3'")])
def test_a_wrong_number_of_neighbours_is_refused(corners: Index, k: int, message: str) -> None:
    for allowed in (None, [1], []):
        with pytest.raises(ValueError, match=message):
            corners.search(CORNERS, k, allowed=allowed)


@pytest.mark.parametrize(
    ("allowed", "message"),
    [
        (np.ones(23, dtype=bool), r"shape \(24,\), not \(23,\)"),
        (np.ones((24, 1), dtype=bool), r"shape \(24,\), not \(24, 1\)"),
        ([24], "there are 24 rows, counted from 0, but rows 24 to 24"),
        ([3, -1], "rows -1 to 3"),
        ([1.0], "not float64"),
        ([[1]], r"of shape \(1, 1\)"),
        (3, r"of shape \(\)"),
    ],
)
def test_a_wrong_filter_is_refused(corners: Index, allowed: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        corners.search(CORNERS, 1, allowed=allowed)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("vectors", "kept", "message"),
    [
        (CORNERS[:2], [1, 0], "must ascend"),
        (CORNERS[:2], [1, 1], "must ascend"),
        (CORNERS[:2], [0, 24], "there are 24 rows"),
        (CORNERS[:2], [0, 1, 2], "3 rows are kept, but there are only 2 vectors"),
        (2 * CORNERS[:2], [0, 1], "row 0 has length 2.0"),
        (np.eye(3), [0], r"\(n, 4\)"),
    ],
)
def test_a_wrong_update_is_refused(corners: Index, vectors: NDArray[np.float32], kept: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        corners.updated(vectors, kept)


def test_checked_vectors_become_contiguous_float32() -> None:
    checked = check_unit_vectors(np.eye(4)[:, ::-1], 4)
    assert checked.dtype == np.float32
    assert checked.flags.c_contiguous


def test_vectors_are_not_copied(corners: Index) -> None:
    assert corners.vectors is CORNERS
