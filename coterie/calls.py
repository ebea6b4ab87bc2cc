"""What is said to a running service and how its answers read, whoever carries it: `coterie.client` does.

A job is one or more calls, for many images go in several requests, and how their results become one. A call's body is
made when it is sent, so that files are read as they are needed.
"""

import base64
import io
import json
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from coterie.images import read_file

if TYPE_CHECKING:
    import httpx

    from coterie.bundle import Manifest
    from coterie.classifier import Classification, Neighbor, Verification

__all__ = [
    "Call",
    "ClassInfo",
    "EnrolledItem",
    "Enrolment",
    "Images",
    "Item",
    "Job",
    "RefusedImage",
    "Swapped",
    "bundle",
    "classes",
    "classify",
    "delete",
    "embed",
    "enroll",
    "forget",
    "items",
    "search",
    "swap",
    "verify",
]

Result = TypeVar("Result")
Entry = TypeVar("Entry")
Params = list[tuple[str, str]]
# Files by path, encoded images, Pillow images, uint8 arrays (h, w, 3); or all as uint8 (n, h, w, 3).
Images = Sequence[Path | str | bytes | Image.Image | NDArray[np.uint8]] | NDArray[np.uint8]

NPY = "application/x-npy"
SWAP_SECONDS = 600.0  # the service loads the bundle before it answers


@dataclass(frozen=True)
class Item:
    """An item of the gallery; `thumbnail` is the path of its picture in the service."""

    id: str
    label: str
    metadata: dict[str, Any]
    enrolled: bool
    thumbnail: str | None


@dataclass(frozen=True)
class ClassInfo:
    """A class: its items, how many of them were enrolled, and the typical gap of its images to its prototype."""

    label: str
    count: int
    enrolled: int
    radius: float


@dataclass(frozen=True)
class EnrolledItem:
    """An image that is part of the gallery now; the `index`-th that was sent."""

    index: int
    id: str
    label: str


@dataclass(frozen=True)
class RefusedImage:
    """An image that could not be used, and why; the `index`-th that was sent."""

    index: int
    message: str
    code: str


@dataclass(frozen=True)
class Enrolment:
    """What became of examples."""

    items: tuple[EnrolledItem, ...]
    refused: tuple[RefusedImage, ...]


@dataclass(frozen=True)
class Swapped:
    """The bundle that is served from now on, and the id of the one before."""

    id: str
    name: str
    previous: str


@dataclass(frozen=True)
class Call(Generic[Result]):
    """One request; safe to be made again, by its nature or by its key.

    Attributes:
        body: makes what httpx is told to send.
        read: the result in a successful answer.
        missing: the result if there is no such thing; without one that is an error.
        start: which of the job's images is the call's first.
        seconds: how long the answer may take, None for as long as the client waits for others.
    """

    method: str
    path: str
    read: Callable[["httpx.Response"], Result]
    params: Params = field(default_factory=list)
    headers: Mapping[str, str] = field(default_factory=dict)
    body: Callable[[], dict[str, Any]] = dict
    missing: Result | None = None
    start: int = 0
    seconds: float | None = None


@dataclass(frozen=True)
class Job(Generic[Entry, Result]):
    """Calls, and how what they return becomes one result."""

    calls: Sequence[Call[Entry]]
    join: Callable[[list[Entry]], Result]


def embed(images: Images, batch: int) -> Job[NDArray[np.float32], NDArray[np.float32]]:
    def read(response: "httpx.Response", start: int) -> NDArray[np.float32]:
        return np.asarray(np.load(io.BytesIO(response.content), allow_pickle=False), dtype=np.float32)

    def join(parts: list[NDArray[np.float32]]) -> NDArray[np.float32]:
        return np.concatenate(parts) if parts else np.empty((0, 0), dtype=np.float32)

    return Job(list(_asking("/v1/embeddings", images, batch, [], read, {"accept": NPY})), join)


def classify(
    images: Images, batch: int, *, false_reject: float, top: int, neighbors: int, k: int | None, partial: bool
) -> Job[list["Classification | Any"], list["Classification | Any"]]:
    params = [("false_reject", f"{false_reject:g}"), ("top", str(top)), ("neighbors", str(neighbors))]
    params += [("k", str(k))] if k is not None else []
    return _listing("/v1/classify", images, batch, params, _classification, partial)


def search(
    images: Images, batch: int, *, k: int, labels: Sequence[str], metadata: Mapping[str, Any], partial: bool
) -> Job[list["list[Neighbor] | Any"], list["list[Neighbor] | Any"]]:
    params = [("k", str(k)), *(("label", label) for label in labels)]
    params += [(f"metadata.{key}", json.dumps(value)) for key, value in metadata.items()]

    def read(entry: dict[str, Any]) -> list["Neighbor"]:
        return [_neighbor(near) for near in entry["neighbors"]]

    return _listing("/v1/search", images, batch, params, read, partial)


def verify(
    images: Images, batch: int, *, label: str, false_reject: float, partial: bool
) -> Job[list["Verification | Any"], list["Verification | Any"]]:
    def read(entry: dict[str, Any]) -> "Verification":
        from coterie.classifier import Verification

        names = ("label", "match", "similarity", "threshold", "calibration", "snapshot")
        return Verification(**{name: entry[name] for name in names})

    params = [("label", label), ("false_reject", f"{false_reject:g}")]
    return _listing("/v1/verify", images, batch, params, read, partial)


def enroll(
    label: str,
    images: Images,
    batch: int,
    *,
    metadata: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None,
    partial: bool,
    key: str | None,
) -> Job[Enrolment, Enrolment]:
    _check_sequence(images)
    given = metadata or {}
    if not isinstance(given, Mapping) and len(given) != len(images):
        raise ValueError(
            f"metadata has {len(given)} objects for {len(images)} images: give one for all, or one for each"
        )
    key = key or str(uuid.uuid4())
    calls = []
    for number, start in enumerate(range(0, len(images), batch)):
        part = images[start : start + batch]
        own = given if isinstance(given, Mapping) else given[start : start + batch]
        options = {"metadata": own, "on_error": "partial" if partial else "fail"}

        def body(part: Images = part, options: dict[str, Any] = options) -> dict[str, Any]:
            return {"json": {"input": [base64.b64encode(_encoded(image)).decode() for image in part], **options}}

        def read(response: "httpx.Response", start: int = start) -> Enrolment:
            rows = response.json()["data"]
            return Enrolment(
                tuple(EnrolledItem(start + r["index"], r["id"], r["label"]) for r in rows if r["object"] != "error"),
                tuple(_refused(r, start) for r in rows if r["object"] == "error"),
            )

        headers = {"idempotency-key": f"{key}-{number}"}
        path = f"/v1/classes/{quote(label, safe='')}/examples"
        calls.append(Call("POST", path, read, headers=headers, body=body, start=start))

    def join(parts: list[Enrolment]) -> Enrolment:
        return Enrolment(
            tuple(chain.from_iterable(part.items for part in parts)),
            tuple(chain.from_iterable(part.refused for part in parts)),
        )

    return Job(calls, join)


def forget(label: str) -> Call[int]:
    return Call("DELETE", f"/v1/classes/{quote(label, safe='')}", lambda r: int(r.json()["items"]), missing=0)


def classes() -> Call[list[ClassInfo]]:
    def read(response: "httpx.Response") -> list[ClassInfo]:
        return [ClassInfo(e["label"], e["count"], e["enrolled"], e["radius"]) for e in response.json()["data"]]

    return Call("GET", "/v1/classes", read)


def items(ids: Sequence[str], batch: int) -> Job[list[Item], list[Item]]:
    def read(response: "httpx.Response") -> list[Item]:
        names = ("id", "label", "metadata", "enrolled", "thumbnail")
        return [Item(**{name: entry[name] for name in names}) for entry in response.json()["data"]]

    calls = [
        Call("GET", "/v1/gallery", read, params=[("id", identifier) for identifier in ids[start : start + batch]])
        for start in range(0, len(ids), batch)
    ]
    return Job(calls, _chained)


def delete(identifier: str) -> Call[bool]:
    return Call("DELETE", f"/v1/gallery/{quote(identifier, safe='')}", lambda _: True, missing=False)


def bundle() -> Call["Manifest"]:
    def read(response: "httpx.Response") -> "Manifest":
        from coterie.bundle import Manifest

        return Manifest.model_validate_json(response.content)

    return Call("GET", "/v1/bundle", read)


def swap(named: str) -> Call[Swapped]:
    def read(response: "httpx.Response") -> Swapped:
        answer = response.json()
        return Swapped(answer["id"], answer["name"], answer["previous"])

    return Call("POST", "/v1/bundle", read, body=lambda: {"json": {"bundle": named}}, seconds=SWAP_SECONDS)


def _listing(
    path: str, images: Images, batch: int, params: Params, read: Callable[[dict[str, Any]], Entry], partial: bool
) -> Job[list[Entry | Any], list[Entry | Any]]:
    """One entry for each image; with `partial` a `RefusedImage` for one that could not be used."""

    def read_all(response: "httpx.Response", start: int) -> list[Entry | Any]:
        entries = response.json()["data"]
        return [_refused(entry, start) if entry.get("object") == "error" else read(entry) for entry in entries]

    params = [*params, ("on_error", "partial")] if partial else params
    return Job(list(_asking(path, images, batch, params, read_all)), _chained)


def _asking(
    path: str,
    images: Images,
    batch: int,
    params: Params,
    read: Callable[["httpx.Response", int], Result],
    headers: Mapping[str, str] | None = None,
) -> Iterator[Call[Result]]:
    _check_sequence(images)
    for start in range(0, len(images), batch):
        part = images[start : start + batch]
        array = isinstance(part, np.ndarray)

        def body(part: Images = part) -> dict[str, Any]:
            if isinstance(part, np.ndarray):
                buffer = io.BytesIO()
                np.save(buffer, np.ascontiguousarray(part), allow_pickle=False)
                return {"content": buffer.getvalue()}
            return {"files": [("image", (str(row), _encoded(image))) for row, image in enumerate(part)]}

        def read_part(response: "httpx.Response", start: int = start) -> Result:
            return read(response, start)

        kind = {"content-type": NPY} if array else {}
        yield Call("POST", path, read_part, params, {**(headers or {}), **kind}, body, start=start)


def _check_sequence(images: Images) -> None:
    if isinstance(images, (str, bytes, Path, Image.Image)) or (isinstance(images, np.ndarray) and images.ndim != 4):
        raise TypeError("give a sequence of images: [image] for a single one")


def _refused(entry: dict[str, Any], start: int) -> RefusedImage:
    # The service counts within one request.
    index, error = entry["index"], entry["error"]
    message = error["message"].replace(f"image {index}:", f"image {start + index}:", 1)
    return RefusedImage(start + index, message, error["code"])


def _encoded(image: Path | str | bytes | Image.Image | NDArray[np.uint8]) -> bytes:
    """An image file's bytes; of pixels, a PNG's."""
    if isinstance(image, bytes):
        return image
    if isinstance(image, (str, Path)):
        return read_file(Path(image))
    buffer = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(buffer, "PNG")
    return buffer.getvalue()


def _classification(entry: dict[str, Any]) -> "Classification":
    from coterie.classifier import Classification, ClassScore

    return Classification(
        label=entry["label"],
        known=entry["known"],
        probability=entry["probability"],
        threshold=entry["threshold"],
        similarity=entry["similarity"],
        classes=tuple(ClassScore(**score) for score in entry["classes"]),
        neighbors=tuple(_neighbor(near) for near in entry["neighbors"]),
        calibration=entry["calibration"],
        snapshot=entry["snapshot"],
    )


def _neighbor(entry: dict[str, Any]) -> "Neighbor":
    from coterie.gallery import Neighbor

    return Neighbor(entry["id"], entry["label"], entry["similarity"], entry["metadata"])


def _chained(parts: list[list[Entry]]) -> list[Entry]:
    return list(chain.from_iterable(parts))
