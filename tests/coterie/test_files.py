"""Files and directories appear whole or not at all."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from coterie.errors import CoterieError
from coterie.files import atomic_directory, write_bytes, write_text


def test_a_written_file_replaces_the_old_one_and_leaves_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "new folder" / "file"
    write_bytes(file, b"old")
    write_text(file, "größer")
    assert file.read_text("utf-8") == "größer"
    assert list(file.parent.iterdir()) == [file]


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    write_bytes(file, b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_bytes(file, b"new")
    assert file.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")
def test_what_is_written_can_be_read_as_the_umask_says(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_bytes(tmp_path / "file", b"")
        with atomic_directory(tmp_path / "folder"):
            pass
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o750


def test_a_directory_appears_with_all_its_files(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "target"
    with atomic_directory(target) as temporary:
        (temporary / "inner").mkdir()
        (temporary / "inner" / "file").write_bytes(b"content")
        assert not target.exists()
    assert (target / "inner" / "file").read_bytes() == b"content"
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("old", [False, True])
def test_a_block_that_fails_leaves_nothing_and_keeps_the_old_directory(
    tmp_path: Path, error: type[BaseException], old: bool
) -> None:
    target = tmp_path / "target"
    if old:
        _directory(target, b"old")
    with pytest.raises(error), atomic_directory(target, overwrite=True) as temporary:
        (temporary / "file").write_bytes(b"new")
        raise error
    assert list(tmp_path.iterdir()) == ([target] if old else [])
    if old:
        assert (target / "file").read_bytes() == b"old"


def test_an_existing_directory_is_replaced_only_when_asked(tmp_path: Path) -> None:
    target = _directory(tmp_path / "target", b"old")
    with pytest.raises(CoterieError, match="exists already"), atomic_directory(target):
        pytest.fail("the block must not run")
    assert (target / "file").read_bytes() == b"old"
    with atomic_directory(target, overwrite=True) as temporary:
        (temporary / "other").write_bytes(b"new")
    assert [file.name for file in target.iterdir()] == ["other"]
    assert list(tmp_path.iterdir()) == [target]


def test_a_directory_made_by_someone_else_in_the_meantime_is_not_lost(tmp_path: Path) -> None:
    target = tmp_path / "target"
    with pytest.raises(CoterieError, match="in the meantime"), atomic_directory(target) as temporary:
        (temporary / "file").write_bytes(b"mine")
        _directory(target, b"theirs")
    assert (target / "file").read_bytes() == b"theirs"
    assert list(tmp_path.iterdir()) == [target]


def test_a_failed_swap_puts_the_old_directory_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = _directory(tmp_path / "target", b"old")
    replace = Path.replace

    def fail_for_the_new_one(self: Path, to: Path) -> Path:
        if (self / "file").is_file() and (self / "file").read_bytes() == b"new":
            raise OSError(5, "Input/output error")
        return replace(self, to)

    monkeypatch.setattr(Path, "replace", fail_for_the_new_one)
    with pytest.raises(OSError, match="Input/output"), atomic_directory(target, overwrite=True) as temporary:
        (temporary / "file").write_bytes(b"new")
    assert (target / "file").read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_a_killed_process_leaves_the_old_directory_as_it_was(tmp_path: Path) -> None:
    target = _directory(tmp_path / "target", b"old")
    code = """
import os, signal, sys
from pathlib import Path
from coterie.files import atomic_directory
with atomic_directory(Path(sys.argv[1]), overwrite=True) as temporary:
    (temporary / "file").write_bytes(b"new")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code, str(target)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert (target / "file").read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir() if not entry.name.startswith(".")] == ["target"]


def _directory(path: Path, content: bytes) -> Path:
    path.mkdir()
    (path / "file").write_bytes(content)
    return path
