"""The page in a real browser, where there is one."""

from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from coterie.bundle import Bundle
from tests.browser import CHROMIUM, Tab, browsing

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")

QUIET = "document.body.getAttribute('aria-busy') === null"


@pytest.fixture
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with browsing(tmp_path_factory.mktemp("browser")) as one:
        yield one
    # Nothing but the page's own: no other host was asked, and no rule broken.
    assert {urlsplit(url.removeprefix("blob:")).hostname for url in one.asked} == {"127.0.0.1"}


@pytest.fixture
def url(service_of: Callable[..., str], tiny_bundle: Bundle) -> str:
    return f"{service_of(tiny_bundle)}/"


def texts(tab: Tab, selector: str) -> list[str]:
    return tab.run(f"Array.from(document.querySelectorAll({selector!r}), (one) => one.textContent)")


def ready(tab: Tab) -> None:
    tab.until(f"{QUIET} && document.querySelectorAll('#classes tr').length > 0")


def written(folder: Path, images: dict[str, bytes]) -> list[Path]:
    for name, image in images.items():
        (folder / name).write_bytes(image)
    return [folder / name for name in images]


def test_a_class_is_enrolled_known_and_forgotten(tab: Tab, url: str, digit_images, tmp_path: Path) -> None:
    eights = digit_images.of("8").images
    tab.open(url)
    ready(tab)
    assert texts(tab, "#classes th") == list("01234567")
    tab.choose("#files", written(tmp_path, {f"{row}.png": image for row, image in enumerate(eights[:5])}))
    tab.until(f"{QUIET} && document.querySelectorAll('.unknown').length === 5")

    label = '<img src=x onerror="document.title=1">'
    tab.run(f"document.getElementById('label').value = {label!r}")
    tab.run("document.getElementById('enrol-button').click()")
    tab.until(f"{QUIET} && document.querySelectorAll('.known').length === 5")
    assert texts(tab, ".known .verdict") == [label] * 5
    assert label in texts(tab, "#classes th") and texts(tab, "#status") == [f"Enrolled 5 as “{label}”."]
    tab.until("document.querySelectorAll('.near img').length === 25")
    assert tab.run("document.querySelectorAll('#classes img, .verdict img').length") == 0
    assert tab.run("document.title") == "Coterie"

    forget = "Array.from(document.querySelectorAll('#classes tr')).find((row) => row.dataset.count === '5')"
    dialog = "document.getElementById('forget')"
    # By the keyboard alone: what keeps the class has the focus, and Escape keeps it, too.
    for keys in ([("Enter", 13, "\r")], [("Escape", 27, "")], [("Tab", 9, ""), ("Enter", 13, "\r")]):
        assert label in texts(tab, "#classes th")
        tab.run(f"{forget}.querySelector('button').focus()")
        tab.press("Enter", 13, "\r")
        tab.until(f"{dialog}.open && document.activeElement.id === 'forget-no'")
        for key in keys:
            tab.press(*key)
        tab.until(f"!{dialog}.open && {QUIET}")
    tab.until("document.querySelectorAll('#classes tr').length === 8")
    tab.until(f"{QUIET} && document.querySelectorAll('.unknown').length === 5")
    assert tab.complaints == []


def test_one_bad_image_says_what_is_wrong_and_harms_no_other(tab: Tab, url: str, digit_images, tmp_path: Path) -> None:
    tab.open(url)
    ready(tab)
    tab.choose("#files", written(tmp_path, {"a.png": digit_images.images[0], "notes.png": b"no image"}))
    tab.until(f"{QUIET} && document.querySelectorAll('.known, .unknown, .failed').length === 2")
    (said,) = texts(tab, ".failed .verdict")
    assert said.startswith("not an image")
    assert tab.run("Array.from(document.querySelectorAll('.choice input'), (one) => one.checked)") == [True, False]
    tab.run("document.getElementById('clear').click()")
    assert texts(tab, ".card") == []
    # The browser's own complaint of the picture that it cannot show is none of the page.
    assert all("notes" in one or "blob" in one for one in tab.complaints)


def test_an_error_of_the_service_is_shown_and_the_key_asked_for(
    tab: Tab, service_of: Callable[..., str], tiny_bundle: Bundle, digit_images, tmp_path: Path
) -> None:
    tab.open(f"{service_of(tiny_bundle, wrap=locked)}/")
    tab.until("!document.getElementById('error').hidden")
    assert texts(tab, "#error") == ["A key is needed: enter it above."]
    assert tab.run("document.activeElement.id") == "key-field" and tab.run("document.getElementById('key').open")
    tab.run("document.getElementById('key-field').value = 'open'")
    tab.press("Enter", 13, "\r")
    tab.until("document.getElementById('error').textContent.includes('not valid')")
    tab.run("document.getElementById('key-field').value = 'sesame'")
    tab.press("Enter", 13, "\r")
    ready(tab)
    assert tab.run("document.getElementById('error').hidden")
    assert tab.run("[sessionStorage.getItem('coterie-key'), localStorage.length]") == ["sesame", 0]
    tab.choose("#files", written(tmp_path, {"a.png": digit_images.images[0]}))
    # Pictures take the key along.
    tab.until("document.querySelectorAll('.near img').length === 5")
    tab.until("document.querySelector('.near img').naturalWidth > 0")


def locked(app):  # type: ignore[no-untyped-def]
    """The application behind a key."""

    async def guarded(scope, receive, send):  # type: ignore[no-untyped-def]
        if scope["path"].startswith("/v1/") and (b"authorization", b"Bearer sesame") not in scope["headers"]:
            content = b'{"error": {"message": "this needs a valid key"}}'
            await send({"type": "http.response.start", "status": 401, "headers": []})
            await send({"type": "http.response.body", "body": content})
        else:
            await app(scope, receive, send)

    return guarded


def test_the_page_works_below_a_path_of_a_proxy(
    tab: Tab, service_of: Callable[..., str], tiny_bundle: Bundle, digit_images, tmp_path: Path
) -> None:
    url = f"{service_of(tiny_bundle, wrap=below_photos)}/photos/"
    tab.open(url)
    ready(tab)
    tab.choose("#files", written(tmp_path, {"a.png": digit_images.images[0]}))
    tab.until("document.querySelectorAll('.near img').length === 5")
    tab.open(f"{url}docs")
    assert tab.run("document.querySelector('header a[href=\"./\"]').href") == url
    assert tab.complaints == []


def below_photos(app):  # type: ignore[no-untyped-def]
    """The application as a proxy's `location /photos/` shows it."""

    async def moved(scope, receive, send):  # type: ignore[no-untyped-def]
        assert scope["path"].startswith("/photos/"), scope["path"]
        await app({**scope, "path": scope["path"].removeprefix("/photos")}, receive, send)

    return moved


@pytest.mark.parametrize("path", ["", "docs"])
@pytest.mark.parametrize("width", [1280, 400])
def test_pages_fit_their_width_in_light_and_dark(tab: Tab, url: str, width: int, path: str) -> None:
    grounds = []
    for dark in (False, True):
        tab.open(url + path, width=width, dark=dark)
        tab.run("document.querySelectorAll('main details').forEach((one) => { one.open = true; })")
        assert tab.run("document.documentElement.scrollWidth") <= width
        grounds.append(tab.run("getComputedStyle(document.documentElement).backgroundColor"))
    assert grounds[0] != grounds[1]
    assert tab.complaints == []
