"""Metrics against slow counts that follow the definitions, and against scikit-learn where it has the function."""

import doctest

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.metrics import accuracy_score, confusion_matrix, roc_curve

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
