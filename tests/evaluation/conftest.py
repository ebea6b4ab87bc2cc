"""A study with all that a report can show."""

import pytest

from evaluation.study import Study, Wanted, run_study


@pytest.fixture(scope="session")
def study(tiny_bundle, digit_tree_of, tmp_path_factory) -> Study:
    folder = tmp_path_factory.mktemp("report")
    known = digit_tree_of(folder / "known", classes=range(8), per_class=6, skip=100)
    unknown = digit_tree_of(folder / "unknown", classes=(8, 9), per_class=6)
    wanted = Wanted(unknown=unknown, hold_out="1,2", corruptions=True, few_shot=True, device="cpu")
    return run_study(tiny_bundle.path, known, [tiny_bundle.path], wanted)
