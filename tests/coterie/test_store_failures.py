"""Kills, full disks, places that cannot be written: no acknowledged change is lost, none is half there."""

import hashlib
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

from coterie.errors import StoreError
from coterie.items import item_id
from coterie.store import Edit, Store, StoredItem

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs signals and POSIX files")

# Adds batches of two images and now and then removes one of its own; says what it does before, and "done" after.
WRITER = """
import sys
from pathlib import Path
import numpy as np
from coterie.items import item_id
from coterie.store import Store, StoredItem
path, name, folder = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
store = Store(path, encoder="e")
def stored(content):
    return StoredItem(item_id(content), "boot", np.eye(4, dtype=np.float32)[0], {"of": name}, b"t" + content, content)
print("open", flush=True)
number, old = 0, []
while True:
    images = [f"{name} {number} {part} ".encode() * 200 for part in range(2)]
    ids = [item_id(image) for image in images]
    print("add", *ids, flush=True)
    store.add([stored(image) for image in images])
    print("done", flush=True)
    old += ids
    if number % 3 == 2:
        gone = old.pop(0)
        print("remove", gone, flush=True)
        store.remove([gone])
        print("done", flush=True)
    number += 1
"""


def item(identifier: str, picture: bytes = b"", **metadata: str) -> StoredItem:
    return StoredItem(identifier, "boot", np.eye(4, dtype=np.float32)[0], metadata, picture)


def ids(store: Store) -> set[str]:
    return {kept.id for kept in store.changes().items}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "gallery.sqlite"


# Kills


def kill_two_writers(path: Path, round_number: int, rng: random.Random) -> list[str]:
    """Start two, kill both at random moments; returns what they said, line by line, the second after the first."""
    command = [sys.executable, "-c", WRITER, str(path)]
    writers = [
        subprocess.Popen([*command, f"writer {round_number} {name}", "."], stdout=subprocess.PIPE, text=True)
        for name in "ab"
    ]
    said: list[list[str]] = [[], []]
    try:
        for lines, writer in zip(said, writers, strict=True):
            assert writer.stdout
            while not lines or lines.count("done") < 3:
                lines.append(writer.stdout.readline().strip())
                assert lines[-1], "a writer ended by itself"
        for lines, writer in rng.sample(list(zip(said, writers, strict=True)), 2):
            assert writer.stdout
            for _ in range(rng.randrange(12)):
                lines.append(writer.stdout.readline().strip())
            time.sleep(rng.choice([0, rng.random() / 100]))  # in the very moment that it speaks, or a little later
            writer.kill()
    finally:
        for writer in writers:
            writer.kill()
    for lines, writer in zip(said, writers, strict=True):
        assert writer.stdout
        lines += writer.stdout.read().split("\n")
        writer.stdout.close()
        assert writer.wait() == -signal.SIGKILL
    return [*said[0], "", *said[1]]


def check_after_kills(path: Path, said: list[str], expected: set[str]) -> set[str]:
    """Compare the store with what was acknowledged; returns what is there."""
    uncertain: list[list[str]] = []
    pending: list[str] | None = None
    for line in said:
        words = line.split()
        if words[:1] == ["done"]:
            assert pending
            change = set(pending[1:])
            expected = expected | change if pending[0] == "add" else expected - change
            pending = None
        elif words and words[0] in ("add", "remove") and len(words[-1]) == 24:
            pending = words
        elif pending and not words:  # the end of one writer
            uncertain.append(pending)
            pending = None
    store = Store(path, encoder="e")
    found = ids(store)
    for operation, *changed in uncertain:
        there = found & set(changed)
        assert there in (set(), set(changed)), "half of a change is there"
        expected = expected | there if operation == "add" else expected - (set(changed) - there)
    assert found == expected
    files = {file.name: file for file in (path.parent / "originals").rglob("*") if file.is_file()}
    assert {name[:24] for name in files if not name.startswith(".")} == found
    for identifier in found:
        content = store.original(identifier)
        assert content is not None and item_id(content) == identifier
        assert store.thumbnail(identifier) == b"t" + content
    store.add([item("after")])
    store.remove(["after"])
    store.close()
    return found


def run_trials(path: Path, trials: int) -> int:
    rng = random.Random(trials)
    expected: set[str] = set()
    for number in range(trials):
        expected = check_after_kills(path, kill_two_writers(path, number, rng), expected)
    return len(expected)


def test_what_two_processes_acknowledged_survives_kills(path: Path) -> None:
    assert run_trials(path, 3) > 10


@pytest.mark.acceptance
@pytest.mark.timeout(1800)
def test_what_two_processes_acknowledged_survives_a_hundred_kills(path: Path) -> None:
    print(f"\n100 trials: {run_trials(path, 100):,} items, none lost, none half there")


# The order of things


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
def test_the_disk_has_the_image_before_the_row_and_the_row_before_the_caller_hears_of_it(
    path: Path, tmp_path: Path
) -> None:
    code = """
import os, sys
from pathlib import Path
import numpy as np
from coterie.items import item_id
from coterie.store import Store, StoredItem
store = Store(Path(sys.argv[1]), encoder="e")
store.add([StoredItem("first", "boot", np.ones(1, dtype=np.float32), {}, b"")])
os.write(1, b"start")
store.add([StoredItem(item_id(b"image"), "boot", np.ones(1, dtype=np.float32), {}, b"", b"image")])
os.write(1, b"added")
store.remove([item_id(b"image")])
os.write(1, b"removed")
"""
    calls = "trace=fsync,fdatasync,write,pwrite64,rename,renameat,renameat2,unlink,unlinkat,ftruncate"
    log = tmp_path / "calls"
    subprocess.run(
        ["strace", "-f", "-y", "-e", calls, "-o", log, sys.executable, "-c", code, path],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    lines = log.read_text().splitlines()
    said = {
        word: next(i for i, line in enumerate(lines) if f'"{word}"' in line) for word in ("start", "added", "removed")
    }

    def steps(begin: str, end: str, **patterns: str) -> list[str]:
        """The named calls between two words, in the order that they were made."""
        part = lines[said[begin] : said[end]]
        return [name for line in part for name, pattern in patterns.items() if re.search(pattern, line)]

    sha256 = hashlib.sha256(b"image").hexdigest()
    adding = steps(
        "start",
        "added",
        image=rf"write\(.*{sha256}.*\"image\"",
        image_named=rf"rename.*{sha256}",
        image_synced=rf"fsync\(.*originals/{sha256[:2]}/{sha256}>",
        folder_synced=rf"fsync\(.*originals/{sha256[:2]}>",
        row=r"pwrite64\(.*gallery\.sqlite-wal",
        row_synced=r"f(data)?sync\(.*gallery\.sqlite-wal",
    )
    expected = ["image", "image_named", "image_synced", "folder_synced", "row", "row_synced"]
    assert [*dict.fromkeys(adding)] == expected and adding[-1] == "row_synced"
    removing = steps(
        "added",
        "removed",
        row=r"pwrite64\(.*gallery\.sqlite-wal",
        row_synced=r"f(data)?sync\(.*gallery\.sqlite-wal",
        log_cut=r"ftruncate\(.*gallery\.sqlite-wal.*, 0\)",
        image_deleted=rf"unlink.*{sha256}",
    )
    assert [*dict.fromkeys(removing)] == ["row", "row_synced", "log_cut", "image_deleted"]


# Erasing


def bytes_of(folder: Path) -> bytes:
    """All files below `folder`, read by a process of its own, for closing a file drops this process's locks on it."""
    code = """
import sys
from pathlib import Path
for file in Path(sys.argv[1]).rglob("*"):
    if file.is_file():
        sys.stdout.buffer.write(file.read_bytes())
"""
    return subprocess.run([sys.executable, "-c", code, folder], check=True, capture_output=True).stdout


def test_nothing_of_a_removed_item_is_left_in_any_file(path: Path) -> None:
    store, reader = Store(path, encoder="e"), Store(path, encoder="e")
    store.add([item(f"before {number}", os.urandom(3000)) for number in range(50)])
    content = b"MARKER-original" * 100
    secret = StoredItem(
        item_id(content),
        "MARKER-label",
        np.frombuffer(b"MARKER-embedding", dtype=np.float32),
        {"name": "MARKER-metadata"},
        b"MARKER-thumbnail" * 300,
        content,
    )
    store.add([secret])
    store.add([item(f"after {number}", os.urandom(3000)) for number in range(50)])
    assert reader.thumbnail(secret.id)
    found = bytes_of(path.parent)
    for part in ("original", "label", "embedding", "metadata", "thumbnail"):
        assert f"MARKER-{part}".encode() in found
    store.remove([secret.id])
    assert b"MARKER" not in bytes_of(path.parent)
    assert len(ids(reader)) == 100


def test_metadata_that_was_replaced_is_gone_from_every_file(path: Path) -> None:
    store = Store(path, encoder="e")
    store.add([item("1", name="MARKER")])
    store.edit([Edit("1", "boot", {"name": "somebody"})])
    assert b"MARKER" not in bytes_of(path.parent)


def test_metadata_that_enrolling_anew_replaced_is_in_no_file(path: Path) -> None:
    store = Store(path, encoder="e")
    store.add([item("1", name="MARKER")])
    store.add([item("2"), item("1", name="somebody")])
    assert b"MARKER" not in bytes_of(path.parent)


def test_what_a_killed_process_did_not_come_to_erase_is_erased_at_the_next_opening(path: Path) -> None:
    code = """
import os, signal, sys
from pathlib import Path
import numpy as np
from coterie.committer import Committer
from coterie.items import item_id
from coterie.store import Store, StoredItem
store, image = Store(Path(sys.argv[1]), encoder="e"), b"MARKER" * 100
store.add([StoredItem(item_id(image), "MARKER", np.ones(1, dtype=np.float32), {}, b"MARKER", image)])
Committer._erase = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
store.remove([item_id(image)])
"""
    assert subprocess.run([sys.executable, "-c", code, path]).returncode == -signal.SIGKILL
    assert b"MARKER" in bytes_of(path.parent)
    store = Store(path, encoder="e")
    assert ids(store) == set()
    assert b"MARKER" not in bytes_of(path.parent)


# Places that cannot be written


def test_a_full_disk_is_named_and_loses_nothing(path: Path) -> None:
    store = Store(path, encoder="e")
    store.add([item("1")])
    large = item("2", os.urandom(2_000_000))
    size = path.with_name("gallery.sqlite-wal").stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 500_000, before[1]))
    try:
        with pytest.raises(StoreError, match=r"gallery\.sqlite cannot be written: "):
            store.add([large])
        store.add([item("3")])  # what is small still fits
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert ids(store) == {"1", "3"}
    store.add([large])
    store.close()
    assert ids(Store(path, encoder="e")) == {"1", "2", "3"}


def test_an_image_that_the_disk_has_no_room_for_is_named_and_leaves_nothing(path: Path) -> None:
    store = Store(path, encoder="e")
    content = os.urandom(2_000_000)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))
    try:
        with pytest.raises(StoreError, match=r"image cannot be kept in .*originals.*: File too large"):
            store.add([StoredItem(item_id(content), "boot", np.eye(4, dtype=np.float32)[0], {}, b"", content)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert ids(store) == set()
    assert not [file for file in path.parent.rglob("*") if file.is_file() and not file.name.startswith("gallery.")]


@pytest.mark.parametrize("there", [True, False], ids=["a store", "no store yet"])
def test_a_folder_that_cannot_be_written_is_named_and_keeps_what_it_has(there: bool) -> None:
    # Not below pytest's own folder, which only its owner may enter: the superuser has to become somebody else.
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        folder = Path(name)
        path = folder / "gallery.sqlite"
        if there:
            store = Store(path, encoder="e")
            store.add([item("1")])
            store.close()
        folder.chmod(0o555)
        child = os.fork()
        if child == 0:
            try:
                if os.geteuid() == 0:
                    os.seteuid(65534)
                Store(path, encoder="e")
            except StoreError as error:
                os._exit(0 if f"store {path} cannot be opened" in str(error) else 1)
            finally:
                os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        folder.chmod(0o755)
        assert ids(Store(path, encoder="e")) == ({"1"} if there else set())


# A copy while it is in use


def test_a_backup_is_a_store_of_one_moment(path: Path, tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
import numpy as np
from coterie.items import item_id
from coterie.store import Store, StoredItem
store, number = Store(Path(sys.argv[1]), encoder="e"), 0
while True:
    images = [f"{number} {part}".encode() for part in range(2)]
    store.add([StoredItem(item_id(i), "boot", np.eye(4, dtype=np.float32)[0], {}, b"t", i) for i in images])
    number += 1
    print(number, flush=True)
"""
    store = Store(path, encoder="e")
    with subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE, text=True) as writer:
        try:
            assert writer.stdout
            while int(writer.stdout.readline()) < 20:
                pass
            seen: list[int] = []
            store.backup(tmp_path / "copy", lambda done, total: seen.append(total - done))
            acknowledged = len(ids(store))
        finally:
            writer.kill()
    copy = Store(tmp_path / "copy" / "gallery.sqlite", encoder="e")
    kept = ids(copy)
    assert 40 <= len(kept) <= acknowledged and len(kept) % 2 == 0
    assert all(item_id(copy.original(identifier) or b"") == identifier for identifier in kept)
    assert all(copy.thumbnail(identifier) == b"t" for identifier in kept)
    assert seen == list(range(len(kept) - 1, -1, -1))
    copy.add([item("after")])


def test_a_backup_replaces_nothing(path: Path, tmp_path: Path) -> None:
    store = Store(path, encoder="e")
    (tmp_path / "there").mkdir()
    with pytest.raises(Exception, match="exists already"):
        store.backup(tmp_path / "there")
