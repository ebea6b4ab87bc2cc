"""What is made of bootstrap draws at once, against the measures themselves on the images drawn."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coterie.intervals import bootstrap_counts
from coterie.metrics import expected_calibration_error, reliability, selective_risks
from evaluation.rejection import rejection, rejection_draws
from evaluation.reliability import BINS, calibration_error_draws, reliability_bins
from evaluation.selective import COVERAGES, measure_selective, risks_of_draws

# Few values, so that many are equal.
SCORES = st.sampled_from([-1.5, -0.25, 0.0, 0.1, 0.3, 2.0])
KNOWN = st.lists(st.tuples(SCORES, st.booleans()), min_size=1, max_size=40)


def drawn_rows(counts: np.ndarray) -> np.ndarray:
    return np.repeat(np.arange(len(counts)), counts.astype(int))


@given(known=KNOWN, unknown=KNOWN, seed=st.integers(0, 100))
def test_measures_of_rejection_are_those_of_the_images_drawn(known, unknown, seed):
    near, right = (np.asarray(values) for values in zip(*known, strict=True))
    far, accepted = (np.asarray(values) for values in zip(*unknown, strict=True))
    counts = [
        np.concatenate(list(bootstrap_counts(len(rows), draws=5, seed=(seed, part))))
        for part, rows in enumerate((near, far))
    ]
    found = rejection_draws(
        near, right, far, accepted, [(counts[0][:2], counts[1][:2]), (counts[0][2:], counts[1][2:])]
    )
    for draw, (of_known, of_unknown) in enumerate(zip(*counts, strict=True)):
        some, others = drawn_rows(of_known), drawn_rows(of_unknown)
        expected = rejection(near[some], right[some], far[others], accepted[others])
        assert {name: values[draw] for name, values in found.items()} == pytest.approx(expected, abs=1e-6)


def test_a_draw_without_unknown_images_is_nan():
    one, none = np.ones((1, 3), np.float32), np.zeros((1, 2), np.float32)
    right = np.ones(3, dtype=bool)
    found = rejection_draws(np.arange(3.0), right, np.arange(2.0), right[:2], [(one, none)])
    assert all(np.isnan(values).all() for values in found.values())
    found = rejection_draws(np.arange(2.0), right[:2], np.arange(3.0), right, [(none, one)])
    assert found.pop("accepted") == 1
    assert all(np.isnan(values).all() for values in found.values())


@given(answers=st.lists(st.tuples(st.sampled_from([0.1, 0.2, 0.5, 0.9, 1.0]), st.booleans()), min_size=1, max_size=40))
def test_risks_are_those_of_the_answers_drawn(answers):
    confidence, right = (np.asarray(values) for values in zip(*answers, strict=True))
    (counts,) = bootstrap_counts(len(right), draws=5)
    for drawn, risks in zip(counts, risks_of_draws(confidence, right, counts), strict=True):
        rows = drawn_rows(drawn)
        np.testing.assert_allclose(risks, selective_risks(confidence[rows], right[rows]), atol=1e-6)


def test_selective_accuracy_lies_in_its_intervals():
    rng = np.random.default_rng(0)
    confidence = rng.random(500)
    right = rng.random(500) < confidence
    aurc, found, risks = measure_selective(confidence, right)
    assert aurc.value == pytest.approx(selective_risks(confidence, right).mean())
    assert aurc.low < aurc.value < aurc.high
    assert [one.coverage for one in found] == list(COVERAGES)
    assert len(risks) == 100
    assert risks[49].value == pytest.approx(1 - found[0].accuracy)
    assert risks[-1].value == pytest.approx(1 - right.mean())
    assert all(risk.low <= risk.value <= risk.high for risk in risks)
    assert (1 - risks[49].high, 1 - risks[49].low) == pytest.approx(found[0].interval)
    assert all(one.interval[0] < one.accuracy < one.interval[1] for one in found)
    assert found[0].accuracy > found[-1].accuracy == pytest.approx(right.mean())


def test_calibration_errors_are_those_of_the_images_drawn_for_all_conditions():
    rng = np.random.default_rng(1)
    confidence, right = rng.random((3, 60)), rng.random((3, 60)) < 0.6
    found = calibration_error_draws(confidence, right, seed=4)
    (counts,) = bootstrap_counts(60, seed=4)
    for draw in range(0, 1000, 100):
        rows = drawn_rows(counts[draw])
        expected = [
            expected_calibration_error(of[rows], rightly[rows]) for of, rightly in zip(confidence, right, strict=True)
        ]
        np.testing.assert_allclose(found[draw], expected, atol=1e-6)


def test_bins_have_intervals_where_they_have_answers():
    rng = np.random.default_rng(2)
    confidence = rng.random(400) / 2 + 0.5
    right = rng.random(400) < confidence
    bins, plain = reliability_bins(confidence, right), reliability(confidence, right, bins=BINS)
    np.testing.assert_array_equal(bins.accuracy, plain.accuracy)
    low, high = bins.accuracy_intervals.T
    some = bins.counts > 0
    assert np.isnan(low[~some]).all()
    assert (low[some] <= bins.accuracy[some]).all() and (bins.accuracy[some] <= high[some]).all()
    # About two standard errors either way, as for any share.
    error = np.sqrt(bins.accuracy[some] * (1 - bins.accuracy[some]) / bins.counts[some])
    np.testing.assert_allclose((high - low)[some], 3.92 * error, rtol=0.25)
