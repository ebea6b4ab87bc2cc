"""Group commit: many callers, one transaction, and nobody pays for another's mistake."""

import sqlite3
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from coterie import committer as committer_module
from coterie.committer import Committer
from coterie.errors import DataError, StoreError
from coterie.store_schema import connect

Change = Callable[[sqlite3.Connection], Any]


def insert(value: str) -> Change:
    return lambda db: db.execute("INSERT INTO t VALUES (?)", (value,)).lastrowid


def fail(error: Exception) -> Change:
    def change(db: sqlite3.Connection) -> None:
        db.execute("INSERT INTO t VALUES ('half done')")
        raise error

    return change


class Harness:
    """A committer whose statements are listed, and whose thread can be held up."""

    def __init__(self, path: Path) -> None:
        self.path, self.statements = path, list[str]()
        with sqlite3.connect(path) as db:
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("CREATE TABLE t (value TEXT NOT NULL UNIQUE)")
        self.committer = Committer(self.connect, lambda error: StoreError(f"translated: {error}"))
        self.pool = ThreadPoolExecutor(300)

    def connect(self) -> sqlite3.Connection:
        db = connect(self.path, 5)
        db.execute("PRAGMA max_page_count = 20")
        db.set_trace_callback(self.statements.append)
        return db

    def rows(self) -> list[str]:
        return [value for (value,) in sqlite3.connect(self.path).execute("SELECT value FROM t ORDER BY value")]

    def together(self, *changes: Change, **options: bool) -> list[Future[Any]]:
        """Have all of `changes` wait at once, then let them go."""
        started, release = threading.Event(), threading.Event()

        def hold(_: sqlite3.Connection) -> None:
            started.set()
            release.wait(10)

        held = self.pool.submit(self.committer.run, hold)
        started.wait(10)
        futures = [self.pool.submit(self.committer.run, change, **options) for change in changes]
        while self.committer._requests.qsize() < len(changes):
            threading.Event().wait(0.001)
        self.statements.clear()
        release.set()
        held.result(10)
        for future in futures:
            future.exception(10)
        return futures

    def count(self, statement: str) -> int:
        return sum(line.startswith(statement) for line in self.statements)


@pytest.fixture
def harness(tmp_path: Path) -> Iterator[Harness]:
    harness = Harness(tmp_path / "db.sqlite")
    yield harness
    harness.committer.close()
    harness.pool.shutdown()


def test_what_a_change_returns_comes_back_when_it_is_durable(harness: Harness) -> None:
    assert harness.committer.run(insert("a")) == 1
    assert harness.rows() == ["a"]


def test_changes_that_wait_are_committed_together(harness: Harness) -> None:
    futures = harness.together(*(insert(f"{number:03}") for number in range(50)))
    assert sorted(future.result() for future in futures) == list(range(1, 51))
    assert len(harness.rows()) == 50
    assert harness.count("COMMIT") == 2  # the one that held the thread up, and all the others


@pytest.mark.parametrize("error", [DataError("no"), ValueError("no"), KeyError("no")])
def test_a_change_that_fails_takes_no_other_with_it(harness: Harness, error: Exception) -> None:
    before, bad, after = harness.together(insert("before"), fail(error), insert("after"))
    assert harness.rows() == ["after", "before"]
    assert bad.exception() is error
    assert before.exception() is after.exception() is None
    assert harness.count("COMMIT") == 2


def test_what_the_database_refuses_is_translated(harness: Harness) -> None:
    first, second = harness.together(insert("same"), insert("same"))
    errors = [future.exception() for future in (first, second) if future.exception()]
    assert [str(error) for error in errors] == ["translated: UNIQUE constraint failed: t.value"]
    assert harness.rows() == ["same"]


def test_one_that_is_too_large_for_the_disk_fails_alone(harness: Harness) -> None:
    large = "x" * 1_000_000
    before, bad, after = harness.together(insert("before"), insert(large), insert("after"))
    assert harness.rows() == ["after", "before"]
    assert "full" in str(bad.exception())
    assert before.exception() is after.exception() is None


def test_a_commit_that_fails_is_tried_again_one_by_one(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    def give_up_everything(db: sqlite3.Connection) -> None:
        db.execute("ROLLBACK")  # as SQLite does by itself for some errors
        raise sqlite3.OperationalError("disk I/O error")

    before, bad, after = harness.together(insert("before"), give_up_everything, insert("after"))
    assert harness.rows() == ["after", "before"]
    assert str(bad.exception()) == "translated: disk I/O error"
    assert before.exception() is after.exception() is None


def test_a_database_that_cannot_be_opened_is_told_to_each_and_tried_again(harness: Harness) -> None:
    working = harness.committer._connect
    harness.committer._connect = lambda: sqlite3.connect(harness.path / "no folder")
    with pytest.raises(StoreError, match="translated: unable to open"):
        harness.committer.run(insert("a"))
    harness.committer._connect = working
    harness.committer.run(insert("b"))
    assert harness.rows() == ["b"]


def test_what_was_erased_is_cut_off_the_log_before_the_caller_goes_on(harness: Harness) -> None:
    harness.committer.run(insert("a"))
    log = harness.path.with_name("db.sqlite-wal")
    assert log.stat().st_size > 0
    harness.committer.run(lambda db: db.execute("DELETE FROM t") and None, erases=lambda: True)
    assert log.stat().st_size == 0


def test_what_a_reader_still_needs_is_erased_when_it_is_done(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(committer_module, "ERASING_SECONDS", 0.01)
    harness.committer.run(insert("a"))
    reader = sqlite3.connect(harness.path, isolation_level=None)
    reader.execute("BEGIN")
    assert reader.execute("SELECT * FROM t").fetchall() == [("a",)]
    harness.committer.run(lambda db: db.execute("DELETE FROM t") and None, erases=lambda: True)
    assert harness.rows() == []
    log = harness.path.with_name("db.sqlite-wal")
    assert log.stat().st_size > 0
    reader.execute("COMMIT")
    while log.stat().st_size:  # until the test's time-out; nobody writes, the thread tries by itself
        threading.Event().wait(0.001)


def test_closing_finishes_what_was_asked_for_and_refuses_more(harness: Harness) -> None:
    futures = harness.together(*(insert(f"{number:03}") for number in range(20)))
    harness.committer.close()
    assert all(future.exception() is None for future in futures)
    with pytest.raises(StoreError, match="closed"):
        harness.committer.run(insert("late"))
    harness.committer.close()
