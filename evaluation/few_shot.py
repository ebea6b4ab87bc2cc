"""How few gallery images of each class suffice: random draws of some, the rest put aside."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from coterie.classifier import Calibration, score
from coterie.clusters import ClassClusters
from coterie.gallery import Snapshot
from coterie.reference import LabelledVectors
from coterie.retrieval import weighted_votes

__all__ = ["DRAWS", "SHOTS", "FewShot", "few_shot"]

SHOTS = (1, 2, 5, 10, 20)
DRAWS = 5


@dataclass(frozen=True)
class FewShot:
    """Top-1 with so many images of each class, mean and standard deviation over draws.

    Attributes:
        shots: images of each class; classes that have fewer give all.
        classifier: as served, with the bundle's calibration.
        knn: DINO's weighted vote with k = shots, so that no class can outvote another by number.
        cluster: the nearest class cluster.
    """

    shots: int
    draws: int
    classifier: float
    classifier_deviation: float
    knn: float
    knn_deviation: float
    cluster: float
    cluster_deviation: float


def few_shot(
    snapshot: Snapshot,
    calibration: Calibration,
    embeddings: NDArray[np.float32],
    truth: NDArray[np.int64],
    *,
    draws: int = DRAWS,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> tuple[FewShot, ...]:
    """Measure on queries (n, d) whose classes are numbered as the snapshot's, for each of `SHOTS`; draw i of one number
    of shots is part of draw i of the next."""
    results = []
    orders = [_shuffled(snapshot, seed, draw) for draw in range(draws)]
    for shots in SHOTS:
        measured = []
        for order in orders:
            rows = np.concatenate([own[:shots] for own in order])
            measured.append(_top1(snapshot, rows, shots, calibration, embeddings, truth))
            if progress:
                progress(1)
        found = np.asarray(measured)
        means, deviations = found.mean(axis=0).tolist(), found.std(axis=0, ddof=1 if draws > 1 else 0).tolist()
        results.append(FewShot(shots, draws, *(v for pair in zip(means, deviations, strict=True) for v in pair)))
    return tuple(results)


def _shuffled(snapshot: Snapshot, seed: int, draw: int) -> list[NDArray[np.int64]]:
    """The rows of each class in random order."""
    rng = np.random.default_rng([seed, draw])
    return [rng.permutation(np.flatnonzero(snapshot.classes == number)) for number in range(len(snapshot.clusters))]


def _top1(
    snapshot: Snapshot,
    rows: NDArray[np.int64],
    shots: int,
    calibration: Calibration,
    embeddings: NDArray[np.float32],
    truth: NDArray[np.int64],
) -> tuple[float, float, float]:
    """Of the classifier, the vote and the clusters."""
    members, classes = snapshot.items.embeddings[rows], snapshot.classes[rows]
    clusters = ClassClusters.fit(members, snapshot.items.labels[rows])
    reference = LabelledVectors(members, classes, clusters)
    scores = score(embeddings, reference, calibration, neighbors=shots)
    near = scores.neighbors[:, :shots]
    votes = weighted_votes(scores.similarities[:, :shots], classes[near], len(clusters))
    answers = scores.best, votes.argmax(axis=1), scores.cluster_similarities.argmax(axis=1)
    return tuple(float((answer == truth).mean()) for answer in answers)  # type: ignore[return-value]
