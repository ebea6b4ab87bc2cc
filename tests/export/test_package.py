"""Export of a real, small run: parity, reproducibility, and what goes where."""

import numpy as np
import onnx
import pytest
import torch

from coterie.encoder import Encoder
from coterie.errors import CoterieError, DataError, GateFailed
from export.onnx import to_onnx
from export.package import export_run
from export.parity import check_parity


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
    assert {entry.key for entry in model.metadata_props} == {"dataset", "embedding_dim", "recipe"}


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
