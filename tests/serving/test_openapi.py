"""What /openapi.json says is what the application does."""

import json
import os
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from jsonschema import Draft202012Validator
from openapi_spec_validator import validate
from starlette.testclient import TestClient

from coterie.bundle import Bundle
from coterie.store import StoreOptions
from serving import samples
from serving.access import Access, Policy
from serving.engine import NORMAL, Engine
from serving.errors import PROBLEMS
from serving.keys import Keyring
from serving.openapi import methods_of
from serving.operations import BENTOML, OPERATIONS
from serving.presenting import OPEN
from serving.problems import DESCRIBED
from serving.records import Recorder
from serving.routes import ROUTES, build_app
from serving.safety import Safety
from serving.served import Served
from serving.settings import Settings

API = json.loads(build_app().state.presented.openapi.content)
JSON = "application/json"


def operations() -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, methods in API["paths"].items():
        for method, operation in methods.items():
            yield method.upper(), path, operation


NAMES = [f"{method} {path}" for method, path, _ in operations()]


def strict(schema: Any) -> Any:
    """A schema in which no object has a field that is not described."""
    if isinstance(schema, list):
        return [strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    made = {name: strict(value) for name, value in schema.items()}
    return made | {"additionalProperties": False} if isinstance(made.get("properties"), dict) else made


def check(value: Any, schema: dict[str, Any]) -> None:
    """Hold a value against a schema of the document."""
    whole = {**strict(schema), "components": strict({"schemas": API["components"]["schemas"]})}
    Draft202012Validator(whole).validate(value)


def check_answer(response: Any, operation: dict[str, Any]) -> None:
    """Hold a real answer against what is declared for its status."""
    declared = operation["responses"][str(response.status_code)]
    media_type = response.headers["content-type"].partition(";")[0]
    assert media_type in declared["content"], (media_type, list(declared["content"]))
    if media_type == JSON:
        check(response.json(), declared["content"][JSON]["schema"])


def shape(value: Any) -> Any:
    """What a value is made of."""
    if isinstance(value, dict):
        return {name: shape(one) for name, one in value.items() if name not in ("metadata", "provenance", "files")}
    if isinstance(value, list):
        return [shape(value[0])] if value else []
    return "number" if isinstance(value, (int, float)) and not isinstance(value, bool) else type(value).__name__


def test_the_document_is_valid() -> None:
    validate(API)
    assert len(set(NAMES)) == len(NAMES)


def test_it_has_every_route_and_no_other() -> None:
    ours = {key for route in ROUTES for key in methods_of(route)}
    assert {(method, path) for method, path, _ in operations()} == ours | BENTOML.keys()
    assert OPERATIONS.keys() == ours


def test_what_a_route_says_of_itself_is_its_summary() -> None:
    for route in ROUTES:
        for method, path in methods_of(route):
            says = f"{method} {path}"
            assert (route.endpoint.__doc__ or "").startswith(says), says
            assert API["paths"][path][method.lower()]["summary"]


def test_every_code_of_an_error_is_described_with_its_status() -> None:
    for problem in PROBLEMS.values():
        described = DESCRIBED[problem.code]
        assert (described.status, described.type) == (problem.status, problem.type)
    for one in API["components"]["examples"].values():
        check(one["value"], {"$ref": "#/components/schemas/ErrorAnswer"})


def test_nothing_refers_to_what_is_not_there_and_nothing_is_left_over() -> None:
    text = json.dumps(API)
    used = set(re.findall(r'"#/components/(\w+)/([\w-]+)"', text))
    there = {(kind, name) for kind, entries in API["components"].items() for name in entries}
    assert used <= there
    assert there - used <= {("securitySchemes", "key")} | {("examples", code) for code in DESCRIBED}
    assert {tag for _, _, operation in operations() for tag in operation["tags"]} == {
        tag["name"] for tag in API["tags"]
    }


def test_every_parameter_and_field_of_a_request_is_explained() -> None:
    for _, path, operation in operations():
        for parameter in operation.get("parameters", []):
            assert parameter["description"], (path, parameter["name"])
        body = operation.get("requestBody", {}).get("content", {}).get(JSON, {}).get("schema", {})
        for name, field in (
            API["components"]["schemas"].get(body.get("$ref", "").rpartition("/")[2], {}).get("properties", {}).items()
        ):
            assert field.get("description"), (path, name)


def test_examples_of_answers_and_requests_are_of_their_schemas() -> None:
    seen = 0
    for _, _, operation in operations():
        given = [operation["requestBody"]] if "requestBody" in operation else []
        for one in [*given, *operation["responses"].values()]:
            for media in one["content"].values():
                if "example" in media:
                    check(media["example"], media["schema"])
                    seen += 1
    assert seen > 20


def test_all_json_answers_and_bodies_have_an_example() -> None:
    for _, path, operation in operations():
        for one in [operation.get("requestBody", {"content": {}}), *operation["responses"].values()]:
            media = one["content"].get(JSON)
            if media is not None and media.get("schema") != {"type": "object"}:
                assert "example" in media or media["examples"], path


@pytest.fixture
def one(tiny_bundle: Bundle, tmp_path: Path) -> Iterator[TestClient]:
    """An application with what stands around it in a service, but for its keys."""
    app = build_app()
    app.state.served = Served(Engine(tiny_bundle, state=tmp_path / "state", store=StoreOptions(class_quota=3)))
    settings = Settings.from_environment({"COTERIE_STATE": str(tmp_path / "state"), "COTERIE_REQUEST_LOG": "0"})
    safety = app.state.safety = Safety(settings)
    recorded = Recorder(app, records=lambda: safety.records, journal=lambda: safety.journal)
    with TestClient(recorded, raise_server_exceptions=False) as client:
        yield client
    safety.close()
    app.state.served.close()


def test_the_examples_are_answered_as_declared(one: TestClient, tiny_bundle: Bundle, digit_images) -> None:
    """First what enrols, then what looks at it, then what erases: an item, and its class last."""
    # tests/serving/test_swapping.py asks for other bundles.
    asked = OPERATIONS.keys() - {("POST", "/v1/bundle")}
    by_path = sorted(asked, key=lambda key: key[1], reverse=True)
    for method, path in sorted(by_path, key=lambda key: ["POST", "GET", "DELETE"].index(key[0])):
        operation = API["paths"][path][method.lower()]
        if method == "DELETE":
            one.post("/v1/classes/8/examples", content=digit_images.of("8").images[0])
        answer = ask_example(one, method, path, operation, tiny_bundle)
        assert answer.status_code == (201 if path.endswith("/examples") else 200), answer.text
        check_answer(answer, operation)
        declared = operation["responses"][str(answer.status_code)]
        example = declared["content"].get(JSON, {}).get("example")
        if example is not None:
            assert shape(answer.json()) == shape(example)
        for name in declared["headers"]:
            assert name in answer.headers, (path, name)


def ask_example(client: TestClient, method: str, path: str, operation: dict[str, Any], bundle: Bundle) -> Any:
    """Send a request's example."""
    query: dict[str, str] = {"id": samples.ITEM} if path == "/v1/gallery" else {}
    headers = {}
    for parameter in operation.get("parameters", []):
        if parameter["in"] == "path":
            path = path.replace(f"{{{parameter['name']}}}", parameter["example"])
        elif parameter["in"] == "header":
            headers[parameter["name"]] = parameter["example"]
    body = operation.get("requestBody", {}).get("content", {}).get(JSON, {}).get("example")
    if body is not None and "model" in body:
        body = body | {"model": bundle.manifest.name}
    return client.request(method, path, params=query, json=body, headers=headers)


def test_every_kind_of_body_that_is_declared_is_taken(
    one: TestClient, tiny_bundle: Bundle, digit_images, files, as_npy
) -> None:
    image = digit_images.images[0]
    bodies: dict[str, dict[str, Any]] = {
        "image/*": {"content": image, "headers": {"content-type": "image/png"}},
        "multipart/form-data": {"files": files([image, image])},
        "application/x-npy": {
            "content": as_npy(tiny_bundle.pixels([image])),
            "headers": {"content-type": "application/x-npy"},
        },
    }
    taken = 0
    for method, path, operation in operations():
        declared = operation.get("requestBody", {}).get("content", {})
        if method == "POST" and "image/*" in declared:
            taken += 1
            for kind, body in bodies.items():
                url = path.replace("{label}", "8") + ("?label=3" if path == "/v1/verify" else "")
                answer = one.post(url, **body)
                assert (answer.status_code in (200, 201)) == (kind in declared), (path, kind, answer.text)
                check_answer(answer, operation)
    assert taken == 5


def test_errors_are_declared_where_they_come(one: TestClient, digit_images, files) -> None:
    image, eights = digit_images.images[0], digit_images.of("8").images
    key = {"idempotency-key": "k"}
    one.post("/v1/classes/8/examples", content=eights[0], headers=key)
    asked = [
        *(("post", f"/v1/{route}", {"content": b"x"}, 422) for route in ("embeddings", "classify", "search")),
        ("post", "/v1/classify", {"content": image, "params": {"top": "-1"}}, 400),
        ("post", "/v1/classify", {"content": image, "headers": {"content-type": "text/plain"}}, 415),
        ("post", "/v1/classify", {"files": files([image] * 257)}, 413),
        ("post", "/v1/verify", {"content": image, "params": {"label": "no such"}}, 404),
        ("post", "/v1/verify", {"content": b"x", "headers": {"content-type": "application/x-npy"}}, 400),
        ("post", "/v1/classes/{label}/examples", {"content": eights[1], "headers": key}, 422),
        ("post", "/v1/classes/{label}/examples", {"files": files(eights[:4])}, 409),
        ("delete", "/v1/classes/{label}", {"label": "no such"}, 404),
        ("get", "/v1/gallery", {}, 400),
        ("get", "/v1/gallery/{id}", {}, 404),
        ("get", "/v1/gallery/{id}/thumbnail", {}, 404),
        ("get", "/page/{name}", {}, 404),
        ("get", "/v1/classes", {"params": {"x": "1"}}, 400),
    ]  # fmt: skip
    for method, path, options, status in asked:
        url = path.replace("{label}", options.pop("label", "8")).replace("{id}", "none").replace("{name}", "none.js")
        answer = one.request(method, url, **options)
        assert answer.status_code == status, (path, answer.text)
        check_answer(answer, API["paths"][path][method])
        code = answer.json()["error"]["code"]
        declared = API["paths"][path][method]["responses"][str(status)]["content"][JSON]["examples"]
        assert code in declared


def test_what_is_refused_for_its_name_is_declared_of_every_route(one: TestClient, tmp_path: Path) -> None:
    around = Access(one.app, lambda: Policy(Keyring(tmp_path / "none"), on_loopback=lambda: True))
    client = TestClient(around, base_url="http://elsewhere")
    for method, path, operation in operations():
        if (method, path) not in BENTOML:
            answer = client.request(method, path)
            assert answer.status_code == 403, path
            check_answer(answer, operation)


def test_what_there_is_no_room_for_is_declared_of_every_body(one: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NORMAL.bodies, "most", 0)
    for method, path, operation in operations():
        if "requestBody" in operation:
            answer = one.request(method, path.replace("{label}", "8"), json={})
            assert answer.status_code == 429, path
            check_answer(answer, operation)


def test_the_commands_do_what_is_said_of_them(
    service_of: Callable[..., str], tiny_bundle: Bundle, digit_images, tmp_path: Path
) -> None:
    (tmp_path / "one.jpg").write_bytes(digit_images.of("3").images[0])
    (tmp_path / "two.png").write_bytes(digit_images.of("3").images[1])
    np.save(tmp_path / "pixels.npy", tiny_bundle.pixels(digit_images.images[:2]))
    url = service_of(tiny_bundle)
    with httpx.Client(trust_env=False) as http:
        http.post(f"{url}/v1/classes/8/examples", json=dict(samples.EXAMPLES_BODY)).raise_for_status()
    commands = [
        (operation, sample["source"])
        for method, path, operation in sorted(operations(), key=lambda one: one[0] == "DELETE" and len(one[1]))
        if path != "/metrics"  # which is the whole service's
        for sample in operation.get("x-codeSamples", [])
    ]
    for operation, command in commands:
        line = f"{command} -w '\\n%{{http_code}} %{{content_type}}'"
        done = subprocess.run(
            ["bash", "-c", line],
            cwd=tmp_path,
            env=os.environ | {"URL": url},
            capture_output=True,
            text=True,
            check=True,
        )
        body, _, last = done.stdout.rpartition("\n")
        status, _, media_type = last.partition(" ")
        assert status in operation["responses"] and status < "300", (command, done.stdout)
        declared = operation["responses"][status]["content"][media_type.partition(";")[0]]
        if media_type == JSON and "-o" not in shlex.split(command):
            check(json.loads(body), declared["schema"])
    assert len(commands) >= 20


def test_what_is_open_to_all_says_so() -> None:
    unlocked = {path for _, path, operation in operations() if operation.get("security") == []}
    assert unlocked == {re.sub(r"^/page/.*", "/page/{name}", path) for path in OPEN} | {"/livez", "/healthz", "/readyz"}
