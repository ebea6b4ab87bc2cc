"""The report stands alone, shows what was measured and escapes what it shows."""

import html
import json
import re
from dataclasses import replace

import numpy as np
import pytest

from evaluation.evaluate import evaluate
from evaluation.figures import figures, on_map
from evaluation.queries import Queries, embed_folder
from evaluation.report import summary, write_report
from evaluation.study import Study, Wanted, run_study


@pytest.fixture(scope="module")
def page(study, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_report(study, path)
    return path.read_text("utf-8")


def outside_scripts(page):
    return re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)


def test_nothing_is_loaded(page):
    assert re.findall(r"<script[^>]", page) == []
    assert re.search(r"<(link|iframe|object)", outside_scripts(page)) is None
    sources = re.findall(r"""(?:src|href)=["']?([^"' >]+)""", outside_scripts(page))
    assert all(source.startswith("data:image/") for source in sources)
    assert "@import" not in page.partition("</style>")[0]


def test_it_shows_the_numbers(page, study):
    text = html.unescape(outside_scripts(page))
    for name in ("top1", "knn_top1", "map_at_r", "ece", "silhouette", "recall_at_10"):
        assert f"{getattr(study.first, name):.4f}" in text
    assert f"{study.first.unknown.oscr:.4f}" in text
    assert study.first.bundle in text
    assert study.first.data in text
    assert summary(study) in text


def test_every_figure_has_its_place(page, study):
    drawn = set(figures(study))
    assert drawn == {
        *("confusion", "reliability", "coverage", "similarities", "knn", "map", "corruptions", "severity", "shots")
    }
    for name in drawn:
        assert f'id="{name}"' in page


def test_axes_of_shares_end_at_all_however_near_the_shares_are(study):
    perfect = tuple(replace(one, top1=1.0, top1_interval=(1.0, 1.0)) for one in study.first.knn)
    flawless = replace(study.first, knn=perfect, risks=(0.0,) * 100, risk_intervals=((0.0, 0.0),) * 100)
    drawn = figures(replace(study, evaluations=(flawless, flawless)))
    low, high = drawn["knn"].layout.yaxis.range
    assert low < 0.995 < 1 < high < 1.005
    low, high = drawn["coverage"].layout.yaxis.range
    assert low == 0 < high < 0.05
    for name in ("knn", "shots"):
        low, high = figures(study)[name].layout.yaxis.range
        shown = [value for trace in figures(study)[name].data for value in trace.y]
        assert low < min(shown) <= max(shown) < high < 1.005


def test_each_corruption_stands_beside_the_others_bundles(page, study):
    ratios = study.comparisons[0].relative_errors
    assert ratios
    for name, ratio in ratios.items():
        low, high = (f"{bound:.1%}" for bound in study.comparisons[0].relative_error_intervals[name])
        shown = f'{ratio:.1%} <span class="soft below">{low} … {high}</span>'
        assert f"<td>{name.replace('_', ' ')}</td><td>{shown}</td>" in page


def test_why_many_classes_have_no_confusion_figure_is_said(tiny_bundle, study, tmp_path):
    many = replace(study.first, classes=(*study.first.classes, *(f"more {number}" for number in range(60))))
    write_report(Study.of(tiny_bundle, study.queries, many), tmp_path / "report.html")
    page = outside_scripts((tmp_path / "report.html").read_text("utf-8"))
    assert f"{len(many.classes)} classes are too many" in page
    assert 'id="confusion"' not in page


def test_mistakes_come_with_their_neighbours(page, study):
    text = html.unescape(outside_scripts(page))
    for mistake in study.first.mistakes:
        assert mistake.path in text
        assert len(mistake.neighbors) == 5
    assert page.count("<figure>") >= len(study.first.mistakes)


def test_what_it_shows_cannot_write_html(tiny_bundle, study, tmp_path):
    evil = "</script><img src=x onerror=alert(1)>"
    images = replace(study.queries.images, classes=(evil, *study.queries.images.classes[1:]))
    queries = Queries(images, study.queries.embeddings, study.queries.seconds)
    first = replace(
        study.first,
        name=evil,
        classes=(evil, *study.first.classes[1:]),
        per_class=(replace(study.first.per_class[0], label=evil), *study.first.per_class[1:]),
    )
    write_report(Study.of(tiny_bundle, queries, first), tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text("utf-8")
    assert evil not in page
    assert "<img src=x" not in page
    assert html.escape(evil) in page


def test_the_map_carries_a_picture_of_every_point(page, study):
    rows = on_map(study)
    carried = re.search(r"thumbnails = (\[.*?\]);", page).group(1)
    assert len(json.loads(carried)) == len(rows)
    points = figures(study)["map"].to_plotly_json()["data"]
    assert sorted(number for trace in points for number in trace["customdata"]) == list(range(len(rows)))


def test_a_handful_of_images_without_extras_has_a_report(tiny_bundle, digit_tree_of, tmp_path):
    queries = embed_folder(tiny_bundle, digit_tree_of(tmp_path / "few", classes=(3,), per_class=2, skip=100))
    study = Study.of(tiny_bundle, queries, evaluate(tiny_bundle, queries))
    write_report(study, tmp_path / "report.html")
    assert "corruptions" not in figures(study)
    assert np.isnan(study.first.silhouette)
    assert "NaN" not in (tmp_path / "report.html").read_text("utf-8").rpartition("<script>")[2]


def test_embeddings_that_are_all_equal_have_a_map(tiny_bundle, study, tmp_path):
    """As of an encoder that collapsed."""
    queries = study.queries
    equal = Queries(queries.images, np.repeat(queries.embeddings[:1], len(queries), axis=0), queries.seconds)
    collapsed = Study.of(tiny_bundle, equal, study.first)
    write_report(collapsed, tmp_path / "report.html")
    for trace in figures(collapsed)["map"].to_plotly_json()["data"]:
        np.testing.assert_allclose([trace["x"], trace["y"]], 0, atol=1e-4)


def test_bundles_are_compared_on_one_class_too(tiny_bundle, digit_tree_of, tmp_path):
    data = digit_tree_of(tmp_path / "threes", classes=(3,), per_class=3, skip=100)
    study = run_study(tiny_bundle.path, data, [tiny_bundle.path], Wanted(device="cpu"))
    write_report(study, tmp_path / "report.html")
    page = outside_scripts((tmp_path / "report.html").read_text("utf-8"))
    assert "nan" not in re.sub(r"data:image[^\"]*", "", page)
