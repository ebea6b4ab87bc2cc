"""Fixtures for all tests: real handwritten digits, and a small bundle that tells them apart, made without training."""

import io
import shutil
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from sklearn.datasets import load_digits

from coterie.bundle import FORMAT, Bundle, EncoderCard, Manifest, write_bundle
from coterie.calibration import calibrate
from coterie.clusters import ClassClusters
from coterie.encoder import Encoder
from coterie.gallery import GalleryItems, Snapshot, item_id
from coterie.images import Preprocessing, decode, load_pixels, thumbnail

if TYPE_CHECKING:
    from training.run import Run

SIDE, DIM = 16, 32
KNOWN = tuple("01234567")
GALLERY_PER_CLASS, HELD_OUT_PER_CLASS, TEST_PER_CLASS = 60, 40, 30


@dataclass(frozen=True)
class DigitImages:
    """Encoded images and their labels, "0" to "9"; equally many of each, in mixed order."""

    images: tuple[bytes, ...]
    labels: NDArray[np.str_]

    def __len__(self) -> int:
        return len(self.images)

    def of(self, *labels: str) -> "DigitImages":
        """Those with one of these labels."""
        rows = np.flatnonzero(np.isin(self.labels, labels))
        return DigitImages(tuple(self.images[row] for row in rows), self.labels[rows])


def encode(pixels: NDArray[np.uint8], kind: str = "PNG") -> bytes:
    """An image file's bytes."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture(scope="session")
def _digit_parts() -> tuple[DigitImages, DigitImages, DigitImages]:
    """Gallery, held-out and test images, disjoint."""
    digits = load_digits()
    pixels = (digits.images * (255 / 16)).round().astype(np.uint8)
    labels = digits.target.astype(np.str_)
    parts: list[list[int]] = [[], [], []]
    for name in sorted(set(labels.tolist())):
        rows = np.flatnonzero(labels == name).tolist()
        for part, count in zip(parts, (GALLERY_PER_CLASS, HELD_OUT_PER_CLASS, TEST_PER_CLASS), strict=True):
            part.extend(rows[:count])
            rows = rows[count:]
    return tuple(  # type: ignore[return-value]
        DigitImages(tuple(encode(pixels[row]) for row in sorted(part)), labels[sorted(part)]) for part in parts
    )


@pytest.fixture(scope="session")
def digit_images(_digit_parts: tuple[DigitImages, DigitImages, DigitImages]) -> DigitImages:
    """30 PNG images of each digit that are neither in the gallery of `tiny_bundle` nor in its calibration."""
    return _digit_parts[2]


@pytest.fixture(scope="session")
def tiny_bundle(
    tmp_path_factory: pytest.TempPathFactory, _digit_parts: tuple[DigitImages, DigitImages, DigitImages]
) -> Bundle:
    """A bundle whose gallery holds 60 images of each digit from 0 to 7; 8 and 9 are unknown to it.

    Its encoder is a linear projection of the image less the mean image. Do not change its files: copy
    `tiny_bundle.path` first.
    """
    folder = tmp_path_factory.mktemp("tiny")
    preprocessing = Preprocessing(input_size=(SIDE, SIDE), interpolation="bilinear")
    gallery, held_out = (part.of(*KNOWN) for part in _digit_parts[:2])
    gallery_pixels = _pixels(gallery, preprocessing)
    model = _projection(gallery_pixels, gallery.labels)
    (folder / "model.onnx").write_bytes(model)
    encoder = Encoder(folder / "model.onnx", device="cpu", threads=1)
    embeddings, unseen = encoder.embed(gallery_pixels), encoder.embed(_pixels(held_out, preprocessing))
    items = GalleryItems(
        ids=tuple(item_id(image) for image in gallery.images),
        labels=gallery.labels,
        embeddings=embeddings,
        positions=embeddings[:, :2].copy(),
        thumbnails=tuple(thumbnail(decode(image)) for image in gallery.images),
        metadata=tuple({"row": row} for row in range(len(gallery))),
    )
    snapshot = Snapshot(items, ClassClusters.fit(embeddings, gallery.labels, (unseen, held_out.labels)))
    manifest = Manifest(
        format=FORMAT,
        name="tiny-digits",
        encoder=EncoderCard(**preprocessing.model_dump(), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), embedding_dim=DIM),
        classes=snapshot.clusters.labels,
        gallery_size=len(items),
        calibration=calibrate(snapshot, unseen, held_out.labels),
        accuracy={},
        provenance={"made_by": "the tests"},
        files={},
    )
    return write_bundle(folder / "bundle", model=model, snapshot=snapshot, card="# Tiny digits\n", manifest=manifest)


def _pixels(part: DigitImages, preprocessing: Preprocessing) -> NDArray[np.uint8]:
    return np.stack([load_pixels(image, preprocessing) for image in part.images])


def _projection(pixels: NDArray[np.uint8], labels: NDArray[np.str_]) -> bytes:
    """An ONNX encoder: uint8 (n, h, w, 3) → the image less the mean image, projected and brought to unit length."""
    grey = pixels.astype(np.float32).mean(axis=3).reshape(len(pixels), -1) / 255
    mean = grey.mean(axis=0)
    # What varies within the classes is scaled down, and the principal directions of the rest are kept.
    names = np.unique(labels)
    spread = sum(np.cov(grey[labels == name], rowvar=False) for name in names) / len(names)
    values, vectors = np.linalg.eigh(spread)
    whiten = vectors / np.sqrt(np.maximum(values, 0) + 0.1) @ vectors.T
    directions = whiten @ np.linalg.svd((grey - mean) @ whiten, full_matrices=False)[2][:DIM].T
    constants = {
        "scale": np.float32(255),
        "mean": mean,
        "directions": np.ascontiguousarray(directions, dtype=np.float32),
        "flat": np.asarray([-1, SIDE * SIDE], dtype=np.int64),
        "channels": np.asarray([3], dtype=np.int64),
        "width": np.asarray([1], dtype=np.int64),
        "tiny": np.float32(1e-12),
    }
    nodes = [
        helper.make_node("Cast", ["images"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["float", "channels"], ["grey"], keepdims=0),
        helper.make_node("Reshape", ["grey", "flat"], ["rows"]),
        helper.make_node("Div", ["rows", "scale"], ["scaled"]),
        helper.make_node("Sub", ["scaled", "mean"], ["centred"]),
        helper.make_node("MatMul", ["centred", "directions"], ["projected"]),
        helper.make_node("ReduceSumSquare", ["projected", "width"], ["squares"], keepdims=1),
        helper.make_node("Add", ["squares", "tiny"], ["positive"]),
        helper.make_node("Sqrt", ["positive"], ["lengths"]),
        helper.make_node("Div", ["projected", "lengths"], ["embedding"]),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["n", SIDE, SIDE, 3])],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["n", DIM])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    return model.SerializeToString()


@pytest.fixture(scope="session")
def digit_tree_of() -> Callable[..., Path]:
    """Writes digits as a class-per-folder tree of PNG files: `per_class` of each class, from the `skip`-th on."""
    digits = load_digits()
    pixels = (digits.images * (255 / 16)).round().astype(np.uint8)

    def write(root: Path, *, classes: Iterable[int], per_class: int, skip: int = 0) -> Path:
        for label in classes:
            folder = root / str(label)
            folder.mkdir(parents=True)
            for row in np.flatnonzero(digits.target == label)[skip : skip + per_class]:
                (folder / f"{row:04d}.png").write_bytes(encode(pixels[row]))
        return root

    return write


@pytest.fixture
def digit_tree(digit_tree_of: Callable[..., Path], tmp_path: Path) -> Path:
    """A tree of its own for a test that changes it: 40 images of each digit from 0 to 7."""
    return digit_tree_of(tmp_path / "digits", classes=range(8), per_class=40)


@pytest.fixture(scope="session")
def tiny_run_tree(digit_tree_of: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `tiny_run` was trained on, the same images as `digit_tree`. Do not change it."""
    return digit_tree_of(tmp_path_factory.mktemp("tree") / "digits", classes=range(8), per_class=40)


@pytest.fixture(scope="session")
def tiny_run(tiny_run_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> "Run":
    """A finished run of a few epochs. Do not change it."""
    from training.pretrain import train
    from training.recipe import load_recipe

    recipe = load_recipe("digits", ["encoder.width=8", "schedule.epochs=8", "schedule.warmup_epochs=1"])
    return train(tiny_run_tree, recipe, tmp_path_factory.mktemp("run") / "run")[0]


@pytest.fixture
def tiny_run_copy(tiny_run: "Run", tmp_path: Path) -> "Run":
    """A copy of `tiny_run` for a test that changes it."""
    return type(tiny_run)(Path(shutil.copytree(tiny_run.path, tmp_path / "run-copy")))


@pytest.fixture
def service_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Serves a bundle over HTTP in a thread: `service_of(bundle, **options of the engine)` is its URL."""
    import uvicorn

    from serving.engine import Engine
    from serving.routes import build_app
    from serving.served import Served

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    running: list[tuple[uvicorn.Server, threading.Thread, Served]] = []

    def start(bundle: Bundle, *, wrap: Callable[[Any], Any] = lambda app: app, **options: Any) -> str:
        app = build_app()
        served = app.state.served = Served(Engine(bundle, state=tmp_path / "service", **options))
        server = uvicorn.Server(uvicorn.Config(wrap(app), lifespan="off", log_level="warning"))
        listening = socket.create_server(("127.0.0.1", 0))  # takes connections from here on
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        running.append((server, thread, served))
        return f"http://127.0.0.1:{listening.getsockname()[1]}"

    yield start
    for server, thread, served in running:
        server.should_exit = True
        thread.join(20)
        served.close()
