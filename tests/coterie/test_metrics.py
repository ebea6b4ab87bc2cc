"""Metrics against scikit-learn."""

import doctest

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.metrics import accuracy_score, confusion_matrix, roc_auc_score, roc_curve

from coterie import metrics

# Few different values, so that ties are common.
scores = st.lists(st.integers(-3, 3), min_size=1, max_size=60).map(lambda values: np.asarray(values, dtype=np.float64))
pairs = st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("abcd")), min_size=1, max_size=40)


def test_the_examples_in_the_docstrings_hold() -> None:
    result = doctest.testmod(metrics)
    assert result.attempted >= 4
    assert result.failed == 0


@given(scores, scores)
def test_auroc_is_that_of_scikit_learn(known: NDArray[np.float64], unknown: NDArray[np.float64]) -> None:
    truth = np.repeat([1, 0], [len(known), len(unknown)])
    assert metrics.auroc(known, unknown) == pytest.approx(roc_auc_score(truth, np.concatenate([known, unknown])))


@given(scores, scores)
def test_auroc_of_swapped_sides_adds_up_to_one(known: NDArray[np.float64], unknown: NDArray[np.float64]) -> None:
    assert metrics.auroc(known, unknown) + metrics.auroc(unknown, known) == pytest.approx(1)


@given(scores, scores)
def test_false_positive_rate_at_95_is_the_first_point_of_the_curve_that_accepts_95_percent(
    known: NDArray[np.float64], unknown: NDArray[np.float64]
) -> None:
    truth = np.repeat([1, 0], [len(known), len(unknown)])
    false_positive, true_positive, _ = roc_curve(truth, np.concatenate([known, unknown]), drop_intermediate=False)
    expected = false_positive[np.flatnonzero(true_positive >= 0.95)[0]]
    assert metrics.false_positive_rate_at_95(known, unknown) == pytest.approx(expected)


@given(pairs)
def test_accuracy_and_confusion_are_those_of_scikit_learn(answers: list[tuple[str, str]]) -> None:
    truth, predicted = (np.asarray(column) for column in zip(*answers, strict=True))
    assert metrics.top1(predicted, truth) == pytest.approx(accuracy_score(truth, predicted))
    labels = ("d", "b", "a", "c")
    expected = confusion_matrix(truth, predicted, labels=list(labels))
    assert metrics.confusion(predicted, truth, labels).tolist() == expected.tolist()


def test_answers_outside_the_labels_are_left_out_of_the_confusion() -> None:
    table = metrics.confusion(np.array(["a", "unknown", "b"]), np.array(["a", "a", "other"]), ("a", "b"))
    assert table.tolist() == [[1, 0], [0, 0]]


def test_nothing_to_measure_is_nan_and_not_zero() -> None:
    none, some, no_text = np.empty(0), np.ones(3), np.empty(0, dtype=np.str_)
    assert np.isnan(metrics.top1(no_text, no_text))
    assert np.isnan(metrics.auroc(none, some))
    assert np.isnan(metrics.auroc(some, none))
    assert np.isnan(metrics.false_positive_rate_at_95(some, none))
