"""The bytes of enrolled images, as files named by their sha256, so that another encoder can embed them anew.

`originals/ab/abcdef…` is on disk, whole, before a row of the store names it. What a power cut leaves half-written is
not named by any row, and the next opening of the store sweeps it away. Which files are still wanted is the store's to
say: `Originals` deletes what it is told to.
"""

import hashlib
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from coterie.errors import StoreError
from coterie.files import sync_directory, sync_file

__all__ = ["Originals"]

NAME = re.compile(r"[0-9a-f]{64}")
# A file that is being written has a name of its own; one so old was left by a process that was killed.
ABANDONED_SECONDS = 3600.0


class Originals:
    """Files below `folder`, which is made when the first is written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, sha256: str) -> Path:
        """Where the file of this digest lies, or would."""
        return self.folder / sha256[:2] / sha256

    def write(self, content: bytes) -> str:
        """Keep `content`; when this returns it survives a power cut. Returns its sha256, hexadecimal.

        Raises:
            StoreError: it cannot be written.
        """
        sha256 = hashlib.sha256(content).hexdigest()
        path = self.path(sha256)
        temporary = path.with_name(f".{sha256}.{os.getpid()}.{threading.get_ident()}")
        try:
            self._make_folder(path.parent)
            if not _holds(path, content):
                try:
                    temporary.write_bytes(content)
                    temporary.replace(path)
                except BaseException:
                    temporary.unlink(missing_ok=True)
                    raise
            # Also where the file was there: whoever wrote it may not have come so far. Under its last name already, the
            # file takes its folder's entry to disk with it, where the journal holds both.
            sync_file(path)
            sync_directory(path.parent)
        except OSError as error:
            raise StoreError(f"the image cannot be kept in {path.parent}: {error.strerror or error}") from error
        return sha256

    def has(self, sha256: str) -> bool:
        return self.path(sha256).exists()

    def read(self, sha256: str) -> bytes:
        """The content of this digest.

        Raises:
            StoreError: the file is gone, or holds something else.
        """
        path = self.path(sha256)
        try:
            content = path.read_bytes()
        except OSError as error:
            raise StoreError(f"the original {path} cannot be read: {error.strerror or error}") from error
        if hashlib.sha256(content).hexdigest() != sha256:
            raise StoreError(f"the original {path} is damaged: its content does not match its name")
        return content

    def delete(self, sha256: str) -> None:
        """Delete the file, if it is there."""
        with suppress(FileNotFoundError):
            self.path(sha256).unlink()

    def names(self) -> Iterator[str]:
        """The digests of all files."""
        for file in self._files():
            if NAME.fullmatch(file.name):
                yield file.name

    def sweep_abandoned(self) -> None:
        """Delete what processes that were killed had begun to write."""
        for file in self._files():
            with suppress(FileNotFoundError):
                if file.name.startswith(".") and time.time() - file.stat().st_mtime > ABANDONED_SECONDS:
                    file.unlink()

    def _files(self) -> Iterator[Path]:
        if self.folder.is_dir():
            for folder in self.folder.iterdir():
                if folder.is_dir():
                    yield from folder.iterdir()

    def _make_folder(self, folder: Path) -> None:
        if not folder.is_dir():
            folder.mkdir(parents=True, exist_ok=True)
            sync_directory(self.folder)
            sync_directory(self.folder.parent)


def _holds(path: Path, content: bytes) -> bool:
    try:
        return path.stat().st_size == len(content) and path.read_bytes() == content
    except FileNotFoundError:
        return False
