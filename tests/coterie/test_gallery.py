"""The gallery: immutable snapshots over a durable log."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from coterie import gallery as gallery_module
from coterie import store as store_module
from coterie.clusters import SMALLEST_GAP, ClassClusters
from coterie.errors import BundleError, DataError
from coterie.gallery import Gallery, GalleryItems, Snapshot, item_id
from coterie.index import IndexOptions
from coterie.live import LiveSnapshot
from coterie.store import Store, StoredItem

DIM = 8
MakeItems = Callable[..., GalleryItems]
Clouds = Any


@pytest.fixture
def clouds(cloud_class: Any) -> Any:
    return cloud_class.make(np.random.default_rng(0), 4, DIM, 0.3)


@pytest.fixture
def base(clouds: Clouds, items: MakeItems) -> Snapshot:
    """Twenty items each of "a", "b" and "c"; "d" is not known yet."""
    embeddings, labels = clouds.draw(np.random.default_rng(1), [20, 20, 20, 0])
    return Snapshot(items(embeddings, labels), ClassClusters.fit(embeddings, labels))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "gallery.sqlite"


@pytest.fixture
def gallery(base: Snapshot, path: Path) -> Gallery:
    return Gallery(base, Store(path, encoder="e"))


def stored(clouds: Clouds, label: str, count: int, prefix: str = "new ", seed: int = 2) -> list[StoredItem]:
    counts = [count if name == label else 0 for name in clouds.names.tolist()]
    embeddings, labels = clouds.draw(np.random.default_rng(seed), counts)
    return [StoredItem(f"{prefix}{row}", labels[row], embeddings[row], {"row": row}, b"x") for row in range(count)]


def frozen(snapshot: Snapshot) -> tuple[Any, ...]:
    """Everything in a snapshot, copied."""
    items, clusters = snapshot.items, snapshot.clusters
    arrays = (items.labels, items.embeddings, items.positions, clusters.prototypes, clusters.radii, clusters.counts)
    content = tuple(array.tobytes() for array in arrays)
    return (tuple(items.ids), clusters.labels, snapshot.sequence, len(snapshot.index), *content)


# Snapshots


def test_the_bundles_own_gallery_is_the_first_snapshot(gallery: Gallery, base: Snapshot) -> None:
    assert gallery.snapshot().items.ids[0] == base.items.ids[0] and len(gallery.snapshot().items) == 60
    assert Gallery(base).snapshot() is base
    assert base.clusters.labels == ("a", "b", "c")
    np.testing.assert_array_equal(np.asarray(base.clusters.labels)[base.classes], base.items.labels)
    assert base.items.ids[base.rows["7"]] == "7"


def test_added_items_are_part_of_the_next_snapshot(gallery: Gallery, clouds: Clouds) -> None:
    new = stored(clouds, "d", 5)
    gallery.add(new)
    snapshot = gallery.snapshot()
    assert snapshot.clusters.labels == ("a", "b", "c", "d")
    assert snapshot.clusters.counts.tolist() == [20, 20, 20, 5]
    assert len(snapshot.items) == 65
    _, rows = snapshot.index.search(np.stack([item.embedding for item in new]), 1)
    assert [snapshot.items.ids[row] for row in rows[:, 0]] == [item.id for item in new]
    assert snapshot.items.metadata[snapshot.rows["new 3"]] == {"row": 3}
    assert np.isnan(snapshot.items.positions[snapshot.rows["new 3"]]).all()


def test_a_snapshot_does_not_change_under_its_reader(gallery: Gallery, base: Snapshot, clouds: Clouds) -> None:
    gallery.add(stored(clouds, "d", 3))
    held = gallery.snapshot()
    before, base_before = frozen(held), frozen(base)
    gallery.add(stored(clouds, "a", 4, prefix="more "))
    gallery.remove(["0", "1", "new 0", "new 1", "new 2"])
    assert gallery.snapshot() is not held
    assert frozen(held) == before
    assert frozen(base) == base_before


def test_an_unchanged_gallery_gives_the_same_snapshot(gallery: Gallery, clouds: Clouds) -> None:
    gallery.add(stored(clouds, "d", 1))
    assert gallery.snapshot() is gallery.snapshot()


def test_only_the_classes_that_changed_get_new_clusters(gallery: Gallery, base: Snapshot, clouds: Clouds) -> None:
    gallery.add(stored(clouds, "b", 10))
    after = gallery.snapshot().clusters
    for row, label in enumerate(base.clusters.labels):
        same = (after.prototypes[row] == base.clusters.prototypes[row]).all()
        assert bool(same) == (label != "b")
        assert (after.counts[row] == base.clusters.counts[row]) == (label != "b")
        if label != "b":
            assert after.radii[row] == base.clusters.radii[row]


def test_removed_items_are_not_found_any_more(gallery: Gallery, base: Snapshot) -> None:
    gone = [identifier for identifier, label in zip(base.items.ids, base.items.labels, strict=True) if label == "b"][
        :19
    ]
    gallery.remove(gone)
    snapshot = gallery.snapshot()
    assert snapshot.clusters.counts.tolist() == [20, 1, 20]
    assert not set(gone) & set(snapshot.items.ids)
    _, rows = snapshot.index.search(base.items.embeddings, 41)
    assert rows.max() == 40


def test_a_class_whose_items_are_all_gone_vanishes(gallery: Gallery, base: Snapshot, clouds: Clouds) -> None:
    gallery.add(stored(clouds, "d", 2))
    gallery.remove(["new 0", "new 1"])
    assert gallery.snapshot().clusters.labels == ("a", "b", "c")
    gallery.remove([base.items.ids[row] for row in np.flatnonzero(base.items.labels == "b")])
    snapshot = gallery.snapshot()
    assert snapshot.clusters.labels == ("a", "c")
    np.testing.assert_array_equal(np.asarray(["a", "c"])[snapshot.classes], snapshot.items.labels)


def test_a_name_that_is_used_anew_forgets_what_it_meant(gallery: Gallery, base: Snapshot, clouds: Clouds) -> None:
    gallery.remove([base.items.ids[row] for row in np.flatnonzero(base.items.labels == "b")])
    (example,) = stored(clouds, "d", 1)
    gallery.add([StoredItem(f"twin {row}", "b", example.embedding, {}, b"") for row in range(5)])
    clusters = gallery.snapshot().clusters
    np.testing.assert_allclose(clusters.prototypes[1], example.embedding, atol=1e-6)
    assert clusters.radii[1] == pytest.approx(SMALLEST_GAP)
    assert base.clusters.radii[1] > 10 * SMALLEST_GAP


def test_every_item_may_be_removed_and_the_gallery_filled_again(
    gallery: Gallery, base: Snapshot, clouds: Clouds
) -> None:
    gallery.remove(base.items.ids)
    empty = gallery.snapshot()
    assert (len(empty.items), len(empty.clusters), len(empty.index)) == (0, 0, 0)
    gallery.add(stored(clouds, "d", 1))
    assert gallery.snapshot().clusters.labels == ("d",)


def test_an_item_replaces_the_one_of_the_same_id(gallery: Gallery, clouds: Clouds) -> None:
    gallery.add(stored(clouds, "d", 1, prefix=""))  # id "0", which the bundle has too
    snapshot = gallery.snapshot()
    assert len(snapshot.items) == 60
    assert snapshot.items.labels[snapshot.rows["0"]] == "d"
    assert snapshot.clusters.counts.sum() == 60


def test_an_item_may_come_back_after_it_was_removed(gallery: Gallery, clouds: Clouds) -> None:
    new = stored(clouds, "d", 1)
    gallery.add(new)
    gallery.remove(["new 0", "5"])
    gallery.add(new)
    assert "new 0" in gallery.snapshot().rows
    assert "5" not in gallery.snapshot().rows


def test_ids_that_are_not_in_the_gallery_are_passed_over(gallery: Gallery) -> None:
    before = gallery.snapshot()
    gallery.remove(["no such id"])
    assert gallery.snapshot() is before


# Durability


def test_changes_are_there_after_a_restart(gallery: Gallery, base: Snapshot, path: Path, clouds: Clouds) -> None:
    gallery.add(stored(clouds, "d", 5))
    gallery.remove(["3", "new 4"])
    again = Gallery(base, Store(path, encoder="e")).snapshot()
    assert frozen(again)[:-3] == frozen(gallery.snapshot())[:-3]
    assert "3" not in again.rows


def test_two_processes_share_one_gallery(gallery: Gallery, base: Snapshot, path: Path, clouds: Clouds) -> None:
    other = Gallery(base, Store(path, encoder="e"))
    gallery.add(stored(clouds, "d", 5))
    assert other.snapshot().clusters.labels == ("a", "b", "c", "d")
    other.remove([f"new {row}" for row in range(5)])
    assert gallery.snapshot().clusters.labels == ("a", "b", "c")


def test_changes_outlive_a_swap_of_the_bundle(gallery: Gallery, base: Snapshot, path: Path, clouds: Clouds) -> None:
    gallery.add(stored(clouds, "d", 5))
    gallery.remove(["0"])
    keep = np.arange(0, 60, 2)
    items = base.items.select(keep)
    swapped = Gallery(Snapshot(items, ClassClusters.fit(items.embeddings, items.labels)), Store(path, encoder="e"))
    snapshot = swapped.snapshot()
    assert len(snapshot.items) == 30 - 1 + 5
    assert "0" not in snapshot.rows


def test_a_gallery_without_a_store_cannot_be_changed(base: Snapshot, clouds: Clouds) -> None:
    gallery = Gallery(base)
    assert gallery.snapshot() is base
    with pytest.raises(DataError, match="without a store"):
        gallery.add(stored(clouds, "d", 1))
    with pytest.raises(DataError, match="without a store"):
        gallery.remove(["0"])


def test_bad_items_are_refused_before_anything_is_kept(gallery: Gallery, base: Snapshot, clouds: Clouds) -> None:
    (good,) = stored(clouds, "d", 1)
    for label in ("", "a/b", "x" * 129):
        with pytest.raises(DataError, match="cannot name a class"):
            gallery.add([good, StoredItem("bad", label, good.embedding, {}, b"")])
    for embedding in (good.embedding[:-1], good.embedding * 2, np.full(DIM, np.nan, dtype=np.float32)):
        with pytest.raises(ValueError, match=r"shape|length"):
            gallery.add([good, StoredItem("bad", "d", embedding, {}, b"")])
    assert len(gallery.snapshot().items) == 60


def test_readers_always_see_whole_changes(gallery: Gallery, clouds: Clouds) -> None:
    """Each change adds five items at once; a snapshot with part of them would break its own counts."""
    stop = threading.Event()

    def read() -> int:
        looks = 0
        while not stop.is_set() or not looks:
            snapshot = gallery.snapshot()
            assert (len(snapshot.items) - 60) % 5 == 0
            assert snapshot.clusters.counts.sum() == len(snapshot.items) == len(snapshot.index)
            assert (np.asarray(snapshot.clusters.labels)[snapshot.classes] == snapshot.items.labels).all()
            looks += 1
        return looks

    with ThreadPoolExecutor(3) as pool:
        readers = [pool.submit(read) for _ in range(2)]
        try:
            for number in range(10):
                gallery.add(stored(clouds, "d" if number % 2 else "a", 5, prefix=f"{number} ", seed=number))
        finally:
            stop.set()
        assert all(reader.result() for reader in readers)
    assert len(gallery.snapshot().items) == 110


# Edits, removals, filters


def test_an_item_may_get_another_label_and_other_metadata(gallery: Gallery, base: Snapshot, clouds: Clouds) -> None:
    gallery.add(stored(clouds, "d", 3))
    of_the_bundle, enrolled = base.items.ids[0], "new 0"
    before = gallery.snapshot()
    gallery.edit(of_the_bundle, metadata={"colour": "red"})
    gallery.edit(enrolled, label="a")
    after = gallery.snapshot()
    for identifier, label, metadata in (
        (of_the_bundle, base.items.label(0), {"colour": "red"}),
        (enrolled, "a", {"row": 0}),
    ):
        row = after.rows[identifier]
        assert (after.items.label(row), after.items.metadata[row]) == (label, metadata)
        assert np.array_equal(after.items.embeddings[row], before.items.embeddings[before.rows[identifier]])
        np.testing.assert_array_equal(after.items.positions[row], before.items.positions[before.rows[identifier]])
    assert after.clusters.counts.tolist() == [21, 20, 20, 2]


def test_an_edit_goes_by_one_snapshot(gallery: Gallery, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else another process's removal in between would give the item another one's label."""
    now = [gallery.snapshot()]
    identifier, label = now[0].items.ids[3], now[0].items.label(3)
    with monkeypatch.context() as patch:
        patch.setattr(gallery, "snapshot", now.pop)
        gallery.edit(identifier, metadata={"new": True})
    after = gallery.snapshot()
    assert after.items.label(after.rows[identifier]) == label


def test_the_index_keeps_its_options_through_changes(base: Snapshot, path: Path) -> None:
    options = IndexOptions(latency_budget=0.002, memory_budget=10**6)
    own = Snapshot(base.items, base.clusters, options=options)
    with Gallery(own, Store(path, encoder="e")) as gallery:
        gallery.remove([base.items.ids[0]])
        assert gallery.snapshot().options == options
        assert gallery.snapshot().settled()._foundation.options == options  # type: ignore[attr-defined]


def test_what_cannot_be_edited_is_named(gallery: Gallery) -> None:
    with pytest.raises(DataError, match="no item nowhere"):
        gallery.edit("nowhere", metadata={})
    with pytest.raises(DataError, match="cannot name a class"):
        gallery.edit("0", label="a/b")
    with pytest.raises(DataError, match="JSON"):
        gallery.edit("0", metadata={"x": b"bytes"})
    assert gallery.snapshot().items.metadata[0] == {"row": 0}


def test_a_whole_class_may_be_forgotten(gallery: Gallery, base: Snapshot, clouds: Clouds) -> None:
    gallery.add(stored(clouds, "b", 2))
    expected = {base.items.ids[row] for row in base.members("b")} | {"new 0", "new 1"}
    assert set(gallery.remove(label="b")) == expected
    assert gallery.snapshot().clusters.labels == ("a", "c")
    with pytest.raises(DataError, match="no class 'b'"):
        gallery.remove(label="b")


def test_of_many_who_forget_a_class_at_once_one_erases_each_item(
    gallery: Gallery, base: Snapshot, clouds: Clouds, monkeypatch: pytest.MonkeyPatch
) -> None:
    gallery.add(stored(clouds, "b", 20))
    expected = sorted([*(base.items.ids[row] for row in base.members("b")), *(f"new {row}" for row in range(20))])
    monkeypatch.setattr(gallery, "snapshot", lambda seen=gallery.snapshot(): seen)  # all see it before any erases
    with ThreadPoolExecutor(8) as pool:
        erased = [pool.submit(gallery.remove, label="b") for _ in range(8)]
        assert sorted(identifier for each in erased for identifier in each.result()) == expected


def test_removing_tells_what_was_there(gallery: Gallery) -> None:
    assert gallery.remove(["5", "nowhere", "5", "6"]) == ("5", "6")


def test_search_finds_what_is_there_at_that_moment(gallery: Gallery, base: Snapshot, clouds: Clouds) -> None:
    (new,) = stored(clouds, "d", 1)
    gallery.add([new])
    (answer,) = gallery.search(new.embedding[None], 3)
    assert (answer[0].id, answer[0].label, answer[0].metadata) == ("new 0", "d", {"row": 0})
    assert answer[0].similarity == pytest.approx(1, abs=1e-6)
    (answer,) = gallery.search(new.embedding[None], 100, labels=["b", "d"])
    assert {near.label for near in answer} == {"b", "d"} and len(answer) == 21
    (answer,) = gallery.search(new.embedding[None], 100, metadata={"row": 0})
    assert [near.id for near in answer] == ["new 0", "0"]
    gallery.remove(["new 0"])
    assert gallery.search(new.embedding[None], 100, metadata={"row": 0})[0][0].id == "0"
    with pytest.raises(ValueError, match="normalise"):
        gallery.search(new.embedding[None] * 2, 1, labels=["b"])
    with pytest.raises(ValueError, match="k is 0"):
        gallery.search(new.embedding[None], 0, labels=["b"])


def test_thumbnails_are_those_of_the_store_and_of_the_bundle(gallery: Gallery, base: Snapshot, clouds: Clouds) -> None:
    gallery.add(stored(clouds, "d", 2))
    held = gallery.snapshot()
    assert held.items.thumbnails[held.rows["new 0"]] == b"x"
    assert held.items.thumbnails[held.rows["0"]] == base.items.thumbnails[0]
    gallery.remove(["new 0"])
    assert held.items.thumbnails[held.rows["new 0"]] == b""  # what is erased is gone for those who look back, too


# A new foundation


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Foundations are renewed after three changes."""
    monkeypatch.setattr(gallery_module, "MANY_CHANGES", 3)
    monkeypatch.setattr(gallery_module, "LARGE_SHARE", 0)


def settled(gallery: Gallery) -> LiveSnapshot:
    thread = gallery._settling
    assert thread is not None
    thread.join()
    snapshot = gallery.snapshot()
    assert isinstance(snapshot, LiveSnapshot)
    return snapshot


@pytest.mark.usefixtures("eager")
def test_many_changes_become_a_new_foundation(gallery: Gallery, clouds: Clouds) -> None:
    gallery.add(stored(clouds, "d", 3))
    gallery.remove(["0"])
    before = gallery.snapshot()
    assert isinstance(before, LiveSnapshot) and (before.foundation_size, before.weight) == (60, 4)
    after = settled(gallery)
    assert (after.foundation_size, after.weight) == (62, 0)
    assert frozen(after) == frozen(before)


@pytest.mark.usefixtures("eager")
def test_changes_that_come_while_a_foundation_is_laid_are_laid_over_it(
    gallery: Gallery, clouds: Clouds, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, release = threading.Event(), threading.Event()
    lay = LiveSnapshot.settled

    def lay_slowly(snapshot: LiveSnapshot) -> LiveSnapshot:
        started.set()
        release.wait(10)
        return lay(snapshot)

    monkeypatch.setattr(LiveSnapshot, "settled", lay_slowly)
    gallery.add(stored(clouds, "d", 4))
    gallery.snapshot()
    started.wait(10)
    gallery.add(stored(clouds, "a", 2, prefix="later "))
    gallery.remove(["new 0", "1"])
    meanwhile = gallery.snapshot()
    release.set()
    after = settled(gallery)
    assert (after.foundation_size, after.weight) == (64, 4)
    assert frozen(after) == frozen(meanwhile)


@pytest.mark.usefixtures("eager")
def test_a_foundation_that_cannot_be_laid_leaves_the_gallery_as_it_is(
    gallery: Gallery, clouds: Clouds, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_: LiveSnapshot) -> LiveSnapshot:
        raise MemoryError

    with monkeypatch.context() as broken:
        broken.setattr(LiveSnapshot, "settled", fail)
        gallery.add(stored(clouds, "d", 4))
        gallery.snapshot()
        assert settled(gallery).weight == 4
    assert "could not be renewed" in caplog.text
    gallery.add(stored(clouds, "d", 1, prefix="later "))
    gallery.snapshot()
    assert settled(gallery).weight == 0


@pytest.mark.usefixtures("eager")
def test_answers_stay_right_while_foundations_come_and_go(base: Snapshot, path: Path, clouds: Clouds) -> None:
    """Two galleries as of two processes, each adding, removing and asking for what it has just been told is durable."""

    def work(name: str) -> None:
        with Gallery(base, Store(path, encoder="e")) as gallery:
            for number in range(15):
                new = stored(clouds, "abcd"[number % 4], 2, prefix=f"{name} {number} ", seed=number)
                gallery.add(new)
                # The other draws the same embeddings: either may be the nearest.
                assert {near.id for near in gallery.search(new[0].embedding[None], 4)[0]} >= {new[0].id}
                gallery.remove([new[0].id])
                assert new[0].id not in gallery.snapshot().rows and new[1].id in gallery.snapshot().rows

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, ["one", "two"]))
    with Gallery(base, Store(path, encoder="e")) as gallery:
        assert len(gallery.snapshot().items) == 60 + 2 * 15


def test_a_reader_who_is_far_behind_reads_everything_anew(
    gallery: Gallery, base: Snapshot, path: Path, clouds: Clouds, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "TOMBSTONES", 2)
    gallery.add(stored(clouds, "d", 6))
    assert len(gallery.snapshot().items) == 66
    with Gallery(base, Store(path, encoder="e")) as other:
        for number in range(5):
            other.remove([f"new {number}"])
    assert list(gallery.snapshot().rows)[60:] == ["new 5"]


def test_one_image_is_one_item_however_often_it_is_enrolled(gallery: Gallery, clouds: Clouds) -> None:
    (drawn,) = stored(clouds, "d", 1)
    image = StoredItem(item_id(b"image"), "d", drawn.embedding, {"n": 1}, b"", b"image")
    gallery.add([image])
    gallery.add([replace(image, label="a", metadata={"n": 2})])
    snapshot = gallery.snapshot()
    row = snapshot.rows[image.id]
    assert (len(snapshot.items), snapshot.items.label(row), snapshot.items.metadata[row]) == (61, "a", {"n": 2})
    assert "d" not in snapshot.clusters.labels
    assert gallery.original(image.id) == b"image" and gallery.original("0") is None
    assert gallery.enrolled_ids() == {image.id}
    with pytest.raises(DataError, match="has an original whose id is"):
        gallery.add([replace(image, id="another")])


# Items and their file


def test_an_id_is_the_start_of_the_contents_hash() -> None:
    assert item_id(b"") == "e3b0c44298fc1c149afbf4c8"
    assert item_id(b"a") != item_id(b"b")


def test_ids_are_unique_and_columns_of_one_length(base: Snapshot) -> None:
    first = base.items.select(np.asarray([0]))
    with pytest.raises(DataError, match="unique"):
        first + first
    with pytest.raises(ValueError, match="differ in length"):
        GalleryItems(("1",), first.labels, first.embeddings, first.positions, (), first.metadata)
    with pytest.raises(ValueError, match="normalise"):
        GalleryItems(("1",), first.labels, first.embeddings * 2, first.positions, (b"",), first.metadata)


def test_selected_and_joined_items_keep_what_belongs_to_them(base: Snapshot) -> None:
    rows = np.asarray([5, 0, 59])
    joined = base.items.select(rows[:2]) + base.items.select(rows[2:])
    assert joined.ids == ("5", "0", "59")
    assert joined.labels.tolist() == base.items.labels[rows].tolist()
    assert [row["row"] for row in joined.metadata] == [5, 0, 59]
    np.testing.assert_array_equal(joined.embeddings, base.items.embeddings[rows])


def test_items_come_back_from_their_file_and_equal_items_give_equal_bytes(tmp_path: Path, base: Snapshot) -> None:
    items = GalleryItems(
        ids=base.items.ids,
        labels=np.char.add(base.items.labels, " größe"),
        embeddings=base.items.embeddings,
        positions=np.where(np.arange(60)[:, None] % 2, np.nan, base.items.positions + 1).astype(np.float32),
        thumbnails=tuple(bytes([row]) * row for row in range(60)),
        metadata=tuple({"b": [row, None], "a": {"ü": "\n"}} for row in range(60)),
    )
    first, second = tmp_path / "first.parquet", tmp_path / "second.parquet"
    items.write(first)
    again = GalleryItems.read(first)
    again.write(second)
    assert first.read_bytes() == second.read_bytes()
    assert (again.ids, again.thumbnails, again.metadata) == (items.ids, items.thumbnails, items.metadata)
    for name in ("labels", "embeddings", "positions"):
        np.testing.assert_array_equal(getattr(again, name), getattr(items, name))
        assert getattr(again, name).dtype == getattr(items, name).dtype


def test_the_order_of_metadata_keys_does_not_change_the_file(tmp_path: Path, base: Snapshot) -> None:
    one = base.items.select(np.asarray([0]))
    for name, metadata in (("first", {"a": 1, "b": 2}), ("second", {"b": 2, "a": 1})):
        columns = (one.ids, one.labels, one.embeddings, one.positions, one.thumbnails)
        GalleryItems(*columns, (metadata,)).write(tmp_path / name)
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()


def test_an_empty_gallery_has_a_file_too(tmp_path: Path) -> None:
    GalleryItems.enrolled((), DIM).write(tmp_path / "empty")
    items = GalleryItems.read(tmp_path / "empty")
    assert (len(items), items.embeddings.shape, items.positions.shape) == (0, (0, DIM), (0, 2))


def test_other_files_are_no_gallery(tmp_path: Path, base: Snapshot) -> None:
    base.items.write(tmp_path / "good")
    table = pq.read_table(tmp_path / "good")
    vectors = table["embedding"]
    broken = {
        "without labels": table.drop_columns(["label"]),
        "ragged": table.set_column(2, "embedding", pa.array(vectors.to_pylist(), pa.list_(pa.float32()))),
        "not of unit length": table.set_column(
            2, "embedding", pa.array([[2.0] * DIM] * 60, pa.list_(pa.float32(), DIM))
        ),
        "twice the same id": table.set_column(0, "id", pa.array(["same"] * 60)),
        "null metadata": table.set_column(5, "metadata", pa.array([None] * 60, pa.string())),
        "metadata of another kind": table.set_column(5, "metadata", pa.array(["{"] * 60)),
    }
    for name, content in broken.items():
        pq.write_table(content, tmp_path / name)
    (tmp_path / "text").write_text("no table")
    (tmp_path / "cut short").write_bytes((tmp_path / "good").read_bytes()[:-10])
    for name in (*broken, "text", "cut short", "missing"):
        with pytest.raises(BundleError, match=f"{name} is not a gallery"):
            GalleryItems.read(tmp_path / name)
