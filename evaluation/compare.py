"""Two bundles on the same images: differences with paired intervals and tests."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from coterie.errors import DataError
from coterie.intervals import bootstrap, bootstrap_means, mcnemar
from coterie.metrics import auroc, expected_calibration_error
from evaluation.evaluate import BINS, Evaluation
from evaluation.queries import Queries
from evaluation.robustness import Robustness, relative_errors
from evaluation.unknown import DRAWS, UnknownResult

__all__ = ["Comparison", "Difference", "check_same_images", "compare"]

RATES = ("top1", "accepted_top1", "knn_top1", "cluster_top1", "probe_top1", "recall_at_1")
MEANS = ("r_precision", "map_at_r", "silhouette")
CHANCE = 0.05


@dataclass(frozen=True)
class Difference:
    """The first's number less the other's, with a 95 % bootstrap interval over images; p by McNemar's exact test."""

    measure: str
    first: float
    other: float
    difference: float
    low: float
    high: float
    p: float | None = None

    @property
    def clear(self) -> bool:
        """Whether chance hardly explains it: p < 0.05 where there is a test, else an interval that leaves out 0."""
        return self.low > 0 or self.high < 0 if self.p is None else self.p < CHANCE


@dataclass(frozen=True)
class Comparison:
    """The evaluated bundle against another, `other`.

    Attributes:
        relative_errors: of the first, by corruption, relative to the other's; None where corruptions were not measured.
        relative_corruption_error: their mean.
    """

    first: str
    other: str
    differences: tuple[Difference, ...]
    relative_corruption_error: float | None = None
    relative_errors: dict[str, float] | None = None

    def __getitem__(self, measure: str) -> Difference:
        return next(one for one in self.differences if one.measure == measure)


def check_same_images(first: Queries, other: Queries) -> None:
    """Refuse to compare what was measured on other images.

    Raises:
        DataError: they differ.
    """
    if first.images.hashes != other.images.hashes:
        raise DataError("the bundles could not read the same images, so they cannot be compared: see what was left out")


def compare(
    names: tuple[str, str],
    first: Evaluation,
    other: Evaluation,
    robustness: tuple[Robustness, Robustness] | None = None,
    *,
    seed: int = 0,
) -> Comparison:
    """Compare two evaluations of the same images in the same order."""
    one, two = first.answers, other.answers
    differences = [_difference(name, one.measures[name], two.measures[name], seed) for name in RATES + MEANS]
    differences.append(
        _difference_of("ece", first.ece, other.ece, (one.confidence, one.right), (two.confidence, two.right), seed)
    )
    if first.unknown and other.unknown:
        differences.append(_difference_of_auroc(first.unknown, other.unknown, seed))
    if not robustness:
        return Comparison(*names, tuple(differences))
    differences.append(_difference("corruption_error", robustness[0].wrong, robustness[1].wrong, seed))
    ratios = relative_errors(*robustness)
    mean = float(np.mean(list(ratios.values()))) if ratios else float("nan")
    return Comparison(*names, tuple(differences), mean, ratios)


def _difference(measure: str, first: NDArray[np.float64], other: NDArray[np.float64], seed: int) -> Difference:
    one, two, less = bootstrap_means(np.stack([first, other, first - other], axis=1), seed=seed)
    p = mcnemar(first > 0, other > 0) if measure in RATES else None
    return Difference(measure, one.value, two.value, less.value, less.low, less.high, p)


def _difference_of(
    measure: str,
    first: float,
    other: float,
    of_first: tuple[NDArray[np.float64], NDArray[np.bool_]],
    of_other: tuple[NDArray[np.float64], NDArray[np.bool_]],
    seed: int,
) -> Difference:
    def less(c1: NDArray[np.float64], r1: NDArray[np.bool_], c2: NDArray[np.float64], r2: NDArray[np.bool_]) -> float:
        ece = expected_calibration_error
        return ece(c1, r1, bins=BINS) - ece(c2, r2, bins=BINS)

    found = bootstrap(less, (*of_first, *of_other), seed=seed)
    return Difference(measure, first, other, found.value, found.low, found.high)


def _difference_of_auroc(first: UnknownResult, other: UnknownResult, seed: int) -> Difference:
    def less(
        k1: NDArray[np.float64], k2: NDArray[np.float64], u1: NDArray[np.float64], u2: NDArray[np.float64]
    ) -> float:
        return auroc(k1, u1) - auroc(k2, u2)

    known, unknown = (first.known_scores, other.known_scores), (first.unknown_scores, other.unknown_scores)
    found = bootstrap(less, known, unknown, draws=DRAWS, seed=seed)
    return Difference("unknown_auroc", first.auroc, other.auroc, found.value, found.low, found.high)
