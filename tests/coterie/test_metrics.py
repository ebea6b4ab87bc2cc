"""Metrics against slow counts that follow the definitions, and against scikit-learn where it has the function."""

import doctest
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.metrics import (
    accuracy_score,
    confusion_matrix,
    precision_recall_fscore_support,
    recall_score,
    roc_curve,
)
from torchmetrics.functional.classification import (
    binary_auroc,
    binary_average_precision,
    binary_calibration_error,
    multiclass_accuracy,
)

from coterie import metrics

# Few different values, so that ties are common.
scores = st.lists(st.integers(-3, 3), min_size=1, max_size=60).map(lambda values: np.asarray(values, dtype=np.float64))
pairs = st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("abcd")), min_size=1, max_size=40)
answers = st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=60)


def test_the_examples_in_the_docstrings_hold() -> None:
    result = doctest.testmod(metrics)
    assert result.attempted >= 8
    assert result.failed == 0


def over_all_pairs(known: NDArray[np.float64], unknown: NDArray[np.float64], weights: NDArray[np.float64]) -> float:
    """Share of pairs in which the known image scores higher, ties counting half, each pair times its weight."""
    won = sum(w * ((k > u) + (k == u) / 2) for k, w in zip(known, weights, strict=True) for u in unknown)
    return float(won / len(known) / len(unknown))


@given(scores, scores)
def test_auroc_counts_the_pairs_that_are_in_order(known: NDArray[np.float64], unknown: NDArray[np.float64]) -> None:
    expected = over_all_pairs(known, unknown, np.ones(len(known)))
    assert metrics.auroc(known, unknown) == pytest.approx(expected)
    assert metrics.auroc(known, unknown) + metrics.auroc(unknown, known) == pytest.approx(1)


@given(scores, scores)
def test_average_precision_sums_over_thresholds(known: NDArray[np.float64], unknown: NDArray[np.float64]) -> None:
    total, recall = 0.0, 0.0
    for threshold in sorted(set(known) | set(unknown), reverse=True):
        hits, others = (known >= threshold).sum(), (unknown >= threshold).sum()
        total += (hits / len(known) - recall) * hits / (hits + others)
        recall = hits / len(known)
    assert metrics.average_precision(known, unknown) == pytest.approx(total)


@given(scores, scores)
def test_the_first_fpr95_is_the_first_point_of_the_curve_that_accepts_95_percent(
    known: NDArray[np.float64], unknown: NDArray[np.float64]
) -> None:
    truth = np.repeat([1, 0], [len(known), len(unknown)])
    false_positive, true_positive, _ = roc_curve(truth, np.concatenate([known, unknown]), drop_intermediate=False)
    expected = false_positive[np.flatnonzero(true_positive >= 0.95)[0]]
    assert metrics.unknown_accepted_at_95(known, unknown) == pytest.approx(expected)


@given(scores, scores)
def test_the_second_fpr95_rejects_as_few_known_as_catch_95_percent_of_the_unknown(
    known: NDArray[np.float64], unknown: NDArray[np.float64]
) -> None:
    # A threshold rejects what lies at or below it.
    caught = [t for t in sorted(set(unknown) | set(known)) if (unknown <= t).mean() >= 0.95]
    assert metrics.known_rejected_at_95(known, unknown) == pytest.approx((known <= caught[0]).mean())


def test_the_two_definitions_of_fpr95_differ() -> None:
    known, unknown = np.arange(20.0) + 10, np.asarray([*np.arange(19.0), 29.5])
    assert metrics.unknown_accepted_at_95(known, unknown) == pytest.approx(9 / 20)  # 11 accepts 19 of 20
    assert metrics.known_rejected_at_95(known, unknown) == pytest.approx(9 / 20)  # 18 catches 19 of 20
    assert metrics.unknown_accepted_at_95(known, unknown[:10]) == 0
    assert metrics.known_rejected_at_95(known[:5], unknown) == 1


@given(
    scores.flatmap(lambda s: st.tuples(st.just(s), st.lists(st.booleans(), min_size=len(s), max_size=len(s)))), scores
)
def test_oscr_counts_the_pairs_whose_known_image_is_right(
    known_and_right: tuple[NDArray[np.float64], list[bool]], unknown: NDArray[np.float64]
) -> None:
    known, right = known_and_right[0], np.asarray(known_and_right[1])
    assert metrics.oscr(known, right, unknown) == pytest.approx(over_all_pairs(known, unknown, right.astype(float)))
    assert metrics.oscr(known, np.ones(len(known), dtype=bool), unknown) == pytest.approx(metrics.auroc(known, unknown))


def test_oscr_is_the_area_under_its_curve() -> None:
    rng = np.random.default_rng(0)
    known, unknown, right = rng.normal(1, 1, 200), rng.normal(0, 1, 300), rng.random(200) < 0.8
    thresholds = np.sort(np.concatenate([known, unknown, [-np.inf, np.inf]]))[::-1]
    rates = [((right & (known >= t)).mean(), (unknown >= t).mean()) for t in thresholds]
    correct, false_positive = np.asarray(rates).T
    assert metrics.oscr(known, right, unknown) == pytest.approx(np.trapezoid(correct, false_positive))


@given(answers)
def test_calibration_error_follows_its_definition(answered: list[tuple[float, bool]]) -> None:
    expected = 0.0
    for bin_number in range(15):
        low, high = bin_number / 15, (bin_number + 1) / 15
        inside = [(c, r) for c, r in answered if low < c <= high or (bin_number == 0 and c == 0)]
        if inside:
            confidence, accuracy = np.mean([c for c, _ in inside]), np.mean([r for _, r in inside])
            expected += len(inside) / len(answered) * abs(confidence - accuracy)
    confidences, right = (np.asarray(column) for column in zip(*answered, strict=True))
    assert metrics.expected_calibration_error(confidences, right) == pytest.approx(expected, abs=1e-9)


def test_calibration_error_of_honest_and_of_boastful_answers() -> None:
    rng = np.random.default_rng(0)
    confidences = rng.uniform(0.5, 1, 20_000)
    honest = rng.random(20_000) < confidences
    assert metrics.expected_calibration_error(confidences, honest) < 0.02
    boastful = rng.random(20_000) < confidences - 0.3
    assert metrics.expected_calibration_error(confidences, boastful) == pytest.approx(0.3, abs=0.02)


@given(pairs)
def test_accuracy_and_confusion_are_those_of_scikit_learn(answered: list[tuple[str, str]]) -> None:
    truth, predicted = (np.asarray(column) for column in zip(*answered, strict=True))
    assert metrics.top1(predicted, truth) == pytest.approx(accuracy_score(truth, predicted))
    labels = ("d", "b", "a", "c")
    expected = confusion_matrix(truth, predicted, labels=list(labels))
    assert metrics.confusion(predicted, truth, labels).tolist() == expected.tolist()


def test_answers_outside_the_labels_are_left_out_of_the_confusion() -> None:
    table = metrics.confusion(np.array(["a", "unknown", "b"]), np.array(["a", "a", "other"]), ("a", "b"))
    assert table.tolist() == [[1, 0], [0, 0]]


def test_nothing_to_measure_is_nan_and_not_zero() -> None:
    none, some, no_text, nothing = np.empty(0), np.ones(3), np.empty(0, dtype=np.str_), np.empty(0, dtype=bool)
    assert np.isnan(metrics.top1(no_text, no_text))
    assert np.isnan(metrics.expected_calibration_error(none, nothing))
    for measure in (
        metrics.auroc,
        metrics.average_precision,
        metrics.unknown_accepted_at_95,
        metrics.known_rejected_at_95,
    ):
        assert np.isnan(measure(none, some))
        assert np.isnan(measure(some, none))
    assert np.isnan(metrics.oscr(none, nothing, some))
    assert np.isnan(metrics.oscr(some, some > 0, none))


probabilities = st.lists(st.lists(st.integers(0, 4), min_size=4, max_size=4), min_size=1, max_size=40)


@given(probabilities, st.integers(1, 6))
def test_top_k_counts_equal_scores_in_class_order(rows: list[list[int]], k: int) -> None:
    scores = np.asarray(rows, dtype=np.float64)
    truth = np.arange(len(rows)) % 4
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(metrics.top_k(scores, truth, k), (order == truth[:, None]).any(axis=1))


def test_top_k_is_torchmetrics_without_ties() -> None:
    rng = np.random.default_rng(0)
    scores, truth = rng.random((200, 7)), rng.integers(7, size=200)
    for k in (1, 3, 5):
        expected = multiclass_accuracy(torch.from_numpy(scores), torch.from_numpy(truth), 7, top_k=k, average="micro")
        assert metrics.top_k(scores, truth, k).mean() == pytest.approx(float(expected), abs=1e-6)


@given(pairs)
def test_class_rates_are_scikit_learns(answers: list[tuple[str, str]]) -> None:
    truth, predicted = (np.asarray(column) for column in zip(*answers, strict=True))
    table = metrics.confusion(predicted, truth, ("a", "b", "c", "d"))
    found = metrics.class_rates(table)
    expected = precision_recall_fscore_support(truth, predicted, labels=list("abcd"), zero_division=np.nan)
    for ours, theirs in zip((found.precision, found.recall, found.f1, found.images), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
    own = [recall_score(truth, predicted, labels=[name], average="macro") for name in sorted(set(truth))]
    assert metrics.balanced_accuracy(table) == pytest.approx(np.mean(own), abs=1e-6)


def test_nothing_to_measure_is_nan() -> None:
    assert np.isnan(metrics.balanced_accuracy(np.zeros((3, 3), dtype=np.int64)))
    assert np.isnan(metrics.risk_at_coverage(metrics.selective_risks(np.empty(0), np.empty(0, dtype=np.bool_)), 0.5))


@given(answers)
def test_reliability_is_what_the_calibration_error_is_made_of(found: list[tuple[float, bool]]) -> None:
    confidences = np.asarray([confidence for confidence, _ in found])
    right = np.asarray([was for _, was in found])
    bins = metrics.reliability(confidences, right)
    assert bins.counts.sum() == len(found)
    error = np.nansum(bins.counts * np.abs(bins.accuracy - bins.confidence)) / len(found)
    assert error == pytest.approx(metrics.expected_calibration_error(confidences, right), abs=1e-6)


def test_the_calibration_error_is_torchmetrics() -> None:
    rng = np.random.default_rng(1)
    confidences = rng.random(500)
    right = rng.random(500) < confidences**1.5
    expected = binary_calibration_error(torch.from_numpy(confidences), torch.from_numpy(right.astype(int)), n_bins=15)
    assert metrics.expected_calibration_error(confidences, right) == pytest.approx(float(expected), abs=1e-6)


@given(answers)
def test_selective_risks_are_the_mean_over_the_orders_of_equal_ones(found: list[tuple[float, bool]]) -> None:
    confidences = np.round([confidence for confidence, _ in found], 1)
    right = np.asarray([was for _, was in found])
    risks = metrics.selective_risks(confidences, right)
    assert risks[-1] == pytest.approx((~right).mean())
    for i in (0, len(risks) // 2):
        surer, equal = confidences > np.sort(confidences)[::-1][i], confidences == np.sort(confidences)[::-1][i]
        expected = (~right[surer]).sum() + (i + 1 - surer.sum()) * (~right[equal]).mean()
        assert risks[i] == pytest.approx(expected / (i + 1), abs=1e-6)


@pytest.mark.parametrize(
    "measure",
    [
        lambda bad: metrics.top_k(bad[:, None], np.zeros(3, dtype=np.int64), 1),
        lambda bad: metrics.reliability(bad, np.ones(3, dtype=np.bool_)),
        lambda bad: metrics.expected_calibration_error(bad, np.ones(3, dtype=np.bool_)),
        lambda bad: metrics.selective_risks(bad, np.ones(3, dtype=np.bool_)),
        lambda bad: metrics.auroc(bad, np.ones(3)),
        lambda bad: metrics.average_precision(bad, np.ones(3)),
        lambda bad: metrics.unknown_accepted_at_95(np.ones(3), bad),
        lambda bad: metrics.oscr(bad, np.ones(3, dtype=np.bool_), np.ones(3)),
    ],
)
def test_nan_is_refused(measure: Callable[[NDArray[np.float64]], object]) -> None:
    with pytest.raises(ValueError, match="NaN"):
        measure(np.array([0.5, np.nan, 0.2]))


@given(scores, scores)
def test_auroc_and_average_precision_are_torchmetrics(known: NDArray[np.float64], unknown: NDArray[np.float64]) -> None:
    both = torch.sigmoid(torch.from_numpy(np.concatenate([known, unknown])))
    truth = torch.tensor([1] * len(known) + [0] * len(unknown))
    assert metrics.auroc(known, unknown) == pytest.approx(float(binary_auroc(both, truth)), abs=1e-6)
    expected = float(binary_average_precision(both, truth))
    assert metrics.average_precision(known, unknown) == pytest.approx(expected, abs=1e-6)
