"""A snapshot of two layers answers as one that was made of the same rows at once."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from coterie import live_items as live_items_module
from coterie.changes import Changes, KeptItem
from coterie.clusters import ClassClusters
from coterie.errors import DataError
from coterie.growing import GrowingColumn, GrowingKeys, GrowingRows
from coterie.index import ExactIndex, InvertedIndex
from coterie.items import GalleryItems
from coterie.layers import Gaps, LayeredIndex
from coterie.live import LiveSnapshot
from coterie.metadata import Values
from coterie.snapshot import Snapshot, join_clusters, place_class

# Similarities of these are multiples of a half, so that many are equal, and exactly so however they are computed.
VECTORS = np.asarray([*np.eye(4), *product([0.5, -0.5], repeat=4)], dtype=np.float32)
Row = tuple[str, int, dict[str, Any]]  # label, number of the vector, metadata


@dataclass
class Model:
    """The gallery as a plain ordered mapping: the oracle."""

    rows: dict[str, Row]
    sequence: int = 0
    changed: dict[str, int] = field(default_factory=dict)
    removed: dict[str, int] = field(default_factory=dict)

    def apply(self, operation: str, identifier: str, label: str, vector: int) -> None:
        if operation == "add":
            row = (label, vector, {"vector": vector, "label": label})
        elif identifier not in self.rows:
            return
        elif operation == "edit":
            row = (label, self.rows[identifier][1], {"edited": True})
        self.sequence += 1
        self.rows.pop(identifier, None)
        self.changed.pop(identifier, None)
        self.removed.pop(identifier, None)
        if operation == "remove":
            self.removed[identifier] = self.sequence
        else:
            self.rows[identifier] = row
            self.changed[identifier] = self.sequence

    def changes(self, since: int) -> Changes:
        items = tuple(
            KeptItem(identifier, self.rows[identifier][0], self.rows[identifier][2], VECTORS[self.rows[identifier][1]])
            for identifier, number in self.changed.items()
            if number > since
        )
        removed = frozenset(identifier for identifier, number in self.removed.items() if number > since)
        return Changes(self.sequence, False, items, removed)


def base_of(rows: dict[str, Row]) -> Snapshot:
    embeddings = VECTORS[[vector for _, vector, _ in rows.values()]]
    labels = np.asarray([label for label, _, _ in rows.values()], dtype=np.str_)
    items = GalleryItems(
        ids=tuple(rows),
        labels=labels,
        embeddings=embeddings,
        positions=np.arange(2 * len(rows), dtype=np.float32).reshape(-1, 2),
        thumbnails=tuple(identifier.encode() for identifier in rows),
        metadata=tuple(metadata for _, _, metadata in rows.values()),
    )
    return Snapshot(items, ClassClusters.fit(embeddings, labels))


BASE: dict[str, Row] = {
    str(row): ("abc"[row % 3], row * 5 % len(VECTORS), {"row": row, "even": row % 2 == 0}) for row in range(12)
}


def nearest(
    queries: NDArray[np.float32], rows: Sequence[int], embeddings: NDArray[np.float32], k: int
) -> list[list[int]]:
    similarities = np.round(queries @ embeddings.T, 6)
    return [sorted(rows, key=lambda row: (-own[row], row))[:k] for own in similarities.tolist()]


def check(snapshot: LiveSnapshot, model: Model, base: Snapshot) -> None:
    items, n = snapshot.items, len(model.rows)
    labels = [label for label, _, _ in model.rows.values()]
    embeddings = VECTORS[[vector for _, vector, _ in model.rows.values()]]
    assert list(items.ids) == [items.ids[row] for row in range(n)] == list(model.rows)
    assert items.labels.tolist() == [items.label(row) for row in range(n)] == labels
    assert list(items.metadata) == [items.metadata[row] for row in range(n)] == [row[2] for row in model.rows.values()]
    assert (len(items), len(snapshot.index), len(snapshot.rows), len(items.thumbnails)) == (n, n, n, n)
    assert {identifier: snapshot.rows[identifier] for identifier in model.rows} == dict(
        zip(model.rows, range(n), strict=True)
    )
    assert set(snapshot.rows) == set(model.rows) and "nowhere" not in snapshot.rows
    assert np.array_equal(items.embeddings, embeddings)
    places = [base.items.positions[base.rows[name]] if name in base.rows else [np.nan] * 2 for name in model.rows]
    np.testing.assert_array_equal(items.positions, np.asarray(places, dtype=np.float32).reshape(-1, 2))
    assert list(items.thumbnails) == [f"picture of {name}".encode() for name in model.rows]
    odd = np.arange(n - 1, -1, -2)
    assert items.select(odd).ids == tuple(list(model.rows)[row] for row in odd)
    assert np.array_equal(items.select(odd).embeddings, embeddings[odd])

    clusters = snapshot.clusters
    assert clusters.labels == tuple(sorted(set(labels)))
    assert np.asarray(clusters.labels, dtype=np.str_)[snapshot.classes].tolist() == labels
    assert clusters.counts.tolist() == [labels.count(label) for label in clusters.labels]

    everything = range(n)
    for k in (1, 3, n + 5):
        if n:
            similarities, found = snapshot.index.search(VECTORS, k)
            assert found.tolist() == nearest(VECTORS, everything, embeddings, k)
            assert np.array_equal(similarities, np.take_along_axis(VECTORS @ embeddings.T, found, 1))
        for wanted, metadata in (
            (["a"], None),
            (["a", "d"], {"edited": True}),
            (None, {"even": True}),
            (None, {"vector": 3, "label": "b"}),
            (["c"], {"nobody has": 1}),
        ):
            if wanted and not set(wanted) <= set(labels):
                continue
            matching = [
                row
                for row, (label, _, values) in enumerate(model.rows.values())
                if (wanted is None or label in wanted) and (metadata or {}).items() <= values.items()
            ]
            answers = snapshot.search(VECTORS, k, labels=wanted, metadata=metadata)
            names = list(model.rows)
            expected = [[names[row] for row in rows] for rows in nearest(VECTORS, matching, embeddings, k)]
            assert [[near.id for near in answer] for answer in answers] == expected
            for near in answers[0]:
                row = snapshot.rows[near.id]
                assert (near.label, near.metadata) == (labels[row], items.metadata[row])
                assert near.similarity == VECTORS[0] @ embeddings[row]


operations = st.lists(
    st.tuples(
        st.sampled_from(["add", "add", "remove", "edit", "look", "settle"]),
        st.sampled_from([*BASE, "n1", "n2", "n3", "n4"]),
        st.sampled_from("abcd"),
        st.integers(0, len(VECTORS) - 1),
    ),
    max_size=25,
)


@settings(deadline=None, max_examples=50)
@given(operations)
def test_changes_in_any_order_give_what_they_say(steps: list[tuple[str, str, str, int]]) -> None:
    base, model = base_of(BASE), Model(dict(BASE))
    snapshot = LiveSnapshot.of(base, lambda name: f"picture of {name}".encode())
    seen = [(snapshot, dict(model.rows))]
    for operation, *rest in steps:
        if operation == "look":
            snapshot = snapshot.changed(model.changes(snapshot.sequence))
            seen.append((snapshot, dict(model.rows)))
        elif operation == "settle":
            snapshot = snapshot.settled().changed(model.changes(snapshot.sequence))
            seen.append((snapshot, dict(model.rows)))
        else:
            model.apply(operation, *rest)
    for earlier, rows in seen:  # none has changed since
        check(earlier, Model(rows), base)

    # Somebody who starts now, or hears of everything at once, has the same answers, clusters to the last bit.
    for other in (
        LiveSnapshot.of(base, lambda name: f"picture of {name}".encode()).changed(model.changes(0)),
        snapshot.changed(model.changes(snapshot.sequence)),
        snapshot.settled().changed(model.changes(snapshot.sequence)).settled(),
    ):
        check(other, model, base)
        touched = {label for label, _, _ in model.rows.values()} | {"a", "b", "c"}
        placed = {}
        for label in touched:
            members = [name for name, row in model.rows.items() if row[0] == label]
            vectors = VECTORS[[model.rows[name][1] for name in members]]
            placed[label] = place_class(base, label, members, vectors)
        expected = join_clusters(base.clusters, placed)
        assert other.clusters.labels == expected.labels
        for column in ("prototypes", "radii", "counts", "bounds"):
            assert np.array_equal(getattr(other.clusters, column), getattr(expected, column)), column


@pytest.mark.parametrize("idle", [0, 10**6], ids=["numbers given anew", "numbers kept"])
def test_ids_are_found_after_any_number_of_foundations(idle: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_items_module, "IDLE_NUMBERS", idle)
    base, model = base_of(BASE), Model(dict(BASE))
    snapshot = LiveSnapshot.of(base, lambda name: f"picture of {name}".encode())
    for turn in range(20):
        for identifier in ("3", "n1", f"n{turn}"):
            model.apply("add", identifier, "a", turn)
        model.apply("remove", str(turn % 12), "", 0)
        snapshot = snapshot.changed(model.changes(snapshot.sequence)).settled()
        check(snapshot, model, base)


def test_a_class_that_nobody_has_is_named() -> None:
    snapshot = LiveSnapshot.of(base_of(BASE), lambda _: b"")
    with pytest.raises(DataError, match="no class 'z': `coterie gallery list`"):
        snapshot.search(VECTORS, 1, labels=["a", "z"])


def test_a_row_that_is_not_there_is_an_error() -> None:
    items = LiveSnapshot.of(base_of(BASE), lambda _: b"").items
    assert items.ids[-1] == "11"
    for row in (12, -13):
        with pytest.raises(IndexError):
            items.ids[row]


def test_an_item_that_another_encoder_embedded_is_found_if_the_bundle_has_it() -> None:
    base = base_of(BASE)
    kept = (KeptItem("3", "d", {}, None), KeptItem("of the other", "d", {}, None))
    snapshot = LiveSnapshot.of(base, lambda _: b"").changed(Changes(2, False, kept, frozenset()))
    assert "of the other" not in snapshot.rows
    assert snapshot.items.label(snapshot.rows["3"]) == "d"
    assert np.array_equal(snapshot.items.embeddings[-1], base.items.embeddings[3])


def test_the_lower_layer_is_asked_for_more_until_enough_are_left() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(500, 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    query = vectors[:1]
    order = np.argsort(-(vectors @ query[0]))
    gone = np.sort(order[:300])  # all that are anywhere near
    index = LayeredIndex(ExactIndex(vectors), ExactIndex(vectors[:0]), Gaps(gone))
    left = np.delete(vectors, gone, axis=0)
    assert index.search(query, 7)[1].tolist() == ExactIndex(left).search(query, 7)[1].tolist()
    assert len(index.search(query, 1000)[1][0]) == 200


@pytest.mark.parametrize("share", [None, 0.02, 0.6, 0.95])
def test_two_layers_answer_as_one_index_to_the_last_bit(share: float | None) -> None:
    """Whatever the batch; though equal vectors lie in both layers, and many are nearly equal."""
    generator = np.random.default_rng(0)
    apart = generator.normal(size=(40, 24))
    spread = apart[generator.integers(0, 40, 700)] + 0.002 * generator.normal(size=(700, 24))
    below = (spread / np.linalg.norm(spread, axis=1, keepdims=True)).astype(np.float32)
    above = below[generator.integers(0, 700, 300)]
    dead = np.sort(generator.choice(1000, 90, replace=False))
    left = np.delete(np.concatenate([below, above]), dead, axis=0)
    layered, one = LayeredIndex(ExactIndex(below), ExactIndex(above), Gaps(dead)), ExactIndex(left)
    allowed = None if share is None else np.flatnonzero(generator.random(len(left)) < share)
    queries = np.concatenate([below[::70], above[::60]])
    similarities, rows = one.search(queries, 12, allowed=allowed)
    for batch in (queries[:1], queries[:4], queries):
        found = layered.search(batch, 12, allowed=allowed)
        assert np.array_equal(found[1], rows[: len(batch)])
        assert np.array_equal(found[0], similarities[: len(batch)])


def test_lists_are_kept_until_too_many_rows_are_newer_than_they() -> None:
    generator = np.random.default_rng(0)
    vectors = generator.normal(size=(1000, 16)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    labels = np.asarray(["a", "b"])[np.arange(400) % 2]
    nothing = np.zeros((400, 2), dtype=np.float32)
    items = GalleryItems(tuple(map(str, range(400))), labels, vectors[:400], nothing, (b"",) * 400, ({},) * 400)
    base = Snapshot(items, ClassClusters.fit(vectors[:400], labels))
    base.index = InvertedIndex(vectors[:400], probes=400)

    def added(start: int, end: int, removed: frozenset[str] = frozenset()) -> Changes:
        return Changes(
            end, False, tuple(KeptItem(str(row), "a", {}, vectors[row]) for row in range(start, end)), removed
        )

    one = LiveSnapshot.of(base, lambda _: b"").changed(added(400, 500, frozenset(["3", "8"]))).settled()
    index = one._foundation.index
    assert isinstance(index, InvertedIndex) and index.share_learned == 398 / 498
    left = np.delete(vectors[:500], [3, 8], axis=0)
    assert np.array_equal(one.index.search(vectors[::50], 5)[1], ExactIndex(left).search(vectors[::50], 5)[1])
    two = one.changed(added(500, 1000)).settled()
    assert isinstance(two._foundation.index, ExactIndex) and len(two.index) == 998


def test_rows_that_grow_leave_those_who_hold_some_alone() -> None:
    one = GrowingRows(2).with_rows(np.ones((3, 2), dtype=np.float32))
    two = one.with_rows(np.full((1, 2), 2, dtype=np.float32))
    other = one.with_rows(np.full((2, 2), 3, dtype=np.float32))  # as if `two` had never been
    assert [rows.array[:, 0].tolist() for rows in (one, two, other)] == [[1, 1, 1], [1, 1, 1, 2], [1, 1, 1, 3, 3]]
    assert two.array.base is one.array.base  # nothing was copied


def test_keys_that_grow_are_looked_up_among_those_that_were_there() -> None:
    one = GrowingKeys(["a", "b", "a"])
    two = one.with_entries(["a", "c"])
    other = one.with_entries(["d"])  # as if `two` had never been
    assert [list(keys) for keys in (one, two, other)] == [
        ["a", "b", "a"],
        ["a", "b", "a", "a", "c"],
        ["a", "b", "a", "d"],
    ]
    assert [keys.rows("a") for keys in (one, two, other)] == [[0, 2], [0, 2, 3], [0, 2]]
    assert [keys.rows("c") for keys in (one, two, other)] == [[], [4], []]
    assert two[-1] == "c" and other[3] == "d"
    with pytest.raises(IndexError, match="no row 3 in 3"):
        one[3]
    assert list(GrowingColumn([1]).with_entries([])) == [1]


def test_equal_metadata_is_what_json_calls_equal() -> None:
    values = Values([{"x": 1}, {"x": 1.0}, {"x": True}, {"x": "1"}, {"x": {"a": 1, "b": None}}, {"y": 1}])
    assert values.rows("x", 1).tolist() == values.rows("x", 1.0).tolist() == [0, 1]
    assert values.rows("x", True).tolist() == [2]
    assert values.rows("x", "1").tolist() == [3]
    assert values.rows("x", {"b": None, "a": 1}).tolist() == [4]
    assert values.rows("x", None).tolist() == values.rows("z", 1).tolist() == []
