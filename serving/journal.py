"""The audit: one line for each change, on disk before the answer leaves."""

import os
from datetime import UTC, datetime
from pathlib import Path

from pydantic_core import to_json

from serving.audit import Change

__all__ = ["FILE_NAME", "Journal"]

FILE_NAME = "audit.jsonl"


class Journal:
    """A file of JSON lines that only ever grows; any number of processes may append to it.

    Args:
        path: the file, readable by its owner alone; made when there is something to write.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def append(self, change: Change, *, key: str | None, request: str) -> None:
        """Add a change, with the ids of the key and of the request; it is on disk when this returns.

        Raises:
            OSError: it cannot be written.
        """
        row = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "action": change.action,
            "target": change.target,
            "count": change.count,
            "key": key,
            "request": request,
        }
        self._path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            os.write(file, to_json(row) + b"\n")  # in one piece, so that lines of several processes do not mix
            os.fsync(file)
        finally:
            os.close(file)
