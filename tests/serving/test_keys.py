"""Keys in their file, and the ring that follows it."""

import json
import stat
import threading
from pathlib import Path

import pytest

from coterie.errors import CoterieError
from serving.keys import Keyring, create_key, read_keys, revoke_key


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "keys.json"


class Clock:
    """A clock that is put forward by hand."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_file_holds_no_secret_and_is_its_owners_alone(path: Path) -> None:
    key, token = create_key(path, "change", "camera 7")
    text = path.read_text()
    assert token not in text and token.rpartition("-")[2] not in text
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert read_keys(path) == [key]
    assert (key.scope, key.name) == ("change", "camera 7") and key.id in token
    assert [entry.name for entry in path.parent.iterdir() if entry.name.endswith(".json")] == ["keys.json"]


def test_each_token_finds_its_own_key_and_no_other_does(path: Path) -> None:
    made = [create_key(path, "ask") for _ in range(3)]
    ring = Keyring(path)
    for key, token in made:
        assert ring.find(token) == key
        assert ring.find(token[:-1] + ("A" if token[-1] != "A" else "B")) is None
        assert ring.find(token + "x") is None
    assert ring.find("") is None and ring.find("coterie-") is None and ring.find("coterie-\udcff-x") is None
    secret = made[0][1].rpartition("-")[2]
    assert ring.find(f"coterie-{made[1][0].id}-{secret}") is None


def test_a_revoked_key_is_refused_within_a_second_and_a_new_one_is_known(path: Path) -> None:
    clock = Clock()
    key, token = create_key(path, "ask")
    ring = Keyring(path, clock=clock)
    assert ring.find(token) == key
    revoke_key(path, key.id)
    other, other_token = create_key(path, "change")
    clock.now = 1.0
    assert ring.find(token) is None
    assert ring.find(other_token) == other


def test_the_file_is_looked_at_once_a_second_at_most(path: Path) -> None:
    clock = Clock()
    _, token = create_key(path, "ask")
    ring = Keyring(path, clock=clock)
    assert ring.find(token)
    path.unlink()
    clock.now = 0.9
    assert ring.find(token)


def test_without_a_file_no_key_is_demanded_until_there_is_one(path: Path) -> None:
    clock = Clock()
    ring = Keyring(path, clock=clock)
    assert not ring.demanded
    create_key(path, "ask")
    clock.now = 1.0
    assert ring.demanded


@pytest.mark.parametrize("harm", ["removed", "emptied", "garbled", "last key revoked"])
def test_a_file_that_is_gone_or_damaged_lets_nobody_in(path: Path, harm: str) -> None:
    clock = Clock()
    key, token = create_key(path, "change")
    ring = Keyring(path, clock=clock)
    assert ring.find(token)
    if harm == "removed":
        path.unlink()
    elif harm == "last key revoked":
        revoke_key(path, key.id)
    else:
        path.write_text("" if harm == "emptied" else '{"keys": [{"id": 1}]}')
    clock.now = 1.0
    assert ring.demanded and ring.find(token) is None


def test_a_file_that_is_required_is_demanded_before_it_is_there(path: Path) -> None:
    assert Keyring(path, required=True).demanded


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"keys": 1}',
        '{"keys": [{}]}',
        json.dumps({"keys": [{"id": "a", "scope": "all", "created": "", "name": "", "sha256": ""}]}),
        json.dumps({"keys": [{"id": "a", "scope": "ask", "created": "", "name": "", "sha256": 1}]}),
    ],
)
def test_a_damaged_file_is_named_and_not_replaced(path: Path, content: str) -> None:
    path.parent.mkdir()
    path.write_text(content)
    for change in (lambda: create_key(path, "ask"), lambda: revoke_key(path, "a")):
        with pytest.raises(CoterieError, match="damaged"):
            change()
    assert path.read_text() == content


def test_commands_at_the_same_time_lose_no_key(path: Path) -> None:
    threads = [threading.Thread(target=create_key, args=(path, "ask", str(number))) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(key.name for key in read_keys(path)) == [str(number) for number in range(8)]
