"""The durable log of changes: what was acknowledged is there, for every process, whatever happens."""

import os
import signal
import sqlite3
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from coterie import store as store_module
from coterie.errors import StoreError
from coterie.store import Store, StoredItem


def item(identifier: str, label: str = "boot", axis: int = 0) -> StoredItem:
    return StoredItem(
        identifier, label, np.eye(4, dtype=np.float32)[axis], {"name": "größe", "n": [1, None]}, b"\x00webp"
    )


def ids(store: Store) -> list[str]:
    return [added.id for added in store.changes().added]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "boots" / "gallery.sqlite"


def test_a_new_store_has_no_changes(path: Path) -> None:
    store = Store(path, encoder="e")
    assert store.sequence() == 0
    assert store.changes() == store_module.Changes(0, (), frozenset())


def test_changes_survive_closing_and_opening(path: Path) -> None:
    store = Store(path, encoder="e")
    store.add([item("1", axis=2), item("2", "shoe")])
    store.remove(["of the bundle"])
    store.close()
    changes = Store(path, encoder="e").changes()
    first, second = changes.added
    assert (first.id, first.label, first.metadata, first.thumbnail) == (
        "1",
        "boot",
        {"name": "größe", "n": [1, None]},
        b"\x00webp",
    )
    assert (first.embedding.dtype, first.embedding.tolist()) == (np.float32, [0, 0, 1, 0])
    assert second.label == "shoe"
    assert changes.removed == {"of the bundle"}
    assert changes.sequence == 3


def test_two_connections_see_each_others_changes(path: Path) -> None:
    one, other = Store(path, encoder="e"), Store(path, encoder="e")
    one.add([item("1")])
    assert (other.sequence(), ids(other)) == (1, ["1"])
    other.remove(["1"])
    assert (one.sequence(), ids(one)) == (2, [])


def test_the_sequence_grows_with_every_change_and_never_repeats(path: Path) -> None:
    store = Store(path, encoder="e")
    seen = [store.sequence()]
    for change in (lambda: store.add([item("1")]), lambda: store.add([item("1")]), lambda: store.remove(["1"])):
        change()
        seen.append(store.sequence())
    store.close()
    store = Store(path, encoder="e")
    store.add([item("2"), item("3")])
    assert [*seen, store.sequence()] == [0, 1, 2, 3, 5]


def test_nothing_to_change_changes_nothing(path: Path) -> None:
    store = Store(path, encoder="e")
    store.add([])
    store.remove([])
    assert store.sequence() == 0


def test_an_item_with_a_known_id_replaces_it(path: Path) -> None:
    store = Store(path, encoder="e")
    store.add([item("1", "boot")])
    store.add([item("1", "shoe"), item("2", "old"), item("2", "new")])
    assert [(added.id, added.label) for added in store.changes().added] == [("1", "shoe"), ("2", "new")]


def test_an_item_may_come_back_after_it_was_removed(path: Path) -> None:
    store = Store(path, encoder="e")
    store.add([item("1")])
    store.remove(["1", "base"])
    assert (ids(store), store.changes().removed) == ([], {"1", "base"})
    store.add([item("1"), item("base")])
    assert (ids(store), store.changes().removed) == (["1", "base"], frozenset())


def test_embeddings_of_another_encoder_are_never_mixed_in(path: Path) -> None:
    Store(path, encoder="e").add([item("1")])
    with pytest.raises(StoreError, match=r"another encoder: .*COTERIE_STATE"):
        Store(path, encoder="other")
    assert ids(Store(path, encoder="e")) == ["1"]


def test_a_batch_is_kept_whole_or_not_at_all(path: Path) -> None:
    store = Store(path, encoder="e")
    bad = StoredItem("2", None, np.eye(4, dtype=np.float32)[0], {}, b"")  # type: ignore[arg-type]
    with pytest.raises(StoreError, match="NOT NULL"):
        store.add([item("1"), bad])
    assert (store.sequence(), ids(store)) == (0, [])
    store.add([item("1")])
    assert ids(store) == ["1"]


def test_a_full_disk_is_named_and_loses_nothing(path: Path) -> None:
    store = Store(path, encoder="e")
    store.add([item("1")])
    pages = store._query("PRAGMA page_count")[0][0]
    store._query(f"PRAGMA max_page_count = {pages + 2}")
    large = StoredItem("2", "boot", np.eye(4, dtype=np.float32)[0], {}, os.urandom(100_000))
    with pytest.raises(StoreError, match="full"):
        store.add([large])
    assert ids(store) == ["1"]
    store._query("PRAGMA max_page_count = 1000000")
    store.add([large])
    assert ids(store) == ["1", "2"]


def test_a_store_held_by_another_writer_says_so(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "BUSY_SECONDS", 0.05)
    store, reader = Store(path, encoder="e"), Store(path, encoder="e")
    writer = sqlite3.connect(path, isolation_level=None)
    writer.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreError, match="busy"):
        store.add([item("1")])
    assert reader.sequence() == 0
    writer.execute("ROLLBACK")
    store.add([item("1")])
    assert ids(store) == ["1"]


def test_opening_waits_for_a_process_that_is_setting_up_the_same_file(path: Path) -> None:
    path.parent.mkdir(parents=True)
    first = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    first.execute("CREATE TABLE other (key)")
    first.execute("BEGIN IMMEDIATE")  # here SQLite's own time-out does not count
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


def test_a_file_that_is_no_database_is_refused(path: Path) -> None:
    path.parent.mkdir(parents=True)
    path.write_bytes(b"no database " * 1000)
    with pytest.raises(StoreError, match="cannot be opened: file is not a database"):
        Store(path, encoder="e")


def test_a_place_that_cannot_be_written_is_a_store_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError, match="cannot be opened"):
        Store(tmp_path / "file" / "gallery.sqlite", encoder="e")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_read_only_folder_is_a_store_error(path: Path) -> None:
    path.parent.mkdir(parents=True)
    path.parent.chmod(0o500)
    with pytest.raises(StoreError, match="cannot be opened"):
        Store(path, encoder="e")
    path.parent.chmod(0o700)


def test_a_closed_store_is_a_store_error(path: Path) -> None:
    store = Store(path, encoder="e")
    store.close()
    for use in (store.sequence, store.changes, lambda: store.add([item("1")]), lambda: store.remove(["1"])):
        with pytest.raises(StoreError, match="closed"):
            use()


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_what_was_acknowledged_survives_a_kill(path: Path) -> None:
    code = """
import sys
from pathlib import Path
import numpy as np
from coterie.store import Store, StoredItem
store = Store(Path(sys.argv[1]), encoder="e")
for number in range(100_000):
    store.add([StoredItem(str(number), "boot", np.ones(1, dtype=np.float32), {}, b"")])
    print(number, flush=True)
"""
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        acknowledged = [process.stdout.readline().strip() for _ in range(20)]
        process.send_signal(signal.SIGKILL)
        acknowledged += process.stdout.read().split()
    assert process.returncode == -signal.SIGKILL
    store = Store(path, encoder="e")
    assert len(acknowledged) >= 20
    assert set(acknowledged) <= set(ids(store))
    store.add([item("after")])
    assert "after" in ids(store)
