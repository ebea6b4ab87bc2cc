"""`coterie enroll`, against a real service in this process."""

import csv
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from coterie.client import Client
from coterie.items import item_id
from coterie.store import StoreOptions
from coterie_cli.main import main

PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture
def tree(digit_tree_of, tmp_path):
    """50 images each of 8 and 9."""
    return digit_tree_of(tmp_path / "new", classes=(8, 9), per_class=50, skip=100)


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("COTERIE_KEY", raising=False)


class Gate:
    """Middleware that lets `passes` requests for examples through; then it refuses with `status`, or hangs.

    `closed` is set when it has held one up, and those it let through have been answered.
    """

    def __init__(self, app, passes, status=None):
        self.app, self.left, self.status = app, passes, status
        self.inside, self.closed = 0, threading.Event()

    async def __call__(self, scope, receive, send):
        if not scope.get("path", "").endswith("/examples"):
            await self.app(scope, receive, send)
            return
        self.left -= 1
        if self.left >= 0:
            self.inside += 1
            await self.app(scope, receive, send)
            self.inside -= 1
            self._note()
            return
        self._note()
        if self.status is None:
            while (await receive())["type"] != "http.disconnect":
                pass
            return
        await send({"type": "http.response.start", "status": self.status, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    def _note(self):
        if self.left < 0 and not self.inside:
            self.closed.set()


def counts(url):
    with Client(url) as client:
        return {entry.label: entry.enrolled for entry in client.classes() if entry.enrolled}


def error_line(err):
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in err, err
    return lines[0]


def test_a_tree_is_enrolled_with_paths_and_the_same_again_sends_nothing(coterie, service_of, tiny_bundle, tree):
    url = service_of(tiny_bundle)
    code, out, _ = coterie("enroll", tree, "--url", url)
    assert (code, "Enrolled 100 images." in out) == (0, True)
    assert counts(url) == {"8": 50, "9": 50}
    file = sorted((tree / "8").iterdir())[7]
    with Client(url) as client:
        item = client.item(item_id(file.read_bytes()))
    assert item.metadata == {"path": f"8/{file.name}"}
    code, out, _ = coterie("enroll", tree, "--url", url)
    assert (code, "Enrolled 0 images; 100 were there already." in out) == (0, True)
    assert not tree.with_name("new.rejects.csv").exists()


def test_tables_loose_folders_and_single_files(coterie, service_of, tiny_bundle, tree, tmp_path):
    url = service_of(tiny_bundle)
    files = [sorted((tree / name).iterdir()) for name in "89"]
    mixed = [file for pair in zip(*files, strict=True) for file in pair]
    with (tmp_path / "table.csv").open("w", newline="") as out:
        csv.writer(out).writerows([("path", "label"), *((f, f"c{f.parent.name}") for f in mixed[:90])])
    coterie("enroll", tmp_path / "table.csv", "--url", url)
    table = pa.table({"image": [file.read_bytes() for file in mixed[90:96]], "label": ["parquet"] * 6})
    pq.write_table(table, tmp_path / "table.parquet")
    coterie("enroll", tmp_path / "table.parquet", "--url", url)
    (tmp_path / "loose").mkdir()
    for file in mixed[96:99]:
        shutil.copy(file, tmp_path / "loose")
    coterie("enroll", tmp_path / "loose", "--url", url, "--label", "loose one")
    coterie("enroll", mixed[99], "--url", url, "--label", "größe")
    assert counts(url) == {"c8": 45, "c9": 45, "parquet": 6, "loose one": 3, "größe": 1}


def test_images_that_cannot_be_used_are_listed_with_reasons(coterie, service_of, tiny_bundle, tree):
    url = service_of(tiny_bundle)
    (tree / "8" / "broken, or so.png").write_bytes(b"no image")
    first = sorted((tree / "9").iterdir())[0]
    shutil.copy(first, tree / "9" / "twice.png")
    (tree / ("x" * 129)).mkdir()
    (tree / ("x" * 129) / "a.png").write_bytes(b"x")
    code, out, err = coterie("enroll", tree, "--url", url)
    assert (code, "Enrolled 100 images." in out) == (0, True)
    assert "3 images were left out" in err
    with tree.with_name("new.rejects.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    reasons = {row["path"]: row["reason"] for row in rows}
    assert len(rows) == 3
    assert "not an image" in reasons["8/broken, or so.png"]
    assert reasons["9/twice.png"] == f"the same bytes as 9/{first.name}"
    assert "longer than 128 bytes" in reasons["x" * 129 + "/a.png"]


def test_the_list_of_rejects_may_lie_elsewhere_and_nothing_enrolled_is_exit_2(
    coterie, service_of, tiny_bundle, tmp_path
):
    (tmp_path / "bad.png").write_bytes(b"no image")
    url = service_of(tiny_bundle)
    listed = tmp_path / "elsewhere.csv"
    code, _, err = coterie("enroll", tmp_path / "bad.png", "--url", url, "--label", "a", "--rejects", listed)
    assert code == 2 and "none of the 1 images" in error_line(err) and "elsewhere.csv" in error_line(err)
    assert 'bad.png,"not an image in' in listed.read_text()


def test_a_service_that_fails_half_way_is_one_line_and_the_same_command_goes_on(coterie, service_of, tiny_bundle, tree):
    bad = service_of(tiny_bundle, wrap=lambda app: Gate(app, 2, 500))
    code, _, err = coterie("enroll", tree, "--url", bad)
    assert code == 2 and "answered 500" in error_line(err)
    done = sum(counts(bad).values())
    assert 0 < done < 100
    url = service_of(tiny_bundle)  # on the same state folder
    code, out, _ = coterie("enroll", tree, "--url", url)
    assert (code, f"Enrolled {100 - done} images; {done} were there already." in out) == (0, True)
    assert counts(url) == {"8": 50, "9": 50}


def test_killed_half_way_the_same_command_goes_on(coterie, service_of, tiny_bundle, tree):
    gates = []

    def gate(app):
        gates.append(Gate(app, 2))
        return gates[-1]

    hanging = service_of(tiny_bundle, wrap=gate)
    command = [sys.executable, "-m", "coterie_cli", "enroll", str(tree), "--url", hanging]
    process = subprocess.Popen(command, cwd=PROJECT, env=dict(os.environ), stderr=subprocess.DEVNULL)
    assert gates[0].closed.wait(60)
    process.send_signal(signal.SIGKILL)
    process.wait(20)
    done = sum(counts(hanging).values())
    assert 0 < done < 100
    url = service_of(tiny_bundle)
    code, out, _ = coterie("enroll", tree, "--url", url)
    assert code == 0 and f"Enrolled {100 - done} images" in out
    assert counts(url) == {"8": 50, "9": 50}


def test_a_busy_service_is_tried_again(coterie, service_of, tiny_bundle, tree, monkeypatch):
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)

    class Busy(Gate):
        async def __call__(self, scope, receive, send):
            if scope.get("path", "").endswith("/examples") and self.left:
                self.left -= 1
                headers = [(b"retry-after", b"3")]
                await send({"type": "http.response.start", "status": self.status, "headers": headers})
                await send({"type": "http.response.body", "body": b""})
                return
            await self.app(scope, receive, send)

    url = service_of(tiny_bundle, wrap=lambda app: Busy(app, 3, 429))
    code, out, _ = coterie("enroll", tree, "--url", url)
    assert (code, "Enrolled 100 images." in out) == (0, True)
    assert sum(wait == 3 for wait in waits) == 3


def test_a_service_that_takes_less_at_a_time_gets_less(coterie, service_of, tiny_bundle, tree):
    from serving.limits import RequestLimits

    url = service_of(tiny_bundle, limits=RequestLimits(max_body=3000))
    (tree / "8" / "large.png").write_bytes(b"x" * 4000)
    code, out, _ = coterie("enroll", tree, "--url", url)
    assert (code, "Enrolled 100 images." in out) == (0, True)
    assert "large.png" in tree.with_name("new.rejects.csv").read_text()


def test_a_full_class_ends_with_the_services_own_words(coterie, service_of, tiny_bundle, tree):
    url = service_of(tiny_bundle, store=StoreOptions(class_quota=40))
    code, _, err = coterie("enroll", tree, "--url", url)
    assert code == 2 and "COTERIE_CLASS_QUOTA allows 40" in error_line(err)


def test_the_key_comes_from_the_flag_or_the_environment(coterie, service_of, tiny_bundle, tree, monkeypatch):
    seen = set()

    def recording(app):
        async def record(scope, receive, send):
            seen.add(dict(scope["headers"]).get(b"authorization"))
            await app(scope, receive, send)

        return record

    url = service_of(tiny_bundle, wrap=recording)
    coterie("enroll", tree, "--url", url, "--key", "flag")
    assert seen == {b"Bearer flag"}
    seen.clear()
    monkeypatch.setenv("COTERIE_KEY", "variable")
    coterie("enroll", tree, "--url", url)
    assert seen == {b"Bearer variable"}


@pytest.mark.parametrize(
    ("data", "url", "words"),
    [
        ("tree", "localhost:3000", "begins with http"),
        ("tree", "http://127.0.0.1:9", "cannot be reached"),
        ("/nowhere", "http://127.0.0.1:9", "/nowhere is not a folder"),
    ],
)
def test_what_cannot_work_is_one_line(coterie, tree, monkeypatch, data, url, words):
    monkeypatch.setattr(time, "sleep", lambda _: None)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    code, _, err = coterie("enroll", tree if data == "tree" else data, "--url", url)
    assert code == 2 and words in error_line(err)


def test_a_wrong_key_shows_before_any_image_is_read(coterie, service_of, tiny_bundle, tree):
    def locked(app):
        async def answer(scope, receive, send):
            await app(scope, receive, send) if scope["path"] == "/open" else await refuse(send)

        return answer

    async def refuse(send):
        await send({"type": "http.response.start", "status": 401, "headers": []})
        body = b'{"error": {"message": "this service asks for a key", "param": null, "code": "unauthorized"}}'
        await send({"type": "http.response.body", "body": body})

    code, _, err = coterie("enroll", tree, "--url", service_of(tiny_bundle, wrap=locked))
    assert code == 2 and error_line(err) == "error: this service asks for a key"


def test_the_help_has_an_example(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["coterie", "enroll", "--help"])
    with pytest.raises(SystemExit):
        main()
    assert "Example: coterie enroll " in capsys.readouterr().out
