"""A request to add items that is made again changes nothing, whichever process takes it."""

from pathlib import Path

import numpy as np
import pytest

from coterie import receipts
from coterie.errors import QuotaError
from coterie.items import item_id
from coterie.receipts import Receipt
from coterie.store import Store, StoredItem, StoreOptions

FIRST = Receipt("key", "digest", "answer")


def item(name: str, label: str = "boot") -> StoredItem:
    embedding = np.eye(4, dtype=np.float32)[0]
    return StoredItem(item_id(name.encode()), label, embedding, {}, b"", name.encode())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "gallery.sqlite"


def test_a_receipt_is_kept_with_its_items_and_survives_a_restart(path: Path) -> None:
    store = Store(path, encoder="e")
    assert store.receipt("key") is None
    assert store.add([item("1")], FIRST) == FIRST
    store.close()
    assert Store(path, encoder="other").receipt("key") == FIRST


def test_the_same_key_adds_nothing_more_and_tells_the_first_receipt(path: Path) -> None:
    one, two = Store(path, encoder="e"), Store(path, encoder="e")
    one.add([item("1")], FIRST)
    one.remove([item("1").id])
    sequence = one.sequence()
    for store in (one, two):
        assert store.add([item("1"), item("2")], Receipt("key", "another")) == FIRST
    assert two.changes().items == () and two.sequence() == sequence
    assert not any(file.is_file() for file in (path.parent / "originals").rglob("*"))


def test_what_was_refused_leaves_no_receipt(path: Path) -> None:
    store = Store(path, encoder="e", options=StoreOptions(class_quota=1))
    with pytest.raises(QuotaError):
        store.add([item("1"), item("2")], FIRST)
    assert store.receipt("key") is None
    assert store.add([item("1")], FIRST) == FIRST


def test_receipts_are_forgotten_by_age_and_by_number(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, now = Store(path, encoder="e"), 1e9
    monkeypatch.setattr(receipts.time, "time", lambda: now)
    monkeypatch.setattr(receipts, "KEPT_RECEIPTS", 3)
    for number in range(5):
        now += 1
        store.add([item(str(number))], Receipt(str(number), "digest"))
    assert [number for number in range(5) if store.receipt(str(number))] == [2, 3, 4]
    now += receipts.KEPT_SECONDS - 1
    assert [number for number in range(5) if store.receipt(str(number))] == [4]
    assert store.add([item("0")], Receipt("2", "another")) == Receipt("2", "another")


def test_enrolled_items_are_told_from_the_bundles_own(path: Path) -> None:
    store = Store(path, encoder="e")
    assert store.enrolled_counts() == {}
    store.add([item("1"), item("2"), item("3", "shoe")])
    assert store.enrolled_counts() == {"boot": 2, "shoe": 1}
    assert store.is_enrolled(item("1").id) and not store.is_enrolled("of the bundle")
