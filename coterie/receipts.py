"""Receipts: which requests to add items were carried out, kept in the same transaction as the items.

A client that lost an answer sends its request again under the same key, and gets the first answer instead of a second
change. Receipts name neither items nor classes, so that what is removed leaves nothing behind in them.
"""

import sqlite3
import time
from dataclasses import dataclass

__all__ = ["KEPT_RECEIPTS", "KEPT_SECONDS", "TABLE", "Receipt", "find", "keep"]

# A retry comes within minutes; a day leaves room for a service that was down over night.
KEPT_SECONDS, KEPT_RECEIPTS = 24 * 3600.0, 10_000
TABLE = """
CREATE TABLE IF NOT EXISTS receipts (
    key TEXT PRIMARY KEY, request TEXT NOT NULL, answer TEXT NOT NULL, kept REAL NOT NULL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS receipts_by_time ON receipts (kept);
"""


@dataclass(frozen=True)
class Receipt:
    """A request that was carried out.

    Attributes:
        key: by which its sender names it.
        request: a digest of all that it asks for; another one under the same key is another request.
        answer: what of its answer cannot be found in the request itself.
    """

    key: str
    request: str
    answer: str = ""


def find(db: sqlite3.Connection, key: str) -> Receipt | None:
    """The receipt of this key, unless it is too old."""
    oldest = time.time() - KEPT_SECONDS
    row = db.execute("SELECT key, request, answer FROM receipts WHERE key = ? AND kept > ?", (key, oldest)).fetchone()
    return Receipt(*row) if row else None


def keep(db: sqlite3.Connection, receipt: Receipt) -> None:
    """Keep a receipt, within the transaction of what it is about, and drop those that are too old or too many."""
    now = time.time()
    db.execute("DELETE FROM receipts WHERE kept <= ?", (now - KEPT_SECONDS,))
    values = (receipt.key, receipt.request, receipt.answer, now)
    db.execute("INSERT OR REPLACE INTO receipts VALUES (?, ?, ?, ?)", values)
    newest = db.execute("SELECT kept FROM receipts ORDER BY kept DESC LIMIT 1 OFFSET ?", (KEPT_RECEIPTS,)).fetchone()
    if newest:
        db.execute("DELETE FROM receipts WHERE kept <= ?", newest)
