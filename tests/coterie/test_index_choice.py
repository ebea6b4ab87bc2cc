"""Which index `build_index` chooses, and what it says of it."""

import subprocess
import sys

import numpy as np
import pytest
from numpy.typing import NDArray

import coterie.index
from coterie.index import InvertedIndex, Kind, build_index, elected, id_recall

Labelled = tuple[NDArray[np.float32], NDArray[np.int64]]


def draw(rng: np.random.Generator, classes: int, per_class: int, spread: float, dim: int = 32) -> Labelled:
    """Round clouds about random directions, mixed."""
    labels = rng.permutation(np.repeat(np.arange(classes), per_class))
    centres = rng.normal(size=(classes, dim))
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    vectors = centres[labels] + spread / np.sqrt(dim) * rng.normal(size=(len(labels), dim))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32), labels


@pytest.fixture(scope="module")
def apart() -> Labelled:
    """Many small classes."""
    return draw(np.random.default_rng(0), 200, 20, 0.3)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which one query takes 50 ms."""
    monkeypatch.setattr(coterie.index, "LEAST_BANDWIDTH", 0)
    monkeypatch.setattr(coterie.index, "_seconds_of_a_query", lambda vectors: 0.05)


def test_a_small_gallery_is_searched_exactly_without_a_clock(apart: Labelled, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(coterie.index, "_seconds_of_a_query")
    report = build_index(*apart).report
    assert (report.kind, report.n, report.bytes_per_vector) == ("exact", 4000, 128)
    assert (report.id_recall, report.label_agreement) == (1, 1)
    assert report.reason == "a query reads 0.5 MB, on any machine within the 10 ms allowed"


def test_search_is_exact_while_the_time_measured_is_within_the_budget(apart: Labelled, slow: None) -> None:
    report = build_index(*apart, latency_budget=0.05).report
    assert report.kind == "exact"
    assert report.reason == "a query of all 4,000 rows takes 50 ms, within the 50 ms allowed"


def test_the_clock_measures_a_query_of_all_rows(apart: Labelled, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coterie.index, "LEAST_BANDWIDTH", 0)
    assert "takes" in build_index(*apart, latency_budget=60).report.reason
    assert build_index(*apart, latency_budget=1e-9).report.kind == "ivf"
    whole = coterie.index._seconds_of_a_query(apart[0])
    monkeypatch.setattr(coterie.index, "TIMED_BYTES", apart[0].nbytes // 100)
    ticks = iter(range(1000))
    monkeypatch.setattr(coterie.index.time, "perf_counter", lambda: next(ticks))
    assert 0 < whole < 60
    assert coterie.index._seconds_of_a_query(apart[0]) == 100


def test_above_the_budget_few_lists_reach_the_goals(apart: Labelled, slow: None) -> None:
    index = build_index(*apart)
    report = index.report
    assert isinstance(index, InvertedIndex)
    assert index.probes <= index.lists / 8
    assert (report.kind, report.n) == ("ivf", 4000)
    assert report.reason == (
        "a query of all 4,000 rows takes 50 ms, above the 10 ms allowed: "
        f"{index.probes} of {index.lists} lists are searched"
    )
    assert report.id_recall is not None
    assert report.id_recall >= 0.95
    assert report.label_agreement is not None
    assert report.label_agreement >= 0.999
    assert 2 * 128 + 8 < report.bytes_per_vector < 3 * 128


@pytest.mark.parametrize("recall", [0.7, 0.95, 0.999])
def test_no_fewer_lists_reach_the_goal(recall: float) -> None:
    rng = np.random.default_rng(0)
    vectors, _ = draw(rng, 50, 80, 0.7)
    index = build_index(vectors, kind="ivf", recall=recall)
    assert isinstance(index, InvertedIndex)
    assert 1 < index.probes < index.lists
    assert index.report.id_recall is not None
    assert recall <= index.report.id_recall
    exact = coterie.index.ExactIndex(vectors).search(vectors, 20)[1]
    recalls = []
    for probes in (index.probes - 1, index.probes):
        index.probes = probes
        recalls.append(id_recall(index.search(vectors, 20)[1], exact))
    # Of all rows, which find themselves, instead of those held back, which do not.
    assert recalls[0] - 0.02 < recall < recalls[1] + 0.01


def test_short_lists_are_taken_where_memory_binds(apart: Labelled, slow: None) -> None:
    assert build_index(*apart, memory_budget=4000 * 300).report.kind == "ivf"
    short = build_index(*apart, memory_budget=4000 * 150)
    assert short.report.kind == "ivf-sq8"
    assert "lists of whole vectors are above the 1 MB allowed" in short.report.reason
    assert short.report.id_recall is not None
    assert short.report.id_recall >= 0.95
    none = build_index(*apart, memory_budget=4000 * 50)
    assert none.report.kind == "exact"
    assert "exceed the memory allowed" in none.report.reason


def test_packed_classes_are_searched_for_their_labels(slow: None) -> None:
    vectors, labels = draw(np.random.default_rng(0), 4, 2000, 0.1)
    index, unlabelled = build_index(vectors, labels), build_index(vectors, kind="ivf")
    assert isinstance(index, InvertedIndex)
    assert isinstance(unlabelled, InvertedIndex)
    assert index.report.label_agreement == 1
    assert index.report.id_recall is not None
    assert index.report.id_recall < 0.95
    assert index.probes <= index.lists / 16 + 1 < unlabelled.probes


def test_vectors_without_clusters_are_searched_exactly_after_all(slow: None) -> None:
    vectors, _ = draw(np.random.default_rng(0), 1, 3000, 30)
    report = build_index(vectors).report
    assert report.kind == "exact"
    assert report.reason.endswith("of the lists would have to be searched")


@pytest.mark.parametrize("kind", ["exact", "ivf", "ivf-sq8"])
def test_a_kind_that_is_asked_for_is_built(apart: Labelled, kind: Kind) -> None:
    report = build_index(*apart, kind=kind).report
    assert report.kind == kind
    assert report.reason.startswith("asked for")


@pytest.mark.parametrize("kind", ["ivf", "ivf-sq8"])
@pytest.mark.parametrize("n", [1, 2, 21, 100])
def test_a_few_equal_rows_can_be_listed(kind: Kind, n: int) -> None:
    index = build_index(np.repeat(np.eye(4)[:1], n, axis=0), ["a"] * n, kind=kind)
    assert index.search(np.eye(4)[:1], 3)[1].tolist() == [[0, 1, 2][:n]]
    assert (index.report.id_recall, index.report.label_agreement) == (1, 1)


@pytest.mark.parametrize("kind", [None, "exact", "ivf", "ivf-sq8"])
def test_no_rows_are_searched_exactly(kind: Kind | None) -> None:
    index = build_index(np.empty((0, 4)), [], kind=kind)
    assert index.report.kind == "exact"
    assert index.search(np.eye(4), 3)[1].shape == (4, 0)


def test_equal_input_gives_equal_indexes_in_another_process() -> None:
    code = """
import hashlib, numpy as np
from coterie.index import build_index
rng = np.random.default_rng(0)
vectors = rng.normal(size=(300, 16))[rng.integers(300, size=5000)] + 0.3 * rng.normal(size=(5000, 16))
vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
for kind in ("ivf", "ivf-sq8"):
    index = build_index(vectors, np.arange(5000) % 300, kind=kind)
    similarities, rows = index.search(vectors[:500], 20)
    print(repr(index.report), hashlib.sha256(similarities.tobytes() + rows.tobytes()).hexdigest())
"""
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(2)]
    assert runs[0].stdout == runs[1].stdout
    assert runs[0].stdout.count("IndexReport(kind='ivf") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": ["a"]}, r"labels must have shape \(4,\), one for each vector, not \(1,\)"),
        ({"kind": "hnsw"}, "no index of kind 'hnsw': choose one of exact, ivf, ivf-sq8"),
        ({"latency_budget": 0}, "budgets must be positive"),
        ({"latency_budget": float("nan")}, "budgets must be positive"),
        ({"memory_budget": -1}, "budgets must be positive"),
        ({"recall": 1.5}, "from 0 to 1"),
        ({"agreement": -1}, "from 0 to 1"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_index(np.eye(4), **arguments)  # type: ignore[arg-type]


def test_votes_weigh_by_similarity_and_ties_go_to_the_first_label() -> None:
    similarities = np.asarray([[0.9, 0.6, 0.6], [0.9, 0.88, 0.88], [0.5, 0.5, 0.1]], dtype=np.float32)
    assert elected(similarities, np.asarray([[2, 1, 1], [2, 1, 1], [5, 3, 0]])).tolist() == [2, 1, 3]


def test_a_row_without_others_is_found_as_well_as_can_be() -> None:
    assert build_index(np.eye(4)[:1], ["a"], kind="ivf").report.id_recall == 1
