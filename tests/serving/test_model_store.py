"""The way of a bundle into BentoML's model store and back; each test has a store of its own."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from coterie.bundle import Bundle, write_bundle
from coterie.errors import BundleError
from serving.model_store import find_bundle

# BentoML settles where its store lies when it is imported, so each story plays in a process of its own.
STORY = """
import json, sys
from pathlib import Path
from coterie.bundle import Bundle
from serving.model_store import find_bundle, push
import bentoml
told = []
for step in sys.argv[1:]:
    word, _, path = step.partition("=")
    if word == "push":
        told.append(push(Bundle.open(path)))
    elif word == "find":
        told.append(Bundle.open(find_bundle(None, beside=Path(path))).manifest.name)
    elif word == "spoil":
        (Path(bentoml.models.get("coterie-bundle:latest").path) / "bundle" / path).write_bytes(b"")
    elif word == "list":
        told.append(len(bentoml.models.list()))
print(json.dumps(told))
"""


def play(home: Path, *steps: str) -> list[Any]:
    environment = os.environ | {"BENTOML_HOME": str(home)}
    command = [sys.executable, "-c", STORY, *steps]
    return json.loads(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


@pytest.fixture
def other_bundle(tiny_bundle: Bundle, tmp_path: Path) -> Bundle:
    return write_bundle(
        tmp_path / "other",
        model=(tiny_bundle.path / "model.onnx").read_bytes(),
        snapshot=tiny_bundle.base,
        card="# Another\n",
        manifest=tiny_bundle.manifest.model_copy(update={"name": "other"}),
    )


def test_the_bundle_last_pushed_is_found_even_if_it_is_the_older(
    tiny_bundle: Bundle, other_bundle: Bundle, tmp_path: Path
) -> None:
    first, second, nowhere = f"push={tiny_bundle.path}", f"push={other_bundle.path}", f"find={tmp_path / 'nowhere'}"
    tag = "coterie-bundle:" + tiny_bundle.manifest.id.removeprefix("sha256:")[:12]
    told = play(tmp_path / "home", first, nowhere, second, nowhere, first, nowhere, "list")
    assert told[0] == told[4] == tag
    assert [told[1], told[3], told[5]] == ["tiny-digits", "other", "tiny-digits"]
    assert told[6] == 2


def test_a_stored_bundle_that_was_damaged_is_replaced_by_the_next_push(tiny_bundle: Bundle, tmp_path: Path) -> None:
    told = play(
        tmp_path, f"push={tiny_bundle.path}", "spoil=model.onnx", f"push={tiny_bundle.path}", f"find={tmp_path / 'no'}"
    )
    assert told[-1] == "tiny-digits"


def test_what_was_named_comes_before_what_lies_beside(tmp_path: Path) -> None:
    beside = tmp_path / "bundle"
    beside.mkdir()
    assert find_bundle(tmp_path / "named", beside=beside) == tmp_path / "named"
    assert find_bundle(None, beside=beside) == beside


def test_a_damaged_bundle_is_not_pushed(tiny_bundle: Bundle, tmp_path: Path) -> None:
    from serving.model_store import push

    path = tmp_path / "bundle"
    shutil.copytree(tiny_bundle.path, path)
    bundle = Bundle.open(path)
    (path / "model.onnx").write_bytes(b"")
    with pytest.raises(BundleError, match="damaged"):
        push(bundle)
