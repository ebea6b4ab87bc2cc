"""The pages as a server gives them out; tests/serving/test_page_browser.py looks at them with a browser."""

import re
from html.parser import HTMLParser

import pytest
from starlette.testclient import TestClient

from serving.presenting import FILES, POLICY
from serving.routes import build_app

HTML = {"accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
PRESENTED = build_app().state.presented
PAGES = {"/": PRESENTED.page.content.decode(), "/docs": PRESENTED.docs.content.decode()}
ASSETS = {f"/page/{name}": document.content.decode() for name, document in PRESENTED.files.items()}


class Tags(HTMLParser):
    """All tags of a page, and what stands within its scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.inside: list[str] = []
        self._last = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        self._last = tag

    def handle_data(self, data: str) -> None:
        if self._last in ("script", "style") and data.strip():
            self.inside.append(data)


def test_browsers_get_a_page_and_tools_get_json(client: TestClient) -> None:
    page = client.get("/", headers=HTML)
    assert page.headers["content-type"] == "text/html; charset=utf-8" and "<h1>Coterie</h1>" in page.text
    for accept in ("*/*", "application/json", ""):
        answer = client.get("/", headers={"accept": accept})
        assert answer.json()["model"] == "tiny-digits" and "POST /v1/classify" in answer.json()["routes"]
        assert answer.headers["vary"] == page.headers["vary"] == "Accept"


@pytest.mark.parametrize("path", ["/", "/docs", "/openapi.json", *ASSETS])
def test_who_has_a_version_gets_none_again(client: TestClient, path: str) -> None:
    first = client.get(path, headers=HTML)
    assert first.status_code == 200 and first.content
    assert first.headers["cache-control"] == "no-cache"
    for known in (first.headers["etag"], f'"other", W/{first.headers["etag"]}', "*"):
        again = client.get(path, headers=HTML | {"if-none-match": known})
        assert (again.status_code, again.content) == (304, b"")
        assert again.headers["etag"] == first.headers["etag"]
    assert client.get(path, headers=HTML | {"if-none-match": '"other"'}).status_code == 200
    assert client.head(path, headers=HTML).content == b""


def test_media_types_are_what_browsers_ask_of_scripts_and_styles(client: TestClient) -> None:
    kinds = {name.partition(".")[2]: client.get(f"/page/{name}").headers["content-type"] for name in FILES}
    assert kinds == {
        "js": "text/javascript; charset=utf-8",
        "css": "text/css; charset=utf-8",
        "svg": "image/svg+xml; charset=utf-8",
    }


@pytest.mark.parametrize("name", ["index.html", "docs.html", "..%2Froutes.py", "none.js", "%00"])
def test_no_other_file_is_given_out(client: TestClient, name: str, error_of) -> None:
    error_of(client.get(f"/page/{name}"), 404)


@pytest.mark.parametrize("path", PAGES)
def test_pages_run_nothing_but_their_own_files(client: TestClient, path: str) -> None:
    policy = client.get(path, headers=HTML).headers["content-security-policy"]
    assert policy == POLICY
    directives = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    assert directives["default-src"] == "'none'" and "unsafe" not in policy and "http" not in policy
    page = Tags(PAGES[path])
    assert page.inside == []
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on") and name != "style", (tag, name)
            if name in ("src", "href", "action"):
                # Relative to the page, so that it also works below a path of a proxy.
                assert value is not None and not re.match(r"[a-z]+:|/", value), (tag, value)
    loaded = {value for _, one in page.tags for name, value in one.items() if name in ("src", "href")}
    assert {f"/{value}" for value in loaded if value and value.startswith("page/")} <= ASSETS.keys()


def test_nothing_is_asked_of_another_host() -> None:
    for path, text in {**PAGES, **ASSETS}.items():
        found = set(re.findall(r"(?:https?:)?//[\w.-]+\.\w+[^\s\"'<)]*", text))
        # An XML namespace is a name, not an address; the documentation says how to name this service.
        assert found <= {"http://www.w3.org/2000/svg", "http://127.0.0.1:3000"}, path
        assert "@import" not in text and "url(" not in text
    imports = re.findall(r'from "(.*)"', "\n".join(text for path, text in ASSETS.items() if path.endswith(".js")))
    assert imports and {name.replace("./", "/page/") for name in imports} <= ASSETS.keys()


def test_scripts_put_what_comes_from_outside_in_as_text() -> None:
    for path, text in ASSETS.items():
        if path.endswith(".js"):
            for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function"):
                assert way not in text, (path, way)


def test_scripts_find_what_they_look_for_in_the_page() -> None:
    there = {attributes["id"] for _, attributes in Tags(PAGES["/"]).tags if "id" in attributes}
    scripts = "\n".join(text for path, text in ASSETS.items() if path.endswith(".js"))
    wanted = set(re.findall(r'getElementById\("([\w-]+)"\)', scripts))
    for names in re.findall(r"= \[([^\]]*)\]\.map\(\(id\)", scripts):
        wanted |= set(re.findall(r'"([\w-]+)"', names))
    assert len(wanted) > 15 and wanted <= there


def test_every_field_of_the_page_has_a_name() -> None:
    """A label around it, for there are no others here."""
    for field in re.findall(r"<(?:input|select)[^>]*>", PAGES["/"]):
        before = PAGES["/"][: PAGES["/"].index(field)]
        assert before.count("<label") > before.count("</label>"), field


def test_the_documentation_shows_every_route_and_shape(client: TestClient) -> None:
    api = client.get("/openapi.json").json()
    ids = [attributes["id"] for _, attributes in Tags(PAGES["/docs"]).tags if "id" in attributes]
    assert len(set(ids)) == len(ids)
    wanted = {operation["operationId"] for methods in api["paths"].values() for operation in methods.values()}
    assert wanted | api["components"]["schemas"].keys() <= set(ids)
    links = {value for _, one in Tags(PAGES["/docs"]).tags for name, value in one.items() if name == "href" and value}
    assert {link[1:] for link in links if link.startswith("#")} <= set(ids)
