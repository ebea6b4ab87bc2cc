"""Offline evaluation of a real bundle: the numbers, the script and the report."""

import json
import subprocess
import sys

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, confusion_matrix

from coterie.errors import DataError
from evaluation.evaluate import embed_folder, evaluate
from evaluation.report import write_report


@pytest.fixture(scope="module")
def queries(tiny_bundle, digit_tree_of, tmp_path_factory):
    folder = tmp_path_factory.mktemp("queries")
    known = digit_tree_of(folder / "known", classes=range(8), per_class=12, skip=100)
    unknown = digit_tree_of(folder / "unknown", classes=(8, 9), per_class=12)
    return embed_folder(tiny_bundle, known), embed_folder(tiny_bundle, unknown)


@pytest.fixture(scope="module")
def result(tiny_bundle, queries):
    return evaluate(tiny_bundle, *queries)


def test_the_numbers_are_those_of_the_served_answers(tiny_bundle, queries, result):
    known, _ = queries
    pixels = list(known.images.pixels)
    closed, accepted = [], []
    for answer in tiny_bundle.classify(pixels):
        closed.append(answer.classes[0].label)
        accepted.append(answer.label)
    truth = known.labels.tolist()
    assert result.top1 == pytest.approx(accuracy_score(truth, closed))
    assert result.accepted_top1 == pytest.approx(np.mean([a == t for a, t in zip(accepted, truth, strict=True)]))
    assert result.false_rejected == pytest.approx(np.mean([a is None for a in accepted]))
    expected = confusion_matrix(truth, closed, labels=list(result.classes))
    np.testing.assert_array_equal(result.confusion, expected)


def test_unknown_images_score_lower_than_known_ones(result):
    assert result.unknown is not None
    assert result.unknown.auroc > 0.6


def test_a_label_that_the_gallery_lacks_is_refused(tiny_bundle, queries):
    _, unknown = queries
    with pytest.raises(DataError, match="'8', '9'"):
        evaluate(tiny_bundle, unknown)


def test_the_script_prints_the_same_numbers(tiny_bundle, digit_tree_of, tmp_path, result):
    known = digit_tree_of(tmp_path / "known", classes=range(8), per_class=12, skip=100)
    command = [sys.executable, "-m", "evaluation.knn", str(tiny_bundle.path), str(known)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["top1"] == result.top1
    assert json.loads(done.stdout)["data"] == result.data


def test_the_script_says_what_is_wrong_in_one_line(tmp_path):
    command = [sys.executable, "-m", "evaluation.knn", str(tmp_path), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_the_report_stands_alone_and_escapes_what_it_shows(result, tmp_path):
    write_report(result, "<script>alert(1)</script>", tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text()
    assert "<script" not in html
    assert "http://" not in html
    assert "https://" not in html
    assert f"{result.top1:.4f}" in html
    for mistake in result.mistakes:
        assert mistake.path in html
