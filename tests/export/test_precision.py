"""Conversions of a small ResNet for digits: what they keep, and what the gates stop."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto
from sklearn.datasets import load_digits

from coterie.encoder import Encoder
from coterie.errors import GateFailed
from coterie.images import Preprocessing
from export.onnx import to_onnx
from export.precision import Precision, check_conversion, convert
from training.encoders import EncoderSpec, build_encoder
from training.losses import SupConLoss

SMALL = (Precision.FP16, Precision.INT8)
PROPERTIES = {"embedding_dim": "64", "recipe": "digits"}


@pytest.fixture(scope="module")
def digits():
    """600 images uint8 (n, 16, 16, 3) and their labels (n,)."""
    found = load_digits()
    grey = (found.images[:600] * (255 / 16)).round().astype(np.uint8).repeat(2, axis=1).repeat(2, axis=2)
    return np.repeat(grey[..., None], 3, axis=3), found.target[:600]


@pytest.fixture(scope="module")
def fp32(digits):
    """A ResNet that was shown each digit a few times."""
    torch.manual_seed(0)
    spec = EncoderSpec("cifar_resnet8", 16, (0.3, 0.3, 0.3), (0.35, 0.35, 0.35), Preprocessing(input_size=(16, 16)))
    encoder, loss = build_encoder(spec), SupConLoss()
    images, labels = torch.from_numpy(digits[0]).permute(0, 3, 1, 2) / 255, torch.from_numpy(digits[1])
    optimizer = torch.optim.Adam(encoder.parameters(), lr=3e-3)
    for rows in torch.arange(600).repeat(10).split(120):
        optimizer.zero_grad()
        loss(encoder(images[rows]), labels[rows]).backward()
        optimizer.step()
    encoder.eval()
    return to_onnx(encoder, (16, 16), PROPERTIES)


@pytest.fixture(scope="module")
def models(fp32, digits):
    return {precision: convert(fp32, precision, digits[0][::4]) for precision in Precision}


@pytest.fixture(scope="module")
def encoders(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("precisions")
    for precision, model in models.items():
        (folder / precision).write_bytes(model)
    return {precision: Encoder(folder / precision, device="cpu", threads=1) for precision in models}


@pytest.fixture(scope="module")
def embeddings(encoders, digits):
    return {precision: encoder.embed(digits[0]) for precision, encoder in encoders.items()}


@pytest.fixture(scope="module")
def held_out():
    return np.arange(600) % 3 == 0


def check(fp32, converted, labels, held_out, precision):
    paths = [Path(f"digit-{row}.png") for row in range(len(labels))]
    return check_conversion(fp32, converted, labels, held_out, precision, paths)


# Models


def test_fp32_is_the_model_itself(models, fp32):
    assert models[Precision.FP32] is fp32


def test_fewer_bits_take_less_room(models):
    full = len(models[Precision.FP32])
    assert len(models[Precision.FP16]) < 0.6 * full
    assert len(models[Precision.INT8]) < 0.45 * full


@pytest.mark.parametrize("precision", Precision)
def test_the_interface_and_the_properties_stay(models, precision):
    model = onnx.load_model_from_string(models[precision])
    (images,), (embedding,) = model.graph.input, model.graph.output
    assert (images.name, images.type.tensor_type.elem_type) == ("images", TensorProto.UINT8)
    assert (embedding.name, embedding.type.tensor_type.elem_type) == ("embedding", TensorProto.FLOAT)
    assert {entry.key: entry.value for entry in model.metadata_props} == PROPERTIES
    onnx.checker.check_model(model, full_check=True)


def test_weights_are_halves_or_signed_bytes(models):
    kinds = {
        precision: {
            tensor.data_type
            for tensor in onnx.load_model_from_string(model).graph.initializer
            if tensor.dims[2:] == [3, 3]
        }
        for precision, model in models.items()
    }
    assert kinds == {
        Precision.FP32: {TensorProto.FLOAT},
        Precision.FP16: {TensorProto.FLOAT16},
        Precision.INT8: {TensorProto.INT8},
    }


@pytest.mark.parametrize("precision", SMALL)
def test_pixels_and_norms_are_computed_in_float32(models, precision):
    model = onnx.shape_inference.infer_shapes(onnx.load_model_from_string(models[precision]), strict_mode=True)
    types = {value.name: value.type.tensor_type.elem_type for value in [*model.graph.value_info, *model.graph.output]}
    delicate = [node for node in model.graph.node if node.op_type in ("Sub", "Div", "MatMul", "ReduceSum", "Sqrt")]
    assert len(delicate) >= 6
    assert {types[node.output[0]] for node in delicate} == {TensorProto.FLOAT}


@pytest.mark.parametrize("precision", SMALL)
def test_the_model_gives_away_nothing_of_the_machine(models, precision, tmp_path):
    model = onnx.load_model_from_string(models[precision])
    for clue in (tmp_path.parts[1], Path.home().name, "site-packages", ".py", ".onnx"):
        assert clue.encode() not in models[precision], clue
    assert not model.doc_string
    assert {entry.domain for entry in model.opset_import} == {""}


def test_another_process_gives_equal_bytes_and_says_nothing(models, digits, tmp_path):
    (tmp_path / "fp32").write_bytes(models[Precision.FP32])
    np.save(tmp_path / "pixels.npy", digits[0][::4])
    program = (
        "import numpy as np; from pathlib import Path; from export.precision import Precision, convert\n"
        "model, pixels = Path('fp32').read_bytes(), np.load('pixels.npy')\n"
        "for name in ('fp16', 'int8'): Path(name).write_bytes(convert(model, Precision(name), pixels))"
    )
    # Another order of everything that is hashed.
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    for precision in SMALL:
        assert (tmp_path / precision).read_bytes() == models[precision]


@pytest.mark.parametrize("precision", SMALL)
@pytest.mark.parametrize("batch", [1, 7, 32])
def test_batches_of_any_size_give_the_same_vectors(encoders, embeddings, digits, precision, batch):
    np.testing.assert_allclose(
        encoders[precision].embed(digits[0][:batch]),
        embeddings[precision][:batch],
        atol=2e-3 if precision == "int8" else 1e-5,
    )


def test_one_image_is_enough_to_calibrate(fp32, digits, tmp_path):
    (tmp_path / "model.onnx").write_bytes(convert(fp32, Precision.INT8, digits[0][:1]))
    assert Encoder(tmp_path / "model.onnx", device="cpu").embed(digits[0][:2]).shape == (2, 64)


# Gates


@pytest.mark.parametrize("precision", Precision)
def test_conversions_agree_with_fp32(embeddings, digits, held_out, precision):
    agreement = check(embeddings[Precision.FP32], embeddings[precision], digits[1], held_out, precision)
    assert agreement.images == 600
    assert agreement.min_cosine > {"fp32": 0.999999, "fp16": 0.9999, "int8": 0.97}[precision]
    assert agreement.min_cosine <= agreement.mean_cosine
    assert agreement.knn_top1_fp32 > 0.9
    assert agreement.knn_top1 == pytest.approx(agreement.knn_top1_fp32, abs=0.01)


def unit(vectors):
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def test_one_image_moved_too_far_fails_fp16_and_is_named(embeddings, digits, held_out):
    full = embeddings[Precision.FP32]
    converted = full.copy()
    converted[41] = unit(full[41:42] + 0.1 * np.roll(full[41:42], 1))
    with pytest.raises(GateFailed, match=r"cosine 0\.99.*digit-41\.png \(0\.99.*[Nn]o bundle was written") as caught:
        check(full, converted, digits[1], held_out, Precision.FP16)
    assert caught.value.exit_code == 1
    assert str(caught.value).count(".png") == 5
    check(full, converted, digits[1], held_out, Precision.INT8)


@pytest.mark.parametrize("precision", SMALL)
def test_a_loss_of_neighbours_fails(embeddings, digits, held_out, precision):
    full = embeddings[Precision.FP32]
    noise = np.random.default_rng(0).normal(size=full.shape)
    with pytest.raises(GateFailed, match="k-NN top-1"):
        check(full, unit(full + 0.3 * noise), digits[1], held_out, precision)


def clusters(wrong):
    """fp32 and converted embeddings of 300 images in 2 clusters, and what is held out; `wrong` queries change sides."""
    labels = np.arange(300) % 2
    sides = np.eye(2, dtype=np.float32)
    held_out = np.arange(300) >= 100
    converted = labels.copy()
    converted[100 : 100 + wrong] = 1 - converted[100 : 100 + wrong]
    return sides[labels], sides[converted], labels, held_out


def test_one_wrong_answer_is_always_allowed_and_two_of_200_are_not():
    assert check(*clusters(0), Precision.INT8).knn_top1 == 1
    assert check(*clusters(1), Precision.INT8).knn_top1 == 0.995
    with pytest.raises(GateFailed, match=r"0\.9900 of 200 held-out images, 1\.0000 in fp32"):
        check(*clusters(2), Precision.INT8)


def test_gaining_neighbours_is_no_failure():
    full, converted, labels, held_out = clusters(10)
    assert check(converted, full, labels, held_out, Precision.INT8).knn_top1 == 1
