"""API keys: who may ask, and who may change what is served.

The file holds of each key its id, scope, time of creation, name and the hash of its secret, never the secret. That is
256 random bits, so a plain SHA-256 protects it: there is nothing to guess faster, as there is with passwords.
"""

import hashlib
import hmac
import json
import logging
import os
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

from coterie.errors import CoterieError
from coterie.files import sync_directory

__all__ = ["FILE_NAME", "Key", "Keyring", "Scope", "create_key", "read_keys", "revoke_key"]

logger = logging.getLogger("coterie.serving")

Scope = Literal["ask", "change"]
FILE_NAME = "keys.json"
MAX_NAME = 100
# How long a revoked key may go on working.
RECHECK_SECONDS = 1.0


@dataclass(frozen=True)
class Key:
    """One key, as the file has it.

    Attributes:
        id: names it in logs and in the audit; 8 hex digits.
        scope: ask, or change, which includes ask.
        created: UTC, ISO 8601.
        name: what its owner calls it; may be empty.
        sha256: of the whole token, in hex.
    """

    id: str
    scope: Scope
    created: str
    name: str
    sha256: str

    def __post_init__(self) -> None:
        if self.scope not in get_args(Scope) or any(not isinstance(value, str) for value in asdict(self).values()):
            raise ValueError("not a key")


def read_keys(path: Path) -> list[Key]:
    """The keys in a file.

    Raises:
        CoterieError: there is none, or it is damaged.
    """
    try:
        return [Key(**entry) for entry in json.loads(path.read_bytes())["keys"]]
    except OSError as error:
        raise CoterieError(f"the key file {path} cannot be read ({error.strerror}): see coterie key new") from error
    except (ValueError, TypeError, KeyError) as error:
        raise CoterieError(f"the key file {path} is damaged: restore it, or move it away and make new keys") from error


def create_key(path: Path, scope: Scope, name: str = "") -> tuple[Key, str]:
    """Add a key to a file, which is made where there is none; with the token to hand out, kept nowhere.

    Raises:
        CoterieError: the file is damaged, or the name too long.
    """
    if len(name) > MAX_NAME or not name.isprintable():
        raise CoterieError(f"a key's name has at most {MAX_NAME} printable characters")
    identifier = secrets.token_hex(4)
    token = f"coterie-{identifier}-{secrets.token_urlsafe(32)}"
    key = Key(identifier, scope, datetime.now(UTC).isoformat(timespec="seconds"), name, _hash(token))
    with _alone(path):
        _write(path, [*(read_keys(path) if path.exists() else []), key])
    return key, token


def revoke_key(path: Path, identifier: str) -> Key:
    """Take a key out of a file; services see it within a second. The file stays, so that nothing is open without it.

    Raises:
        CoterieError: there is no such key, or no such file.
    """
    with _alone(path):
        keys = read_keys(path)
        found = [key for key in keys if key.id == identifier]
        if not found:
            raise CoterieError(f"{path} has no key {identifier}: coterie key list shows them")
        _write(path, [key for key in keys if key.id != identifier])
    return found[0]


class Keyring:
    """The keys of a file as they are now.

    Once a file has been seen, keys are demanded until the process ends: one that is gone or damaged lets nobody in.

    Args:
        path: the file.
        required: whether keys are demanded although there is no file yet.
    """

    def __init__(self, path: Path, *, required: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        self._path, self._clock = path, clock
        self._demanded = required
        self._keys: dict[str, Key] = {}
        self._seen: tuple[int, ...] | None = None
        self._checked = -RECHECK_SECONDS

    @property
    def demanded(self) -> bool:
        """Whether a key is needed at all."""
        self._refresh()
        return self._demanded

    def find(self, token: str) -> Key | None:
        """The key that a token belongs to; takes as long for a wrong secret as for the right one."""
        self._refresh()
        key = self._keys.get(token[len("coterie-") :].partition("-")[0])
        if hmac.compare_digest(_hash(token), key.sha256 if key else _hash("")):
            return key
        return None

    def _refresh(self) -> None:
        now = self._clock()
        if now - self._checked < RECHECK_SECONDS:
            return
        self._checked = now
        try:
            status = self._path.stat()
        except FileNotFoundError:
            seen: tuple[int, ...] | None = None
        except OSError:
            seen = (0,)
        else:
            # The time of change tells apart what a clock's tick or a re-used inode would not.
            seen = (status.st_ino, status.st_mtime_ns, status.st_ctime_ns, status.st_size)
        if seen == self._seen:
            return
        self._seen, self._keys, self._demanded = seen, {}, True
        try:
            self._keys = {key.id: key for key in read_keys(self._path)}
        except CoterieError as error:
            logger.error("nobody is let in: %s", error)


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold off other commands that change the file; services only read it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("a") as lock:
        if os.name == "posix":
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _write(path: Path, keys: list[Key]) -> None:
    """Replace the file, whole or not at all, readable by its owner alone from its first byte."""
    content: dict[str, Any] = {"keys": [asdict(key) for key in keys]}
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # of mode 0600
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(json.dumps(content, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    sync_directory(path.parent)
