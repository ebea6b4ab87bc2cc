"""Two bundles on the same images: differences with paired intervals and tests."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from coterie.errors import DataError
from coterie.intervals import bootstrap_means, interval, mcnemar
from evaluation.evaluate import Evaluation
from evaluation.queries import Queries
from evaluation.reliability import calibration_error_draws
from evaluation.robustness import Robustness, relative_errors
from evaluation.unknown import mean_auroc_draws

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
        relative_errors: of the first, by corruption, relative to the other's; see evaluation.robustness.
        relative_corruption_error: their mean. These are None where corruptions were not measured, and so are their
            intervals, low and high.
    """

    first: str
    other: str
    differences: tuple[Difference, ...]
    relative_corruption_error: float | None = None
    relative_corruption_error_interval: tuple[float, float] | None = None
    relative_errors: dict[str, float] | None = None
    relative_error_intervals: dict[str, tuple[float, float]] | None = None

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
    eces = [calibration_error_draws(of.confidence[None], of.right[None], seed=seed)[:, 0] for of in (one, two)]
    differences.append(_difference_of_draws("ece", first.ece, other.ece, *eces))
    if first.unknown and other.unknown and first.unknown.data == other.unknown.data:
        of_first, of_other = first.unknown, other.unknown
        aurocs = of_first.draws["auroc"], of_other.draws["auroc"]
        differences.append(_difference_of_draws("unknown_auroc", of_first.auroc, of_other.auroc, *aurocs))
    if first.held_out and [split.classes for split in first.held_out] == [split.classes for split in other.held_out]:
        aurocs = mean_auroc_draws(first.held_out), mean_auroc_draws(other.held_out)
        means = first.held_out_auroc, other.held_out_auroc
        differences.append(_difference_of_draws("held_out_auroc", *means, *aurocs))
    if not robustness:
        return Comparison(*names, tuple(differences))
    own, others = (found.wrong.mean(axis=1) for found in robustness)
    differences.append(_difference("corruption_error", own, others, seed))
    ratios, mean = relative_errors(*robustness, seed=seed)
    return Comparison(
        *names,
        tuple(differences),
        relative_corruption_error=mean.value,
        relative_corruption_error_interval=mean.bounds,
        relative_errors={name: one.value for name, one in ratios.items()},
        relative_error_intervals={name: one.bounds for name, one in ratios.items()},
    )


def _difference(measure: str, first: NDArray[np.float64], other: NDArray[np.float64], seed: int) -> Difference:
    one, two, less = bootstrap_means(np.stack([first, other, first - other], axis=1), seed=seed)
    p = mcnemar(first > 0, other > 0) if measure in RATES else None
    return Difference(measure, one.value, two.value, less.value, less.low, less.high, p)


def _difference_of_draws(
    measure: str, first: float, other: float, drawn: NDArray[np.float64], drawn_other: NDArray[np.float64]
) -> Difference:
    """From draws of the same images for both."""
    found = interval(first - other, drawn - drawn_other)
    return Difference(measure, first, other, found.value, found.low, found.high)
