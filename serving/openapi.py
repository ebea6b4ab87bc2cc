"""The API's description in OpenAPI 3.1, made from the routes, the schemas and `serving.operations`."""

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaMode, models_json_schema
from starlette.routing import Route

from serving import schemas
from serving.operation import Answer, Operation, Parameter
from serving.operations import BENTOML, OPERATIONS
from serving.problems import ANYWHERE, AT_THE_DOOR, DESCRIBED
from serving.tensors import NPY

__all__ = ["describe", "methods_of"]

TITLE, API_VERSION = "Coterie", "1"
ABOUT = """\
Image in, embedding out; image in, label out, or an honest "unknown"; examples of a new class in, and it is known.

Where the service demands keys, send `Authorization: Bearer KEY`; a key's scope is `ask`, or `change`, which includes
it. Every answer of a route names its bundle in `X-Bundle-Id`.
"""
TAGS = {
    "Ask": "Images in, answers about them out; nothing is changed.",
    "Gallery": "Classes and their examples.",
    "Bundle": "What is served.",
    "Service": "The service itself.",
    "Probes": "For whoever watches the service; never asked for a key.",
    "BentoML's clients": "The methods behind `bentoml.SyncHTTPClient`.",
}
HEADERS = {
    "X-Bundle-Id": "Id of the bundle that answered.",
    "X-Request-Id": "The id that the request brought in the same header, or a new one; the log has it, too.",
    "x-queue-time": "Milliseconds that the slowest image waited for the encoder.",
    "x-inference-time": "Milliseconds that the encoder took.",
    "ETag": "Of this version; send it as If-None-Match.",
    "WWW-Authenticate": "Bearer.",
    "Retry-After": "Seconds after which the same request may succeed.",
}
COMPONENTS = "#/components/"
BINARY = {"type": "string", "contentMediaType": "application/octet-stream"}
Model = type[BaseModel]


def describe(routes: Sequence[Route]) -> dict[str, Any]:
    """The document.

    Raises:
        KeyError: `serving.operations` says nothing of a route.
    """
    ours = [(OPERATIONS[key], key, route) for route in routes for key in methods_of(route)]
    found = _Schemas([*(operation for operation, _, _ in ours), *BENTOML.values()])
    paths: dict[str, Any] = {}
    for operation, (method, path), route in ours:
        names = {"operationId": route.endpoint.__name__, "summary": _summary(route)}
        paths.setdefault(path, {})[method.lower()] = _operation(operation, names, found, ours=True)
    for (method, path), operation in BENTOML.items():
        names = {"operationId": f"bentoml_{path[1:]}", "summary": operation.summary}
        paths.setdefault(path, {})[method.lower()] = _operation(operation, names, found, ours=False)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": TITLE,
            "version": API_VERSION,
            "summary": "Image embeddings and open-set labels.",
            "description": ABOUT,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "tags": [{"name": name, "description": text} for name, text in TAGS.items()],
        "security": [{"key": []}, {}],
        "paths": paths,
        "components": {
            "schemas": found.definitions,
            "headers": {name: {"description": text, "schema": {"type": "string"}} for name, text in HEADERS.items()},
            "examples": {
                code: {"summary": one.when, "value": one.example(code).model_dump()} for code, one in DESCRIBED.items()
            },
            "securitySchemes": {
                "key": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "A key of `coterie key new`. A service without keys asks for none.",
                }
            },
        },
    }


def methods_of(route: Route) -> Iterator[tuple[str, str]]:
    """Method and path of what a route answers; HEAD goes without saying."""
    for method in sorted((route.methods or set()) - {"HEAD"}):
        yield method, route.path


class _Schemas:
    """JSON schemas of all models of the table, requests' as they are read and answers' as they are written."""

    def __init__(self, operations: Sequence[Operation]) -> None:
        wanted: dict[tuple[Model, JsonSchemaMode], None] = {(schemas.ErrorAnswer, "serialization"): None}
        for operation in operations:
            for given in (operation.query, operation.body):
                if isinstance(given, type):
                    wanted[given, "validation"] = None
            for answer in operation.answers.values():
                for model in _models(answer.schema):
                    wanted[model, "serialization"] = None
        named, rest = models_json_schema(list(wanted), ref_template=COMPONENTS + "schemas/{model}")
        self.definitions: dict[str, Any] = rest["$defs"]
        self._names = {key: reference["$ref"].rpartition("/")[2] for key, reference in named.items()}
        for (model, _), name in self._names.items():
            _describe_fields(self.definitions[name], model)
        # A query is its parameters, and no schema of its own.
        self._queries = {
            query: self.definitions.pop(self._names[query, "validation"])
            for query in dict.fromkeys(operation.query for operation in operations)
        }
        read = {name for (_, mode), name in self._names.items() if mode == "validation"}
        for name, definition in self.definitions.items():
            if name not in read:  # what has a default is written, too
                definition["required"] = list(definition.get("properties", {}))

    def reference(self, given: Any, mode: JsonSchemaMode) -> Any:
        """A schema, with models in it as references."""
        if isinstance(given, type):
            return {"$ref": f"{COMPONENTS}schemas/{self._names[given, mode]}"}
        if isinstance(given, Mapping):
            return {name: self.reference(value, mode) for name, value in given.items()}
        return given

    def query(self, model: Model) -> dict[str, Any]:
        """The schema of a query, whole."""
        return self._queries[model]


def _models(given: Any) -> Iterator[Model]:
    if isinstance(given, type):
        yield given
    elif isinstance(given, Mapping):
        for value in given.values():
            yield from _models(value)


def _operation(operation: Operation, names: dict[str, str], found: _Schemas, *, ours: bool) -> dict[str, Any]:
    """What is said of one method of one path; BentoML's errors of its own are its own."""
    written: dict[str, Any] = {"tags": [operation.tag], **names}
    if operation.description:
        written["description"] = operation.description
    if operation.open:
        written["security"] = []
    parameters = [*map(_parameter, operation.parameters), *_query(operation, found)]
    if parameters:
        written["parameters"] = parameters
    if operation.body is not None:
        written["requestBody"] = {"required": True, "content": _body(operation, found)}
    written["responses"] = {
        str(status): _answer(answer, found, ours=ours) for status, answer in operation.answers.items()
    }
    if ours or not operation.open:  # nobody stands before the probes
        written["responses"] |= _errors(operation, ANYWHERE if ours else AT_THE_DOOR)
    if operation.samples:
        written["x-codeSamples"] = [
            {"lang": "Shell", "label": sample.title, "source": f"curl -s {sample.arguments}"}
            for sample in operation.samples
        ]
    return written


def _parameter(parameter: Parameter) -> dict[str, Any]:
    return {
        "name": parameter.name,
        "in": parameter.place,
        "required": parameter.required,
        "description": parameter.description,
        "schema": {"type": "string"},
        "example": parameter.example,
    }


def _query(operation: Operation, found: _Schemas) -> Iterator[dict[str, Any]]:
    schema = found.query(operation.query)
    for name, value in schema.get("properties", {}).items():
        inner = {key: part for key, part in value.items() if key != "description"}
        described = {
            "name": name,
            "in": "query",
            "required": name in schema.get("required", []),
            "description": value.get("description", ""),
        }
        if name != "metadata":
            yield described | {"schema": inner}
        elif issubclass(operation.query, schemas.SearchQuery):
            # One parameter for each key: metadata.row=7&metadata.source=…
            pattern = {"type": "object", "patternProperties": {r"^metadata\.": {}}, "additionalProperties": False}
            yield described | {"style": "form", "explode": True, "schema": pattern, "example": {"metadata.row": 329}}
        else:
            yield described | {"content": {"application/json": {"schema": inner, "example": {"source": "scanner 2"}}}}


def _body(operation: Operation, found: _Schemas) -> dict[str, Any]:
    reference = found.reference(operation.body, "validation")
    content: dict[str, Any] = {"application/json": {"schema": reference, "example": dict(operation.example)}}
    if operation.images:
        content["image/*"] = {"schema": BINARY | {"description": "One image; its bytes say of what kind."}}
        content["multipart/form-data"] = {
            "schema": {
                "type": "object",
                "properties": {"file": {"type": "array", "items": BINARY, "minItems": 1}},
                "additionalProperties": {"type": "array", "items": BINARY},
                "description": "Files under any names, in order; no other fields.",
            },
            "encoding": {"file": {"contentType": "image/*, application/octet-stream"}},
        }
    if operation.arrays:
        content[NPY] = {"schema": BINARY | {"description": "uint8 N×H×W×3 in C order, RGB, of the encoder's size."}}
    return content


def _answer(answer: Answer, found: _Schemas, *, ours: bool) -> dict[str, Any]:
    media: dict[str, Any] = {}
    if answer.schema is not None:
        media["schema"] = found.reference(answer.schema, "serialization")
    elif answer.media_type.startswith("text/"):
        media["schema"] = {"type": "string"}
    if answer.example is not None:
        media["example"] = answer.example
    others = {kind: {"schema": {"type": "string"}} if kind.startswith("text/") else {} for kind in answer.also}
    written: dict[str, Any] = {"description": answer.description, "content": {answer.media_type: media, **others}}
    if ours:
        written["headers"] = _headers("X-Bundle-Id", "X-Request-Id", *answer.headers)
    return written


def _errors(operation: Operation, always: tuple[str, ...]) -> dict[str, Any]:
    codes = sorted({*operation.errors, *always}, key=lambda code: (DESCRIBED[code].status, code))
    if operation.open:
        codes = [code for code in codes if code != "unauthorized"]
    written: dict[str, Any] = {}
    for status, same in groupby(codes, key=lambda code: DESCRIBED[code].status):
        group = list(same)
        headers = {name for code in group for name in DESCRIBED[code].headers}
        written[str(status)] = {
            "description": " ".join(f"`{code}`: {DESCRIBED[code].when}" for code in group),
            "headers": _headers("X-Request-Id", *sorted(headers)),
            "content": {
                "application/json": {
                    "schema": {"$ref": f"{COMPONENTS}schemas/ErrorAnswer"},
                    "examples": {code: {"$ref": f"{COMPONENTS}examples/{code}"} for code in group},
                }
            },
        }
    return written


def _headers(*names: str) -> dict[str, Any]:
    return {name: {"$ref": f"{COMPONENTS}headers/{name}"} for name in names}


def _summary(route: Route) -> str:
    """What an endpoint's docstring says: METHOD PATH: this."""
    first = (inspect.getdoc(route.endpoint) or "").partition("\n")[0]
    said = first.partition(": ")[2].rstrip(".")
    return said[:1].upper() + said[1:]


def _describe_fields(schema: dict[str, Any], model: Model) -> None:
    """Move what the docstrings' Attributes say of single fields to these."""
    for base in reversed(model.__mro__):
        if issubclass(base, BaseModel) and base.__doc__:
            for names, text in _attributes(base.__doc__):
                for name in names:
                    if name in schema.get("properties", {}):
                        schema["properties"][name]["description"] = text
    if "description" in schema:
        schema["description"] = schema["description"].partition("\n\nAttributes:")[0]
    for name, value in schema.get("properties", {}).items():
        if value.get("title") == name.replace("_", " ").title():
            del value["title"]


def _attributes(docstring: str) -> Iterator[tuple[list[str], str]]:
    """Names and text of the entries below "Attributes:"."""
    part = inspect.cleandoc(docstring).partition("Attributes:\n")[2]
    for names, text in re.findall(r"^ {4}(\w[\w, ]*): (.*(?:\n {8}.*)*)", part, re.MULTILINE):
        said = " ".join(text.split())
        yield names.split(", "), said[:1].upper() + said[1:]
