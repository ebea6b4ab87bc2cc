"""What an evaluation found: frozen values, plain enough for JSON but for pictures and the answers themselves."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coterie.dataset import Rejected
from evaluation.leaks import Leaks
from evaluation.plain import plain
from evaluation.reliability import ReliabilityBins
from evaluation.selective import Selective
from evaluation.speed import Speed
from evaluation.unknown import HeldOut, UnknownResult

__all__ = ["Answers", "ClassResult", "Evaluation", "Histograms", "Knn", "Mistake"]


@dataclass(frozen=True)
class Knn:
    """DINO's weighted vote of the k nearest at T = 0.07, with 95 % intervals."""

    k: int
    top1: float
    top1_interval: tuple[float, float]
    top5: float
    top5_interval: tuple[float, float]


@dataclass(frozen=True)
class ClassResult:
    """One class's share of the result; `accepted` counts right and accepted answers. NaN: nothing to measure."""

    label: str
    images: int
    precision: float
    recall: float
    f1: float
    accepted: float
    intervals: dict[str, tuple[float, float]]


@dataclass(frozen=True)
class Mistake:
    """A wrong label, the picture it was given for, and label, similarity and picture of the nearest gallery items."""

    path: str
    truth: str
    predicted: str
    probability: float
    thumbnail: bytes = field(repr=False)
    neighbors: tuple[tuple[str, float, bytes], ...] = field(repr=False)


@dataclass(frozen=True)
class Histograms:
    """How similar images are to their most probable class: counts (bins,) by group, between `edges` (bins + 1,).

    The groups are those of right and of wrong labels, and, where there were such, unknown images and those of classes
    taken from the gallery.
    """

    edges: NDArray[np.float64]
    counts: dict[str, NDArray[np.int64]]


@dataclass(frozen=True)
class Answers:
    """What each of n queries was answered, for plots and comparisons.

    Attributes:
        measures: by the name of a mean in `Evaluation`, what it is the mean of; NaN does not count.
        confidence, vote_confidence: probability of the label given by the classifier, and by the plain vote.
        vote_right: whether the vote's label is right.
        similarity: to the most probable class.
    """

    predicted: NDArray[np.str_]
    measures: dict[str, NDArray[np.float64]]
    confidence: NDArray[np.float64]
    vote_confidence: NDArray[np.float64]
    vote_right: NDArray[np.bool_]
    similarity: NDArray[np.float64]

    @property
    def right(self) -> NDArray[np.bool_]:
        return self.measures["top1"] > 0


@dataclass(frozen=True)
class Evaluation:
    """The numbers of one bundle on one set of images.

    Attributes:
        top1, top5: share of right labels among the classifier's first one or five, rejection ignored.
        accepted_top1: share of right labels that were accepted at `false_reject`: the served answer.
        false_rejected: share of all images called unknown.
        knn_top1, cluster_top1, probe_top1: by the weighted vote of 20 neighbours at T = 0.07 as DINO has it (arXiv
            2104.14294), by the most similar cluster alone, and by a linear classifier on the embeddings.
        agreement: share of images to which vote and clusters give one label.
        recall_at_1 … map_at_r: see coterie.retrieval.Retrieval.
        balanced_accuracy, macro_f1: means of recall over classes with queries, and of F1 over these and those answered.
        ece, ece_of_vote: expected calibration error of the fitted probabilities and of the plain vote, before
            calibration; 15 bins, top label.
        aurc: mean risk over all coverages.
        selective: accuracy of the most confident share, for a few shares.
        risks: share wrong among the most confident 1, 2, … 100 per cent; `risk_intervals` theirs.
        silhouette: of the queries' own embeddings, by cosine distance.
        held_out_auroc: mean over the splits of `held_out`.
        knn: over a range of k, as far as the gallery has so many items.
        intervals: low and high of a 95 % bootstrap interval, by the name of the number.
        confusion: counts, rows true and columns predicted labels in the order of `classes`.
        mistakes: wrong labels, the most confident first.
        rejected: images that could not be read.
    """

    bundle: str
    name: str
    data: str
    images: int
    gallery: int
    classes: tuple[str, ...]
    false_reject: float
    seed: int
    top1: float
    top5: float
    accepted_top1: float
    false_rejected: float
    knn_top1: float
    cluster_top1: float
    probe_top1: float
    agreement: float
    recall_at_1: float
    recall_at_5: float
    recall_at_10: float
    r_precision: float
    map_at_r: float
    balanced_accuracy: float
    macro_f1: float
    ece: float
    ece_of_vote: float
    aurc: float
    silhouette: float
    held_out_auroc: float
    selective: tuple[Selective, ...]
    risks: tuple[float, ...]
    risk_intervals: tuple[tuple[float, float], ...]
    intervals: dict[str, tuple[float, float]]
    knn: tuple[Knn, ...]
    per_class: tuple[ClassResult, ...]
    confusion: tuple[tuple[int, ...], ...]
    reliability: dict[str, ReliabilityBins]
    similarities: Histograms
    mistakes: tuple[Mistake, ...]
    leaks: Leaks
    rejected: tuple[Rejected, ...]
    speed: Speed
    answers: Answers = field(repr=False)
    unknown: UnknownResult | None = None
    held_out: tuple[HeldOut, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values, without pictures; what was not measured is null."""
        return {**plain(self), "rejected": [str(entry) for entry in self.rejected]}
