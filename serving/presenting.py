"""What the service shows of itself: a page to try it, its documentation, and its description for tools.

Everything here is made once, when the application is; a request gets bytes that lie ready.
"""

import hashlib
from collections.abc import Sequence
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from pydantic_core import to_json
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Scope

from serving import schemas
from serving.errors import NotFoundError
from serving.openapi import describe, methods_of
from serving.requests import engine_of

__all__ = ["OPEN", "Document", "Presented", "docs", "index", "is_open", "openapi", "page_file"]

# Nothing but what comes from here, and no code or style inside the pages: what a label says stays text.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
FILES = ("api.js", "classes.js", "docs.css", "icon.svg", "page.css", "page.js", "results.js", "style.css")
# What a browser asks for before it can have a key; it holds nothing of the gallery.
OPEN = frozenset({"/docs", "/openapi.json", *(f"/page/{name}" for name in FILES)})


class Document:
    """Bytes that are the same for everybody; who has this version already is told so."""

    def __init__(self, content: bytes, media_type: str) -> None:
        self.content = content
        self._tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
        self._headers = {"ETag": self._tag, "Cache-Control": "no-cache", "Content-Type": media_type}
        if media_type.startswith("text/html"):
            self._headers |= {"Content-Security-Policy": POLICY, "Referrer-Policy": "no-referrer"}

    def answer(self, request: Request, **headers: str) -> Response:
        """The document, or 304."""
        known = {tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")}
        fresh = bool(known & {self._tag, "*"})
        return Response(b"" if fresh else self.content, 304 if fresh else 200, self._headers | headers)


class Presented:
    """The documents of an application with these routes; lies in its `state.presented`."""

    def __init__(self, routes: Sequence[Route]) -> None:
        self.routes = [f"{method} {path}" for route in routes for method, path in methods_of(route)]
        description = describe(routes)
        self.openapi = Document(to_json(description), "application/json")
        self.docs = Document(_drawn(description), "text/html; charset=utf-8")
        folder = resources.files("serving") / "page"
        self.page = Document((folder / "index.html").read_bytes(), "text/html; charset=utf-8")
        self.files = {name: Document((folder / name).read_bytes(), _media_type(name)) for name in FILES}


def is_open(scope: Scope) -> bool:
    """Whether a request, if it is one to read, is answered without a key: the pages, not what they show."""
    return scope["path"] in OPEN or (scope["path"] == "/" and _wants_page(Headers(scope=scope)))


def _wants_page(headers: Headers) -> bool:
    return "text/html" in headers.get("accept", "")


async def index(request: Request) -> Response:
    """GET /: what is served here, and where; for browsers a page to try it."""
    presented = _presented(request)
    if _wants_page(request.headers):
        return presented.page.answer(request, Vary="Accept")
    manifest = engine_of(request).manifest
    answer = schemas.Index(model=manifest.name, bundle=manifest.id, routes=presented.routes)
    return Response(to_json(answer), headers={"Vary": "Accept"}, media_type="application/json")


async def docs(request: Request) -> Response:
    """GET /docs: this documentation."""
    return _presented(request).docs.answer(request)


async def openapi(request: Request) -> Response:
    """GET /openapi.json: this documentation for tools."""
    return _presented(request).openapi.answer(request)


async def page_file(request: Request) -> Response:
    """GET /page/{name}: what the pages are drawn with."""
    document = _presented(request).files.get(request.path_params["name"])
    if document is None:
        raise NotFoundError("the pages have no such file", param="name")
    return document.answer(request)


def _presented(request: Request) -> Presented:
    presented: Presented = request.app.state.presented
    return presented


def _drawn(description: dict[str, Any]) -> bytes:
    environment = Environment(
        loader=PackageLoader("serving", "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["json"] = lambda value: to_json(value, indent=2).decode()
    return environment.get_template("docs.html").render(api=description).encode()


def _media_type(name: str) -> str:
    # Not of the system's table, which may call scripts plain text.
    kind = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}[name[name.rindex(".") :]]
    return f"{kind}; charset=utf-8"
