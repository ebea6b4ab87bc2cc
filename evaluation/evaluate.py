"""What is served, measured: a bundle on labelled images, through the same pixels, encoder, index and classifier."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coterie.bundle import Bundle
from coterie.classifier import Scores, score
from coterie.dataset import LabelledPixels, Rejected, read_images, read_pixels
from coterie.errors import DataError
from coterie.gallery import Snapshot
from coterie.metrics import (
    auroc,
    average_precision,
    confusion,
    expected_calibration_error,
    known_rejected_at_95,
    oscr,
    top1,
    unknown_accepted_at_95,
)
from coterie.progress import progress_bar

__all__ = ["ClassResult", "Evaluation", "Mistake", "Queries", "UnknownResult", "embed_folder", "evaluate"]


@dataclass(frozen=True)
class Queries:
    """Embedded labelled images: `images` with their unit-length `embeddings` (n, d)."""

    images: LabelledPixels
    embeddings: NDArray[np.float32]

    @property
    def labels(self) -> NDArray[np.str_]:
        return self.images.names


@dataclass(frozen=True)
class ClassResult:
    """One class's share of the result; `accepted` counts right and accepted answers."""

    label: str
    images: int
    recall: float
    accepted: float


@dataclass(frozen=True)
class Mistake:
    """A wrong label, with the picture it was given for."""

    path: str
    truth: str
    predicted: str
    probability: float
    thumbnail: bytes


@dataclass(frozen=True)
class UnknownResult:
    """How well images of no known class are told from the others.

    Attributes:
        images: how many unknown images.
        accepted: share of the unknown that was given a label.
        auroc, aupr, oscr: of known against unknown, by deviation; see coterie.metrics.
        unknown_accepted_at_95: share of the unknown accepted where 95 % of the known are.
        known_rejected_at_95: share of the known rejected where 95 % of the unknown are.
    """

    images: int
    accepted: float
    auroc: float
    aupr: float
    oscr: float
    unknown_accepted_at_95: float
    known_rejected_at_95: float


@dataclass(frozen=True)
class Evaluation:
    """The numbers of one bundle on one set of images.

    Attributes:
        top1: share of right labels, rejection ignored.
        accepted_top1: share of right labels that were accepted at `false_reject`: the served answer.
        false_rejected: share of all images called unknown.
        ece: expected calibration error of the probabilities, 15 bins; see coterie.metrics.
        knn_top1, cluster_top1: by the weighted vote of 20 neighbours at T = 0.07 as DINO has it (arXiv 2104.14294),
            and by the most similar cluster alone.
        confusion: counts, rows true and columns predicted labels in the order of `classes`.
        mistakes: wrong labels, the most confident first.
        rejected: images that could not be read.
    """

    bundle: str
    data: str
    images: int
    classes: tuple[str, ...]
    false_reject: float
    top1: float
    accepted_top1: float
    false_rejected: float
    ece: float
    knn_top1: float
    cluster_top1: float
    per_class: tuple[ClassResult, ...]
    confusion: tuple[tuple[int, ...], ...]
    mistakes: tuple[Mistake, ...]
    rejected: tuple[Rejected, ...]
    unknown: UnknownResult | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values, without pictures."""
        values = asdict(self)
        for mistake in values["mistakes"]:
            del mistake["thumbnail"]
        values["rejected"] = [str(entry) for entry in self.rejected]
        return values


def embed_folder(bundle: Bundle, data: Path, *, strict: bool = False) -> Queries:
    """Read and embed labelled images: a class-per-folder tree, a CSV or a Parquet file.

    Raises:
        DataError: they cannot be used.
        DeviceError: the encoder cannot run where it shall.
    """
    encoder = bundle.encoder  # that it cannot run here is said before anything is decoded
    found = read_images(data)
    with progress_bar(f"reading {data.name}", len(found)) as advance:
        images = read_pixels(
            found, bundle.manifest.encoder.preprocessing, thumbnails=True, strict=strict, progress=advance
        )
    with progress_bar(f"embedding {data.name}", len(images)) as advance:
        return Queries(images, encoder.embed(images.pixels, progress=advance))


def evaluate(
    bundle: Bundle,
    queries: Queries,
    unknown: Queries | None = None,
    *,
    snapshot: Snapshot | None = None,
    false_reject: float = 0.05,
) -> Evaluation:
    """Measure a bundle on labelled queries, and optionally on images of no known class.

    Args:
        snapshot: the gallery to ask; by default the bundle's own.

    Raises:
        DataError: a query's label is not in the gallery.
    """
    snapshot = snapshot or bundle.base
    calibration = bundle.manifest.calibration
    names = np.asarray(snapshot.clusters.labels, dtype=np.str_)
    truth = queries.labels
    _check_labels(truth, names)
    scores = score(queries.embeddings, snapshot, calibration)
    predicted = names[scores.best]
    right = predicted == truth
    accepted = scores.accepted(calibration.limit(false_reject))
    classes = tuple(sorted(set(truth.tolist()) | set(predicted.tolist())))
    return Evaluation(
        bundle=bundle.manifest.id,
        data=queries.images.fingerprint,
        images=len(truth),
        classes=classes,
        false_reject=false_reject,
        top1=top1(predicted, truth),
        accepted_top1=float(np.mean(right & accepted)),
        false_rejected=float(np.mean(~accepted)),
        ece=expected_calibration_error(scores.probabilities.max(axis=1), right),
        knn_top1=top1(names[_vote(queries.embeddings, snapshot)], truth),
        cluster_top1=top1(names[scores.cluster_similarities.argmax(axis=1)], truth),
        per_class=tuple(
            ClassResult(
                label,
                int((own := truth == label).sum()),
                float(right[own].mean()),
                float((right & accepted)[own].mean()),
            )
            for label in sorted(set(truth.tolist()))
        ),
        confusion=tuple(tuple(row) for row in confusion(predicted, truth, classes).tolist()),
        mistakes=_mistakes(queries, predicted, scores),
        rejected=queries.images.rejected,
        unknown=_unknown(scores, right, unknown, bundle, snapshot, false_reject) if unknown else None,
    )


def _check_labels(truth: NDArray[np.str_], names: NDArray[np.str_]) -> None:
    strange = sorted(set(truth.tolist()) - set(names.tolist()))
    if strange:
        raise DataError(
            f"the gallery has no class {', '.join(map(repr, strange[:5]))}{' …' if len(strange) > 5 else ''}: "
            "enrol it first, or give these images as --unknown"
        )


def _vote(
    embeddings: NDArray[np.float32], snapshot: Snapshot, k: int = 20, temperature: float = 0.07
) -> NDArray[np.int64]:
    similarities, rows = snapshot.index.search(embeddings, k)
    weights = np.exp((similarities - 1).astype(np.float64) / temperature)
    votes = np.zeros((len(embeddings), len(snapshot.clusters)))
    np.add.at(votes, (np.arange(len(votes))[:, None], snapshot.classes[rows]), weights)
    return np.asarray(votes.argmax(axis=1))


def _mistakes(queries: Queries, predicted: NDArray[np.str_], scores: Scores, most: int = 24) -> tuple[Mistake, ...]:
    wrong = np.flatnonzero(predicted != queries.labels)
    confidence = scores.probabilities[wrong, scores.best[wrong]]
    images = queries.images
    return tuple(
        Mistake(
            path=images.paths[row].as_posix(),
            truth=str(queries.labels[row]),
            predicted=str(predicted[row]),
            probability=float(scores.probabilities[row, scores.best[row]]),
            thumbnail=images.thumbnails[row],
        )
        for row in wrong[np.argsort(-confidence, kind="stable")][:most]
    )


def _unknown(
    known: Scores,
    right: NDArray[np.bool_],
    unknown: Queries,
    bundle: Bundle,
    snapshot: Snapshot,
    false_reject: float,
) -> UnknownResult:
    calibration = bundle.manifest.calibration
    strangers = score(unknown.embeddings, snapshot, calibration)
    near, strange = -known.deviations, -strangers.deviations
    return UnknownResult(
        images=len(strange),
        accepted=float(strangers.accepted(calibration.limit(false_reject)).mean()),
        auroc=auroc(near, strange),
        aupr=average_precision(near, strange),
        oscr=oscr(near, right, strange),
        unknown_accepted_at_95=unknown_accepted_at_95(near, strange),
        known_rejected_at_95=known_rejected_at_95(near, strange),
    )
