"""A bundle with another encoder keeps what was enrolled, from the images that were kept."""

import dataclasses
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from coterie import anew as anew_module
from coterie.bundle import Bundle, write_bundle
from coterie.errors import CoterieWarning
from coterie.gallery import Gallery
from coterie.items import GalleryItems, item_id
from coterie.snapshot import Snapshot
from coterie.store import StoredItem


@pytest.fixture(scope="module")
def turned_bundle(tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The same gallery with an encoder of another mind: every embedding is turned by the same rotation."""
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(32, 32)))[0].astype(np.float32)
    model = onnx.load(tiny_bundle.path / "model.onnx")
    (directions,) = (tensor for tensor in model.graph.initializer if tensor.name == "directions")
    directions.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(directions) @ rotation, "directions"))
    items, clusters = tiny_bundle.base.items.whole(), tiny_bundle.base.clusters
    turned = GalleryItems(
        items.ids, items.labels, items.embeddings @ rotation, items.positions, items.thumbnails, items.metadata
    )
    snapshot = Snapshot(turned, dataclasses.replace(clusters, prototypes=clusters.prototypes @ rotation))
    return write_bundle(
        tmp_path_factory.mktemp("turned") / "bundle",
        model=model.SerializeToString(),
        snapshot=snapshot,
        card="# Turned\n",
        manifest=tiny_bundle.manifest,
    )


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture(autouse=True)
def _warnings_are_errors() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", CoterieWarning)
        yield


def enrol(
    bundle: Bundle, gallery: Gallery, images: tuple[bytes, ...], label: str, *, originals: bool = True
) -> list[str]:
    items = [
        StoredItem(item_id(image), label, row, {"n": number}, b"t", image if originals else None)
        for number, (image, row) in enumerate(zip(images, bundle.embed(images), strict=True))
    ]
    gallery.add(items)
    return [item.id for item in items]


def embedding(gallery: Gallery, identifier: str) -> np.ndarray:
    snapshot = gallery.snapshot()
    return snapshot.items.embeddings[snapshot.rows[identifier]]


def test_another_encoder_embeds_what_was_enrolled_anew(
    tiny_bundle: Bundle, turned_bundle: Bundle, state: Path, digit_images
) -> None:
    images = digit_images.of("8").images[:5]
    with tiny_bundle.gallery(state) as old:
        names = enrol(tiny_bundle, old, images, "8")
        old.remove([tiny_bundle.base.items.ids[0]])
        old.edit(names[0], metadata={"edited": True})
        old.edit(tiny_bundle.base.items.ids[1], metadata={"edited": True})
    with turned_bundle.gallery(state) as new:
        for name, expected in zip(names, turned_bundle.embed(images), strict=True):
            np.testing.assert_allclose(embedding(new, name), expected, atol=1e-6)
        snapshot = new.snapshot()
        assert snapshot.items.label(snapshot.rows[names[3]]) == "8"
        assert snapshot.items.metadata[snapshot.rows[names[3]]] == {"n": 3}
        assert snapshot.items.metadata[snapshot.rows[names[0]]] == {"edited": True}
        assert snapshot.items.metadata[snapshot.rows[tiny_bundle.base.items.ids[1]]] == {"edited": True}
        assert snapshot.items.thumbnails[snapshot.rows[names[0]]] == b"t"
        assert tiny_bundle.base.items.ids[0] not in snapshot.rows
    with tiny_bundle.gallery(state) as back:  # at once, for its embeddings are still there
        np.testing.assert_allclose(embedding(back, names[0]), tiny_bundle.embed(images[:1])[0], atol=1e-6)


def test_what_has_no_original_is_named_and_kept_aside(
    tiny_bundle: Bundle, turned_bundle: Bundle, state: Path, digit_images
) -> None:
    images = digit_images.of("8").images[:4]
    with tiny_bundle.gallery(state) as old:
        with_image = enrol(tiny_bundle, old, images[:2], "8")
        without = enrol(tiny_bundle, old, images[2:3], "8", originals=False)
        damaged = enrol(tiny_bundle, old, images[3:], "8")
    (file,) = (state / "tiny-digits" / "originals").rglob(f"{damaged[0]}*")
    file.write_bytes(b"something else")
    with pytest.warns(CoterieWarning) as caught, turned_bundle.gallery(state) as new:
        assert set(new.snapshot().rows) - set(turned_bundle.base.items.ids) == set(with_image)
    (warning,) = caught
    text = str(warning.message)
    assert text.startswith("2 enrolled images could not be embedded") and "Enrol them again" in text
    assert f"{without[0]} (8): its image was not kept" in text
    assert f"{damaged[0]} (8): the original" in text and "damaged" in text
    with tiny_bundle.gallery(state) as back:
        assert {*with_image, *without, *damaged} <= set(back.snapshot().rows)


def test_images_that_the_new_bundle_brings_need_no_original(
    tiny_bundle: Bundle, turned_bundle: Bundle, state: Path
) -> None:
    (name, row) = tiny_bundle.base.items.ids[5], tiny_bundle.base.items.embeddings[5]
    with tiny_bundle.gallery(state) as old:
        old.add([StoredItem(name, "moved", row, {"enrolled": True}, b"")])
    with turned_bundle.gallery(state) as new:
        snapshot = new.snapshot()
        assert snapshot.items.label(snapshot.rows[name]) == "moved"
        np.testing.assert_array_equal(embedding(new, name), turned_bundle.base.items.embeddings[5])


def test_processes_with_the_old_and_the_new_encoder_share_a_gallery(
    tiny_bundle: Bundle, turned_bundle: Bundle, state: Path, digit_images
) -> None:
    images = digit_images.of("8", "9").images
    with tiny_bundle.gallery(state) as old:
        first = enrol(tiny_bundle, old, images[:2], "8")
        with turned_bundle.gallery(state) as new:
            by_old = enrol(tiny_bundle, old, images[2:4], "8")
            np.testing.assert_allclose(embedding(new, by_old[1]), turned_bundle.embed(images[3:4])[0], atol=1e-6)
            by_new = enrol(turned_bundle, new, images[4:6], "9")
            np.testing.assert_allclose(embedding(old, by_new[1]), tiny_bundle.embed(images[5:6])[0], atol=1e-6)
            old.remove(first)
            assert not set(first) & set(new.snapshot().rows)
            np.testing.assert_allclose(embedding(old, by_old[0]), tiny_bundle.embed(images[2:3])[0], atol=1e-6)
            assert set(old.snapshot().rows) == set(new.snapshot().rows)


def test_killed_half_way_it_goes_on_where_it_stopped(
    tiny_bundle: Bundle, turned_bundle: Bundle, state: Path, digit_images, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = digit_images.of("8", "9").images[:20]
    with tiny_bundle.gallery(state) as old:
        names = enrol(tiny_bundle, old, images, "8")
    code = """
import os, signal, sys
from pathlib import Path
from coterie import anew, store
from coterie.bundle import Bundle
anew.BATCH, complete, batches = 6, store.Store.complete, []
def complete_twice(self, embeddings):
    complete(self, embeddings)
    batches.append(len(embeddings))
    if len(batches) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
store.Store.complete = complete_twice
Bundle.open(sys.argv[1]).gallery(Path(sys.argv[2]))
"""
    command = [sys.executable, "-c", code, turned_bundle.path, state]
    assert subprocess.run(command, stderr=subprocess.DEVNULL).returncode == -signal.SIGKILL
    with tiny_bundle.gallery(state) as back:
        assert set(names) <= set(back.snapshot().rows)
    encoded: list[int] = []
    encode = turned_bundle.encoder.embed
    monkeypatch.setattr(anew_module, "BATCH", 6)
    monkeypatch.setattr(
        turned_bundle.encoder, "embed", lambda pixels: encoded.append(len(pixels)) or encode(pixels), raising=True
    )
    with turned_bundle.gallery(state) as new:
        assert sum(encoded) == 20 - 2 * 6
        for name, expected in zip(names, encode(turned_bundle.pixels(images)), strict=True):
            np.testing.assert_allclose(embedding(new, name), expected, atol=1e-6)


def test_several_processes_may_open_the_new_bundle_at_once(
    tiny_bundle: Bundle, turned_bundle: Bundle, state: Path, digit_images
) -> None:
    images = digit_images.of("8", "9").images[:40]
    with tiny_bundle.gallery(state) as old:
        names = enrol(tiny_bundle, old, images, "8")
    code = """
import sys
from pathlib import Path
from coterie import anew
from coterie.bundle import Bundle
anew.BATCH = 4
with Bundle.open(sys.argv[1]).gallery(Path(sys.argv[2])) as gallery:
    print(len(gallery.snapshot().items))
"""
    command = [sys.executable, "-c", code, turned_bundle.path, state]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) for _ in range(3)]
    sizes = {process.communicate()[0].strip() for process in processes}
    assert sizes == {str(len(turned_bundle.base.items) + len(names)).encode()}
