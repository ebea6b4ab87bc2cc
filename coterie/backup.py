"""A copy of a gallery's store while it is in use: a folder of the same form, which can take its place."""

import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

from coterie.files import atomic_directory
from coterie.originals import Originals

__all__ = ["back_up"]


def back_up(path: Path, originals: Originals, folder: Path, progress: Callable[[int, int], None] | None = None) -> None:
    """Copy the database `path` as of one moment, and the originals that it names, into the new folder `folder`.

    Nobody has to stop meanwhile. An original whose item is removed before its turn comes is left out.

    Args:
        progress: called with the number of files copied and of all.

    Raises:
        CoterieError: `folder` exists.
        sqlite3.Error: the database cannot be read or its copy not be written.
    """
    with atomic_directory(folder) as temporary:
        with closing(sqlite3.connect(path)) as source, closing(sqlite3.connect(temporary / path.name)) as copy:
            source.backup(copy)
            copy.execute("PRAGMA journal_mode = DELETE")  # a single file; whoever opens it makes a log again
            names = [name for (name,) in copy.execute("SELECT original FROM items WHERE original IS NOT NULL")]
        kept = Originals(temporary / originals.folder.name)
        for number, name in enumerate(names, 1):
            kept.path(name).parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):
                shutil.copyfile(originals.path(name), kept.path(name))
            if progress:
                progress(number, len(names))
