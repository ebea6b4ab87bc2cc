"""A bundle leaves the environment it was made in and answers the same where only the base is installed, without torch.

Slow, and needs uv with a package index: `uv run pytest -m acceptance tests/export/test_base_install.py -s`.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from coterie import Bundle
from export.package import export_bundle
from export.source import run_source

ROOT = Path(__file__).resolve().parents[2]
NOT_IN_A_CHECKOUT = shutil.ignore_patterns(".git", ".*_cache", ".venv*", "__pycache__", "uv.lock")
IN_THE_BASE = """
import json, sys
from importlib.util import find_spec
from pathlib import Path
import numpy as np
from coterie import Bundle

more = [name for name in ("torch", "torchvision", "timm", "onnx", "pytest") if find_spec(name)]
assert not more, f"{more} are not part of the base"
bundle, images, out = map(Path, sys.argv[1:])
opened = Bundle.open(bundle, device="cpu")
files = sorted(images.rglob("*.png"))
np.save(out / "embeddings.npy", opened.embed(files))
answers = [(answer.label, answer.probability) for answer in opened.classify(files)]
(out / "answers.json").write_text(json.dumps(answers))
"""


@pytest.mark.acceptance
@pytest.mark.timeout(1800)
def test_a_bundle_answers_the_same_in_a_base_install(tiny_run, tiny_run_tree, digit_tree_of, tmp_path):
    here = export_bundle(run_source(tiny_run), tiny_run_tree, tmp_path / "here").bundle.path
    images = digit_tree_of(tmp_path / "images", classes=range(10), per_class=5, skip=100)

    checkout = shutil.copytree(ROOT, tmp_path / "checkout", ignore=NOT_IN_A_CHECKOUT)
    environment = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "PYTHONPATH")}
    environment["UV_COMPILE_BYTECODE_TIMEOUT"] = "600"  # instead of a minute, which a busy machine may need
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    subprocess.run(["uv", "sync", "--no-dev", "--python", version], cwd=checkout, env=environment, check=True)
    there = Path(shutil.copytree(here, tmp_path / "there"))
    python = checkout / ".venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    subprocess.run([python, "-c", IN_THE_BASE, there, images, tmp_path], cwd=tmp_path, env=environment, check=True)

    opened, files = Bundle.open(here, device="cpu"), sorted(images.rglob("*.png"))
    expected, found = opened.embed(files), np.load(tmp_path / "embeddings.npy")
    print(f"{len(files)} images, largest difference {np.abs(expected - found).max()}")
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    answers = json.loads((tmp_path / "answers.json").read_text())
    assert [label for label, _ in answers] == [answer.label for answer in opened.classify(files)]
    probabilities = [answer.probability for answer in opened.classify(files)]
    np.testing.assert_allclose([probability for _, probability in answers], probabilities, atol=1e-5)
    assert len({label for label, _ in answers}) > 3
