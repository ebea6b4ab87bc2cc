"""Calibration errors and reliability bins with bootstrap intervals; see coterie.metrics."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from coterie.intervals import bootstrap_sums, interval
from coterie.metrics import Reliability, confidence_bins, reliability

__all__ = ["BINS", "ReliabilityBins", "calibration_error_draws", "reliability_bins"]

BINS = 15


@dataclass(frozen=True)
class ReliabilityBins(Reliability):
    """Confidence beside accuracy, and low and high of the accuracy's interval, (bins, 2)."""

    accuracy_intervals: NDArray[np.float64]


def reliability_bins(confidence: NDArray[np.float64], right: NDArray[np.bool_], *, seed: int = 0) -> ReliabilityBins:
    """Of n answers."""
    found = reliability(confidence, right, bins=BINS)
    within = confidence_bins(confidence, BINS)[:, None] == np.arange(BINS)
    sums = bootstrap_sums(np.concatenate([within & right[:, None], within], axis=1), seed=seed)
    with np.errstate(invalid="ignore"):
        shares = sums[:, :BINS] / sums[:, BINS:]
    bounds = [interval(float(value), drawn) for value, drawn in zip(found.accuracy, shares.T, strict=True)]
    intervals = np.asarray([one.bounds for one in bounds])
    return ReliabilityBins(found.counts, found.confidence, found.accuracy, intervals)


def calibration_error_draws(
    confidence: NDArray[np.floating], right: NDArray[np.bool_], *, seed: int = 0
) -> NDArray[np.float64]:
    """The expected calibration error of bootstrap draws over n images.

    Args:
        confidence, right: of the answers of each of m conditions to each image, (m, n).

    Returns:
        (draws, m): paired, for a draw is of the same images in all conditions.
    """
    m, n = right.shape
    surplus = np.zeros((n, m * BINS), dtype=np.float32)
    columns = confidence_bins(confidence, BINS) + np.arange(m)[:, None] * BINS
    surplus[np.arange(n), columns] = right - confidence
    drawn = np.abs(bootstrap_sums(surplus, seed=seed)).reshape(-1, m, BINS)
    return np.asarray(drawn.sum(axis=2, dtype=np.float64) / max(n, 1))
