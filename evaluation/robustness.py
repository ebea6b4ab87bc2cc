"""Bundles on corrupted copies of the query images; see evaluation.corruptions."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import product
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from coterie.bundle import Bundle
from coterie.classifier import score
from coterie.decoding import decoding_processes
from coterie.intervals import Interval, bootstrap_means, bootstrap_sums, interval
from coterie.machine import processors
from coterie.metrics import expected_calibration_error
from coterie.progress import progress_bar
from evaluation.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from evaluation.queries import Queries
from evaluation.reliability import calibration_error_draws

__all__ = ["Robustness", "measure_robustness", "relative_errors"]

# Pixels that travel between processes at once: 32 MB.
CHUNK = 1 << 25

Condition = tuple[str, int]
Bounds = tuple[float, float]
T = TypeVar("T")


@dataclass(frozen=True)
class Robustness:
    """Of one bundle, by corruption and severity 1 to 5.

    Attributes:
        errors: share of wrong labels by the classifier, rejection ignored.
        refused: share called unknown at the evaluation's false-reject rate.
        eces: expected calibration error, 15 bins.
        mean_error: over all corruptions and severities, unweighted, as the CIFAR literature has it.
        error_by_severity, ece_by_severity: means over corruptions.
        clean_error: of the images as they are.
        error_intervals and others: low and high of each of the former, by a bootstrap over images.
        wrong: share of the severities of each corruption at which each image was wrong, (n, corruptions).
    """

    images: int
    seed: int
    input_size: tuple[int, int]
    clean_error: float
    clean_error_interval: Bounds
    mean_error: float
    mean_error_interval: tuple[float, float]
    error_by_severity: tuple[float, ...]
    error_by_severity_intervals: tuple[Bounds, ...]
    ece_by_severity: tuple[float, ...]
    ece_by_severity_intervals: tuple[Bounds, ...]
    errors: dict[str, tuple[float, ...]]
    error_intervals: dict[str, tuple[Bounds, ...]]
    refused: dict[str, tuple[float, ...]]
    refused_intervals: dict[str, tuple[Bounds, ...]]
    eces: dict[str, tuple[float, ...]]
    ece_intervals: dict[str, tuple[Bounds, ...]]
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


def relative_errors(
    robustness: Robustness, baseline: Robustness, *, seed: int = 0
) -> tuple[dict[str, Interval], Interval]:
    """Corruption errors relative to a baseline's (arXiv 1903.12261, section 4.1), 1 being as bad, and their mean, mCE.

    Of each corruption the sum of the errors over severities divided by the baseline's; corruptions under which the
    baseline makes no mistake are left out, also in a bootstrap draw, which is of the same images for both.
    """
    names = [name for name, errors in baseline.errors.items() if sum(errors) > 0]
    some = [list(CORRUPTIONS).index(name) for name in names]
    own, other = robustness.wrong[:, some], baseline.wrong[:, some]
    drawn = bootstrap_sums(np.concatenate([own, other], axis=1), seed=seed).astype(np.float64)
    ratios = own.sum(axis=0) / other.sum(axis=0)
    sums, others = drawn[:, : len(names)], drawn[:, len(names) :]
    draws = np.divide(sums, others, out=np.full_like(sums, np.nan), where=others > 0)
    found = {name: interval(float(ratio), of) for name, ratio, of in zip(names, ratios, draws.T, strict=True)}
    if not names:
        return {}, Interval(float("nan"), float("nan"), float("nan"))
    some_left = ~np.isnan(draws).all(axis=1)
    return found, interval(float(ratios.mean()), np.nanmean(draws[some_left], axis=1))


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
        yield _summary(bundle, own, right[i], refused[i], confidence[i], seed, false_reject)


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
    confidence: NDArray[np.float32],
    seed: int,
    false_reject: float,
) -> Robustness:
    """From what each image was answered in each condition, (conditions, n)."""
    shape = len(CORRUPTIONS), len(SEVERITIES)
    wrong = ~right.reshape(*shape, -1)
    errors = wrong.mean(axis=2)
    eces = np.asarray([expected_calibration_error(*one) for one in zip(confidence, right, strict=True)]).reshape(shape)
    ece_draws = np.stack(
        [
            calibration_error_draws(of_all, rightly, seed=seed)
            for of_all, rightly in zip(_by_severity(confidence), _by_severity(right), strict=True)
        ],
        axis=2,
    )  # (draws, corruptions, severities)
    clean = score(queries.embeddings, bundle.base, bundle.manifest.calibration)
    wrong_clean = np.asarray(bundle.base.clusters.labels, dtype=np.str_)[clean.best] != queries.labels
    rates = np.stack([wrong_clean, wrong.mean(axis=(0, 1)), *wrong.mean(axis=0)], axis=1)
    as_they_are, mean, *by_severity = bootstrap_means(rates, seed=seed)
    return Robustness(
        images=len(queries),
        seed=seed,
        input_size=bundle.manifest.encoder.input_size,
        clean_error=as_they_are.value,
        clean_error_interval=as_they_are.bounds,
        mean_error=mean.value,
        mean_error_interval=mean.bounds,
        error_by_severity=tuple(errors.mean(axis=0).tolist()),
        error_by_severity_intervals=tuple(one.bounds for one in by_severity),
        ece_by_severity=tuple(eces.mean(axis=0).tolist()),
        ece_by_severity_intervals=_intervals(eces.mean(axis=0), ece_draws.mean(axis=1)),
        errors=_by_name(errors.tolist()),
        error_intervals=_by_name(_means(~right, seed)),
        refused=_by_name(refused.mean(axis=1).reshape(shape).tolist()),
        refused_intervals=_by_name(_means(refused, seed)),
        eces=_by_name(eces.tolist()),
        ece_intervals=_by_name([_intervals(*one) for one in zip(eces, ece_draws.swapaxes(0, 1), strict=True)]),
        wrong=wrong.mean(axis=1).T,
    )


def _by_severity(values: NDArray[Any]) -> NDArray[Any]:
    """(conditions, n) as (severities, corruptions, n)."""
    return values.reshape(len(CORRUPTIONS), len(SEVERITIES), -1).swapaxes(0, 1)


def _by_name(values: Sequence[Sequence[T]]) -> dict[str, tuple[T, ...]]:
    """Values of each corruption at each severity."""
    return {name: tuple(row) for name, row in zip(CORRUPTIONS, values, strict=True)}


def _means(values: NDArray[np.bool_], seed: int) -> list[list[Bounds]]:
    """Intervals of the mean of each condition's `values` (conditions, n)."""
    each = [one.bounds for one in bootstrap_means(values.T, seed=seed)]
    return [each[at : at + len(SEVERITIES)] for at in range(0, len(each), len(SEVERITIES))]


def _intervals(values: NDArray[np.float64], drawn: NDArray[np.float64]) -> tuple[Bounds, ...]:
    """Of k values (k,) from their draws (draws, k)."""
    return tuple(interval(value, of).bounds for value, of in zip(values.tolist(), drawn.T, strict=True))
