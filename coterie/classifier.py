"""Neighbours and clusters joined into probabilities, and an honest "unknown".

For a query x and a class c with n_c items, prototype similarity s_c and radius r_c:

    logit_c = w · log(1 + 1/n_c Σ (exp((s_i − s_k)/T) − 1)) − β · (log(1 − s_c) − λ · log r_c)

The sum runs over those of the query's k nearest items that belong to c, s_k being the similarity of the k-th. Items
farther away are taken to be as near as the k-th, which they are at most: so the vote is a kernel density of each class
at x of which only the nearest part is known. Dividing by n_c keeps large classes from drowning a young one. The second
term is how far x lies from the cluster, discounted by how wide the cluster is. k, T, w and β are fitted by likelihood
on held-out images.

The answer is "unknown" when log((1 − s_c) / r_c), the deviation of x from the winning cluster c, is above a limit that
at most a stated share of known images passes; that is, when s_c is below the threshold 1 − r_c · exp(limit).
"""

from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from coterie.clusters import cluster_similarities, gaps, left_out_radii, shrunken_radii
from coterie.errors import CoterieError, DataError
from coterie.gallery import Snapshot

__all__ = ["Calibration", "ClassScore", "Classification", "Neighbor", "Scores", "calibrate", "classify", "score"]

FALSE_REJECT_RATES = (0.01, 0.02, 0.05, 0.1, 0.2)
# The share of the radius's logarithm that counts in a class's favour. At 0 a narrow, well trained cluster takes the
# queries of a wide young one; at 1 a wide one swallows its neighbours'. For scikit-learn's digits, three seeds, 0.3
# gives classes of five examples 0.02 more than 0.25 does, while known ones lose under half a point.
RADIUS_WEIGHT = 0.3
EPISODE_EXAMPLES = 5
MOST_EPISODES = 10
# The grid search takes time and memory in proportion; a few thousand images tell its settings apart.
MOST_FITTING_IMAGES = 2000


class Calibration(BaseModel):
    """What was fitted on held-out images; part of a bundle's manifest.

    Attributes:
        n_neighbors: k of the vote.
        temperature: T of the vote's weights.
        vote_weight, cluster_weight: w and β.
        limits: largest deviation that is accepted, by false-reject rate.
        confidence: with which a rate is kept, given how few images the limits were drawn from.
        images: how many that were.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    n_neighbors: int = Field(ge=1)
    temperature: float = Field(gt=0)
    vote_weight: float = Field(ge=0)
    cluster_weight: float = Field(ge=0)
    limits: dict[str, float]
    confidence: float
    images: int

    def limit(self, false_reject: float) -> float:
        """The largest deviation accepted at `false_reject`.

        Raises:
            CoterieError: no limit was fitted for that rate.
        """
        try:
            return self.limits[f"{false_reject:g}"]
        except KeyError:
            raise CoterieError(
                f"no threshold for a false-reject rate of {false_reject:g}: choose one of {', '.join(self.limits)}"
            ) from None


@dataclass(frozen=True)
class Neighbor:
    """A gallery item near the query."""

    id: str
    label: str
    similarity: float
    metadata: dict[str, Any]


@dataclass(frozen=True)
class ClassScore:
    """How well one class fits the query."""

    label: str
    probability: float
    cluster_similarity: float


@dataclass(frozen=True)
class Classification:
    """The answer for one image.

    Attributes:
        label: the class, or None where it is unknown.
        known: whether `similarity` reaches `threshold`.
        probability: of the most probable class, among the known ones.
        similarity, threshold: to the most probable class's cluster, and the least that is accepted.
        classes: the most probable classes, best first; also for unknown images.
        neighbors: the nearest gallery items.
    """

    label: str | None
    known: bool
    probability: float
    threshold: float
    similarity: float
    classes: tuple[ClassScore, ...]
    neighbors: tuple[Neighbor, ...]


@dataclass(frozen=True)
class Scores:
    """Everything the classifier computes for a batch, as arrays.

    Attributes:
        probabilities: float64 (n, c).
        cluster_similarities: float32 (n, c).
        deviations: float64 (n,), of each query from its most probable class's cluster.
        best: int64 (n,), the most probable class.
        neighbors, similarities: rows of the snapshot's nearest items, and their similarities; (n, k).
    """

    probabilities: NDArray[np.float64]
    cluster_similarities: NDArray[np.float32]
    deviations: NDArray[np.float64]
    best: NDArray[np.int64]
    neighbors: NDArray[np.int64]
    similarities: NDArray[np.float32]

    def accepted(self, thresholds: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Whether each query reaches the threshold of its most probable class; thresholds (c,), result (n,)."""
        return np.asarray(self.cluster_similarities[np.arange(len(self.best)), self.best] >= thresholds[self.best])


def score(
    embeddings: NDArray[np.float32], snapshot: Snapshot, calibration: Calibration, *, neighbors: int = 0
) -> Scores:
    """Score unit-length embeddings (n, d) against every class of the snapshot.

    Args:
        neighbors: how many nearest items to return, if more than the `n_neighbors` that vote.

    Raises:
        DataError: the snapshot has no items.
    """
    if not len(snapshot.items):
        raise DataError("the gallery is empty: add examples of a class first")
    k = calibration.n_neighbors
    similarities, rows = snapshot.index.search(embeddings, max(k, neighbors))
    to_clusters = cluster_similarities(embeddings, snapshot.clusters)
    votes = _log_votes(
        similarities[:, :k], snapshot.classes[rows[:, :k]], snapshot.clusters.counts, calibration.temperature
    )
    closeness = _closeness(to_clusters, snapshot.clusters.radii)
    logits = calibration.vote_weight * votes + calibration.cluster_weight * closeness
    probabilities = _softmax(logits)
    best = logits.argmax(axis=1)
    deviations = _deviations(to_clusters[np.arange(len(best)), best], snapshot.clusters.radii[best])
    return Scores(probabilities, to_clusters, deviations, best, rows, similarities)


def classify(
    embeddings: NDArray[np.float32],
    snapshot: Snapshot,
    calibration: Calibration,
    *,
    false_reject: float = 0.05,
    top: int = 5,
    neighbors: int = 5,
) -> list[Classification]:
    """Name the class of each unit-length embedding (n, d), or say that it is unknown.

    Args:
        false_reject: the share of known images that may be called unknown; one of those calibrated.
        top: how many classes to list.
        neighbors: how many gallery items to list.
    """
    thresholds = snapshot.clusters.thresholds(calibration.limit(false_reject))
    scores = score(embeddings, snapshot, calibration, neighbors=neighbors)
    clusters, items = snapshot.clusters, snapshot.items
    accepted = scores.accepted(thresholds)
    answers = []
    for row, best in enumerate(scores.best.tolist()):
        known = bool(accepted[row])
        order = np.argsort(-scores.probabilities[row], kind="stable")[:top].tolist()
        near = zip(
            scores.neighbors[row, :neighbors].tolist(), scores.similarities[row, :neighbors].tolist(), strict=True
        )
        answers.append(
            Classification(
                label=clusters.labels[best] if known else None,
                known=known,
                probability=float(scores.probabilities[row, best]),
                threshold=float(thresholds[best]),
                similarity=float(scores.cluster_similarities[row, best]),
                classes=tuple(
                    ClassScore(
                        clusters.labels[c],
                        float(scores.probabilities[row, c]),
                        float(scores.cluster_similarities[row, c]),
                    )
                    for c in order
                ),
                neighbors=tuple(
                    Neighbor(items.ids[i], str(items.labels[i]), similarity, items.metadata[i])
                    for i, similarity in near
                ),
            )
        )
    return answers


def calibrate(
    snapshot: Snapshot, embeddings: NDArray[np.float32], labels: NDArray[np.str_], *, confidence: float = 0.95
) -> Calibration:
    """Fit the classifier on held-out images, (n, d) and (n,), of classes in the snapshot.

    The likelihood is taken over the gallery as it is and over episodes in which one class has only a few items, so that
    the fit is also right for classes enrolled later.

    Raises:
        CoterieError: there are no held-out images of the snapshot's classes.
    """
    names = np.asarray(snapshot.clusters.labels, dtype=np.str_)
    usable = np.isin(labels, names)
    embeddings, truth = embeddings[usable], np.searchsorted(names, labels[usable])
    if not len(truth):
        raise CoterieError("no held-out image belongs to a class of the gallery: calibration needs some of each")
    some = slice(None, None, -(-len(truth) // MOST_FITTING_IMAGES))
    settings = _most_likely([snapshot, *_episodes(snapshot)], embeddings[some], truth[some])
    fitted = Calibration(**settings, limits={}, confidence=confidence, images=len(truth))
    deviations = np.sort(_unseen_deviations(embeddings, truth, snapshot, fitted))
    limits = {f"{rate:g}": _limit(deviations, rate, confidence) for rate in FALSE_REJECT_RATES}
    return fitted.model_copy(update={"limits": limits})


def _unseen_deviations(
    embeddings: NDArray[np.float32], truth: NDArray[np.int64], snapshot: Snapshot, calibration: Calibration
) -> NDArray[np.float64]:
    """What `score` would call the deviation of each image, (n,), had the image not helped to measure the radii.

    It is taken from the winning cluster, right or wrong, as it will be for the images that the limits must hold for.
    """
    scores = score(embeddings, snapshot, calibration)
    log_gaps = np.log(gaps(scores.cluster_similarities[np.arange(len(truth)), truth]))
    measured = shrunken_radii(log_gaps, truth, len(snapshot.clusters))[truth]
    correction = np.log(left_out_radii(log_gaps, truth, len(snapshot.clusters)) / measured)
    return np.asarray(scores.deviations - np.where(scores.best == truth, correction, 0))


def _limit(deviations: NDArray[np.float64], rate: float, confidence: float) -> float:
    """The least of the sorted `deviations` (n,) that rejects at most `rate` of all known images with `confidence`.

    Of n held-out deviations the m largest may lie above it, m being the largest count with P[Binomial(n, rate) ≤ m] ≤
    1 − confidence: split conformal prediction valid for this very calibration set (Vovk, arXiv 1209.2673). Too few
    images to promise the rate leave the largest deviation.
    """
    from scipy.special import bdtr  # the binomial distribution; it takes 0.1 s to load, and only export needs it

    counts = np.arange(len(deviations))
    allowed = np.flatnonzero(bdtr(counts, len(deviations), rate) <= 1 - confidence)
    above = int(allowed[-1]) if len(allowed) else 0
    return float(deviations[len(deviations) - 1 - above])


def _most_likely(
    snapshots: list[Snapshot], embeddings: NDArray[np.float32], truth: NDArray[np.int64]
) -> dict[str, Any]:
    """Grid search of the settings with the smallest mean negative log-likelihood over all snapshots."""
    best: tuple[float, dict[str, Any]] = (np.inf, {})
    largest = 50
    searched = [snapshot.index.search(embeddings, largest) for snapshot in snapshots]
    closeness = [
        _closeness(cluster_similarities(embeddings, snapshot.clusters), snapshot.clusters.radii)
        for snapshot in snapshots
    ]
    rows = np.arange(len(truth))
    for k, temperature in product((5, 10, 20, largest), (0.1, 0.2, 0.4)):
        votes = [
            _log_votes(similarities[:, :k], s.classes[neighbors[:, :k]], s.clusters.counts, temperature)
            for s, (similarities, neighbors) in zip(snapshots, searched, strict=True)
        ]
        for w, beta in product((0.0, 0.1, 0.25, 0.5, 1.0), (1.0, 2.0, 4.0, 8.0)):
            losses = [
                -np.log(_softmax(w * vote + beta * close)[rows, truth] + 1e-12).mean()
                for vote, close in zip(votes, closeness, strict=True)
            ]
            loss = float(losses[0] + np.mean(losses[1:])) if len(losses) > 1 else float(losses[0])
            if loss < best[0] - 1e-9:
                settings = {"n_neighbors": k, "temperature": temperature, "vote_weight": w, "cluster_weight": beta}
                best = (loss, settings)
    return best[1]


def _episodes(snapshot: Snapshot) -> list[Snapshot]:
    """Snapshots in each of which another class has only its first few items."""
    items = snapshot.items
    large = np.flatnonzero(snapshot.clusters.counts > EPISODE_EXAMPLES)
    if len(snapshot.clusters) < 2:
        return []
    episodes = []
    for row in large[:: -(-len(large) // MOST_EPISODES) or 1]:
        members = np.flatnonzero(items.labels == snapshot.clusters.labels[row])
        few = items.select(members[:EPISODE_EXAMPLES])
        episodes.append(snapshot.with_items(few, [items.ids[i] for i in members]))
    return episodes


def _log_votes(
    similarities: NDArray[np.float32], classes: NDArray[np.int64], counts: NDArray[np.int64], temperature: float
) -> NDArray[np.float64]:
    """log(1 + 1/n_c Σ (exp((s_i − s_k)/T) − 1)) of neighbours (n, k), nearest first, for every class; (n, c)."""
    weights = np.expm1((similarities - similarities[:, -1:]).astype(np.float64) / temperature)
    n, c = len(similarities), len(counts)
    flat = np.bincount((np.arange(n)[:, None] * c + classes).ravel(), weights=weights.ravel(), minlength=n * c)
    return np.asarray(np.log1p(flat.reshape(n, c) / counts))


def _closeness(to_clusters: NDArray[np.float32], radii: NDArray[np.float32]) -> NDArray[np.float64]:
    """−(log gap − λ · log radius), (n, c)."""
    return np.asarray(RADIUS_WEIGHT * np.log(radii.astype(np.float64)) - np.log(gaps(to_clusters)))


def _deviations(similarities: NDArray[np.float32], radii: NDArray[np.float32]) -> NDArray[np.float64]:
    """log((1 − s) / r): 0 for a typical member of a cluster, growing outwards."""
    return np.asarray(np.log(gaps(similarities)) - np.log(radii.astype(np.float64)))


def _softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(weights / weights.sum(axis=1, keepdims=True))
