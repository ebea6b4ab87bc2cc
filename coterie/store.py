"""The gallery's durable changes in one SQLite file, with the enrolled images beside it.

Readers have a connection of their own and never wait for a writer (WAL); all writing of a process is one thread's
(coterie.committer). A row holds the number of its last change, so there is no log that grows: a change replaces what
was there, and only the ids of removed items stay behind. What is removed is erased: SQLite overwrites it, and it is
cut off the write-ahead log.
"""

import json
import sqlite3
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coterie import receipts
from coterie import store_schema as schema
from coterie.backup import back_up
from coterie.changes import Changes, Edit, KeptItem, Lacking, StoredItem
from coterie.committer import Committer
from coterie.errors import CoterieError, DataError, QuotaError, StoreBusyError, StoreError
from coterie.originals import Originals
from coterie.receipts import Receipt

__all__ = ["CLASS_QUOTA", "Changes", "Edit", "Receipt", "Store", "StoreOptions", "StoredItem"]

CLASS_QUOTA = 10_000
# Of removed items that the bundle never had, so many ids are kept for other processes to learn of.
TOMBSTONES = 10_000


@dataclass(frozen=True)
class StoreOptions:
    """How a store is kept.

    Attributes:
        originals: keep the bytes of enrolled images.
        class_quota: how many enrolled items a class may have.
        busy_seconds: how long to wait for another process that writes.
    """

    originals: bool = True
    class_quota: int = CLASS_QUOTA
    busy_seconds: float = 5.0


class Store:
    """A gallery's changes in one SQLite file; a `coterie.changes.GalleryStore`.

    Args:
        path: the database; its folder is made if missing. Originals lie in `originals/` beside it.
        encoder: identity of the encoder whose embeddings are meant. Each encoder has its own, so that processes with
            different ones can share a store.

    Raises:
        StoreError: the file cannot be opened or is no store; StoreBusyError: another process holds it.
    """

    def __init__(self, path: Path, *, encoder: str, options: StoreOptions = StoreOptions()) -> None:
        self.path, self._options = path, options
        self._originals = Originals(path.with_name("originals"))
        self._lock = threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._reader = self._connect()
            try:
                self._encoder = schema.prepare(self._reader, encoder)
                self._reader.execute("PRAGMA query_only = ON")
            except sqlite3.Error:
                self._reader.close()
                raise
        except sqlite3.Error as error:
            raise self._error(error, "opened") from error
        except OSError as error:
            raise StoreError(f"the gallery store {path} cannot be opened: {error.strerror or error}") from error
        self._committer = Committer(self._connect, lambda error: self._error(error, "written"))
        self._sweep()

    def version(self) -> int:
        return int(self._read("PRAGMA data_version")[0][0])

    def sequence(self) -> int:
        """The number of the last change, 0 before the first."""
        return int(self._read("SELECT sequence FROM counter")[0][0])

    def changes(self, since: int = 0) -> Changes:
        with self._lock:
            try:
                self._reader.execute("BEGIN")
                try:
                    sequence, horizon = self._reader.execute("SELECT sequence, horizon FROM counter").fetchone()
                    whole = since < horizon
                    since = 0 if whole else since
                    rows = self._reader.execute(schema.CHANGED, (self._encoder, since)).fetchall()
                    gone = self._reader.execute("SELECT id FROM removed WHERE sequence > ?", (since,)).fetchall()
                finally:
                    self._reader.execute("COMMIT")
            except sqlite3.Error as error:
                raise self._error(error, "read") from error
        items = tuple(
            KeptItem(
                identifier,
                label,
                json.loads(metadata),
                None if embedding is None else np.frombuffer(embedding, dtype="<f4"),
            )
            for identifier, label, metadata, embedding in rows
        )
        return Changes(sequence, whole, items, frozenset(identifier for (identifier,) in gone))

    def add(self, items: Sequence[StoredItem], receipt: Receipt | None = None) -> Receipt | None:
        if not items:
            return None
        originals = [
            self._originals.write(item.original) if self._options.originals and item.original is not None else None
            for item in items
        ]
        metadata = [_as_json(item.id, item.metadata) for item in items]

        replaces = False

        def change(db: sqlite3.Connection) -> Receipt | None:
            nonlocal replaces
            if receipt is not None:
                if known := receipts.find(db, receipt.key):
                    return known
                receipts.keep(db, receipt)
            # Whoever sweeps or removes deletes files within a transaction: from here on they stay.
            for item, sha256 in zip(items, originals, strict=True):
                if sha256 is not None and not self._originals.has(sha256):
                    self._originals.write(item.original or b"")
            numbers = schema.next_numbers(db, len(items))
            replaces = any(db.execute("SELECT 1 FROM items WHERE id = ?", (item.id,)).fetchone() for item in items)
            rows = [
                (item.id, number, item.label, text, sha256)
                for item, number, text, sha256 in zip(items, numbers, metadata, originals, strict=True)
            ]
            db.executemany(schema.ADD_ITEM, rows)
            embeddings = [(item.id, self._encoder, item.embedding.astype("<f4").tobytes()) for item in items]
            db.executemany("INSERT OR REPLACE INTO embeddings VALUES (?, ?, ?)", embeddings)
            db.executemany("INSERT OR REPLACE INTO thumbnails VALUES (?, ?)", [(i.id, i.thumbnail) for i in items])
            db.executemany("DELETE FROM removed WHERE id = ?", [(item.id,) for item in items])
            self._hold_quota(db, {item.label for item in items})
            return receipt

        try:
            kept = self._committer.run(change, erases=lambda: replaces)  # what an item's metadata said before, too
        except CoterieError:
            # What was refused must not fill the disk either.
            self._delete_originals([sha256 for sha256 in originals if sha256 is not None], must=False)
            raise
        if kept is not receipt:
            self._delete_originals([sha256 for sha256 in originals if sha256 is not None], must=False)
        return kept

    def receipt(self, key: str) -> Receipt | None:
        with self._lock:
            try:
                return receipts.find(self._reader, key)
            except sqlite3.Error as error:
                raise self._error(error, "read") from error

    def enrolled_counts(self) -> dict[str, int]:
        return dict(self._read("SELECT label, count(*) FROM items WHERE NOT bundled GROUP BY label"))

    def is_enrolled(self, identifier: str) -> bool:
        return bool(self._read("SELECT 1 FROM items WHERE id = ? AND NOT bundled", (identifier,)))

    def edit(self, edits: Sequence[Edit]) -> None:
        if not edits:
            return
        metadata = [_as_json(edit.id, edit.metadata) for edit in edits]

        def change(db: sqlite3.Connection) -> None:
            for edit, number, text in zip(edits, schema.next_numbers(db, len(edits)), metadata, strict=True):
                if db.execute("SELECT 1 FROM removed WHERE id = ?", (edit.id,)).fetchone():
                    raise DataError(f"the gallery has no item {edit.id}: it was removed")
                db.execute(schema.EDIT_ITEM, (edit.id, number, edit.label, text))
            self._hold_quota(db, {edit.label for edit in edits})

        # What the metadata said before is erased too.
        self._committer.run(change, erases=lambda: True)

    def remove(self, ids: Sequence[str], *, bundled: Collection[str] = ()) -> tuple[str, ...]:
        if not ids:
            return ()

        def change(db: sqlite3.Connection) -> tuple[list[str], list[str]]:
            keys = [(identifier,) for identifier in dict.fromkeys(ids)]
            known = [db.execute("SELECT original FROM items WHERE id = ?", key).fetchone() for key in keys]
            hidden = [db.execute("SELECT 1 FROM removed WHERE id = ?", key).fetchone() for key in keys]
            there = [
                identifier
                for (identifier,), item, gone in zip(keys, known, hidden, strict=True)
                if item or (identifier in bundled and not gone)
            ]
            for table in ("items", "embeddings", "thumbnails"):
                db.executemany(f"DELETE FROM {table} WHERE id = ?", keys)
            rows = [
                (identifier, number, identifier in bundled)
                for (identifier,), number in zip(keys, schema.next_numbers(db, len(keys)), strict=True)
            ]
            db.executemany("INSERT OR REPLACE INTO removed VALUES (?, ?, ?)", rows)
            schema.forget_tombstones(db, TOMBSTONES)
            return there, [row[0] for row in known if row and row[0]]

        there, originals = self._committer.run(change, erases=lambda: True)
        self._delete_originals(originals)
        return tuple(there)

    def thumbnail(self, identifier: str) -> bytes:
        rows = self._read("SELECT thumbnail FROM thumbnails WHERE id = ?", (identifier,))
        return bytes(rows[0][0]) if rows else b""

    def original(self, identifier: str) -> bytes | None:
        rows = self._read("SELECT original FROM items WHERE id = ?", (identifier,))
        return self._originals.read(rows[0][0]) if rows and rows[0][0] else None

    def lacking(self) -> list[Lacking]:
        return [Lacking(*row) for row in self._read(schema.LACKING, (self._encoder,))]

    def complete(self, embeddings: Mapping[str, NDArray[np.float32]]) -> None:
        rows = [
            (self._encoder, embedding.astype("<f4").tobytes(), identifier)
            for identifier, embedding in embeddings.items()
        ]
        # An item may have been removed in the meantime.
        self._committer.run(lambda db: db.executemany(schema.COMPLETE, rows) and None)

    def forget_encoders(self) -> None:
        self._committer.run(lambda db: db.execute(schema.FORGET_ENCODERS, (self._encoder,)) and None)

    def backup(self, folder: Path, progress: Callable[[int, int], None] | None = None) -> None:
        try:
            back_up(self.path, self._originals, folder, progress)
        except sqlite3.Error as error:
            raise self._error(error, f"copied to {folder}") from error

    def close(self) -> None:
        self._committer.close()
        with self._lock:
            self._reader.close()

    def _connect(self) -> sqlite3.Connection:
        return schema.connect(self.path, self._options.busy_seconds)

    def _read(self, statement: str, values: Sequence[Any] = ()) -> list[Any]:
        with self._lock:
            try:
                return self._reader.execute(statement, values).fetchall()
            except sqlite3.Error as error:
                raise self._error(error, "read") from error

    def _hold_quota(self, db: sqlite3.Connection, labels: Collection[str]) -> None:
        for label in sorted(labels):
            (count,) = db.execute("SELECT count(*) FROM items WHERE label = ? AND NOT bundled", (label,)).fetchone()
            if count > self._options.class_quota:
                raise QuotaError(
                    f"class {label!r} would have {count:,} enrolled items, and COTERIE_CLASS_QUOTA allows "
                    f"{self._options.class_quota:,}: remove some of them, or raise it"
                )

    def _delete_originals(self, names: Sequence[str], *, must: bool = True) -> None:
        """Delete the files that no row names; if they need not go now, the next opening may do it."""
        if not names:
            return

        def change(db: sqlite3.Connection) -> None:
            # Within a write transaction, so that nobody can be adding the same image meanwhile.
            for name in names:
                if not db.execute("SELECT 1 FROM items WHERE original = ?", (name,)).fetchone():
                    self._originals.delete(name)

        try:
            self._committer.run(change)
        except StoreError:
            if must:
                raise

    def _sweep(self) -> None:
        """Remove what a process that was killed half way has left: files without a row, and erased rows in the log."""
        wanted = {name for (name,) in self._read("SELECT original FROM items WHERE original IS NOT NULL")}
        self._delete_originals([name for name in self._originals.names() if name not in wanted], must=False)
        self._originals.sweep_abandoned()

    def _error(self, error: sqlite3.Error, done: str) -> StoreError:
        if getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            return StoreBusyError(f"the gallery store {self.path} is held by another process: try again in a moment")
        return StoreError(f"the gallery store {self.path} cannot be {done}: {error}")


def _as_json(identifier: str, metadata: Mapping[str, Any]) -> str:
    try:
        return json.dumps(metadata, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise DataError(f"the metadata of item {identifier} cannot be kept as JSON: {error}") from error
