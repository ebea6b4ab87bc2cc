"""Bundles on corrupted copies of the query images; see evaluation.corruptions."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import product

import numpy as np
from numpy.typing import NDArray

from coterie.bundle import Bundle
from coterie.classifier import score
from coterie.decoding import decoding_processes
from coterie.intervals import bootstrap_means
from coterie.machine import processors
from coterie.metrics import expected_calibration_error
from coterie.progress import progress_bar
from evaluation.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from evaluation.queries import Queries

__all__ = ["Robustness", "measure_robustness", "relative_errors"]

# Pixels that travel between processes at once: 32 MB.
CHUNK = 1 << 25

Condition = tuple[str, int]


@dataclass(frozen=True)
class Robustness:
    """Of one bundle, by corruption and severity 1 to 5.

    Attributes:
        errors: share of wrong labels by the classifier, rejection ignored; `error_intervals` low and high of each.
        refused: share called unknown at the evaluation's false-reject rate; `refused_intervals` low and high of each.
        eces: expected calibration error, 15 bins.
        mean_error: over all corruptions and severities, unweighted, as the CIFAR literature has it.
        error_by_severity, ece_by_severity: means over corruptions.
        wrong: share of the conditions in which each image was wrong, (n,).
    """

    images: int
    seed: int
    input_size: tuple[int, int]
    clean_error: float
    mean_error: float
    mean_error_interval: tuple[float, float]
    error_by_severity: tuple[float, ...]
    ece_by_severity: tuple[float, ...]
    errors: dict[str, tuple[float, ...]]
    error_intervals: dict[str, tuple[tuple[float, float], ...]]
    refused: dict[str, tuple[float, ...]]
    refused_intervals: dict[str, tuple[tuple[float, float], ...]]
    eces: dict[str, tuple[float, ...]]
    wrong: NDArray[np.float64] = field(repr=False)


def measure_robustness(
    bundles: Sequence[tuple[Bundle, Queries]], *, false_reject: float = 0.05, seed: int = 0
) -> list[Robustness]:
    """Measure each bundle on its queries; bundles that take the same pixels get the same corrupted images.

    Images are corrupted by as many processes as there are processors, while this one embeds.
    """
    found: dict[int, Robustness] = {}
    total = len(CORRUPTIONS) * len(SEVERITIES) * sum(len(queries) for _, queries in bundles)
    with progress_bar("corrupting and embedding", total) as advance:
        for preprocessing in dict.fromkeys(bundle.manifest.encoder.preprocessing for bundle, _ in bundles):
            own = [i for i, (bundle, _) in enumerate(bundles) if bundle.manifest.encoder.preprocessing == preprocessing]
            measured = _measure([bundles[i] for i in own], false_reject, seed, advance)
            found.update(zip(own, measured, strict=True))
    return [found[i] for i in range(len(bundles))]


def relative_errors(robustness: Robustness, baseline: Robustness) -> dict[str, float]:
    """Corruption errors relative to a baseline's (arXiv 1903.12261, section 4.1), 1 being as bad; their mean is mCE.

    Of each corruption the sum of the errors over severities divided by the baseline's; corruptions under which the
    baseline makes no mistake are left out.
    """
    found = ((name, sum(errors), sum(baseline.errors[name])) for name, errors in robustness.errors.items())
    return {name: own / other for name, own, other in found if other > 0}


def _measure(
    bundles: Sequence[tuple[Bundle, Queries]], false_reject: float, seed: int, advance: Callable[..., None]
) -> Iterator[Robustness]:
    """Of bundles that take the same pixels of the same images."""
    _, queries = bundles[0]
    conditions = list(product(CORRUPTIONS, SEVERITIES))
    right = np.empty((len(bundles), len(conditions), len(queries)), dtype=np.bool_)
    refused, confidence = np.empty_like(right), np.empty(right.shape, dtype=np.float32)
    for number, start, pixels in _corrupted(queries.images.pixels, conditions, seed):
        rows = slice(start, start + len(pixels))
        for i, (bundle, _) in enumerate(bundles):
            calibration, snapshot = bundle.manifest.calibration, bundle.base
            scores = score(bundle.encoder.embed(pixels), snapshot, calibration)
            labels = np.asarray(snapshot.clusters.labels, dtype=np.str_)[scores.best]
            right[i, number, rows] = labels == queries.labels[rows]
            refused[i, number, rows] = ~scores.accepted(calibration.limit(false_reject))
            confidence[i, number, rows] = scores.probabilities.max(axis=1)
            advance(len(pixels), note=f"{conditions[number][0]} {conditions[number][1]}")
    for i, (bundle, own) in enumerate(bundles):
        yield _summary(bundle, own, right[i], refused[i], confidence[i].astype(np.float64), seed, false_reject)


def _corrupted(
    pixels: NDArray[np.uint8], conditions: Sequence[Condition], seed: int
) -> Iterator[tuple[int, int, NDArray[np.uint8]]]:
    """The number of a condition, the first row of a chunk, and the chunk corrupted; in order."""
    step = max(1, CHUNK // pixels[:1].nbytes)
    workers = processors()
    with decoding_processes(workers) as pool:
        waiting: deque[tuple[int, int, Future[NDArray[np.uint8]]]] = deque()
        for number, condition in enumerate(conditions):
            for start in range(0, len(pixels), step):
                task = pool.submit(_corrupt_all, pixels[start : start + step], *condition, seed, start)
                waiting.append((number, start, task))
                if len(waiting) > workers + 1:
                    yield _done(waiting)
        while waiting:
            yield _done(waiting)


def _done(waiting: deque[tuple[int, int, Future[NDArray[np.uint8]]]]) -> tuple[int, int, NDArray[np.uint8]]:
    number, start, task = waiting.popleft()
    return number, start, task.result()


def _corrupt_all(pixels: NDArray[np.uint8], name: str, severity: int, seed: int, first: int) -> NDArray[np.uint8]:
    images = [corrupt(image, name, severity, seed=seed, index=first + row) for row, image in enumerate(pixels)]
    return np.stack(images)


def _summary(
    bundle: Bundle,
    queries: Queries,
    right: NDArray[np.bool_],
    refused: NDArray[np.bool_],
    confidence: NDArray[np.float64],
    seed: int,
    false_reject: float,
) -> Robustness:
    shape = len(CORRUPTIONS), len(SEVERITIES)
    errors = (1 - right.mean(axis=1)).reshape(shape)
    eces = np.asarray([expected_calibration_error(*one) for one in zip(confidence, right, strict=True)]).reshape(shape)
    clean = score(queries.embeddings, bundle.base, bundle.manifest.calibration)
    labels = np.asarray(bundle.base.clusters.labels, dtype=np.str_)[clean.best]
    wrong = 1 - right.mean(axis=0)
    mean = bootstrap_means(wrong[:, None], seed=seed)[0]
    return Robustness(
        images=len(queries),
        seed=seed,
        input_size=bundle.manifest.encoder.input_size,
        clean_error=float((labels != queries.labels).mean()),
        mean_error=mean.value,
        mean_error_interval=(mean.low, mean.high),
        error_by_severity=tuple(errors.mean(axis=0).tolist()),
        ece_by_severity=tuple(eces.mean(axis=0).tolist()),
        errors=_by_name(errors),
        error_intervals=_intervals(~right, seed),
        refused=_by_name(refused.mean(axis=1).reshape(shape)),
        refused_intervals=_intervals(refused, seed),
        eces=_by_name(eces),
        wrong=wrong,
    )


def _by_name(values: NDArray[np.float64]) -> dict[str, tuple[float, ...]]:
    return {name: tuple(row) for name, row in zip(CORRUPTIONS, values.tolist(), strict=True)}


def _intervals(values: NDArray[np.bool_], seed: int) -> dict[str, tuple[tuple[float, float], ...]]:
    """Of the mean of each condition's `values` (conditions, n)."""
    each = [(one.low, one.high) for one in bootstrap_means(values.T, seed=seed)]
    steps = range(0, len(each), len(SEVERITIES))
    return dict(zip(CORRUPTIONS, (tuple(each[at : at + len(SEVERITIES)]) for at in steps), strict=True))
