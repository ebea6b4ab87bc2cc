"""The bundle: what is in it is what was written, and nothing else is believed."""

import dataclasses
import io
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from coterie import Bundle
from coterie.bundle import FORMAT, EncoderCard, Manifest, write_bundle
from coterie.classifier import Calibration
from coterie.clusters import ClassClusters
from coterie.errors import BundleError, CoterieError, DataError, DeviceError, ImageError
from coterie.gallery import GalleryItems, Snapshot
from coterie.store import StoredItem

SIDE, DIM = 4, 6
CALIBRATION = Calibration(
    n_neighbors=5,
    temperature=0.1,
    vote_weight=0.5,
    cluster_weight=1.0,
    neighbor_share=0.5,
    typical_gap=0.2,
    limits={"0.05": 2.0},
    images=10,
    ece_of_vote=0.04,
    ece=0.02,
    left_out_auroc={"0.5": 0.9},
)
FILES = ["README.md", "clusters.parquet", "gallery.parquet", "manifest.json", "model.onnx"]
WriteBundle = Callable[..., Bundle]


def tiny_model(seed: int = 0, *, images: Any = None) -> bytes:
    """An encoder: uint8 (n, h, w, 3) → flattened, projected, of unit length."""
    weights = np.random.default_rng(seed).normal(size=(SIDE * SIDE * 3, DIM)).astype(np.float32)
    nodes = [
        helper.make_node("Cast", ["images"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Reshape", ["float", "rows"], ["flat"]),
        helper.make_node("Add", ["flat", "one"], ["positive"]),
        helper.make_node("MatMul", ["positive", "weights"], ["projected"]),
        helper.make_node("LpNormalization", ["projected"], ["embedding"], axis=1, p=2),
    ]
    constants = {
        "rows": np.asarray([-1, SIDE * SIDE * 3], dtype=np.int64),
        "one": np.ones(1, dtype=np.float32),
        "weights": weights,
    }
    graph = helper.make_graph(
        nodes,
        "tiny",
        [images or helper.make_tensor_value_info("images", TensorProto.UINT8, ["n", SIDE, SIDE, 3])],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["n", DIM])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def manifest(snapshot: Snapshot, **changes: Any) -> Manifest:
    values: dict[str, Any] = {
        "format": FORMAT,
        "name": "boots",
        "encoder": EncoderCard(
            input_size=(SIDE, SIDE), mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), embedding_dim=DIM
        ),
        "classes": snapshot.clusters.labels,
        "gallery_size": len(snapshot.items),
        "calibration": CALIBRATION,
        "accuracy": {"held_out_top1": 0.9},
        "provenance": {"recipe": "größe", "versions": {"coterie": "0.1"}, "list": [1, 2.5, None]},
        "files": {},
    }
    return Manifest(**values | changes)


@pytest.fixture
def snapshot(items: Callable[..., GalleryItems]) -> Snapshot:
    embeddings = np.eye(DIM, dtype=np.float32)
    labels = np.asarray(["boot", "boot", "shoe", "shoe", "größe", "größe"])
    return Snapshot(items(embeddings, labels), ClassClusters.fit(embeddings, labels))


@pytest.fixture
def write(tmp_path: Path, snapshot: Snapshot) -> WriteBundle:
    def write(
        folder: str = "bundle", *, model: bytes = b"", card: str = "# Boots\n", overwrite: bool = False, **changes: Any
    ) -> Bundle:
        return write_bundle(
            tmp_path / folder,
            model=model or tiny_model(),
            snapshot=changes.pop("snapshot", snapshot),
            card=card,
            manifest=manifest(snapshot, **changes),
            overwrite=overwrite,
        )

    return write


@pytest.fixture
def bundle(write: WriteBundle) -> Bundle:
    return write()


def png(image: np.ndarray[Any, Any]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


# Round trip


def test_a_bundle_comes_back_as_it_was_written(bundle: Bundle, snapshot: Snapshot) -> None:
    again = Bundle.open(str(bundle.path), device="cpu")
    assert again.manifest == bundle.manifest
    assert again.manifest.provenance == {"recipe": "größe", "versions": {"coterie": "0.1"}, "list": [1, 2.5, None]}
    assert again.base.items.ids == snapshot.items.ids
    assert again.base.clusters.labels == snapshot.clusters.labels == again.manifest.classes
    for name in ("counts", "spacings", "bounds", "prototypes", "owners", "radii"):
        np.testing.assert_array_equal(getattr(again.base.clusters, name), getattr(snapshot.clusters, name))
        assert getattr(again.base.clusters, name).dtype == getattr(snapshot.clusters, name).dtype
    np.testing.assert_array_equal(again.base.items.embeddings, snapshot.items.embeddings)
    assert sorted(file.name for file in bundle.path.iterdir()) == FILES
    assert (bundle.path / "README.md").read_text("utf-8") == "# Boots\n"


def test_a_class_of_several_prototypes_and_an_enrolled_one_come_back(write: WriteBundle, snapshot: Snapshot) -> None:
    looks = np.repeat(np.eye(DIM, dtype=np.float32)[:2], 10, axis=0)
    clusters = snapshot.clusters.with_class("boot", looks, snapshot.items.embeddings)
    clusters = clusters.with_class("shoe", looks[:0], looks).with_class("shoe", looks[:3], looks[:12])
    assert len(clusters.owners) == len(clusters) + 1
    assert clusters.enrolled.tolist() == [False, False, True]
    again = write(snapshot=Snapshot(snapshot.items, clusters)).base.clusters
    for name in ("counts", "spacings", "bounds", "prototypes", "owners", "radii"):
        np.testing.assert_array_equal(getattr(again, name), getattr(clusters, name))


def test_equal_content_gives_equal_bytes_and_the_same_id(write: WriteBundle) -> None:
    first, second = write("first"), write("second")
    for name in FILES:
        assert (first.path / name).read_bytes() == (second.path / name).read_bytes()
    assert first.manifest.id == second.manifest.id
    assert first.manifest.id.startswith("sha256:")
    assert len(first.manifest.id) == 7 + 64


def test_the_id_changes_with_every_file_and_every_value(write: WriteBundle, snapshot: Snapshot) -> None:
    fewer = Snapshot(snapshot.items, ClassClusters.fit(snapshot.items.embeddings, snapshot.items.labels[::-1]))
    renamed = GalleryItems(
        tuple(f"other {row}" for row in range(6)),
        snapshot.items.labels,
        snapshot.items.embeddings,
        snapshot.items.positions,
        snapshot.items.thumbnails,
        snapshot.items.metadata,
    )
    ids = [
        write("same").manifest.id,
        write("model", model=tiny_model(1)).manifest.id,
        write("card", card="# Other\n").manifest.id,
        write("gallery", snapshot=Snapshot(renamed, snapshot.clusters)).manifest.id,
        write("clusters", snapshot=fewer).manifest.id,
        write("name", name="other").manifest.id,
        write("calibration", calibration=CALIBRATION.model_copy(update={"temperature": 0.2})).manifest.id,
        write("accuracy", accuracy={"held_out_top1": 0.91}).manifest.id,
        write("provenance", provenance={}).manifest.id,
    ]
    assert len(set(ids)) == len(ids)


def test_a_bundle_is_replaced_only_when_asked(bundle: Bundle, write: WriteBundle) -> None:
    with pytest.raises(CoterieError, match="exists already"):
        write(card="# New\n")
    assert Bundle.open(bundle.path).manifest.id == bundle.manifest.id
    assert write(card="# New\n", overwrite=True).manifest.id != bundle.manifest.id


def test_a_bundle_that_cannot_be_written_leaves_nothing(write: WriteBundle, tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        write(card=None)
    assert list(tmp_path.iterdir()) == []


# Damage


def test_every_flipped_byte_of_the_manifest_is_found(bundle: Bundle) -> None:
    file = bundle.path / "manifest.json"
    original = file.read_bytes()
    for position in range(len(original)):
        damaged = bytearray(original)
        damaged[position] ^= 1 << position % 8
        file.write_bytes(damaged)
        with pytest.raises(BundleError):
            Bundle.open(bundle.path)
    file.write_bytes(original)
    Bundle.open(bundle.path)


@pytest.mark.parametrize("name", ["model.onnx", "gallery.parquet", "clusters.parquet", "README.md"])
def test_a_flipped_byte_anywhere_else_names_the_file(bundle: Bundle, name: str) -> None:
    file = bundle.path / name
    original = file.read_bytes()
    for position in np.linspace(0, len(original) - 1, 8).astype(int).tolist():
        damaged = bytearray(original)
        damaged[position] ^= 0x10
        file.write_bytes(damaged)
        with pytest.raises(BundleError, match=f"{name} is damaged: it does not match its checksum"):
            Bundle.open(bundle.path)
    file.write_bytes(original)
    Bundle.open(bundle.path)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("change", ["cut short", "longer", "empty", "missing", "a folder", "a dangling link"])
def test_a_file_that_is_not_whole_is_found(bundle: Bundle, name: str, change: str) -> None:
    file = bundle.path / name
    content = file.read_bytes()
    match change:
        case "cut short":
            file.write_bytes(content[:-1])
        case "longer":
            file.write_bytes(content + b"\n")
        case "empty":
            file.write_bytes(b"")
        case "missing":
            file.unlink()
        case "a folder":
            file.unlink()
            file.mkdir()
        case "a dangling link":
            file.unlink()
            file.symlink_to("nowhere")
    with pytest.raises(BundleError, match=name.replace(".", r"\.")):
        Bundle.open(bundle.path)


@pytest.mark.parametrize("name", ["extra.py", ".hidden", "index.faiss", "folder/file"])
def test_a_file_too_many_is_named(bundle: Bundle, name: str) -> None:
    extra = bundle.path / name
    extra.parent.mkdir(exist_ok=True)
    extra.write_bytes(b"")
    with pytest.raises(BundleError, match=f"{name.split('/')[0]} does not belong to the bundle"):
        Bundle.open(bundle.path)


def test_the_model_stores_own_file_is_no_file_too_many(bundle: Bundle) -> None:
    (bundle.path / "model.yaml").write_text("name: coterie-bundle")
    Bundle.open(bundle.path)


def test_a_link_instead_of_a_file_is_refused_even_if_its_content_is_right(bundle: Bundle, tmp_path: Path) -> None:
    model = bundle.path / "model.onnx"
    model.rename(tmp_path / "elsewhere.onnx")
    model.symlink_to(tmp_path / "elsewhere.onnx")
    with pytest.raises(BundleError, match=r"model\.onnx"):
        Bundle.open(bundle.path)


def test_a_file_that_cannot_be_read_is_named(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: Path) -> str:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("coterie.bundle._sha256", broken)
    with pytest.raises(BundleError, match=r"README\.md cannot be read \(Input/output error\)"):
        Bundle.open(bundle.path)


def test_damage_shows_without_verification_only_where_it_is_read(bundle: Bundle) -> None:
    (bundle.path / "gallery.parquet").write_bytes(b"no table")
    opened = Bundle.open(bundle.path, verify=False)
    with pytest.raises(BundleError, match=r"gallery\.parquet is not a gallery"):
        _ = opened.base
    with pytest.raises(BundleError, match=r"gallery\.parquet is damaged"):
        opened.verify()


def rewrite(bundle: Bundle, **changes: Any) -> None:
    """Change values of the manifest and give it the id that belongs to them, as a forger would."""
    file = bundle.path / "manifest.json"
    values = json.loads(file.read_text("utf-8")) | changes
    fields = {name: value for name, value in values.items() if name in Manifest.model_fields}
    forged = Manifest.model_construct(**fields)
    values["id"] = forged.compute_id()
    file.write_text(json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False) + "\n", "utf-8")


@pytest.mark.filterwarnings("ignore::UserWarning:pydantic")
@pytest.mark.parametrize("found", [FORMAT + 1, 1, 0, None, "2"])
def test_another_format_says_which_and_what_to_do(bundle: Bundle, found: Any) -> None:
    rewrite(bundle, format=found)
    with pytest.raises(BundleError, match=f"format {found!r}, this version reads {FORMAT}: export it again"):
        Bundle.open(bundle.path)


@pytest.mark.filterwarnings("ignore::UserWarning:pydantic")
@pytest.mark.parametrize(
    "changes",
    [
        {"unheard of": 1},
        {"classes": 5},
        {"files": {}},
        {"files": {"../outside": {"sha256": "0" * 64, "size": 0}}},
        {"files": {"/etc/passwd": {"sha256": "0" * 64, "size": 0}}},
        {"name": "../../outside"},
        {"name": ".."},
        {"name": ""},
        {"name": "a\nb"},
    ],
)
def test_a_forged_manifest_is_refused(bundle: Bundle, changes: dict[str, Any]) -> None:
    rewrite(bundle, **changes)
    with pytest.raises(BundleError, match=r"manifest\.json"):
        Bundle.open(bundle.path)


@pytest.mark.parametrize("content", ["", "[]", "null", "{}", f'{{"format": {FORMAT}}}', "not json", "[" * 100_000])
def test_a_manifest_that_is_none_is_refused(bundle: Bundle, content: str) -> None:
    (bundle.path / "manifest.json").write_text(content)
    with pytest.raises(BundleError):
        Bundle.open(bundle.path)


def test_what_is_not_a_bundle_says_how_to_make_one(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "file"):
        with pytest.raises(
            BundleError, match=r"is not a bundle, it has no manifest.json: make one with `coterie export`"
        ):
            Bundle.open(path)


def test_nothing_in_a_bundle_is_unpickled(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, lambda *_, **__: pytest.fail("something was unpickled"))
    opened = Bundle.open(bundle.path, device="cpu")
    opened.classify([np.zeros((SIDE, SIDE, 3), dtype=np.uint8)])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gallery_size": 7}, "size and width"),
        ({"classes": ("boot", "größe")}, "different classes"),
        (
            {"encoder": EncoderCard(input_size=(SIDE, SIDE), mean=(0, 0, 0), std=(1, 1, 1), embedding_dim=DIM + 1)},
            "size and width",
        ),
    ],
)
def test_parts_that_do_not_fit_together_are_refused(write: WriteBundle, changes: dict[str, Any], message: str) -> None:
    written = write(**changes)
    with pytest.raises(BundleError, match=message):
        _ = written.base
    with pytest.raises(BundleError, match=message):
        written.verify_parts()


@pytest.mark.filterwarnings("ignore::UserWarning:pydantic")
@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "folder/model.onnx"])
def test_a_manifest_that_lists_a_file_elsewhere_names_it(bundle: Bundle, name: str) -> None:
    entries = {entry: value.model_dump() for entry, value in bundle.manifest.files.items()}
    rewrite(bundle, files={**entries, name: {"sha256": "0" * 64, "size": 0}})
    with pytest.raises(BundleError, match=rf"manifest\.json lists other files than a bundle's .*: '{name}'$"):
        Bundle.open(bundle.path)


def test_parts_that_fit_are_verified_without_a_session_for_running(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coterie.bundle.Encoder", lambda *_, **__: pytest.fail("a session was made"))
    Bundle.open(bundle.path).verify_parts()


@pytest.mark.filterwarnings("ignore::UserWarning:pydantic")
def test_a_model_of_another_width_than_a_signed_manifest_states_is_named(bundle: Bundle) -> None:
    card = bundle.manifest.encoder.model_copy(update={"embedding_dim": DIM + 1})
    rewrite(bundle, encoder=card.model_dump(mode="json"))
    opened = Bundle.open(bundle.path)  # every checksum is right
    with pytest.raises(BundleError, match=r"model\.onnx does not have the size and width its manifest states"):
        opened.verify_parts()


def test_clusters_of_another_width_than_stated_are_named(write: WriteBundle, snapshot: Snapshot) -> None:
    clusters = snapshot.clusters
    narrow = np.eye(len(clusters.owners), 3, dtype=np.float32)
    written = write(snapshot=Snapshot(snapshot.items, dataclasses.replace(clusters, prototypes=narrow)))
    with pytest.raises(BundleError, match=r"clusters\.parquet does not have the width its manifest states"):
        written.verify_parts()


# The encoder in it


def test_a_model_of_another_size_than_stated_is_refused(write: WriteBundle) -> None:
    card = EncoderCard(input_size=(8, 8), mean=(0, 0, 0), std=(1, 1, 1), embedding_dim=DIM)
    with pytest.raises(BundleError, match="does not have the size and width its manifest states"):
        _ = write(encoder=card).encoder


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        (TensorProto.FLOAT, ["n", SIDE, SIDE, 3]),
        (TensorProto.UINT8, ["n", "height", "width", 3]),
        (TensorProto.UINT8, ["n", SIDE * SIDE * 3]),
    ],
)
def test_a_model_of_another_signature_is_refused(write: WriteBundle, kind: int, shape: list[Any]) -> None:
    images = helper.make_tensor_value_info("images", kind, shape)
    with pytest.raises(BundleError, match=r"model\.onnx maps .* not uint8 \(n, height, width, 3\) to \(n, d\)"):
        _ = write(model=tiny_model(images=images)).encoder


def test_a_file_that_is_no_model_is_refused(write: WriteBundle) -> None:
    with pytest.raises(BundleError, match=r"model\.onnx cannot be loaded by ONNX Runtime"):
        _ = write(model=b"no model").encoder


def test_the_encoder_gets_the_device_and_threads_that_the_bundle_was_opened_with(bundle: Bundle) -> None:
    encoder = Bundle.open(bundle.path, device="cpu", threads=3).encoder
    assert (encoder.provider, encoder.threads) == ("CPUExecutionProvider", 3)
    with pytest.raises(DeviceError, match="no device 'tpu'"):
        Bundle.open(bundle.path, device="tpu")


def test_every_kind_of_image_gives_the_same_embedding(bundle: Bundle, tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    file = tmp_path / "image.png"
    file.write_bytes(png(array))
    found = bundle.embed([file, str(file), file.read_bytes(), Image.fromarray(array), array])
    assert (found.shape, found.dtype) == ((5, DIM), np.float32)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    assert (found == found[0]).all()


def test_an_array_of_many_images_is_a_sequence_and_no_images_are_no_embeddings(bundle: Bundle) -> None:
    batch = np.random.default_rng(0).integers(0, 256, (70, SIDE, SIDE, 3), dtype=np.uint8)
    together = bundle.embed(batch)
    np.testing.assert_allclose(together, np.concatenate([bundle.embed([image]) for image in batch]), atol=1e-6)
    assert bundle.embed([]).shape == (0, DIM)


@pytest.mark.parametrize(
    "image", ["image.png", Path("image.png"), b"bytes", Image.new("RGB", (4, 4)), np.zeros((4, 4, 3), dtype=np.uint8)]
)
def test_one_image_instead_of_a_sequence_is_a_mistake_that_is_explained(bundle: Bundle, image: Any) -> None:
    with pytest.raises(TypeError, match=r"\[image\] for a single one"):
        bundle.embed(image)


def test_a_bad_image_among_many_is_named(bundle: Bundle, tmp_path: Path) -> None:
    good = np.zeros((SIDE, SIDE, 3), dtype=np.uint8)
    with pytest.raises(ImageError, match="image 2: not an image"):
        bundle.embed([good, good, b"garbage"])
    with pytest.raises(ImageError, match=r"missing\.png: cannot be read \(No such file"):
        bundle.embed([good, tmp_path / "missing.png"])


def test_classify_names_the_class_of_each_image(tiny_bundle: Bundle, digit_images: Any) -> None:
    digits = digit_images.of("0", "1")
    labels = [answer.label for answer in tiny_bundle.classify(digits.images, false_reject=0.01)]
    assert np.mean(np.asarray(labels) == digits.labels) > 0.9


# Its gallery


def enrolled(bundle: Bundle) -> StoredItem:
    return StoredItem("new", "sandal", np.eye(DIM, dtype=np.float32)[0], {}, b"")


def test_a_gallery_without_state_is_read_only(bundle: Bundle) -> None:
    with pytest.raises(DataError, match="without a store"):
        bundle.gallery().add([enrolled(bundle)])


def test_a_gallery_with_state_keeps_it_in_a_folder_of_its_own(bundle: Bundle, tmp_path: Path) -> None:
    state = tmp_path / "state"
    before = {name: (bundle.path / name).read_bytes() for name in FILES}
    bundle.gallery(state).add([enrolled(bundle)])
    assert "sandal" in Bundle.open(bundle.path).gallery(state).snapshot().clusters.labels
    assert [entry.name for entry in state.iterdir()] == ["boots"]
    assert {name: (bundle.path / name).read_bytes() for name in FILES} == before
    Bundle.open(bundle.path)


def test_the_state_follows_a_new_bundle_of_the_same_encoder(write: WriteBundle, tmp_path: Path) -> None:
    state = tmp_path / "state"
    write("first").gallery(state).add([enrolled(write("again"))])
    assert "new" in write("new card", card="# New\n").gallery(state).snapshot().rows


def test_a_copied_bundle_is_the_same_bundle(bundle: Bundle, tmp_path: Path) -> None:
    shutil.copytree(bundle.path, tmp_path / "copy")
    (tmp_path / "link").symlink_to(tmp_path / "copy")
    assert Bundle.open(tmp_path / "link").manifest == bundle.manifest


@pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")
def test_a_bundle_needs_no_right_to_write(bundle: Bundle) -> None:
    for file in bundle.path.iterdir():
        file.chmod(0o400)
    bundle.path.chmod(0o500)
    opened = Bundle.open(bundle.path, device="cpu")
    assert len(opened.classify([np.zeros((SIDE, SIDE, 3), dtype=np.uint8)])) == 1
    bundle.path.chmod(0o700)
