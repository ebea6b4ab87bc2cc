"""Fit the classifier on held-out images: probabilities that mean what they say, thresholds that keep a stated rate.

What classes enrolled later will do is learnt from episodes: gallery classes are shown with a few items only, or left
out altogether and met as unknown ones.
"""

import math
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coterie.classifier import OWN_SHARE, Calibration, closeness, joined_gap, log_votes, score, softmax
from coterie.clusters import PRIOR_MEMBERS
from coterie.errors import CoterieError
from coterie.gallery import Snapshot
from coterie.metrics import auroc, expected_calibration_error
from coterie.prototypes import gaps
from coterie.reference import LabelledVectors, Reference

__all__ = ["FALSE_REJECT_RATES", "calibrate", "fit"]

FALSE_REJECT_RATES = (0.01, 0.02, 0.05, 0.1, 0.2)
NEIGHBORS, TEMPERATURES = (5, 10, 20, 50), (0.1, 0.2, 0.4)
# The vote weighs at most an eighth of the clusters. Likelihood has only classes to go by that the encoder was trained
# on and would have it weigh as much as they do: with five examples of each, 0.79 instead of 0.86 of the demo's new
# digits are then right.
MOST_VOTE = 1 / 8
# The plain vote that calibration is compared with, as DINO has it (arXiv 2104.14294).
PLAIN_NEIGHBORS, PLAIN_TEMPERATURE = 20, 0.07
# Cluster and nearest item alike unless one alone is better by this many standard errors over the classes left out.
SHARES, EVEN_SHARE, CLEARLY = (0.0, 0.5, 1.0), 0.5, 2.0
# Of Newton's method: where a class is alone, nothing depends on the weights.
ROUNDS, PRECISION, RIDGE = 100, 1e-6, 1e-9
EPISODE_EXAMPLES = 5
MOST_EPISODES = 10
# Time and memory go in proportion; a few thousand images tell settings apart, a few hundred the ways to reject.
MOST_FITTING_IMAGES, MOST_REJECTED_IMAGES = 2000, 500


def calibrate(snapshot: Snapshot, embeddings: NDArray[np.float32], labels: NDArray[np.str_]) -> Calibration:
    """Fit the classifier on held-out images, (n, d) and (n,), of classes in the snapshot; as `fit`."""
    return fit(LabelledVectors(snapshot.items.embeddings, snapshot.classes, snapshot.clusters), embeddings, labels)


def fit(gallery: LabelledVectors, embeddings: NDArray[np.float32], labels: NDArray[np.str_]) -> Calibration:
    """Fit the classifier on held-out images, (n, d) and (n,), of classes in the gallery; others do not count.

    The likelihood is taken over the gallery as it is and over episodes in which one class has only a few items, so that
    the fit is also right for classes enrolled later.

    Raises:
        CoterieError: there are no held-out images of the gallery's classes.
    """
    names = np.asarray(gallery.clusters.labels, dtype=np.str_)
    usable = np.isin(labels, names)
    embeddings, truth = embeddings[usable], np.searchsorted(names, labels[usable])
    if not len(truth):
        raise CoterieError("no held-out image belongs to a class of the gallery: calibration needs some of each")
    some = slice(None, None, -(-len(truth) // MOST_FITTING_IMAGES))
    settings, eces = _most_likely(gallery, embeddings[some], truth[some])
    few = slice(None, None, -(-len(truth) // MOST_REJECTED_IMAGES))
    share, measured = _best_share(gallery, embeddings[few], truth[few], settings)
    fitted = _calibration(gallery, settings, share, images=len(truth), **eces, left_out_auroc=measured)
    deviations = np.sort(_unseen_deviations(gallery, embeddings, truth, fitted))
    return fitted.model_copy(update={"limits": {f"{rate:g}": _limit(deviations, rate) for rate in FALSE_REJECT_RATES}})


def _calibration(gallery: LabelledVectors, settings: dict[str, Any], share: float, **more: Any) -> Calibration:
    clusters = gallery.clusters
    typical = joined_gap(clusters.radii, clusters.spacings[clusters.owners], share)
    nothing = {"limits": {}, "images": 0, "ece_of_vote": 0, "ece": 0, "left_out_auroc": {}}
    return Calibration(
        **settings, neighbor_share=share, typical_gap=float(np.exp(np.log(typical).mean())), **{**nothing, **more}
    )


# Probabilities


def _most_likely(
    gallery: LabelledVectors, embeddings: NDArray[np.float32], truth: NDArray[np.int64]
) -> tuple[dict[str, Any], dict[str, float]]:
    """The settings with the smallest loss over the gallery and all episodes, and the calibration errors."""
    references = [gallery, *(_with_few(gallery, row) for row in _rows(gallery, EPISODE_EXAMPLES + 1))]
    searched = [reference.index.search(embeddings, max(NEIGHBORS)) for reference in references]
    close = [closeness(*reference.clusters.similarities(embeddings)) for reference in references]
    best: tuple[float, dict[str, Any], list[NDArray[np.float64]]] = (math.inf, {}, [])
    for k, temperature in product(NEIGHBORS, TEMPERATURES):
        features = [
            np.stack([near, near + MOST_VOTE * _votes(reference, *found, k, temperature)])  # (2, n, c)
            for reference, found, near in zip(references, searched, close, strict=True)
        ]
        loss, weights = _fit_weights(features, truth)
        if loss < best[0] - 1e-9:
            alone, both = _scaled(weights, features[0], truth).tolist()
            settings = {
                "n_neighbors": k,
                "temperature": temperature,
                "vote_weight": MOST_VOTE * both,
                "cluster_weight": alone + both,
            }
            best = (loss, settings, features)
    votes, after = _plain_votes(gallery, *searched[0]), _crossed(best[2], truth)
    return best[1], {
        "ece_of_vote": expected_calibration_error(votes.max(axis=1), votes.argmax(axis=1) == truth),
        "ece": expected_calibration_error(after.max(axis=1), after.argmax(axis=1) == truth),
    }


def _plain_votes(
    gallery: LabelledVectors, similarities: NDArray[np.float32], rows: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Each class's share of the nearest items' votes exp(s / T), (n, c)."""
    near = similarities[:, :PLAIN_NEIGHBORS].astype(np.float64)
    weights = softmax(near / PLAIN_TEMPERATURE)
    shares = np.zeros((len(near), len(gallery.clusters)))
    np.add.at(shares, (np.arange(len(near))[:, None], gallery.classes[rows[:, :PLAIN_NEIGHBORS]]), weights)
    return shares


def _votes(
    reference: Reference, similarities: NDArray[np.float32], rows: NDArray[np.int64], k: int, temperature: float
) -> NDArray[np.float64]:
    return log_votes(similarities[:, :k], reference.classes[rows[:, :k]], reference.clusters.counts, temperature)


def _fit_weights(features: list[NDArray[np.float64]], truth: NDArray[np.int64]) -> tuple[float, NDArray[np.float64]]:
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
    _, (scale,) = _fit_weights([_logits(weights, feature)[None]], truth)
    return np.asarray(weights * scale)


def _crossed(features: list[NDArray[np.float64]], truth: NDArray[np.int64]) -> NDArray[np.float64]:
    """Probabilities (n, c) of each half of the images by weights fitted on the other half."""
    halves = np.arange(len(truth)) % 2
    probabilities = np.empty(features[0].shape[1:])
    for half in range(min(2, len(truth))):
        asked = halves == half
        seen = ~asked if len(truth) > 1 else asked
        _, weights = _fit_weights([feature[:, seen] for feature in features], truth[seen])
        weights = _scaled(weights, features[0][:, seen], truth[seen])
        probabilities[asked] = softmax(_logits(weights, features[0][:, asked]))
    return probabilities


def _logits(weights: NDArray[np.float64], feature: NDArray[np.float64]) -> NDArray[np.float64]:
    """Features (m, n, c) weighed, (n, c); not by BLAS, whose threads wait for each other where cores are busy."""
    return np.asarray(np.einsum("m,mnc->nc", weights, feature))


# Rejection


def _best_share(
    gallery: LabelledVectors, embeddings: NDArray[np.float32], truth: NDArray[np.int64], settings: dict[str, Any]
) -> tuple[float, dict[str, float]]:
    """Which share the nearest item shall have in rejecting, and the AUROC of each over classes left out in turn."""
    rows = [row for row in _rows(gallery, 1) if 0 < np.count_nonzero(truth == row) < len(truth)]
    if not rows:
        return EVEN_SHARE, {}
    found = np.asarray([_left_out_auroc(gallery, embeddings, truth, settings, row) for row in rows])  # (rows, shares)
    means = dict(zip(SHARES, found.mean(axis=0).tolist(), strict=True))
    even = found[:, [SHARES.index(EVEN_SHARE)]]
    errors = (found - even).std(axis=0, ddof=1) / math.sqrt(len(rows)) if len(rows) > 1 else np.full(3, np.inf)
    clear = (found - even).mean(axis=0) > CLEARLY * errors
    better = [share for share, ahead in zip(SHARES, clear, strict=True) if ahead]
    chosen = max(better, key=means.__getitem__, default=EVEN_SHARE)
    return chosen, {f"{share:g}": value for share, value in means.items()}


def _left_out_auroc(
    gallery: LabelledVectors,
    embeddings: NDArray[np.float32],
    truth: NDArray[np.int64],
    settings: dict[str, Any],
    row: int,
) -> list[float]:
    """AUROC of the other classes' images against those of the class `row` where the gallery lacks it, by share."""
    rest = gallery.without(row)
    measured = []
    for share in SHARES:
        deviations = score(embeddings, rest, _calibration(rest, settings, share)).deviations
        measured.append(auroc(-deviations[truth != row], -deviations[truth == row]))
    return measured


def _unseen_deviations(
    gallery: LabelledVectors, embeddings: NDArray[np.float32], truth: NDArray[np.int64], calibration: Calibration
) -> NDArray[np.float64]:
    """What `score` would call the deviation of each image, (n,), had the image not helped to measure its class.

    It is taken from the winning class, right or wrong, as it will be for the images that the limits must hold for.
    """
    scores = score(embeddings, gallery, calibration)
    log_gaps = np.log(gaps(scores.joint)) - math.log(calibration.typical_gap)
    # A mean of n logarithms and the prior, t, is t + (t − l) / (n + prior − 1) without one of them, l.
    from_own = scores.deviations - (1 - OWN_SHARE) * log_gaps
    evidence = np.bincount(truth, minlength=len(gallery.clusters))[truth] + PRIOR_MEMBERS - 1
    return np.asarray(scores.deviations + np.where(scores.best == truth, from_own / evidence, 0))


def _limit(deviations: NDArray[np.float64], rate: float) -> float:
    """The least of the sorted `deviations` (n,) above which a new known image lies with probability `rate` at most.

    That is the ⌈(n + 1)(1 − rate)⌉-th: split conformal prediction (Vovk, arXiv 1209.2673, section 2). The rate holds on
    average over sets of held-out images, not for each; too few images to promise it leave the largest deviation.
    """
    above = max(math.floor((len(deviations) + 1) * rate + 1e-9) - 1, 0)
    return float(deviations[len(deviations) - 1 - above])


def _with_few(gallery: LabelledVectors, row: int) -> LabelledVectors:
    """The gallery as if of this class only the first few items had just been enrolled."""
    few = gallery.embeddings[gallery.classes == row][:EPISODE_EXAMPLES]
    return gallery.without(row).with_class(gallery.clusters.labels[row], few)


def _rows(gallery: LabelledVectors, least: int) -> list[int]:
    """Some classes, evenly chosen, that have at least so many items; none of a gallery with a single class."""
    rows = (
        np.flatnonzero(gallery.clusters.counts >= least) if len(gallery.clusters) > 1 else np.empty(0, dtype=np.int64)
    )
    return [int(row) for row in rows[:: -(-len(rows) // MOST_EPISODES) or 1]]
