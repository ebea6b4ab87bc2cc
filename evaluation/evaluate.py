"""What is served, measured: a bundle on labelled images, through the same pixels, encoder, index and classifier."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from coterie.bundle import Bundle
from coterie.classifier import Scores, score
from coterie.gallery import Snapshot
from coterie.intervals import bootstrap_means, bootstrap_tallies, interval
from coterie.metrics import (
    balanced_accuracy,
    class_rates,
    confusion,
    expected_calibration_error,
    top_k,
)
from coterie.progress import progress_bar
from coterie.retrieval import retrieve, silhouettes, weighted_votes
from evaluation.leaks import find_leaks
from evaluation.probe import linear_probe
from evaluation.queries import Queries, check_labels
from evaluation.reliability import BINS, calibration_error_draws, reliability_bins
from evaluation.results import Answers, ClassResult, Evaluation, Histograms, Knn, Mistake
from evaluation.selective import measure_selective
from evaluation.speed import measure_speed
from evaluation.unknown import HeldOut, UnknownResult, hold_out, mean_auroc, measure_unknown

__all__ = ["KS", "Evaluation", "evaluate"]

KS = (1, 5, 10, 20, 50, 100, 200)
K = 20  # of `knn_top1`: what DINO found best
HISTOGRAM_BINS = 40
MOST_MISTAKES, MISTAKEN_NEIGHBORS = 24, 5


def evaluate(
    bundle: Bundle,
    queries: Queries,
    unknown: Queries | None = None,
    *,
    snapshot: Snapshot | None = None,
    false_reject: float = 0.05,
    held_out: Sequence[Sequence[str]] = (),
    seed: int = 0,
) -> Evaluation:
    """Measure a bundle on labelled queries, and optionally on images of no known class.

    Args:
        snapshot: the gallery to ask; by default the bundle's own.
        held_out: sets of classes to take from the gallery and meet as unknown, one set after another.
        seed: of the bootstrap.

    Raises:
        DataError: a query's label is not in the gallery.
    """
    snapshot = snapshot or bundle.base
    calibration = bundle.manifest.calibration
    limit = calibration.limit(false_reject)
    names = np.asarray(snapshot.clusters.labels, dtype=np.str_)
    labels = queries.labels
    check_labels(labels.tolist(), snapshot.clusters.labels)
    truth = np.searchsorted(names, labels)
    scores = score(queries.embeddings, snapshot, calibration, neighbors=max(KS))
    answers = _answers(queries, truth, scores, snapshot, scores.accepted(limit))
    classes = tuple(sorted(set(labels.tolist()) | set(answers.predicted.tolist())))
    table = confusion(answers.predicted, labels, classes)
    means = {name: float(np.nanmean(values)) for name, values in answers.measures.items() if np.isfinite(values).any()}
    splits = [hold_out(bundle, snapshot, queries, split, false_reject=false_reject, seed=seed) for split in held_out]
    of_splits = {"held_out_auroc": mean_auroc(splits)} if splits else {}
    aurc, selective, risks = measure_selective(answers.confidence, answers.right, seed)
    per_class, of_classes = _per_class(table, classes, answers, labels, seed)
    strangers = _unknown(scores, answers.right, unknown, bundle, snapshot, limit, seed) if unknown else None
    return Evaluation(
        bundle=bundle.manifest.id,
        name=bundle.manifest.name,
        data=queries.images.fingerprint,
        images=len(truth),
        gallery=len(snapshot.items),
        classes=classes,
        false_reject=false_reject,
        seed=seed,
        **{name: means.get(name, float("nan")) for name in answers.measures},
        balanced_accuracy=balanced_accuracy(table),
        macro_f1=float(np.nanmean(class_rates(table).f1)),
        ece=expected_calibration_error(answers.confidence, answers.right, bins=BINS),
        ece_of_vote=expected_calibration_error(answers.vote_confidence, answers.vote_right, bins=BINS),
        aurc=aurc.value,
        held_out_auroc=of_splits["held_out_auroc"].value if splits else float("nan"),
        selective=selective,
        risks=tuple(one.value for one in risks),
        risk_intervals=tuple(one.bounds for one in risks),
        intervals={
            **_intervals(answers, seed),
            **of_classes,
            **{name: one.bounds for name, one in {"aurc": aurc, **of_splits}.items()},
        },
        knn=_knn(scores, snapshot, truth, seed),
        per_class=per_class,
        confusion=tuple(tuple(row) for row in table.tolist()),
        reliability={
            "vote": reliability_bins(answers.vote_confidence, answers.vote_right, seed=seed),
            "classifier": reliability_bins(answers.confidence, answers.right, seed=seed),
        },
        similarities=_histograms(answers, strangers, splits),
        mistakes=_mistakes(queries, answers, scores, snapshot),
        leaks=find_leaks(queries, snapshot, scores.neighbors, scores.similarities),
        rejected=queries.images.rejected,
        speed=measure_speed(bundle, queries),
        answers=answers,
        unknown=strangers,
        held_out=tuple(splits),
    )


def _answers(
    queries: Queries, truth: NDArray[np.int64], scores: Scores, snapshot: Snapshot, accepted: NDArray[np.bool_]
) -> Answers:
    """Everything that is a mean over the queries, by its name in `Evaluation`."""
    embeddings, gallery = queries.embeddings, snapshot.items.embeddings
    names = np.asarray(snapshot.clusters.labels, dtype=np.str_)
    votes = _votes(scores, snapshot, K)
    by_vote, by_cluster = votes.argmax(axis=1), scores.cluster_similarities.argmax(axis=1)
    right = scores.best == truth
    with progress_bar("ranking the gallery", len(truth)) as advance:
        found = retrieve(embeddings, truth, gallery, snapshot.classes, progress=advance)
    measures = {
        "top1": right,
        "top5": top_k(scores.probabilities, truth, 5),
        "accepted_top1": right & accepted,
        "false_rejected": ~accepted,
        "knn_top1": by_vote == truth,
        "cluster_top1": by_cluster == truth,
        "probe_top1": linear_probe(gallery, snapshot.classes, embeddings) == truth,
        "agreement": by_vote == by_cluster,
        **{f"recall_at_{k}": values for k, values in found.recall.items()},
        "r_precision": found.r_precision,
        "map_at_r": found.map_at_r,
        "silhouette": silhouettes(embeddings, truth),
    }
    return Answers(
        predicted=names[scores.best],
        measures={name: np.asarray(values, dtype=np.float64) for name, values in measures.items()},
        confidence=scores.probabilities.max(axis=1),
        vote_confidence=votes.max(axis=1) / votes.sum(axis=1),
        vote_right=by_vote == truth,
        similarity=scores.joint,
    )


def _votes(scores: Scores, snapshot: Snapshot, k: int) -> NDArray[np.float64]:
    near = snapshot.classes[scores.neighbors[:, :k]]
    return weighted_votes(scores.similarities[:, :k], near, len(snapshot.clusters))


def _knn(scores: Scores, snapshot: Snapshot, truth: NDArray[np.int64], seed: int) -> tuple[Knn, ...]:
    ks = sorted({min(k, scores.neighbors.shape[1]) for k in KS})
    right: list[NDArray[np.bool_]] = []
    for k in ks:
        votes = _votes(scores, snapshot, k)  # one k at a time: with many classes these are large
        right += [top_k(votes, truth, min(most, k)) for most in (1, 5)]
    found = bootstrap_means(np.stack(right, axis=1), seed=seed)
    return tuple(
        Knn(k, one.value, one.bounds, five.value, five.bounds)
        for k, one, five in zip(ks, found[::2], found[1::2], strict=True)
    )


def _intervals(answers: Answers, seed: int) -> dict[str, tuple[float, float]]:
    """Of the means, and of both calibration errors."""
    means = bootstrap_means(np.stack(list(answers.measures.values()), axis=1), seed=seed)
    found = dict(zip(answers.measures, means, strict=True))
    for name, confidence, right in (
        ("ece", answers.confidence, answers.right),
        ("ece_of_vote", answers.vote_confidence, answers.vote_right),
    ):
        drawn = calibration_error_draws(confidence[None], right[None], seed=seed)[:, 0]
        found[name] = interval(expected_calibration_error(confidence, right, bins=BINS), drawn)
    return {name: one.bounds for name, one in found.items()}


def _per_class(
    table: NDArray[np.int64], classes: tuple[str, ...], answers: Answers, labels: NDArray[np.str_], seed: int
) -> tuple[tuple[ClassResult, ...], dict[str, tuple[float, float]]]:
    """Each class, and the intervals of what is a mean over them."""
    names, rates = np.asarray(classes, dtype=np.str_), class_rates(table)
    own, named = np.searchsorted(names, labels), np.searchsorted(names, answers.predicted)
    accepted = np.where(answers.measures["accepted_top1"] > 0, own, -1)
    groups = np.stack([np.where(own == named, own, -1), own, named, accepted])
    right, images, answered, taken = bootstrap_tallies(groups, len(classes), seed=seed)
    with np.errstate(invalid="ignore"):
        shares = np.bincount(accepted[accepted >= 0], minlength=len(classes)) / rates.images
        drawn = {
            "precision": right / answered,
            "recall": right / images,
            "f1": 2 * right / (images + answered),
            "accepted": taken / images,
        }
    values = {"precision": rates.precision, "recall": rates.recall, "f1": rates.f1, "accepted": shares}
    results = []
    for column, label in enumerate(classes):
        found = {name: interval(float(values[name][column]), drawn[name][:, column]) for name in drawn}
        results.append(
            ClassResult(
                label,
                int(rates.images[column]),
                **{name: one.value for name, one in found.items()},
                intervals={name: one.bounds for name, one in found.items()},
            )
        )
    asked = rates.images > 0
    over_all = {
        "balanced_accuracy": np.nanmean(drawn["recall"][:, asked], axis=1),
        "macro_f1": np.nanmean(drawn["f1"], axis=1),
    }
    return tuple(results), {name: _bounds(values) for name, values in over_all.items()}


def _histograms(answers: Answers, unknown: UnknownResult | None, splits: Sequence[HeldOut]) -> Histograms:
    groups = {"right": answers.similarity[answers.right], "wrong": answers.similarity[~answers.right]}
    if unknown:
        groups["unknown"] = unknown.similarities
    if splits:
        groups["held_out"] = np.concatenate([split.unknown.similarities for split in splits])
    values = np.concatenate(list(groups.values()))
    edges = np.linspace(values.min() - 1e-9, values.max() + 1e-9, HISTOGRAM_BINS + 1)
    return Histograms(edges, {name: np.histogram(group, bins=edges)[0] for name, group in groups.items()})


def _bounds(drawn: NDArray[np.float64]) -> tuple[float, float]:
    found = interval(0.0, drawn)
    return found.bounds


def _mistakes(queries: Queries, answers: Answers, scores: Scores, snapshot: Snapshot) -> tuple[Mistake, ...]:
    wrong = np.flatnonzero(~answers.right)
    images, items = queries.images, snapshot.items
    return tuple(
        Mistake(
            path=images.paths[row].as_posix(),
            truth=str(queries.labels[row]),
            predicted=str(answers.predicted[row]),
            probability=float(answers.confidence[row]),
            thumbnail=images.thumbnails[row],
            neighbors=tuple(
                (items.label(near), float(similarity), items.thumbnails[near])
                for near, similarity in zip(
                    scores.neighbors[row, :MISTAKEN_NEIGHBORS].tolist(),
                    scores.similarities[row, :MISTAKEN_NEIGHBORS].tolist(),
                    strict=True,
                )
            ),
        )
        for row in wrong[np.argsort(-answers.confidence[wrong], kind="stable")][:MOST_MISTAKES]
    )


def _unknown(
    known: Scores,
    right: NDArray[np.bool_],
    unknown: Queries,
    bundle: Bundle,
    snapshot: Snapshot,
    limit: float,
    seed: int,
) -> UnknownResult:
    strange = score(unknown.embeddings, snapshot, bundle.manifest.calibration)
    return measure_unknown(known, right, strange, limit, data=unknown.images.fingerprint, seed=seed)
