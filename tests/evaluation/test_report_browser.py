"""The report in a real browser, where there is one: its figures, in light and dark, on a desk and on a phone."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from evaluation.figures import figures, on_map
from evaluation.report import write_report
from evaluation.study import Study
from tests.browser import CHROMIUM, Tab, browsing

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")

DRAWN = "document.querySelectorAll('.plot .main-svg').length > 0 && window.map"


@pytest.fixture(scope="module")
def url(study, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_report(study, path)
    return path.as_uri()


@pytest.fixture
def tab(url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with browsing(tmp_path_factory.mktemp("browser")) as one:
        yield one
    assert one.complaints == []
    assert {asked for asked in one.asked if not asked.startswith("data:image/")} == {url}


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (390, True)])
def test_every_figure_is_drawn_and_nothing_is_wider_than_the_page(
    tab: Tab, url: str, study: Study, width: int, dark: bool
) -> None:
    tab.open(url, width=width, dark=dark)
    tab.until(DRAWN)
    drawn = tab.run("Array.from(document.querySelectorAll('.plot:has(.main-svg)'), (one) => one.id)")
    assert set(drawn) == set(figures(study))
    assert tab.run("document.documentElement.scrollWidth") <= width
    wide = "Array.from(document.querySelectorAll('.plot'), (one) => one.getBoundingClientRect().right)"
    assert max(tab.run(wide)) <= width
    ink = tab.run("getComputedStyle(document.body).color")
    assert (ink == "rgb(232, 233, 236)") == dark
    texts = tab.run("Array.from(document.querySelectorAll('#knn .xtitle'), (one) => getComputedStyle(one).fill)")
    assert texts == [ink]


def test_a_point_of_the_map_shows_its_picture(tab: Tab, url: str, study: Study) -> None:
    tab.open(url)
    tab.until(DRAWN)
    tab.run("document.getElementById('map').scrollIntoView({block: 'center', behavior: 'instant'})")
    point = "document.querySelector('#map .points path').getBoundingClientRect()"
    x, y = tab.run(f"(({{x, y, width, height}}) => [x + width / 2, y + height / 2])({point})")
    hover = "document.getElementById('hover')"
    assert tab.run(f"getComputedStyle({hover}).display") == "none"
    tab("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    tab.until(f"getComputedStyle({hover}).display === 'block' && {hover}.firstChild.naturalWidth > 0")
    assert len(on_map(study)) == tab.run("thumbnails.length")
    tab("Input.dispatchMouseEvent", type="mouseMoved", x=5, y=5)
    tab.until(f"getComputedStyle({hover}).display === 'none'")


def test_it_prints_in_light(tab: Tab, url: str, tmp_path: Path) -> None:
    tab.open(url, dark=True)
    tab.until(DRAWN)
    tab("Emulation.setEmulatedMedia", media="print", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    tab.run("dispatchEvent(new Event('beforeprint'))")
    assert tab.run("getComputedStyle(document.body).color") == "rgb(26, 28, 32)"
    assert tab.run("getComputedStyle(document.querySelector('#knn .xtitle')).fill") == "rgb(26, 28, 32)"
    tab.run("dispatchEvent(new Event('afterprint'))")
    assert tab.run("getComputedStyle(document.querySelector('#knn .xtitle')).fill") == "rgb(232, 233, 236)"
