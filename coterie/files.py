"""Durable writes: a file or directory appears whole under its name or not at all.

Everything is written beside its destination under a temporary name, synced to disk and then renamed.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from coterie.errors import CoterieError

__all__ = ["atomic_directory", "atomic_file", "sync_directory", "sync_file", "write_bytes", "write_text"]


def write_bytes(path: Path, data: bytes) -> None:
    """Replace the file at `path` by `data`; a reader sees the old or the new content, never a part."""
    with atomic_file(path) as file:
        file.write(data)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Yield a file to write to; when the block ends without an error it replaces the one at `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def write_text(path: Path, text: str) -> None:
    """Replace the file at `path` by `text` in UTF-8."""
    write_bytes(path, text.encode("utf-8"))


@contextmanager
def atomic_directory(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty directory beside `path`; when the block ends without an error it takes that name.

    Raises:
        CoterieError: `path` exists and `overwrite` is false.
    """
    if path.exists() and not overwrite:
        raise CoterieError(f"{path} exists already: choose another path, or remove it first")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield temporary
        for file in temporary.rglob("*"):
            sync_file(file)
        sync_file(temporary)
        temporary.chmod(0o777 & ~_umask())
        _take_name(temporary, path, overwrite)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make a rename inside `path` survive a power cut; directories cannot be synced on Windows."""
    if os.name == "posix":
        sync_file(path)


def _take_name(temporary: Path, path: Path, overwrite: bool) -> None:
    if not path.exists():
        temporary.replace(path)
        return
    if not overwrite:
        raise CoterieError(f"{path} was made by someone else in the meantime: choose another path, or remove it first")
    retired = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
    path.replace(retired / path.name)
    try:
        temporary.replace(path)
    except BaseException:
        (retired / path.name).replace(path)
        retired.rmdir()
        raise
    shutil.rmtree(retired, ignore_errors=True)


def sync_file(path: Path) -> None:
    """Have what was written to `path` on disk."""
    if path.is_dir() and os.name != "posix":
        return
    # Windows flushes only what is open for writing.
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
