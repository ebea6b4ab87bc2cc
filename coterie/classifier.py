"""Neighbours and clusters joined into probabilities, and an honest "unknown".

For a query x and a class c with n_c items, cluster similarity s_c to its nearest prototype and that one's radius r_c:

    logit_c = w · log(1 + 1/n_c Σ (exp((s_i − s_k)/T) − 1)) − β · (log(1 − s_c) − λ · log r_c)

The sum runs over those of the query's k nearest items that belong to c, s_k being the similarity of the k-th. Items
farther away are taken to be as near as the k-th, which they are at most: so the vote is a kernel density of each class
at x of which only the nearest part is known. Dividing by n_c keeps large classes from drowning a young one. The second
term is how far x lies from the cluster, discounted by how wide the cluster is. k, T, w and β are fitted by likelihood
on held-out images.

Whether x is known is asked of the most probable class c alone. Its similarity joins cluster and nearest item, at s_n:

    similarity = 1 − (1 − s_c)^(1−γ) · (1 − s_n)^γ

and must reach the threshold 1 − R_c · exp(limit). R_c is the class's typical gap, its radius and spacing joined in the
same way; of classes that the limit was calibrated on it lies halfway to what is typical of all. The limit is drawn from
held-out images of known classes for a stated false-reject rate, γ from classes that were left out; see
coterie.calibration.
"""

import hashlib
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from coterie.clusters import ClassClusters
from coterie.errors import CoterieError, DataError
from coterie.gallery import Neighbor, Snapshot
from coterie.prototypes import gaps
from coterie.reference import Reference

__all__ = [
    "Calibration",
    "ClassScore",
    "Classification",
    "Neighbor",
    "Scores",
    "Verification",
    "classify",
    "closeness",
    "joined_gap",
    "log_votes",
    "score",
    "softmax",
    "verify",
]

# The share of the radius's logarithm that counts in a class's favour. At 0 a narrow, well trained cluster takes the
# queries of a wide young one; at 1 a wide one swallows its neighbours'. For scikit-learn's digits, three seeds, 0.3
# gives classes of five examples 0.02 more than 0.25 does, while known ones lose under half a point.
RADIUS_WEIGHT = 0.3
# The share of a class's own typical gap, the rest being that of all, in what its images may deviate from. Over seven
# encoders of digits and hand signs AUROC against unknown classes is 0.927 with a half, 0.908 with none and 0.912 with
# all of it.
OWN_SHARE = 0.5


class Calibration(BaseModel):
    """What was fitted on held-out images; part of a bundle's manifest.

    Attributes:
        n_neighbors: k of the vote.
        temperature: T of the vote's weights.
        vote_weight, cluster_weight: w and β.
        neighbor_share: γ, the nearest item's share in deciding what is known; the rest is the cluster's.
        typical_gap: that of the classes which the limits were calibrated on, in units of the joint gap.
        limits: largest deviation that is accepted, by false-reject rate.
        images: how many images these were drawn from.
        ece_of_vote, ece: expected calibration error of the neighbours' plain vote, and of the probabilities, on images
            that they were not fitted on.
        left_out_auroc: of known images against those of classes left out of the gallery, by neighbor_share; empty
            where there was no class to leave out.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    n_neighbors: int = Field(ge=1)
    temperature: float = Field(gt=0)
    vote_weight: float = Field(ge=0)
    cluster_weight: float = Field(ge=0)
    neighbor_share: float = Field(ge=0, le=1)
    typical_gap: float = Field(gt=0)
    limits: dict[str, float]
    images: int
    ece_of_vote: float
    ece: float
    left_out_auroc: dict[str, float]

    @property
    def id(self) -> str:
        """The first 12 hexadecimal digits of the sha256 of these values."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:12]

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
        similarity, threshold: to the most probable class, its cluster and nearest item joined, and the least that is
            accepted.
        classes: the most probable classes, best first; also for unknown images.
        neighbors: the nearest gallery items.
        calibration, snapshot: by what it was decided: the calibration's id, and the gallery's last change.
        best: the most probable class, however few are listed; a service does not tell its clients.
    """

    label: str | None
    known: bool
    probability: float
    threshold: float
    similarity: float
    classes: tuple[ClassScore, ...]
    neighbors: tuple[Neighbor, ...]
    calibration: str
    snapshot: int
    best: str | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Verification:
    """Whether one image belongs to a class.

    Attributes:
        match: whether `similarity` reaches `threshold`.
        similarity, threshold: to the class, its cluster and nearest item joined, and the least that is accepted.
        calibration, snapshot: as of a `Classification`.
    """

    label: str
    match: bool
    similarity: float
    threshold: float
    calibration: str
    snapshot: int


@dataclass(frozen=True)
class Scores:
    """Everything the classifier computes for a batch, as arrays.

    Attributes:
        probabilities: float64 (n, c).
        cluster_similarities: float32 (n, c).
        best: int64 (n,), the most probable class.
        joint: float64 (n,), similarity to the most probable class, its cluster and nearest item joined.
        typical: float64 (n,), that class's typical joint gap.
        bounds: float64 (n,), the joint gap beyond which it accepts nothing.
        neighbors, similarities: rows of the snapshot's nearest items, and their similarities; (n, k).
    """

    probabilities: NDArray[np.float64]
    cluster_similarities: NDArray[np.float32]
    best: NDArray[np.int64]
    joint: NDArray[np.float64]
    typical: NDArray[np.float64]
    bounds: NDArray[np.float64]
    neighbors: NDArray[np.int64]
    similarities: NDArray[np.float32]

    @property
    def deviations(self) -> NDArray[np.float64]:
        """log((1 − similarity) / R), (n,): about 0 for a typical member of a class, growing outwards."""
        return np.asarray(np.log(gaps(self.joint)) - np.log(self.typical))

    def thresholds(self, limit: float) -> NDArray[np.float64]:
        """The least joint similarity that is accepted, (n,), at a deviation of at most `limit`."""
        return _thresholds(self.typical, self.bounds, limit)

    def accepted(self, limit: float) -> NDArray[np.bool_]:
        """Whether each query reaches its threshold, (n,)."""
        return np.asarray(self.joint >= self.thresholds(limit))


def score(
    embeddings: NDArray[np.float32], snapshot: Reference, calibration: Calibration, *, neighbors: int = 0
) -> Scores:
    """Score unit-length embeddings (n, d) against every class of the snapshot.

    Args:
        neighbors: how many nearest items to return, if more than the `n_neighbors` that vote.

    Raises:
        DataError: the snapshot has no items.
    """
    clusters, k = snapshot.clusters, calibration.n_neighbors
    if not len(clusters):
        raise DataError("the gallery is empty: add examples of a class first")
    similarities, rows = snapshot.index.search(embeddings, max(k, neighbors))
    classes = snapshot.classes_of(rows[:, :k])
    to_clusters, radii = clusters.similarities(embeddings)
    votes = log_votes(similarities[:, :k], classes, clusters.counts, calibration.temperature)
    logits = calibration.vote_weight * votes + calibration.cluster_weight * closeness(to_clusters, radii)
    best, each = logits.argmax(axis=1), np.arange(len(logits))

    to_item = _nearest_of(best, similarities[:, :k], classes)
    typical, bounds = _reaches(clusters, best, radii[each, best], calibration)
    return Scores(
        probabilities=softmax(logits),
        cluster_similarities=to_clusters,
        best=best,
        joint=1 - joined_gap(gaps(to_clusters[each, best]), gaps(to_item), calibration.neighbor_share),
        typical=typical,
        bounds=bounds,
        neighbors=rows,
        similarities=similarities,
    )


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
    limit = calibration.limit(false_reject)
    scores = score(embeddings, snapshot, calibration, neighbors=neighbors)
    labels, items, identity = snapshot.clusters.labels, snapshot.items, calibration.id
    order = np.argsort(-scores.probabilities, axis=1, kind="stable")[:, :top]
    columns = (
        scores.best,
        scores.accepted(limit),
        scores.thresholds(limit),
        scores.joint,
        order,
        np.take_along_axis(scores.probabilities, order, 1),
        np.take_along_axis(scores.cluster_similarities, order, 1),
        scores.probabilities.max(axis=1),
        scores.neighbors[:, :neighbors],
        scores.similarities[:, :neighbors],
    )
    return [
        Classification(
            label=labels[best] if known else None,
            known=known,
            probability=probability,
            threshold=threshold,
            similarity=similarity,
            classes=tuple(ClassScore(labels[c], p, s) for c, p, s in zip(first, likely, to_clusters, strict=True)),
            neighbors=tuple(
                Neighbor(items.ids[i], items.label(i), close, items.metadata[i])
                for i, close in zip(near, how_near, strict=True)
            ),
            calibration=identity,
            snapshot=snapshot.sequence,
            best=labels[best],
        )
        for best, known, threshold, similarity, first, likely, to_clusters, probability, near, how_near in zip(
            *(column.tolist() for column in columns), strict=True
        )
    ]


def verify(
    embeddings: NDArray[np.float32],
    snapshot: Snapshot,
    calibration: Calibration,
    label: str,
    *,
    false_reject: float = 0.05,
) -> list[Verification]:
    """Say of each unit-length embedding (n, d) whether it belongs to a class, whichever other class it may resemble.

    Similarity and threshold are those of `classify` where that finds the class most probable and one of its items among
    the neighbours that vote; here the class's nearest item counts wherever it lies.

    Args:
        false_reject: the share of the class's images that may be refused; one of those calibrated.

    Raises:
        CoterieError: no limit was fitted for that rate.
        DataError: there is no such class.
    """
    limit, clusters = calibration.limit(false_reject), snapshot.clusters
    if label not in clusters.labels:
        raise DataError(f"the gallery has no class {label!r}: `coterie gallery list` shows which it has")
    row = clusters.labels.index(label)
    to_class, radii = (found[:, 0] for found in clusters.select([row]).similarities(embeddings))
    to_item = snapshot.index.search(embeddings, 1, allowed=snapshot.members(label))[0][:, 0]
    joint = 1 - joined_gap(gaps(to_class), gaps(to_item), calibration.neighbor_share)
    typical, bounds = _reaches(clusters, np.full(len(embeddings), row), radii, calibration)
    thresholds, identity = _thresholds(typical, bounds, limit), calibration.id
    return [
        Verification(label, match, similarity, threshold, identity, snapshot.sequence)
        for match, similarity, threshold in zip(
            (joint >= thresholds).tolist(), joint.tolist(), thresholds.tolist(), strict=True
        )
    ]


def log_votes(
    similarities: NDArray[np.float32], classes: NDArray[np.int64], counts: NDArray[np.int64], temperature: float
) -> NDArray[np.float64]:
    """log(1 + 1/n_c Σ (exp((s_i − s_k)/T) − 1)) of neighbours (n, k), nearest first, for every class; (n, c)."""
    weights = np.expm1((similarities - similarities[:, -1:]).astype(np.float64) / temperature)
    n, c = len(similarities), len(counts)
    flat = np.bincount((np.arange(n)[:, None] * c + classes).ravel(), weights=weights.ravel(), minlength=n * c)
    return np.asarray(np.log1p(flat.reshape(n, c) / counts))


def closeness(to_clusters: NDArray[np.float32], radii: NDArray[np.float32]) -> NDArray[np.float64]:
    """−(log gap − λ · log radius), (n, c)."""
    return np.asarray(RADIUS_WEIGHT * np.log(radii.astype(np.float64)) - np.log(gaps(to_clusters)))


def softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """Probabilities (n, c) of logits."""
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(weights / weights.sum(axis=1, keepdims=True))


def _nearest_of(
    wanted: NDArray[np.int64], similarities: NDArray[np.float32], classes: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Similarity of the nearest neighbour of the wanted class, (n,); of the last, which it is at most, without any."""
    own = classes == wanted[:, None]
    found = np.where(own.any(axis=1), own.argmax(axis=1), own.shape[1] - 1)
    return np.asarray(np.take_along_axis(similarities, found[:, None], 1)[:, 0])


def _reaches(
    clusters: ClassClusters, rows: NDArray[np.int64], radii: NDArray[np.float32], calibration: Calibration
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Of the classes at `rows`, with the radius of one prototype each: the typical joint gap, and the largest."""
    share = calibration.neighbor_share
    typical = joined_gap(radii, clusters.spacings[rows], share)
    shared = typical**OWN_SHARE * calibration.typical_gap ** (1 - OWN_SHARE)
    bounds = joined_gap(clusters.bounds[rows, 0], clusters.bounds[rows, 1], share)
    return np.where(clusters.enrolled[rows], typical, shared), bounds


def _thresholds(typical: NDArray[np.float64], bounds: NDArray[np.float64], limit: float) -> NDArray[np.float64]:
    return np.asarray(1 - np.minimum(typical * np.exp(limit), bounds))


def joined_gap(of_cluster: NDArray[np.floating], of_items: NDArray[np.floating], share: float) -> NDArray[np.float64]:
    """The geometric mean of two gaps, the second weighing `share`."""
    return np.asarray(of_cluster.astype(np.float64) ** (1 - share) * of_items.astype(np.float64) ** share)
