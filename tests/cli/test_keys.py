"""`coterie key`: what is shown once, what is listed, and what is refused."""

import json

import pytest


def test_a_key_is_made_listed_and_revoked(coterie, tmp_path) -> None:
    code, token, told = coterie("key", "new", "--scope", "change", "--name", "camera 7", "--state", tmp_path)
    assert code == 0 and token.startswith("coterie-") and len(token.split()) == 1
    (entry,) = json.loads((tmp_path / "keys.json").read_text())["keys"]
    assert entry["id"] in told and token.strip() not in told
    code, listed, _ = coterie("key", "list", "--keys", tmp_path / "keys.json")
    assert code == 0 and entry["id"] in listed and "camera 7" in listed and token.strip() not in listed
    code, _, _ = coterie("key", "revoke", entry["id"], "--state", tmp_path)
    assert code == 0 and json.loads((tmp_path / "keys.json").read_text()) == {"keys": []}


@pytest.mark.parametrize("command", [["list"], ["revoke", "abc"]])
def test_without_a_file_or_with_a_damaged_one_it_says_so_in_one_line(coterie, tmp_path, command) -> None:
    code, _, told = coterie("key", *command, "--state", tmp_path)
    assert code == 2 and len(told.splitlines()) == 1 and "keys.json" in told
    (tmp_path / "keys.json").write_text("{")
    code, _, told = coterie("key", *command, "--state", tmp_path)
    assert code == 2 and "damaged" in told


def test_an_unknown_key_cannot_be_revoked(coterie, tmp_path) -> None:
    coterie("key", "new", "--state", tmp_path)
    code, _, told = coterie("key", "revoke", "abc", "--state", tmp_path)
    assert code == 2 and "coterie key list" in told


@pytest.mark.parametrize("command", ["key new", "key list", "key revoke"])
def test_help_has_an_example(coterie, command) -> None:
    code, shown, _ = coterie(*command.split(), "--help")
    assert code == 0 and f"coterie {command}" in shown.replace("\n", " ")
