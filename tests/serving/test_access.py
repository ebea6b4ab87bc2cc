"""Who may do what: with keys, without any, from web pages, and by names that are not ours."""

import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from serving.access import ASKING, Access, Policy
from serving.engine import Engine
from serving.keys import Keyring, create_key
from serving.listening import listens_on_loopback
from serving.presenting import OPEN
from serving.routes import ROUTES, build_app
from serving.served import Served

Make = Callable[..., TestClient]


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


@pytest.fixture
def make(engine: Engine, keys: Path) -> Iterator[Make]:
    """The application behind a policy; by default bound to the loopback interface, called by its name."""
    opened = []

    def one(*, local: bool = True, base: str = "http://localhost:3000", **policy: Any) -> TestClient:
        app = build_app()
        app.state.served = Served(engine)
        around = Access(app, lambda: Policy(Keyring(keys), on_loopback=lambda: local, **policy))
        opened.append(TestClient(around, base_url=base, raise_server_exceptions=False))
        return opened[-1]

    yield one
    for client in opened:
        client.close()


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def test_every_route_that_changes_is_closed_to_who_may_only_ask(make: Make, keys: Path, error_of) -> None:
    _, token = create_key(keys, "ask")
    client = make()
    for route in ROUTES:
        for method in (route.methods or set()) - {"GET", "HEAD"}:
            path = route.path.replace("{label}", "nothing").replace("{id}", "nothing")
            response = client.request(method, path, headers=bearer(token))
            if path in ASKING:
                assert response.status_code == 400, path
            else:
                assert error_of(response, 403)["code"] == "forbidden", path


def test_with_keys_nothing_but_the_probes_is_open(make: Make, keys: Path, digit_images, error_of) -> None:
    create_key(keys, "change")
    client = make()
    for method, path in [
        ("GET", "/"),
        ("GET", "/v1/classes"),
        ("GET", "/metrics"),
        ("GET", "/nope"),
        ("POST", "/v1/classify"),
        ("POST", "/embed"),
        ("DELETE", "/v1/classes/3"),
    ]:
        for headers in ({}, bearer("wrong"), {"Authorization": "Basic eDp5"}, {"Authorization": "Bearer"}):
            response = client.request(method, path, headers=headers)
            assert error_of(response, 401)["code"] == "unauthorized", path
            assert response.headers["www-authenticate"] == "Bearer"
    for path in ("/healthz", "/livez", "/readyz"):  # which BentoML answers
        assert client.get(path).status_code == 404


def test_pages_are_open_so_that_they_can_ask_for_the_key(make: Make, keys: Path, error_of) -> None:
    create_key(keys, "change")
    client, html = make(), {"accept": "text/html,*/*;q=0.8"}
    for path in ("/", *OPEN):
        response = client.get(path, headers=html)
        assert response.status_code == 200 and "tiny-digits" not in response.text, path
        assert client.head(path, headers=html).status_code == 200
        error_of(client.post(path, headers=html), 401)
    for path in ("/v1/classes", "/docs/", "/page/none.js"):
        error_of(client.get(path, headers=html), 401)


def test_a_key_opens_what_its_scope_says(make: Make, keys: Path, digit_images, engine: Engine) -> None:
    asks, changes = create_key(keys, "ask")[1], create_key(keys, "change")[1]
    client, image = make(local=False, base="http://example.org"), digit_images.images[0]
    for token in (asks, changes):
        assert client.post("/v1/classify", content=image, headers=bearer(token)).status_code == 200
    before = engine.gallery().members("3")
    assert client.delete("/v1/classes/3", headers=bearer(asks)).status_code == 403
    assert len(engine.gallery().members("3")) == len(before) > 0
    assert client.delete("/v1/classes/3", headers=bearer(changes)).status_code == 200
    assert not len(engine.gallery().members("3"))


def test_without_keys_anybody_asks_and_this_machine_alone_changes(make: Make, digit_images, error_of) -> None:
    image = digit_images.images[0]
    for client in (make(), make(local=False, base="http://example.org")):
        assert client.post("/v1/classify", content=image).status_code == 200
        assert client.get("/v1/classes").status_code == 200
    assert make().delete("/v1/classes/3").status_code == 200
    error = error_of(make(local=False).delete("/v1/classes/4"), 401)
    assert "coterie key new" in error["message"]


@pytest.mark.parametrize("header", ["X-Forwarded-For", "Forwarded", "X-Real-IP", "Via"])
def test_what_a_proxy_hands_over_is_not_from_this_machine(make: Make, header: str, error_of) -> None:
    error_of(make().delete("/v1/classes/3", headers={header: "203.0.113.9"}), 401)


@pytest.mark.parametrize("host", ["evil.example", "evil.example:3000", "localhost.evil.example", "127.0.0.1.evil", ""])
def test_a_name_that_leads_here_but_is_not_ours_is_refused(make: Make, host: str, error_of) -> None:
    for method, path in (("DELETE", "/v1/classes/3"), ("GET", "/v1/classes"), ("POST", "/v1/classify")):
        response = make().request(method, path, headers={"Host": host})
        assert error_of(response, 403)["param"] == "host"


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:3000", "127.0.0.1:3000", "[::1]:3000", "box.example:80"])
def test_names_of_this_machine_and_those_listed_are_ours(make: Make, host: str) -> None:
    client = make(hosts=frozenset({"box.example"}))
    assert client.delete("/v1/classes/3", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://localhost:4000", "https://localhost.evil", "http://[x", "", "//"]
)
def test_changes_are_not_taken_from_pages_of_other_origins(make: Make, keys: Path, origin: str, error_of) -> None:
    assert error_of(make().delete("/v1/classes/3", headers={"Origin": origin}), 403)["param"] == "origin"
    token = create_key(keys, "change")[1]
    error_of(make().delete("/v1/classes/3", headers={"Origin": origin, **bearer(token)}), 403)


def test_changes_are_taken_from_our_own_pages_and_those_listed(make: Make) -> None:
    assert make().delete("/v1/classes/3", headers={"Origin": "http://localhost:3000"}).status_code == 200
    client = make(origins=("https://app.example",))
    assert client.delete("/v1/classes/4", headers={"Origin": "https://app.example"}).status_code == 200


def test_a_check_that_fails_itself_is_our_error(make: Make, monkeypatch: pytest.MonkeyPatch, error_of) -> None:
    def broken() -> Any:
        raise OSError("/proc cannot be read")

    monkeypatch.setattr(Policy, "check", lambda *_: broken())
    checked = make()
    without_policy = TestClient(Access(checked.app, broken), raise_server_exceptions=False)
    for client in (checked, without_policy):
        error = error_of(client.delete("/v1/classes/3"), 500)
        assert error["code"] == "internal_error" and "/proc" not in error["message"]


def test_browsers_let_in_listed_origins_and_no_others(make: Make, keys: Path, error_of) -> None:
    create_key(keys, "ask")
    asked = {"Origin": "https://app.example", "Access-Control-Request-Method": "POST"}
    assert "access-control-allow-origin" not in make().options("/v1/classify", headers=asked).headers
    client = make(origins=("https://app.example",))
    allowed = client.options("/v1/classify", headers=asked)  # which browsers send without a key
    assert (allowed.status_code, allowed.content) == (200, b"")
    assert allowed.headers["access-control-allow-origin"] == "https://app.example"
    refused = client.options("/v1/classify", headers=asked | {"Origin": "https://evil.example"})
    assert error_of(refused, 400)["code"] == "bad_request"
    assert "access-control-allow-origin" not in refused.headers
    answer = client.get("/v1/classes", headers={"Origin": "https://app.example"})
    read = answer.headers["access-control-expose-headers"].lower().split(", ")
    assert {"x-bundle-id", "x-queue-time", "x-inference-time", "retry-after"} <= set(read)


def test_heads_beyond_reason_are_refused(make: Make, error_of) -> None:
    assert error_of(make().get("/v1/classes?" + "a" * 9000), 414)["code"] == "uri_too_long"
    assert error_of(make().get("/v1/classes", headers={"x": "a" * 70_000}), 431)["code"] == "headers_too_large"
    assert make().get("/nope", headers={"x": "a" * 60_000}).status_code == 404


@pytest.mark.parametrize(("address", "local"), [("127.0.0.1", True), ("::1", True), ("0.0.0.0", False), ("::", False)])
def test_where_a_process_listens_is_read_from_its_sockets(address: str, local: bool) -> None:
    assert not listens_on_loopback()  # nowhere, which could be anywhere
    with socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET):
        assert listens_on_loopback() is local
    with socket.create_server(("127.0.0.1", 0)), socket.create_server(("0.0.0.0", 0)):
        assert not listens_on_loopback()
