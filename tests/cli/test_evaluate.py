"""`coterie evaluate` as a person calls it: files written, gates as exit codes, wrong use in one line."""

import json
import shutil
import sys

import pytest


@pytest.fixture(scope="module")
def data(digit_tree_of, tmp_path_factory):
    return digit_tree_of(tmp_path_factory.mktemp("data") / "test", classes=range(8), per_class=5, skip=100)


def one_line(err):
    """The error line, which is all of stderr but progress bars."""
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, err
    assert "Traceback" not in err
    return lines[0]


def test_report_and_json_are_written_though_a_gate_fails(coterie, tiny_bundle, data, tmp_path):
    report, numbers = tmp_path / "report.html", tmp_path / "numbers.json"
    files = ("--report", report, "--json", numbers)
    code, out, err = coterie("evaluate", tiny_bundle.path, data, *files, "--max-ece", 0, "--hold-out", "1,2")
    assert code == 1
    assert "calibration error is" in one_line(err)
    assert "MAP@R" in out
    assert "AUROC without 1, 2" in out
    values = json.loads(numbers.read_text())
    assert values["bundle"] == tiny_bundle.manifest.id
    assert report.stat().st_size > 1_000_000


def test_the_numbers_are_kept_though_the_report_fails(coterie, tiny_bundle, data, tmp_path):
    numbers, nowhere = tmp_path / "numbers.json", tmp_path / "file" / "report.html"
    (tmp_path / "file").touch()
    code, _, err = coterie("evaluate", tiny_bundle.path, data, "--report", nowhere, "--json", numbers)
    assert code == 2
    assert str(tmp_path / "file") in one_line(err)
    assert json.loads(numbers.read_text())["bundle"] == tiny_bundle.manifest.id


@pytest.mark.parametrize("option", ["--report", "--json"])
def test_a_folder_to_write_to_is_refused_before_any_work(coterie, tiny_bundle, data, tmp_path, option):
    code, out, err = coterie("evaluate", tiny_bundle.path, data, option, tmp_path)
    assert code == 2
    assert "is a folder: name a file in it" in one_line(err)
    assert out == ""


def test_what_was_not_measured_is_a_dash(coterie, tiny_bundle, digit_tree_of, tmp_path):
    threes = digit_tree_of(tmp_path / "threes", classes=(3,), per_class=2, skip=100)
    code, out, _ = coterie("evaluate", tiny_bundle.path, threes, "--compare", tiny_bundle.path)
    assert code == 0
    assert "silhouette" in out
    assert "nan" not in out


def test_all_gates_that_fail_are_named_at_once(coterie, tiny_bundle, digit_tree_of, data, tmp_path):
    mixed = shutil.copytree(data, tmp_path / "mixed")
    (mixed / "0").rename(tmp_path / "zeros")
    (mixed / "1").rename(mixed / "0")
    (tmp_path / "zeros").rename(mixed / "1")
    gates = ("--min-top1", 0.99, "--max-ece", 0.001)
    code, _, err = coterie("evaluate", tiny_bundle.path, mixed, *gates)
    assert code == 1
    assert "below --min-top1 0.99; the calibration error is" in one_line(err)


def test_a_comparison_with_itself_drops_nothing(coterie, tiny_bundle, data):
    command = ("evaluate", tiny_bundle.path, data, "--compare", tiny_bundle.path, "--max-drop", 0)
    code, out, _ = coterie(*command)
    assert code == 0
    assert "McNemar" in out


def test_labels_that_the_gallery_lacks(coterie, tiny_bundle, digit_tree_of, tmp_path):
    strange = digit_tree_of(tmp_path / "strange", classes=(7, 8), per_class=3)
    code, _, err = coterie("evaluate", tiny_bundle.path, strange)
    assert code == 2
    assert "the gallery has no class '8': enrol it first, or give these images as --unknown" in one_line(err)


def test_an_empty_folder(coterie, tiny_bundle, tmp_path):
    (tmp_path / "empty").mkdir()
    code, _, err = coterie("evaluate", tiny_bundle.path, tmp_path / "empty")
    assert code == 2
    assert "has no class folders" in one_line(err)


def test_a_bundle_of_another_version_to_compare_with(coterie, tiny_bundle, data, tmp_path):
    other = shutil.copytree(tiny_bundle.path, tmp_path / "bundle")
    manifest = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps(manifest | {"format": 1}))
    code, _, err = coterie("evaluate", tiny_bundle.path, data, "--compare", other)
    assert code == 2
    assert "has bundle format 1, this version reads" in one_line(err)


def test_a_gate_on_a_drop_from_nothing(coterie, tiny_bundle, data):
    code, _, err = coterie("evaluate", tiny_bundle.path, data, "--max-drop", 0.01)
    assert code == 2
    assert "name it with --compare" in one_line(err)


def test_a_class_to_hold_out_that_is_not_there(coterie, tiny_bundle, data):
    code, _, err = coterie("evaluate", tiny_bundle.path, data, "--hold-out", "7,nine")
    assert code == 2
    assert "the gallery has no class 'nine'" in one_line(err)


def test_a_report_where_plotly_is_not_installed(coterie, tiny_bundle, data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly", None)
    code, out, err = coterie("evaluate", tiny_bundle.path, data, "--report", tmp_path / "report.html")
    assert code == 2
    assert "install coterie[report]" in one_line(err)
    assert out == ""
    assert not (tmp_path / "report.html").exists()
