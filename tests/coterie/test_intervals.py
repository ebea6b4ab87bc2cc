"""Intervals against slow resampling, coverage of the truth, and McNemar's test against counts."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, bootstrap

from coterie.intervals import bootstrap_counts, bootstrap_means, bootstrap_sums, bootstrap_tallies, mcnemar


def test_sums_are_those_of_rows_drawn_with_replacement() -> None:
    values = np.random.default_rng(0).normal(size=(50, 3))
    drawn = bootstrap_sums(values, draws=20, seed=5)
    rng = np.random.default_rng(5)
    expected = [values[rows].sum(axis=0) for rows in rng.integers(50, size=(20, 50))]
    np.testing.assert_allclose(drawn, expected, atol=1e-4)


def test_tallies_are_sums_of_a_column_for_each_group() -> None:
    groups = np.random.default_rng(0).integers(-1, 4, size=(3, 50))
    found = bootstrap_tallies(groups, 5, draws=20, seed=5)
    for own, tallies in zip(groups, found, strict=True):
        np.testing.assert_array_equal(tallies, bootstrap_sums(own[:, None] == np.arange(5), draws=20, seed=5))


def test_tallies_of_many_groups_need_no_column_for_each() -> None:
    rows, count = 20_000, 2000
    groups = np.random.default_rng(0).integers(count, size=(1, rows))
    tracemalloc.start()
    bootstrap_tallies(groups, count, draws=5)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < rows * count / 4


def test_the_interval_of_a_mean_is_scipys() -> None:
    right = (np.random.default_rng(1).random(400) < 0.8).astype(np.float64)
    found = bootstrap_means(right[:, None], draws=4000)[0]
    other = bootstrap((right,), np.mean, n_resamples=4000, method="percentile", rng=1).confidence_interval
    assert found.value == right.mean()
    assert found.bounds == pytest.approx((other.low, other.high), abs=0.005)


@pytest.mark.parametrize("at_once", [1, 3, 7, 100])
def test_draws_are_the_same_however_many_are_made_at_once(at_once: int) -> None:
    whole = np.concatenate(list(bootstrap_counts(50, draws=20, seed=5)))
    np.testing.assert_array_equal(np.concatenate(list(bootstrap_counts(50, draws=20, seed=5, at_once=at_once))), whole)
    assert (whole.sum(axis=1) == 50).all()
    assert not np.array_equal(np.concatenate(list(bootstrap_counts(50, draws=20, seed=(5, 1)))), whole)


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(2)
    held = 0
    for seed in range(300):
        interval = bootstrap_means((rng.random((300, 1)) < 0.7).astype(np.float64), draws=300, seed=seed)[0]
        held += interval.low <= 0.7 <= interval.high
    assert 0.90 <= held / 300 <= 0.985


def test_nan_rows_do_not_count_and_nothing_is_nan() -> None:
    values = np.array([[1.0, np.nan], [0.0, np.nan], [np.nan, np.nan]])
    first, second = bootstrap_means(values, draws=200)
    assert first.value == 0.5
    assert np.isnan([second.value, second.low, second.high]).all()
    assert np.isnan(bootstrap_means(np.empty((0, 1)))[0].bounds).all()


def test_one_seed_one_answer() -> None:
    values = np.random.default_rng(3).random((80, 2))
    assert bootstrap_means(values, seed=4) == bootstrap_means(values, seed=4)
    assert bootstrap_means(values, seed=4) != bootstrap_means(values, seed=5)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_mcnemar_adds_up_the_splits_as_uneven(answers: list[tuple[bool, bool]]) -> None:
    first, second = np.asarray(answers).T
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    n, uneven = only_first + only_second, abs(only_first - only_second)
    expected = sum(binom.pmf(i, n, 0.5) for i in range(n + 1) if abs(n - 2 * i) >= uneven)
    assert mcnemar(first, second) == pytest.approx(expected, abs=1e-6)
    assert mcnemar(first, second) == mcnemar(second, first)
