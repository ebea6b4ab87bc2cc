"""Votes, retrieval and silhouette against slow counts, pytorch-metric-learning, torchmetrics and scikit-learn."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.metrics import silhouette_samples
from torchmetrics.functional.retrieval import retrieval_r_precision

from coterie.index import ExactIndex
from coterie.retrieval import retrieve, silhouettes, weighted_votes


def unit(values: NDArray[np.float64]) -> NDArray[np.float32]:
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)


def clouds(seed: int, n: int, classes: int, dim: int = 16) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=n)
    centres = np.random.default_rng(99).normal(size=(classes, dim))
    return unit(centres[labels] + 1.2 * rng.normal(size=(n, dim))), labels


def slow(
    query: NDArray[np.float32],
    label: int,
    gallery: NDArray[np.float32],
    classes: NDArray[np.int64],
    ks: tuple[int, ...],
) -> tuple[list[float], float, float]:
    """By the definitions: everything sorted, equal similarities in gallery order."""
    similarities = np.round(gallery.astype(np.float64) @ query.astype(np.float64), 6)
    hits = (classes == label)[np.argsort(-similarities, kind="stable")]
    relevant = int(hits.sum())
    precisions = [hits[: i + 1].mean() * hits[i] for i in range(relevant)]
    return [float(hits[:k].any()) for k in ks], float(hits[:relevant].mean()), float(np.sum(precisions) / relevant)


@pytest.mark.parametrize("seed", range(3))
def test_retrieval_is_what_the_definitions_say(seed: int) -> None:
    queries, truth = clouds(seed, 40, 5)
    gallery, classes = clouds(seed + 100, 150, 4)  # nothing of class 4
    found = retrieve(queries, truth, gallery, classes, ks=(1, 5, 10, 1000))
    for row, (query, label) in enumerate(zip(queries, truth, strict=True)):
        ours = [*(found.recall[k][row] for k in (1, 5, 10, 1000)), found.r_precision[row], found.map_at_r[row]]
        if label == 4:
            assert np.isnan(ours).all()
            continue
        recall, r_precision, map_at_r = slow(query, label, gallery, classes, (1, 5, 10, 1000))
        np.testing.assert_allclose(ours, [*recall, r_precision, map_at_r], atol=1e-6)


@pytest.mark.parametrize("spread", [0.1, 0.003])
def test_the_nearest_is_the_indexs_of_collapsed_embeddings_too(spread: float) -> None:
    rng = np.random.default_rng(5)
    x = unit(rng.normal(size=128) + spread * rng.normal(size=(2500, 128)))
    labels = rng.integers(10, size=len(x))
    gallery, classes, queries, truth = x[:2000], labels[:2000], x[2000:], labels[2000:]
    _, rows = ExactIndex(gallery).search(queries, 1)
    found = retrieve(queries, truth, gallery, classes)
    np.testing.assert_array_equal(found.recall[1], classes[rows[:, 0]] == truth)


# In a process of its own, for it replaces methods of FAISS.
THEIRS = """
import json, sys
import numpy as np, torch
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

names = ("precision_at_1", "r_precision", "mean_average_precision_at_r")
given = np.load(sys.argv[1])
arrays = [torch.from_numpy(given[name]) for name in ("queries", "truth", "gallery", "classes")]
print(json.dumps(AccuracyCalculator(include=names, k="max_bin_count").get_accuracy(*arrays)))
"""


def test_retrieval_agrees_with_pytorch_metric_learning(tmp_path: Path) -> None:
    queries, truth = clouds(1, 60, 4)
    gallery, classes = clouds(2, 200, 4)
    found = retrieve(queries, truth, gallery, classes)
    np.savez(tmp_path / "given.npz", queries=queries, truth=truth, gallery=gallery, classes=classes)
    command = [sys.executable, "-c", THEIRS, str(tmp_path / "given.npz")]
    theirs = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
    assert found.recall[1].mean() == pytest.approx(theirs["precision_at_1"], abs=1e-6)
    assert found.r_precision.mean() == pytest.approx(theirs["r_precision"], abs=1e-6)
    assert found.map_at_r.mean() == pytest.approx(theirs["mean_average_precision_at_r"], abs=1e-6)


def test_r_precision_is_torchmetrics() -> None:
    queries, truth = clouds(1, 60, 4)
    gallery, classes = clouds(2, 200, 4)
    found = retrieve(queries, truth, gallery, classes)
    for row in range(len(queries)):
        similarities = torch.from_numpy(gallery @ queries[row])
        expected = retrieval_r_precision(similarities, torch.from_numpy(classes == truth[row]))
        assert found.r_precision[row] == pytest.approx(float(expected), abs=1e-6)


def test_equal_similarities_stand_in_gallery_order() -> None:
    gallery = np.repeat(np.eye(2, dtype=np.float32)[:1], 4, axis=0)
    found = retrieve(gallery[:1], np.array([1]), gallery, np.array([0, 1, 0, 1]), ks=(1, 2))
    assert (found.recall[1][0], found.recall[2][0]) == (0, 1)
    assert found.r_precision[0] == 0.5
    assert found.map_at_r[0] == 0.25


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, truth = clouds(3, 50, 3)
    gallery, classes = clouds(4, 90, 3)
    whole = retrieve(queries, truth, gallery, classes)
    monkeypatch.setattr("coterie.retrieval.BLOCK", 200)
    done: list[int] = []
    apart = retrieve(queries, truth, gallery, classes, progress=done.append)
    np.testing.assert_array_equal(whole.map_at_r, apart.map_at_r)
    assert sum(done) == 50


@pytest.mark.parametrize("where", ["queries", "gallery"])
def test_nan_is_refused(where: str) -> None:
    good, labels = clouds(0, 10, 2)
    bad = good.copy()
    bad[3, 0] = np.nan
    with pytest.raises(ValueError, match="row 3"):
        retrieve(*((bad, labels, good, labels) if where == "queries" else (good, labels, bad, labels)))
    with pytest.raises(ValueError, match="row 3"):
        silhouettes(bad, labels)


@given(st.integers(0, 10_000), st.integers(2, 6), st.integers(8, 60))
@settings(max_examples=40)
def test_silhouettes_are_scikit_learns(seed: int, classes: int, n: int) -> None:
    x, labels = clouds(seed, n, classes)
    if 1 < len(np.unique(labels)) < n:
        expected = silhouette_samples(x.astype(np.float64), labels, metric="cosine")
        np.testing.assert_allclose(silhouettes(x, labels), expected, atol=1e-6)


def test_silhouettes_of_a_lone_row_and_of_one_class() -> None:
    x, _ = clouds(0, 5, 2)
    labels = np.array([0, 0, 0, 0, 1])
    found = silhouettes(x, labels)
    np.testing.assert_allclose(found, silhouette_samples(x.astype(np.float64), labels, metric="cosine"), atol=1e-6)
    assert found[4] == 0
    assert np.isnan(silhouettes(x, np.zeros(5, dtype=np.int64))).all()


def test_votes_are_dinos() -> None:
    rng = np.random.default_rng(0)
    similarities = np.sort(rng.uniform(-1, 1, size=(30, 20)).astype(np.float32))[:, ::-1]
    classes = rng.integers(7, size=(30, 20))
    votes = weighted_votes(similarities, classes, 7)
    one_hot = torch.zeros(30, 20, 7).scatter_(2, torch.from_numpy(classes)[:, :, None], 1).double()
    weights = torch.from_numpy(similarities.copy()).double().div(0.07).exp()
    published = (one_hot * weights[:, :, None]).sum(1)
    published /= published.sum(dim=1, keepdim=True)
    np.testing.assert_allclose(votes / votes.sum(axis=1, keepdims=True), published.numpy(), atol=1e-12)
