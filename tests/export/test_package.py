"""Export of a real, small run: parity, reproducibility, and what goes where."""

import numpy as np
import onnx
import pytest
import torch

from coterie.bundle import Bundle
from coterie.encoder import Encoder
from coterie.errors import CoterieError, DataError, GateFailed
from export.onnx import to_onnx
from export.package import export_bundle, export_run
from export.parity import check_parity
from export.precision import Precision
from export.source import pretrained_source
from training.monitor import features_of


@pytest.fixture(scope="module")
def export(tiny_run, tiny_run_tree, tmp_path_factory):
    return export_run(tiny_run, tiny_run_tree, tmp_path_factory.mktemp("export") / "bundle")


def test_the_bundle_answers_what_torch_answers(export, tiny_run):
    encoder, _ = tiny_run.load_encoder()
    pixels = export.images.pixels[:40]
    assert export.parity >= 0.99999
    assert check_parity(export.bundle.encoder, encoder, pixels) >= 0.99999


def test_two_exports_of_one_run_are_equal(export, tiny_run, tiny_run_tree, tmp_path):
    again = export_run(tiny_run, tiny_run_tree, tmp_path / "again")
    assert again.bundle.manifest.id == export.bundle.manifest.id
    for file in export.bundle.path.iterdir():
        assert (again.bundle.path / file.name).read_bytes() == file.read_bytes(), file.name


def test_calibration_uses_only_images_the_encoder_never_saw_and_the_gallery_does_not_hold(export, tiny_run):
    record = tiny_run.dataset()
    short = {identifier[:16] for identifier in export.bundle.base.items.ids}
    assert short == record.train
    assert export.bundle.manifest.calibration.images == len(record.calibration)


def test_the_model_gives_away_no_paths(export):
    data = (export.bundle.path / "model.onnx").read_bytes()
    assert b"site-packages" not in data
    assert b".py" not in data
    model = onnx.load_model_from_string(data)
    properties = {entry.key for entry in model.metadata_props}
    assert properties == {"architecture", "dataset", "embedding_dim", "objective", "recipe"}


def test_a_failed_gate_leaves_no_bundle(tiny_run, tiny_run_tree, tmp_path, monkeypatch):
    honest = Encoder.embed

    def wrong(self, pixels, progress=None):
        return np.roll(honest(self, pixels, progress), 1, axis=1)

    monkeypatch.setattr(Encoder, "embed", wrong)
    with pytest.raises(GateFailed, match="cosine"):
        export_run(tiny_run, tiny_run_tree, tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_bundle_is_only_replaced_when_asked(export, tiny_run, tiny_run_tree):
    with pytest.raises(CoterieError, match="exists already"):
        export_run(tiny_run, tiny_run_tree, export.bundle.path)


def test_a_gallery_of_images_never_seen_is_split_for_calibration(tiny_run, digit_tree_of, tmp_path):
    gallery = digit_tree_of(tmp_path / "new", classes=(8, 9), per_class=30)
    bundle = export_run(tiny_run, gallery, tmp_path / "bundle").bundle
    assert bundle.manifest.classes == ("8", "9")
    assert bundle.manifest.gallery_size == 48
    assert bundle.manifest.calibration.images == 12


def test_a_gallery_with_nothing_to_calibrate_with_is_refused(tiny_run, tiny_run_tree, tmp_path):
    record = tiny_run.dataset()
    import hashlib
    import shutil

    gallery = tmp_path / "seen"
    for file in tiny_run_tree.rglob("*.png"):
        if record.has_trained_on(hashlib.sha256(file.read_bytes()).hexdigest()):
            target = gallery / file.relative_to(tiny_run_tree)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, target)
    with pytest.raises(DataError, match="calibrate"):
        export_run(tiny_run, gallery, tmp_path / "bundle")


def test_batches_of_any_size_give_the_same_vectors(tiny_run, tmp_path):
    encoder, spec = tiny_run.load_encoder()
    path = tmp_path / "model.onnx"
    path.write_bytes(to_onnx(encoder, spec.preprocessing.input_size, {}))
    exported = Encoder(path, device="cpu")
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (67, 16, 16, 3), dtype=torch.uint8, generator=generator).numpy()
    together = exported.embed(pixels)
    alone = np.concatenate([exported.embed(pixels[i : i + 1]) for i in range(len(pixels))])
    np.testing.assert_allclose(together, alone, atol=1e-6)


@pytest.fixture(scope="module")
def source(tiny_weights):
    return pretrained_source("timm:test_resnet", weights=tiny_weights, input_size=32)


@pytest.fixture(scope="module")
def pretrained(source, tiny_run_tree, tmp_path_factory):
    return export_bundle(source, tiny_run_tree, tmp_path_factory.mktemp("pretrained") / "bundle")


def test_an_encoder_of_timm_becomes_a_bundle_that_answers(pretrained, digit_tree_of, tmp_path):
    bundle = Bundle.open(pretrained.bundle.path, device="cpu")
    files = sorted(digit_tree_of(tmp_path / "new", classes=range(8), per_class=10, skip=40).rglob("*.png"))
    answers = bundle.classify(files)
    right = [answer.classes[0].label == file.parent.name for answer, file in zip(answers, files, strict=True)]
    assert np.mean(right) > 0.6  # by features of random weights; chance is 1 in 8
    assert bundle.manifest.name == "test_resnet"
    assert bundle.manifest.encoder.input_size == (32, 32)


def test_a_gallery_that_nothing_is_known_of_is_split_for_calibration(pretrained):
    manifest = pretrained.bundle.manifest
    assert (manifest.gallery_size, manifest.calibration.images) == (8 * 32, 8 * 8)


def test_the_features_of_a_pretrained_encoder_are_whitened_on_the_gallery_alone(pretrained, tiny_weights):
    images = pretrained.images
    kept = np.isin([digest[:24] for digest in images.hashes], pretrained.bundle.base.items.ids)
    expected = pretrained_source("timm:test_resnet", weights=tiny_weights, input_size=32).encoder
    features = features_of(expected, torch.from_numpy(images.pixels[kept]))
    expected.whiten(features, torch.from_numpy(images.labels[kept]), shrinkage=0.1)
    assert check_parity(pretrained.bundle.encoder, expected, images.pixels) >= 0.99999


def test_an_encoder_that_was_exported_before_gives_the_same_bundle_again(pretrained, source, tiny_run_tree, tmp_path):
    again = export_bundle(source, tiny_run_tree, tmp_path / "again")
    for file in pretrained.bundle.path.iterdir():
        assert (again.bundle.path / file.name).read_bytes() == file.read_bytes(), file.name


def test_one_image_of_each_class_leaves_nothing_to_calibrate_with(source, digit_tree_of, tmp_path):
    gallery = digit_tree_of(tmp_path / "gallery", classes=range(3), per_class=1)
    with pytest.raises(DataError, match="give at least 3 of one"):
        export_bundle(source, gallery, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


@pytest.fixture(scope="module")
def grouped(source, digit_tree_of, tmp_path_factory):
    """Three classes of twenty images, grouped by all but the last digit of their numbers, and one image of a fourth."""
    folder = tmp_path_factory.mktemp("grouped")
    gallery = digit_tree_of(folder / "gallery", classes=range(3), per_class=20)
    digit_tree_of(gallery, classes=[7], per_class=1)
    return export_bundle(source, gallery, folder / "bundle", group=r"(\d+)\d\.png")


def test_a_class_of_one_image_stays_in_the_gallery(grouped):
    assert grouped.bundle.manifest.classes == ("0", "1", "2", "7")
    assert grouped.bundle.base.clusters.counts[3] == 1
    image = next(path for path in grouped.images.paths if path.parent.name == "7")
    (answer,) = grouped.bundle.classify([grouped.bundle.path.parent / "gallery" / image])
    assert answer.neighbors[0].label == "7"


def test_images_of_one_object_stay_on_one_side(grouped):
    ids = set(grouped.bundle.base.items.ids)
    sides = {}
    for name, digest in zip(grouped.images.groups, grouped.images.hashes, strict=True):
        sides.setdefault(name, set()).add(digest[:24] in ids)
    assert {side for both in sides.values() for side in both} == {True, False}
    assert all(len(both) == 1 for both in sides.values())


@pytest.fixture(scope="module", params=[Precision.FP16, Precision.INT8])
def converted(request, tiny_run, tiny_run_tree, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return export_run(tiny_run, tiny_run_tree, folder / "bundle", precision=request.param)


def test_the_gallery_of_a_converted_encoder_holds_its_own_embeddings(converted, export):
    bundle = converted.bundle
    assert bundle.manifest.encoder.precision in ("fp16", "int8")
    kept = np.isin([digest[:24] for digest in converted.images.hashes], bundle.base.items.ids)
    np.testing.assert_allclose(
        bundle.base.items.embeddings, bundle.encoder.embed(converted.images.pixels[kept]), atol=1e-5
    )
    assert np.abs(bundle.base.items.embeddings - export.bundle.base.items.embeddings).max() > 1e-5


def test_how_far_a_conversion_moved_the_embeddings_stands_in_the_manifest(converted):
    accuracy = converted.bundle.manifest.accuracy
    assert accuracy["mean_cosine_to_fp32"] == converted.agreement.mean_cosine > 0.95
    assert accuracy["knn_top1"] == converted.agreement.knn_top1
    assert "k-NN top-1 in fp32" in (converted.bundle.path / "README.md").read_text("utf-8")


def test_two_conversions_of_one_run_are_equal(converted, tiny_run, tiny_run_tree, tmp_path):
    precision = Precision(converted.bundle.manifest.encoder.precision)
    again = export_run(tiny_run, tiny_run_tree, tmp_path / "again", precision=precision)
    for file in converted.bundle.path.iterdir():
        assert (again.bundle.path / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_conversion_that_answers_otherwise_leaves_no_bundle(tiny_run, tiny_run_tree, tmp_path, monkeypatch):
    def other_weights(model, precision, calibration):
        damaged = onnx.load_model_from_string(model)
        for tensor in damaged.graph.initializer:
            if len(tensor.dims) == 4:
                tensor.CopyFrom(onnx.numpy_helper.from_array(-onnx.numpy_helper.to_array(tensor), tensor.name))
        return damaged.SerializeToString()

    monkeypatch.setattr("export.package.convert", other_weights)
    with pytest.raises(GateFailed, match="int8 differs from fp32"):
        export_run(tiny_run, tiny_run_tree, tmp_path / "bundle", precision=Precision.INT8)
    assert list(tmp_path.iterdir()) == []
