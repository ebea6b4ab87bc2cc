"""How well images of no known class are told from the others: a folder of such, or classes left out of the gallery."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from coterie.bundle import Bundle
from coterie.classifier import Scores, score
from coterie.errors import DataError
from coterie.gallery import Snapshot
from coterie.intervals import Interval, bootstrap_counts, bootstrap_means, interval
from coterie.reference import LabelledVectors
from evaluation.queries import Queries
from evaluation.rejection import Counts, rejection, rejection_draws

__all__ = [
    "RANDOM",
    "HeldOut",
    "UnknownResult",
    "check_split",
    "hold_out",
    "mean_auroc",
    "mean_auroc_draws",
    "measure_unknown",
    "random_splits",
]

RANDOM = "random"
SPLITS, UNKNOWN_SHARE = 5, 0.4  # of ten classes four, as the splits that open-set papers share (arXiv 2110.06207)
# Draws times images at once: a dozen arrays of 8 MB.
BLOCK = 1 << 20


@dataclass(frozen=True)
class UnknownResult:
    """Of known against unknown images, by deviation; see coterie.metrics.

    Attributes:
        data: fingerprint of the unknown images; None where they are queries.
        images: how many unknown images.
        accepted: share of the unknown that was given a label.
        aupr: with the known as positives; `aupr_unknown` with the unknown.
        oscr: AUROC that counts rightly labelled images only.
        unknown_accepted_at_95: FPR95 of KNN-OOD and CIDER: share of the unknown accepted where 95 % of the known are.
        known_rejected_at_95: FPR95 of OpenOOD: share of the known rejected where 95 % of the unknown are.
        intervals: low and high of each.
        similarities: of the unknown images to their most probable class, (n,).
        draws: of each, what the intervals are taken from, (draws,); of bundles on the same images they are paired.
    """

    data: str | None
    images: int
    accepted: float
    auroc: float
    aupr: float
    aupr_unknown: float
    oscr: float
    unknown_accepted_at_95: float
    known_rejected_at_95: float
    intervals: dict[str, tuple[float, float]]
    similarities: NDArray[np.float64] = field(repr=False)
    draws: dict[str, NDArray[np.float64]] = field(repr=False)


@dataclass(frozen=True)
class HeldOut:
    """A split: `classes` were taken from the gallery, the queries of all others are the known ones.

    Attributes:
        top1: share of right labels among the known.
    """

    classes: tuple[str, ...]
    known: int
    top1: float
    top1_interval: tuple[float, float]
    unknown: UnknownResult


def measure_unknown(
    known: Scores, right: NDArray[np.bool_], strange: Scores, limit: float, *, data: str | None = None, seed: int = 0
) -> UnknownResult:
    """Measure from the scores of known images, whether their labels are right (m,), and those of unknown ones."""
    m, n = len(right), len(strange.deviations)
    step = max(1, BLOCK // (m + n))
    draws = zip(
        bootstrap_counts(m, seed=seed, at_once=step), bootstrap_counts(n, seed=(seed, 1), at_once=step), strict=True
    )
    return _measured(known, right, strange, limit, draws, data)


def _measured(
    known: Scores,
    right: NDArray[np.bool_],
    strange: Scores,
    limit: float,
    counts: Iterable[Counts],
    data: str | None = None,
) -> UnknownResult:
    """Measure, with the intervals of these draws."""
    near, far, accepted = -known.deviations, -strange.deviations, strange.accepted(limit)
    values = rejection(near, right, far, accepted)
    drawn = rejection_draws(near, right, far, accepted, counts)
    bounds = {name: interval(value, drawn[name]) for name, value in values.items()}
    return UnknownResult(
        data=data,
        images=len(far),
        **values,
        intervals={name: one.bounds for name, one in bounds.items()},
        similarities=strange.joint,
        draws=drawn,
    )


def random_splits(asked: Sequence[str], seed: int) -> tuple[tuple[str, ...], ...]:
    """Five draws of two fifths of the classes that have queries, `asked`: at least one and not all.

    Raises:
        DataError: there are fewer than two.
    """
    if len(asked) < 2:
        raise DataError(
            f"--hold-out random draws among the classes of the images and leaves some: of {len(asked)} it cannot, add "
            "images of another"
        )
    count = min(max(1, round(UNKNOWN_SHARE * len(asked))), len(asked) - 1)
    rng = np.random.default_rng(seed)
    return tuple(tuple(sorted(rng.choice(asked, count, replace=False).tolist())) for _ in range(SPLITS))


def check_split(split: Sequence[str], gallery: Sequence[str], asked: Iterable[str]) -> None:
    """Refuse to take classes from a gallery that lacks them, or that would leave nothing to ask of the classes `asked`.

    Raises:
        DataError: says which.
    """
    strange = sorted(set(split) - set(gallery))
    if strange:
        raise DataError(f"--hold-out: the gallery has no class {', '.join(map(repr, strange))}")
    if len(set(split)) >= len(gallery):
        raise DataError("--hold-out leaves no class in the gallery")
    if not set(split) & set(asked) or not set(asked) - set(split):
        raise DataError(f"--hold-out {','.join(split)}: images are needed of these classes and of others")


def hold_out(
    bundle: Bundle, snapshot: Snapshot, queries: Queries, classes: Sequence[str], *, false_reject: float, seed: int = 0
) -> HeldOut:
    """Take classes from the gallery and meet their queries as unknown ones.

    The encoder was trained on these classes, as a rule, and the thresholds were calibrated with them: that is kinder
    than classes that were never seen.

    Raises:
        DataError: the gallery lacks one of the classes, or nothing would be left to ask.
    """
    check_split(classes, snapshot.clusters.labels, queries.labels.tolist())
    gallery = LabelledVectors(snapshot.items.embeddings, snapshot.classes, snapshot.clusters)
    rest = gallery.without(*map(snapshot.clusters.labels.index, set(classes)))
    out = np.isin(queries.labels, list(classes))
    calibration = bundle.manifest.calibration
    known, unknown = (score(queries.embeddings[rows], rest, calibration) for rows in (~out, out))
    right = np.asarray(rest.clusters.labels, dtype=np.str_)[known.best] == queries.labels[~out]
    step = max(1, BLOCK // len(out))
    counts = ((drawn[:, ~out], drawn[:, out]) for drawn in bootstrap_counts(len(out), seed=seed, at_once=step))
    found = _measured(known, right, unknown, calibration.limit(false_reject), counts)
    top1 = bootstrap_means(right[:, None], seed=seed)[0]
    return HeldOut(tuple(sorted(set(classes))), len(right), top1.value, top1.bounds, found)


def mean_auroc(splits: Sequence[HeldOut]) -> Interval:
    """Mean AUROC over splits of the same queries."""
    return interval(float(np.mean([split.unknown.auroc for split in splits])), mean_auroc_draws(splits))


def mean_auroc_draws(splits: Sequence[HeldOut]) -> NDArray[np.float64]:
    """Its bootstrap draws, (draws,): each is of the same images for all splits."""
    return np.asarray(np.mean([split.unknown.draws["auroc"] for split in splits], axis=0))
