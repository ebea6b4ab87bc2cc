"""The tables of a SQLite store, and how a connection to them is opened."""

import sqlite3
import time
from pathlib import Path

from coterie import receipts

__all__ = [
    "ADD_ITEM",
    "CHANGED",
    "COMPLETE",
    "EDIT_ITEM",
    "FORGET_ENCODERS",
    "LACKING",
    "connect",
    "forget_tombstones",
    "next_numbers",
    "prepare",
]

FORMAT = 1
LOG_BYTES = 16 * 2**20  # of the log that stays, once a reader who kept it from being reused is done
TABLES = """
BEGIN IMMEDIATE;
-- The number of the last change; removals up to `horizon` may have been forgotten.
CREATE TABLE counter (sequence INTEGER NOT NULL, horizon INTEGER NOT NULL);
INSERT INTO counter VALUES (0, 0);
-- `used` grows each time that another encoder takes over.
CREATE TABLE encoders (number INTEGER PRIMARY KEY, identity TEXT NOT NULL UNIQUE, used INTEGER NOT NULL);
-- `bundled`: the bundle's own item, under another label or with other metadata. `original`: sha256 of the image.
CREATE TABLE items (
    id TEXT PRIMARY KEY,
    sequence INTEGER NOT NULL UNIQUE,
    label TEXT NOT NULL,
    metadata TEXT NOT NULL,
    original TEXT,
    bundled INTEGER NOT NULL
) WITHOUT ROWID;
CREATE INDEX items_by_label ON items (label) WHERE NOT bundled;
CREATE INDEX items_by_original ON items (original) WHERE original IS NOT NULL;
CREATE TABLE embeddings (id TEXT NOT NULL, encoder INTEGER NOT NULL, embedding BLOB NOT NULL, UNIQUE (id, encoder));
CREATE TABLE thumbnails (id TEXT PRIMARY KEY, thumbnail BLOB NOT NULL);
CREATE TABLE removed (id TEXT PRIMARY KEY, sequence INTEGER NOT NULL, bundled INTEGER NOT NULL) WITHOUT ROWID;
CREATE INDEX removed_by_sequence ON removed (sequence);
PRAGMA user_version = 1;
COMMIT;
"""

ADD_ITEM = """
INSERT INTO items VALUES (?, ?, ?, ?, ?, 0) ON CONFLICT (id) DO UPDATE SET
    sequence = excluded.sequence, label = excluded.label, metadata = excluded.metadata,
    original = coalesce(excluded.original, original), bundled = 0
"""
EDIT_ITEM = """
INSERT INTO items VALUES (?, ?, ?, ?, NULL, 1) ON CONFLICT (id) DO UPDATE SET
    sequence = excluded.sequence, label = excluded.label, metadata = excluded.metadata
"""
CHANGED = """
SELECT items.id, label, metadata, embedding
FROM items LEFT JOIN embeddings ON embeddings.id = items.id AND encoder = ?
WHERE sequence > ? ORDER BY sequence
"""
LACKING = """
SELECT id, label, original FROM items
WHERE NOT bundled AND NOT EXISTS (SELECT 1 FROM embeddings WHERE id = items.id AND encoder = ?) ORDER BY sequence
"""
COMPLETE = "INSERT OR IGNORE INTO embeddings SELECT id, ?, ? FROM items WHERE id = ?"
# The last but one stays: for processes that still run it, and for going back to it.
FORGET_ENCODERS = """
DELETE FROM embeddings
WHERE encoder NOT IN (SELECT number FROM encoders ORDER BY used DESC LIMIT 2)
    AND id IN (SELECT id FROM embeddings WHERE encoder = ?)
    AND id IN (SELECT id FROM items WHERE original IS NOT NULL)
"""


def connect(path: Path, busy_seconds: float) -> sqlite3.Connection:
    """A connection whose commits survive a power cut and whose deletions overwrite what they delete."""
    db = sqlite3.connect(path, timeout=busy_seconds, check_same_thread=False, isolation_level=None)
    try:
        _use_wal(db, busy_seconds)
        db.execute("PRAGMA synchronous = FULL")
        db.execute("PRAGMA secure_delete = ON")
        db.execute(f"PRAGMA journal_size_limit = {LOG_BYTES}")
    except BaseException:
        db.close()
        raise
    return db


def prepare(db: sqlite3.Connection, encoder: str) -> int:
    """Make the tables if there are none; the number under which embeddings of `encoder` are kept.

    Raises:
        sqlite3.Error: the file is no database, is busy, or holds something else.
    """
    if _format(db) == 0:
        _make_tables(db)
    if _format(db) != FORMAT:
        raise sqlite3.DatabaseError(
            f"it has the format {_format(db)}, and this version reads {FORMAT}: "
            "give another state folder with COTERIE_STATE, or use the version that wrote it"
        )
    db.executescript(receipts.TABLE)
    _cut_log(db)
    newest = db.execute("SELECT identity, number FROM encoders ORDER BY used DESC LIMIT 1").fetchone()
    if newest is None or newest[0] != encoder:
        db.execute(
            "INSERT INTO encoders (identity, used) SELECT ?, coalesce(max(used), 0) + 1 FROM encoders WHERE true "
            "ON CONFLICT (identity) DO UPDATE SET used = excluded.used",
            (encoder,),
        )
    return int(db.execute("SELECT number FROM encoders WHERE identity = ?", (encoder,)).fetchone()[0])


def next_numbers(db: sqlite3.Connection, count: int) -> range:
    """Take the next `count` numbers of the sequence, within a transaction."""
    db.execute("UPDATE counter SET sequence = sequence + ?", (count,))
    (last,) = db.execute("SELECT sequence FROM counter").fetchone()
    return range(last - count + 1, last + 1)


def forget_tombstones(db: sqlite3.Connection, most: int) -> None:
    """Keep the `most` newest ids of removed items that the bundle never had; readers who are behind read all anew."""
    old = db.execute(
        "SELECT sequence FROM removed WHERE NOT bundled ORDER BY sequence DESC LIMIT 1 OFFSET ?", (most,)
    ).fetchone()
    if old:
        db.execute("DELETE FROM removed WHERE NOT bundled AND sequence <= ?", old)
        db.execute("UPDATE counter SET horizon = ?", old)


def _use_wal(db: sqlite3.Connection, busy_seconds: float) -> None:
    """Switch the file to write-ahead logging; SQLite itself does not wait here when two processes do so at once."""
    deadline = time.monotonic() + busy_seconds
    while True:
        try:
            db.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
        else:
            return


def _format(db: sqlite3.Connection) -> int:
    (found,) = db.execute("PRAGMA user_version").fetchone()
    return int(found)


def _make_tables(db: sqlite3.Connection) -> None:
    try:
        db.executescript(TABLES)
    except sqlite3.Error:
        if db.in_transaction:
            db.execute("ROLLBACK")
        if _format(db) == 0:  # else another process was quicker
            raise


def _cut_log(db: sqlite3.Connection) -> None:
    """Cut erased rows off the log that a process left when it was killed, unless somebody is using the log."""
    (patience,) = db.execute("PRAGMA busy_timeout").fetchone()
    db.execute("PRAGMA busy_timeout = 0")
    db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    db.execute(f"PRAGMA busy_timeout = {patience}")
