"""The durable changes of a gallery: what was acknowledged is there, for every thread and every process."""

import sqlite3
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from coterie import store as store_module
from coterie.changes import Changes, GalleryStore, Lacking
from coterie.errors import DataError, QuotaError, StoreBusyError, StoreError
from coterie.items import item_id
from coterie.store import Edit, Store, StoredItem, StoreOptions


def item(identifier: str, label: str = "boot", axis: int = 0, original: bytes | None = None) -> StoredItem:
    embedding = np.eye(4, dtype=np.float32)[axis]
    return StoredItem(identifier, label, embedding, {"name": "größe", "n": [1, None]}, b"\x00webp", original)


def image(content: bytes, label: str = "boot") -> StoredItem:
    return item(item_id(content), label, original=content)


def ids(store: Store) -> list[str]:
    return [kept.id for kept in store.changes().items]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "boots" / "gallery.sqlite"


@pytest.fixture
def store(path: Path) -> Store:
    return Store(path, encoder="e")


# Changes


def test_a_new_store_has_no_changes(store: GalleryStore) -> None:
    assert store.changes() == Changes(0, False, (), frozenset())


def test_changes_survive_closing_and_opening(store: Store, path: Path) -> None:
    store.add([item("1", axis=2), item("2", "shoe")])
    store.remove(["of the bundle"], bundled=["of the bundle"])
    store.close()
    store = Store(path, encoder="e")
    changes = store.changes()
    first, second = changes.items
    assert (first.id, first.label, first.metadata) == ("1", "boot", {"name": "größe", "n": [1, None]})
    assert first.embedding is not None
    assert (first.embedding.dtype, first.embedding.tolist()) == (np.float32, [0, 0, 1, 0])
    assert store.thumbnail("1") == b"\x00webp"
    assert second.label == "shoe"
    assert changes.removed == {"of the bundle"}
    assert changes.sequence == 3


def test_two_stores_see_each_others_changes(store: Store, path: Path) -> None:
    other = Store(path, encoder="e")
    store.add([item("1")])
    assert ids(other) == ["1"]
    other.remove(["1"])
    assert ids(store) == []


def test_the_version_changes_with_every_change_by_whomever_and_only_then(store: Store, path: Path) -> None:
    other = Store(path, encoder="e")
    for change in (
        lambda: store.add([item("1")]),
        lambda: other.add([item("1")]),
        lambda: store.edit([Edit("1", "shoe", {})]),
        lambda: other.remove(["1"]),
    ):
        before = store.version(), other.version()
        assert before == (store.version(), other.version())
        change()
        assert store.version() != before[0] and other.version() != before[1]


def test_the_sequence_grows_with_every_change_and_never_repeats(store: Store, path: Path) -> None:
    seen = [store.sequence()]
    for change in (lambda: store.add([item("1")]), lambda: store.add([item("1")]), lambda: store.remove(["1"])):
        change()
        seen.append(store.sequence())
    store.close()
    store = Store(path, encoder="e")
    store.add([item("2"), item("3")])
    assert [*seen, store.sequence()] == [0, 1, 2, 3, 5]


def test_a_reader_asks_for_what_is_new(store: Store) -> None:
    store.add([item("1"), item("2"), item("3")])
    store.remove(["1"])
    known = store.sequence()
    assert store.changes(known) == Changes(known, False, (), frozenset())
    store.add([item("4"), item("2", "shoe")])
    store.remove(["3", "never there"])
    new = store.changes(known)
    assert [(kept.id, kept.label) for kept in new.items] == [("4", "boot"), ("2", "shoe")]
    assert new.removed == {"3", "never there"}
    assert (new.sequence, new.whole) == (known + 4, False)


def test_ids_of_removed_items_are_not_kept_for_ever(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "TOMBSTONES", 3)
    store.add([item(str(number)) for number in range(10)])
    known = store.sequence()
    store.remove(["of the bundle"], bundled=["of the bundle"])
    for number in range(5):
        store.remove([str(number)])
    changes = store.changes(known)  # someone who is that far behind cannot be told what is gone
    assert changes.whole and [kept.id for kept in changes.items] == ["5", "6", "7", "8", "9"]
    assert changes.removed == {"of the bundle", "2", "3", "4"}
    recent = store.changes(store.sequence() - 1)
    assert (recent.whole, recent.items, recent.removed) == (False, (), {"4"})


def test_nothing_to_change_changes_nothing(store: Store) -> None:
    store.add([])
    store.edit([])
    store.remove([])
    assert store.sequence() == 0


def test_an_item_with_a_known_id_replaces_it(store: Store) -> None:
    store.add([item("1", "boot")])
    store.add([item("1", "shoe"), item("2", "old"), item("2", "new")])
    assert [(kept.id, kept.label) for kept in store.changes().items] == [("1", "shoe"), ("2", "new")]


def test_an_item_may_come_back_after_it_was_removed(store: Store) -> None:
    store.add([item("1")])
    store.remove(["1", "base"], bundled=["base"])
    assert (ids(store), store.changes().removed) == ([], {"1", "base"})
    store.add([item("1"), item("base")])
    assert (ids(store), store.changes().removed) == (["1", "base"], frozenset())


def test_label_and_metadata_may_change(store: Store) -> None:
    store.add([item("1")])
    known = store.sequence()
    store.edit([Edit("1", "shoe", {"colour": "red"}), Edit("of the bundle", "boot", {"colour": "blue"})])
    enrolled, bundled = store.changes(known).items
    assert enrolled[:3] == ("1", "shoe", {"colour": "red"}) and enrolled.embedding is not None
    assert bundled == ("of the bundle", "boot", {"colour": "blue"}, None)
    assert store.thumbnail("1") == b"\x00webp"


def test_what_was_removed_cannot_be_edited(store: Store) -> None:
    store.add([item("1")])
    store.remove(["1"])
    with pytest.raises(DataError, match="no item 1"):
        store.edit([Edit("2", "boot", {}), Edit("1", "boot", {})])
    assert ids(store) == []


def test_a_batch_is_kept_whole_or_not_at_all(store: Store) -> None:
    bad = StoredItem("2", None, np.eye(4, dtype=np.float32)[0], {}, b"")  # type: ignore[arg-type]
    with pytest.raises(StoreError, match="NOT NULL"):
        store.add([item("1"), bad])
    assert (store.sequence(), ids(store)) == (0, [])
    store.add([item("1")])
    assert ids(store) == ["1"]


@pytest.mark.parametrize("metadata", [{"x": float("nan")}, {"x": {1}}, {"x": b"bytes"}])
def test_metadata_is_json(store: Store, metadata: dict) -> None:
    with pytest.raises(DataError, match="metadata of item 2 cannot be kept as JSON"):
        store.add([item("1"), StoredItem("2", "boot", np.eye(4, dtype=np.float32)[0], metadata, b"")])
    assert ids(store) == []


# Quota


def test_a_class_has_no_more_items_than_its_quota(path: Path) -> None:
    store = Store(path, encoder="e", options=StoreOptions(class_quota=3))
    store.add([item("1"), item("2"), item("3")])
    with pytest.raises(QuotaError, match="'boot' would have 4 enrolled items, and COTERIE_CLASS_QUOTA allows 3"):
        store.add([item("4")])
    store.add([item("1"), item("4", "shoe")])  # one that is there already takes no more room
    with pytest.raises(QuotaError):
        store.edit([Edit("4", "boot", {})])
    store.edit([Edit("of the bundle", "boot", {})])  # only enrolled items count
    store.remove(["1"])
    store.edit([Edit("4", "boot", {})])
    assert sorted(ids(store)) == ["2", "3", "4", "of the bundle"]


def test_the_quota_holds_whoever_fills_the_class(path: Path) -> None:
    options = StoreOptions(class_quota=20)

    def fill(worker: int) -> int:
        store, refused = Store(path, encoder="e", options=options), 0
        for number in range(10):
            try:
                store.add([item(f"{worker}-{number}")])
            except QuotaError:
                refused += 1
        store.close()
        return refused

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(fill, range(4))) == 20
    assert len(ids(Store(path, encoder="e"))) == 20


# Originals


def test_the_image_of_an_item_is_kept_beside_it(store: Store, path: Path) -> None:
    store.add([image(b"one image"), item("without")])
    assert store.original(item_id(b"one image")) == b"one image"
    assert (store.original("without"), store.original("nowhere")) == (None, None)
    (file,) = (file for file in path.with_name("originals").rglob("*") if file.is_file())
    assert file.name.startswith(item_id(b"one image")) and file.parent.name == file.name[:2]


def test_images_are_not_kept_if_that_is_not_wanted(path: Path) -> None:
    store = Store(path, encoder="e", options=StoreOptions(originals=False))
    store.add([image(b"one image")])
    assert ids(store) == [item_id(b"one image")]
    assert store.original(item_id(b"one image")) is None
    assert not path.with_name("originals").exists()


def test_an_image_that_is_enrolled_again_without_itself_stays(store: Store) -> None:
    store.add([image(b"one image")])
    store.add([item(item_id(b"one image"), "shoe")])
    assert store.original(item_id(b"one image")) == b"one image"


@pytest.mark.parametrize("damaged", [b"", b"one imagf", b"half"])
def test_an_image_that_was_damaged_says_so_and_is_made_whole_by_enrolling_it_again(
    store: Store, path: Path, damaged: bytes
) -> None:
    store.add([image(b"one image")])
    (file,) = (file for file in path.with_name("originals").rglob("*") if file.is_file())
    file.write_bytes(damaged)
    with pytest.raises(StoreError, match="is damaged"):
        store.original(item_id(b"one image"))
    store.add([image(b"one image")])
    assert store.original(item_id(b"one image")) == b"one image"
    file.unlink()
    with pytest.raises(StoreError, match="cannot be read: No such file"):
        store.original(item_id(b"one image"))


def test_an_image_goes_with_its_item(store: Store, path: Path) -> None:
    store.add([image(b"one image"), image(b"another")])
    store.remove([item_id(b"one image")])
    assert store.original(item_id(b"one image")) is None
    (left,) = (file for file in path.with_name("originals").rglob("*") if file.is_file())
    assert left.read_bytes() == b"another"


def test_files_without_a_row_are_swept_at_the_next_opening(store: Store, path: Path) -> None:
    store.add([image(b"one image")])
    orphan = store._originals.write(b"left by a kill")
    Store(path, encoder="e").close()
    assert not store._originals.has(orphan)
    assert store.original(item_id(b"one image")) == b"one image"


def test_what_is_refused_leaves_no_file(path: Path) -> None:
    store = Store(path, encoder="e", options=StoreOptions(class_quota=1))
    store.add([image(b"one image")])
    for _ in range(2):
        with pytest.raises(QuotaError):
            store.add([image(b"one image"), image(b"another")])
    (left,) = (file for file in path.with_name("originals").rglob("*") if file.is_file())
    assert left.read_bytes() == b"one image"


def test_a_sweep_waits_for_nobody(path: Path) -> None:
    options = StoreOptions(busy_seconds=0.05)
    store = Store(path, encoder="e", options=options)
    orphan = store._originals.write(b"left by a kill")
    writer = sqlite3.connect(path, isolation_level=None)
    writer.execute("BEGIN IMMEDIATE")
    Store(path, encoder="e", options=options).close()
    assert store._originals.has(orphan)
    writer.execute("ROLLBACK")
    Store(path, encoder="e", options=options).close()
    assert not store._originals.has(orphan)


def test_a_sweep_does_not_take_away_what_is_just_being_added(
    store: Store, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process opens the store after the file was written and before its row is."""
    write = store._originals.write

    def write_and_let_another_open(content: bytes) -> str:
        monkeypatch.setattr(store._originals, "write", write)
        name = write(content)
        Store(path, encoder="e").close()
        assert not store._originals.has(name)
        return name

    monkeypatch.setattr(store._originals, "write", write_and_let_another_open)
    store.add([image(b"one image")])
    assert store.original(item_id(b"one image")) == b"one image"


def test_an_image_that_comes_back_before_its_file_is_deleted_stays(
    store: Store, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    delete = store._delete_originals

    def let_another_add_and_delete(names: list[str]) -> None:
        Store(path, encoder="e").add([image(b"one image")])
        delete(names)

    store.add([image(b"one image")])
    monkeypatch.setattr(store, "_delete_originals", let_another_add_and_delete)
    store.remove([item_id(b"one image")])
    assert store.original(item_id(b"one image")) == b"one image"


def test_removing_and_adding_the_same_image_at_once_leaves_it_whole_or_gone(path: Path) -> None:
    content, stores = b"one image", [Store(path, encoder="e") for _ in range(2)]
    start = threading.Barrier(2)

    def add() -> None:
        start.wait()
        stores[0].add([image(content)])

    def remove() -> None:
        start.wait()
        stores[1].remove([item_id(content)])

    for _ in range(20):
        with ThreadPoolExecutor(2) as pool:
            for future in [pool.submit(add), pool.submit(remove)]:
                future.result()
        kept = ids(stores[0]) == [item_id(content)]
        assert stores[0].original(item_id(content)) == (content if kept else None)
        files = [file for file in path.with_name("originals").rglob("*") if file.is_file()]
        assert len(files) == int(kept)


# Encoders


def test_each_encoder_sees_its_own_embeddings(store: Store, path: Path) -> None:
    store.add([image(b"1"), item("2")])
    other = Store(path, encoder="other")
    assert [(kept.id, kept.embedding) for kept in other.changes().items] == [(item_id(b"1"), None), ("2", None)]
    assert [row[:2] for row in other.lacking()] == [(item_id(b"1"), "boot"), ("2", "boot")]
    assert [row.original is None for row in other.lacking()] == [False, True]
    other.complete({item_id(b"1"): np.eye(4, dtype=np.float32)[3], "removed meanwhile": np.eye(4, dtype=np.float32)[0]})
    assert other.lacking() == [Lacking("2", "boot", None)]
    first, second = other.changes().items
    assert first.embedding is not None and first.embedding.tolist() == [0, 0, 0, 1]
    assert second.embedding is None
    assert all(kept.embedding is not None and kept.embedding[0] == 1 for kept in store.changes().items)


def test_the_encoder_before_the_last_is_forgotten_where_it_can_be_replaced(path: Path) -> None:
    def embeddings() -> list[tuple[str, int]]:
        with sqlite3.connect(path) as db:
            return sorted(db.execute("SELECT id, encoder FROM embeddings"))

    one, lone = item_id(b"1"), "2"
    Store(path, encoder="first").add([image(b"1"), item(lone)])
    for encoder in ("second", "third"):
        store = Store(path, encoder=encoder)
        store.forget_encoders()  # nothing is replaced yet, nothing is forgotten
        store.complete({one: np.eye(4, dtype=np.float32)[0]})
    assert embeddings() == sorted([(one, 1), (lone, 1), (one, 2), (one, 3)])
    store.forget_encoders()
    assert embeddings() == sorted([(lone, 1), (one, 2), (one, 3)])


# Many at once


def test_opening_waits_for_a_process_that_is_setting_up_the_same_file(path: Path) -> None:
    path.parent.mkdir(parents=True)
    first = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    first.execute("PRAGMA user_version")
    first.execute("BEGIN EXCLUSIVE")  # here SQLite's own time-out does not count
    threading.Timer(0.2, lambda: first.execute("COMMIT")).start()
    assert Store(path, encoder="e").sequence() == 0


def test_many_may_open_and_add_at_once(path: Path) -> None:
    start = threading.Barrier(8)

    def enrol(worker: int) -> None:
        start.wait()
        store = Store(path, encoder="e")
        for number in range(5):
            store.add([item(f"{worker}-{number}")])
        store.close()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(enrol, range(8)))
    store = Store(path, encoder="e")
    assert (store.sequence(), len(ids(store))) == (40, 40)


def test_threads_and_processes_write_while_others_read(store: Store, path: Path) -> None:
    """Every reader sees whole batches, in the order of their numbers, and everything in the end."""
    code = """
import sys
from pathlib import Path
import numpy as np
from coterie.store import Store, StoredItem
store = Store(Path(sys.argv[1]), encoder="e")
for number in range(30):
    name = f"{sys.argv[2]}-{number}"
    store.add([StoredItem(f"{name}-{part}", "boot", np.eye(4, dtype=np.float32)[0], {}, b"") for part in range(3)])
    assert {f"{name}-0", f"{name}-2"} <= {kept.id for kept in store.changes().items}
"""
    stop = threading.Event()

    def read() -> int:
        reader, seen = Store(path, encoder="e"), 0
        known: dict[str, int] = {}
        while not stop.is_set() or not known:
            changes = reader.changes(seen)
            known.update((kept.id, 1) for kept in changes.items)
            assert len(known) == changes.sequence and len(known) % 3 == 0
            seen = changes.sequence
        return len(known)

    def write(thread: int) -> None:
        for number in range(10):
            store.add([item(f"thread {thread}-{number}-{part}") for part in range(3)])

    processes = [subprocess.Popen([sys.executable, "-c", code, str(path), name]) for name in ("one", "two")]
    with ThreadPoolExecutor(6) as pool:
        readers = [pool.submit(read) for _ in range(2)]
        try:
            list(pool.map(write, range(4)))
            assert [process.wait() for process in processes] == [0, 0]
        finally:
            stop.set()
        for reader in readers:
            reader.result()
    assert store.sequence() == len(ids(store)) == 3 * (30 + 30 + 40)


# What cannot be used


def test_a_store_held_by_another_process_says_so(path: Path) -> None:
    options = StoreOptions(busy_seconds=0.05)
    store, reader = Store(path, encoder="e", options=options), Store(path, encoder="e", options=options)
    writer = sqlite3.connect(path, isolation_level=None)
    writer.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreBusyError, match="held by another process: try again"):
        store.add([item("1")])
    assert reader.sequence() == 0
    with pytest.raises(StoreBusyError):
        Store(path, encoder="another", options=options)
    writer.execute("ROLLBACK")
    store.add([item("1")])
    assert ids(store) == ["1"]


def test_a_file_that_is_no_database_is_refused(path: Path) -> None:
    path.parent.mkdir(parents=True)
    path.write_bytes(b"no database " * 1000)
    with pytest.raises(StoreError, match="cannot be opened: file is not a database"):
        Store(path, encoder="e")


@pytest.mark.parametrize("statement", ["PRAGMA user_version = 99", "CREATE TABLE items (id)"])
def test_a_database_of_another_form_is_refused(path: Path, statement: str) -> None:
    path.parent.mkdir(parents=True)
    with sqlite3.connect(path) as other:
        other.execute(statement)
    with pytest.raises(StoreError, match=r"format 99.*COTERIE_STATE|already exists"):
        Store(path, encoder="e")


def test_a_place_that_cannot_be_written_is_a_store_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError, match="cannot be opened"):
        Store(tmp_path / "file" / "gallery.sqlite", encoder="e")


def test_a_closed_store_is_a_store_error(store: Store) -> None:
    store.add([item("1")])
    store.close()
    for use in (
        store.sequence,
        store.version,
        store.changes,
        lambda: store.add([item("1")]),
        lambda: store.remove("1"),
    ):
        with pytest.raises(StoreError, match="closed"):
            use()
