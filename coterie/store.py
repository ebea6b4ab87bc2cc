"""The gallery's durable changes: a log of additions and removals in SQLite.

Only what differs from the bundle's own gallery is kept here. A change is on disk (WAL, synchronous=FULL) before the
call returns; other processes see it at their next look at `sequence`.
"""

import json
import sqlite3
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coterie.errors import StoreError

__all__ = ["Changes", "Store", "StoredItem"]

SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS log (
    sequence INTEGER PRIMARY KEY AUTOINCREMENT,
    operation TEXT NOT NULL CHECK (operation IN ('add', 'remove')),
    id TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS items (
    id TEXT PRIMARY KEY,
    label TEXT NOT NULL,
    embedding BLOB NOT NULL,
    metadata TEXT NOT NULL,
    thumbnail BLOB NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS removed (id TEXT PRIMARY KEY) WITHOUT ROWID;
"""
BUSY_SECONDS = 5.0


@dataclass(frozen=True)
class StoredItem:
    """One labelled embedding as the store keeps it; `embedding` is float32 (d,) of unit length."""

    id: str
    label: str
    embedding: NDArray[np.float32]
    metadata: dict[str, Any]
    thumbnail: bytes


@dataclass(frozen=True)
class Changes:
    """What the store adds to and takes from a bundle's gallery, as of `sequence`."""

    sequence: int
    added: tuple[StoredItem, ...]
    removed: frozenset[str]


class Store:
    """A gallery's changes in one SQLite file, safe for many threads and processes.

    Args:
        path: the database; its folder is made if missing.
        encoder: identity of the encoder whose embeddings are kept, so that another's are never mixed in.

    Raises:
        StoreError: the file cannot be opened, is no store, or belongs to another encoder.
    """

    def __init__(self, path: Path, *, encoder: str) -> None:
        self.path = path
        self._lock = threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, timeout=BUSY_SECONDS, check_same_thread=False, isolation_level=None)
            self._use_wal()
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.executescript(SCHEMA)
            self._db.execute("INSERT OR IGNORE INTO meta VALUES ('encoder', ?)", (encoder,))
            (known,) = self._db.execute("SELECT value FROM meta WHERE key = 'encoder'").fetchone()
        except (OSError, sqlite3.Error) as error:
            raise StoreError(f"the gallery store {path} cannot be opened: {error}") from error
        if known != encoder:
            self._db.close()
            raise StoreError(
                f"the gallery store {path} was filled by another encoder: serve the bundle it belongs to, "
                "or give this one another state folder with COTERIE_STATE"
            )

    def sequence(self) -> int:
        """The number of the last change, 0 before the first."""
        return int(self._query("SELECT coalesce(max(sequence), 0) FROM log")[0][0])

    def changes(self) -> Changes:
        """Everything that is different from the bundle's gallery, read as of one moment."""
        with self._lock, self._transaction("BEGIN"):
            (sequence,) = self._db.execute("SELECT coalesce(max(sequence), 0) FROM log").fetchone()
            rows = self._db.execute(
                "SELECT id, label, embedding, metadata, thumbnail FROM items ORDER BY id"
            ).fetchall()
            removed = frozenset(identifier for (identifier,) in self._db.execute("SELECT id FROM removed"))
        added = tuple(
            StoredItem(identifier, label, np.frombuffer(blob, dtype="<f4"), json.loads(metadata), thumbnail)
            for identifier, label, blob, metadata, thumbnail in rows
        )
        return Changes(sequence, added, removed)

    def add(self, items: Sequence[StoredItem]) -> None:
        """Keep `items`; when this returns they survive a power cut. An item with a known id replaces it."""
        rows = [
            (item.id, item.label, item.embedding.astype("<f4").tobytes(), json.dumps(item.metadata), item.thumbnail)
            for item in items
        ]
        with self._lock, self._transaction("BEGIN IMMEDIATE"):
            self._db.executemany("INSERT OR REPLACE INTO items VALUES (?, ?, ?, ?, ?)", rows)
            self._db.executemany("DELETE FROM removed WHERE id = ?", [(item.id,) for item in items])
            self._db.executemany("INSERT INTO log (operation, id) VALUES ('add', ?)", [(item.id,) for item in items])

    def remove(self, ids: Sequence[str]) -> None:
        """Forget the items of these ids, whether added here or part of the bundle."""
        keys = [(identifier,) for identifier in ids]
        with self._lock, self._transaction("BEGIN IMMEDIATE"):
            self._db.executemany("DELETE FROM items WHERE id = ?", keys)
            self._db.executemany("INSERT OR IGNORE INTO removed VALUES (?)", keys)
            self._db.executemany("INSERT INTO log (operation, id) VALUES ('remove', ?)", keys)

    def close(self) -> None:
        with self._lock:
            self._db.close()

    def _use_wal(self) -> None:
        """Switch the file to write-ahead logging; SQLite itself does not wait here when two processes do so at once."""
        deadline = time.monotonic() + BUSY_SECONDS
        while True:
            try:
                self._db.execute("PRAGMA journal_mode = WAL")
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
            else:
                return

    def _query(self, statement: str) -> list[Any]:
        try:
            with self._lock:
                return self._db.execute(statement).fetchall()
        except sqlite3.Error as error:
            raise StoreError(f"the gallery store {self.path} cannot be read: {error}") from error

    def _transaction(self, begin: str) -> "_Transaction":
        return _Transaction(self._db, begin, self.path)


class _Transaction:
    """Commits at the end of the block, rolls back if it fails, and turns SQLite's errors into the project's."""

    def __init__(self, db: sqlite3.Connection, begin: str, path: Path) -> None:
        self._db, self._begin, self._path = db, begin, path

    def __enter__(self) -> None:
        try:
            self._db.execute(self._begin)
        except sqlite3.Error as error:
            raise StoreError(f"the gallery store {self._path} is busy or cannot be written: {error}") from error

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is None:
            try:
                self._db.execute("COMMIT")
            except sqlite3.Error as failure:
                error = failure
        # A full disk has already rolled back by itself.
        if self._db.in_transaction:
            self._db.execute("ROLLBACK")
        if isinstance(error, sqlite3.Error):
            raise StoreError(f"the gallery store {self._path} cannot be used: {error}") from error
