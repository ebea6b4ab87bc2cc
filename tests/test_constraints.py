"""The tested versions stand in one place, and they are the ones that the tests run with."""

import importlib.metadata
import runpy
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent


def test_constraints_txt_is_generated_from_pyproject():
    script = runpy.run_path(str(ROOT / ".ci" / "constraints.py"))
    assert (ROOT / "constraints.txt").read_text("utf-8") == script["constraints_text"]()


def test_installed_packages_have_the_tested_versions():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    wrong, checked = [], 0
    for line in settings["tool"]["uv"]["constraint-dependencies"]:
        requirement = Requirement(line)
        if requirement.marker and not requirement.marker.evaluate():
            continue
        try:
            installed = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            continue  # an extra, or a package of another system
        checked += 1
        if not requirement.specifier.contains(installed, prereleases=True):
            wrong.append(f"{requirement.name} {installed}, tested with {requirement.specifier}")
    assert checked > 50
    assert not wrong
