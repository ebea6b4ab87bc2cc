"""Which settings of the classifier make held-out images likeliest.

Knows neighbours' votes, closeness to clusters and how the two are weighed. Knows nothing of rejection.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coterie.classifier import closeness, log_votes, softmax
from coterie.metrics import expected_calibration_error
from coterie.reference import LabelledVectors

__all__ = ["MOST_VOTE", "NEIGHBORS", "fit_weights", "most_likely"]

NEIGHBORS, TEMPERATURES = (5, 10, 20, 50), (0.1, 0.2, 0.4)
# The vote weighs at most an eighth of the clusters, unless it lowers the loss by a tenth to let it. Likelihood has only
# classes to go by that the encoder was trained on: it would have the vote weigh a third of the clusters or as much as
# they do, for a loss 1 to 5 % lower, and with five examples of each, 0.79 instead of 0.86 of the demo's new digits
# would be right. Of raw pixels, where clusters say little, freedom lowers the loss by half.
MOST_VOTE = 1 / 8
WORTH_FREEDOM = 0.9
# What is weighed from 0 on: combinations of closeness and vote.
BOUNDED, FREE = np.asarray([[1, 0], [1, MOST_VOTE]]), np.eye(2)
# The plain vote that calibration is compared with, as DINO has it (arXiv 2104.14294).
PLAIN_NEIGHBORS, PLAIN_TEMPERATURE = 20, 0.07
# Of Newton's method: where a class is alone, nothing depends on the weights.
ROUNDS, PRECISION, RIDGE = 100, 1e-6, 1e-9


@dataclass(frozen=True)
class _Fit:
    """Settings with their loss, and what their weights are fitted to: for each reference (2, n, c)."""

    loss: float
    settings: dict[str, Any]
    features: list[NDArray[np.float64]]


def most_likely(
    references: Sequence[LabelledVectors],
    embeddings: NDArray[np.float32],
    truth: NDArray[np.int64],
    neighbors: Sequence[int] = NEIGHBORS,
) -> tuple[dict[str, Any], dict[str, float]]:
    """The settings with the smallest loss over the gallery and all episodes, and the calibration errors.

    Args:
        references: the gallery, then the episodes.
        embeddings, truth: held-out images (n, d) and their classes (n,).
        neighbors: how many may vote.

    Returns:
        Fields of coterie.classifier.Calibration: how to score, and `ece` with `ece_of_vote`.
    """
    searched = [reference.index.search(embeddings, max(*neighbors, PLAIN_NEIGHBORS)) for reference in references]
    close = [closeness(*reference.clusters.similarities(embeddings)) for reference in references]
    votes = {
        (k, temperature): [
            log_votes(near[:, :k], reference.classes_of(rows[:, :k]), reference.clusters.counts, temperature)
            for reference, (near, rows) in zip(references, searched, strict=True)
        ]
        for k, temperature in product(neighbors, TEMPERATURES)
    }
    bounded, free = (_best_fit(close, votes, truth, directions) for directions in (BOUNDED, FREE))
    best = free if free.loss < WORTH_FREEDOM * bounded.loss else bounded
    plain, after = _plain_votes(references[0], *searched[0]), _crossed(best.features, truth)
    return best.settings, {
        "ece_of_vote": expected_calibration_error(plain.max(axis=1), plain.argmax(axis=1) == truth),
        "ece": expected_calibration_error(after.max(axis=1), after.argmax(axis=1) == truth),
    }


def _best_fit(
    close: list[NDArray[np.float64]],
    votes: dict[tuple[int, float], list[NDArray[np.float64]]],
    truth: NDArray[np.int64],
    directions: NDArray[np.float64],
) -> _Fit:
    best = _Fit(math.inf, {}, [])
    for (k, temperature), logs in votes.items():
        features = [
            np.stack([cluster * near + vote * log for cluster, vote in directions])
            for near, log in zip(close, logs, strict=True)
        ]
        loss, weights = fit_weights(features, truth)
        if loss < best.loss - 1e-9:
            cluster_weight, vote_weight = (_scaled(weights, features[0], truth) @ directions).tolist()
            settings = {
                "n_neighbors": k,
                "temperature": temperature,
                "vote_weight": vote_weight,
                "cluster_weight": cluster_weight,
            }
            best = _Fit(loss, settings, features)
    return best


def _plain_votes(
    gallery: LabelledVectors, similarities: NDArray[np.float32], rows: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Each class's share of the nearest items' votes exp(s / T), (n, c)."""
    near = similarities[:, :PLAIN_NEIGHBORS].astype(np.float64)
    weights = softmax(near / PLAIN_TEMPERATURE)
    shares = np.zeros((len(near), len(gallery.clusters)))
    np.add.at(shares, (np.arange(len(near))[:, None], gallery.classes_of(rows[:, :PLAIN_NEIGHBORS])), weights)
    return shares


def fit_weights(features: list[NDArray[np.float64]], truth: NDArray[np.int64]) -> tuple[float, NDArray[np.float64]]:
    """The weights (m,) of `features`, each (m, n, c), with the smallest loss, and that loss; convex.

    The loss is the negative log-likelihood on the first of them, the gallery's, plus its mean over the others, the
    episodes'. A wrong answer is allowed for that n images did not show: with probability 1 / (n + 2), as Platt's
    scaling has it (1999), so that classes which are told apart without error do not make the weights infinite.
    """
    m, n, c = features[0].shape
    doubt = 1 / (n + 2) if c > 1 else 0.0
    target = np.full((n, c), doubt / max(c - 1, 1))
    target[np.arange(n), truth] = 1 - doubt
    shares = [1.0] + [1 / max(len(features) - 1, 1)] * (len(features) - 1)

    def expanded(weights: NDArray[np.float64]) -> tuple[float, NDArray[np.float64], NDArray[np.float64]]:
        """Loss, gradient (m,) and second derivatives (m, m)."""
        value, slope, curve = 0.0, np.zeros(m), np.zeros((m, m))
        for share, feature in zip(shares, features, strict=True):
            probabilities = softmax(_logits(weights, feature))
            value -= share * float((target * np.log(probabilities + 1e-300)).sum()) / n
            slope += share * np.einsum("mnc,nc->m", feature, probabilities - target) / n
            centred = feature - np.einsum("mnc,nc->mn", feature, probabilities)[:, :, None]
            curve += share * np.einsum("mnc,knc->mk", centred * probabilities, centred) / n
        return value, slope, curve

    return _newton(expanded, np.ones(m))


def _newton(
    expanded: Callable[[NDArray[np.float64]], tuple[float, NDArray[np.float64], NDArray[np.float64]]],
    weights: NDArray[np.float64],
) -> tuple[float, NDArray[np.float64]]:
    """The least value of a convex function and where it lies among weights from 0 on.

    Newton's method on the weights that are free to move, each step halved until it leads down.
    """
    value, slope, curve = expanded(weights)
    for _ in range(ROUNDS):
        free = (weights > 0) | (slope < 0)
        step = np.zeros_like(weights)
        step[free] = np.linalg.solve(curve[np.ix_(free, free)] + RIDGE * np.eye(free.sum()), slope[free])
        while np.abs(step).max() > PRECISION:
            trial = np.maximum(weights - step, 0)
            found = expanded(trial)
            if found[0] < value:
                break
            step /= 2
        else:
            break
        weights, (value, slope, curve) = trial, found
    return value, weights


def _scaled(
    weights: NDArray[np.float64], feature: NDArray[np.float64], truth: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Weights in the same ratio, of the size that fits the gallery as it is.

    Episodes say how much neighbours and clusters are worth beside each other where classes are young, but they are
    harder than what is asked of the gallery now, whose probabilities would be too timid.
    """
    _, (scale,) = fit_weights([_logits(weights, feature)[None]], truth)
    return np.asarray(weights * scale)


def _crossed(features: list[NDArray[np.float64]], truth: NDArray[np.int64]) -> NDArray[np.float64]:
    """Probabilities (n, c) of each half of the images by weights fitted on the other half."""
    halves = np.arange(len(truth)) % 2
    probabilities = np.empty(features[0].shape[1:])
    for half in range(min(2, len(truth))):
        asked = halves == half
        seen = ~asked if len(truth) > 1 else asked
        _, weights = fit_weights([feature[:, seen] for feature in features], truth[seen])
        weights = _scaled(weights, features[0][:, seen], truth[seen])
        probabilities[asked] = softmax(_logits(weights, features[0][:, asked]))
    return probabilities


def _logits(weights: NDArray[np.float64], feature: NDArray[np.float64]) -> NDArray[np.float64]:
    """Features (m, n, c) weighed, (n, c); not by BLAS, whose threads wait for each other where cores are busy."""
    return np.asarray(np.einsum("m,mnc->nc", weights, feature))
