"""Fit the classifier on held-out images: probabilities that mean what they say, thresholds that keep a stated rate.

What classes enrolled later will do is learnt from episodes: gallery classes are shown with a few items only, or left
out altogether and met as unknown ones.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coterie.classifier import OWN_SHARE, Calibration, joined_gap, score
from coterie.clusters import PRIOR_MEMBERS
from coterie.errors import CoterieError
from coterie.gallery import Snapshot
from coterie.likelihood import NEIGHBORS, most_likely
from coterie.metrics import auroc
from coterie.prototypes import gaps
from coterie.reference import LabelledVectors

__all__ = ["FALSE_REJECT_RATES", "calibrate", "fit"]

FALSE_REJECT_RATES = (0.01, 0.02, 0.05, 0.1, 0.2)
# Cluster and nearest item alike unless one alone is better by this many standard errors over the classes left out.
SHARES, EVEN_SHARE, CLEARLY = (0.0, 0.5, 1.0), 0.5, 2.0
EPISODE_EXAMPLES = 5
MOST_EPISODES = 10
# Time and memory go in proportion; a few thousand images tell settings apart, a few hundred the ways to reject.
MOST_FITTING_IMAGES, MOST_REJECTED_IMAGES = 2000, 500
# Every image is scored against every class, hundreds of times: with many classes fewer images have to do.
MOST_FITTING_SCORES, FEWEST_FITTING_IMAGES = 400_000, 200


def calibrate(snapshot: Snapshot, embeddings: NDArray[np.float32], labels: NDArray[np.str_]) -> Calibration:
    """Fit the classifier on held-out images, (n, d) and (n,), of classes in the snapshot; as `fit`."""
    return fit(LabelledVectors(snapshot.items.embeddings, snapshot.classes, snapshot.clusters), embeddings, labels)


def fit(
    gallery: LabelledVectors,
    embeddings: NDArray[np.float32],
    labels: NDArray[np.str_],
    *,
    neighbors: Sequence[int] = NEIGHBORS,
) -> Calibration:
    """Fit the classifier on held-out images, (n, d) and (n,), of classes in the gallery; others do not count.

    The likelihood is taken over the gallery as it is and over episodes in which one class has only a few items, so that
    the fit is also right for classes enrolled later.

    Args:
        neighbors: how many may vote; the likeliest is chosen.

    Raises:
        CoterieError: there are no held-out images of the gallery's classes.
    """
    names = np.asarray(gallery.clusters.labels, dtype=np.str_)
    usable = np.isin(labels, names)
    embeddings, truth = embeddings[usable], np.searchsorted(names, labels[usable])
    if not len(truth):
        raise CoterieError("no held-out image belongs to a class of the gallery: calibration needs some of each")
    most = max(FEWEST_FITTING_IMAGES, min(MOST_FITTING_IMAGES, MOST_FITTING_SCORES // len(gallery.clusters)))
    some = slice(None, None, -(-len(truth) // most))
    references = [gallery, *(_with_few(gallery, row) for row in _rows(gallery, EPISODE_EXAMPLES + 1))]
    settings, eces = most_likely(references, embeddings[some], truth[some], neighbors)
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
