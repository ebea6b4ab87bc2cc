"""Group commit: one thread writes for all threads of a process, as many changes in one transaction as are waiting.

A disk takes as long to sync one change as a hundred. Each caller returns when its own change is durable, and one that
fails takes no other with it.
"""

import queue
import sqlite3
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from coterie.errors import StoreError

__all__ = ["Committer"]

Result = TypeVar("Result")

MOST_TOGETHER = 256
# How long to wait for readers of the log before erased content is cut off it, and how soon to try again.
ERASING_SECONDS = 0.5


@dataclass
class _Request:
    change: Callable[[sqlite3.Connection], Any]
    erasing: Callable[[], bool]
    result: Any = None
    failure: Exception | None = None
    done: Future[Any] = field(default_factory=Future)

    @property
    def erases(self) -> bool:
        """Whether what it deleted must be cut off the log; known once the change has run."""
        return self.failure is None and self.erasing()

    def settle(self) -> None:
        """Let the caller go on."""
        if self.failure is None:
            self.done.set_result(self.result)
        else:
            self.done.set_exception(self.failure)


class Committer:
    """The writer's side of a SQLite file in WAL mode.

    Args:
        connect: opens the connection, which belongs to the writing thread.
        translate: turns SQLite's errors into the project's.
    """

    def __init__(
        self, connect: Callable[[], sqlite3.Connection], translate: Callable[[sqlite3.Error], StoreError]
    ) -> None:
        self._connect, self._translate = connect, translate
        self._requests: queue.SimpleQueue[_Request | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._unerased = False

    def run(
        self, change: Callable[[sqlite3.Connection], Result], *, erases: Callable[[], bool] = lambda: False
    ) -> Result:
        """Run `change` within a transaction; what it returned, once that is on disk.

        Args:
            erases: asked after the change whether to cut what it deleted off the log. While a reader needs the log,
                this is tried again in the background.

        Raises:
            StoreError: the transaction failed, or the store is closed.
            and what `change` raises; it has then changed nothing.
        """
        request = _Request(change, erases)
        with self._lock:
            if self._closed:
                raise StoreError("the gallery store is closed")
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="gallery-writer", daemon=True)
                self._thread.start()
            self._requests.put(request)
        return cast(Result, request.done.result())

    def close(self) -> None:
        """End the thread, once what was asked for is done."""
        with self._lock:
            self._closed = True
            thread = self._thread
            self._requests.put(None)
        if thread is not None:
            thread.join()

    def _work(self) -> None:
        db: sqlite3.Connection | None = None
        while (batch := self._next_batch()) is not None:
            try:
                db = db or self._connect()
            except Exception as error:
                self._fail(batch, error)
            else:
                self._commit(db, batch)
            for request in batch:
                if not request.erases:
                    request.settle()
                self._unerased |= request.erases
            if db is not None and self._unerased:
                self._erase(db)
            for request in batch:
                if request.erases:
                    request.settle()
        if db is not None:
            db.close()

    def _next_batch(self) -> list[_Request] | None:
        """All that waits; nothing if it is time to try to erase again; None at the end."""
        try:
            batch = [self._requests.get(timeout=2 * ERASING_SECONDS if self._unerased else None)]
        except queue.Empty:
            return []
        while batch[-1] is not None and len(batch) < MOST_TOGETHER:
            try:
                batch.append(self._requests.get_nowait())
            except queue.Empty:
                break
        if batch[-1] is None:
            self._requests.put(None)  # for the next look
            batch.pop()
        return cast(list[_Request], batch) or None

    def _commit(self, db: sqlite3.Connection, batch: Sequence[_Request]) -> None:
        if not batch:
            return
        try:
            db.execute("BEGIN IMMEDIATE")
        except sqlite3.Error as error:
            self._fail(batch, error)
            return
        try:
            for request in batch:
                _apply(db, request)
            db.execute("COMMIT")
        except Exception as error:  # whatever it is, the thread goes on: its callers wait for it
            if db.in_transaction:
                db.execute("ROLLBACK")
            # A full disk, say: which of them was too large shows when each is alone.
            if len(batch) == 1:
                self._fail(batch, error)
            else:
                for request in batch:
                    self._commit(db, [request])
            return
        for request in batch:
            if isinstance(request.failure, sqlite3.Error):
                request.failure = self._translate(request.failure)

    def _fail(self, batch: Sequence[_Request], error: Exception) -> None:
        for request in batch:
            request.failure = self._translate(error) if isinstance(error, sqlite3.Error) else error

    def _erase(self, db: sqlite3.Connection) -> None:
        try:
            (patience,) = db.execute("PRAGMA busy_timeout").fetchone()
            db.execute(f"PRAGMA busy_timeout = {int(ERASING_SECONDS * 1000)}")
            (busy, _, _) = db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            db.execute(f"PRAGMA busy_timeout = {patience}")
            self._unerased = bool(busy)
        except sqlite3.Error:  # the change itself is durable; a full disk is told to whoever writes next
            self._unerased = True


def _apply(db: sqlite3.Connection, request: _Request) -> None:
    """Run one change so that it alone is undone if it fails.

    Raises:
        what the change raised, if SQLite has then given up the whole transaction.
    """
    request.result = request.failure = None
    db.execute("SAVEPOINT change")
    try:
        request.result = request.change(db)
    except Exception as error:
        if not db.in_transaction:
            raise
        request.failure = error
        db.execute("ROLLBACK TO change")
    db.execute("RELEASE change")
