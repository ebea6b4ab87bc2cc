"""A smaller, faster encoder from a float32 one, and whether it still gives the same answers.

Whatever the precision, the model takes uint8 images and gives float32 embeddings of unit length, and what is cheap but
delicate stays in float32: the normalisation of the pixels before the first weights, and everything from the whitening
on, whose sum of squares would overflow float16.
"""

import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import chain
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, helper
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from onnxruntime.transformers.float16 import convert_float_to_float16
from onnxruntime.transformers.onnx_model import OnnxModel

from coterie.errors import GateFailed
from coterie.index import ExactIndex
from coterie.metrics import top1
from export.onnx import serialised

__all__ = ["Agreement", "Precision", "check_conversion", "convert"]

# Where the weights are; and what merely picks among their results, at which integers lose nothing.
WEIGHTED = ("Conv", "MatMul", "Gemm")
QUANTISED = (*WEIGHTED, "Relu", "Clip", "MaxPool")
# Ranges are the least and largest values that these images reach. Of a ResNet-14 trained on traffic signs, 16 to 1,024
# images gave the same: k-NN top-1 0.978 to 0.983 of 409 queries, fp32 0.980; more only take longer.
MOST_CALIBRATION_IMAGES = 128
CALIBRATION_BATCH = 8

NEIGHBORS, TEMPERATURE = 20, 0.07  # of the vote, as training's monitor has them
NAMED = 5


class Precision(StrEnum):
    """What an exported encoder computes in."""

    FP32 = "fp32"
    FP16 = "fp16"
    INT8 = "int8"


# Smallest cosine to float32's embedding, of each image. Integers move vectors further and yet keep their neighbours.
MIN_COSINE = {Precision.FP16: 0.999}
# Percentage points of k-NN top-1; one image always, for with few of them it is more.
MAY_LOSE = {Precision.FP32: 0.0, Precision.FP16: 0.1, Precision.INT8: 0.5}


def convert(model: bytes, precision: Precision, calibration: NDArray[np.uint8]) -> bytes:
    """Convert a float32 encoder that `to_onnx` exported; equal arguments give equal bytes.

    Args:
        calibration: images uint8 (n, h, w, 3), n at least 1, of the kind the encoder will be shown; int8 alone looks
            at them, and at no more than MOST_CALIBRATION_IMAGES, evenly spaced.
    """
    if precision is Precision.FP32:
        return model
    source = onnx.load_model_from_string(model)
    properties = {entry.key: entry.value for entry in source.metadata_props}
    converted = _in_half(source) if precision is Precision.FP16 else _in_integers(source, calibration)
    return serialised(converted, properties)


def _in_half(model: ModelProto) -> ModelProto:
    """The part with the weights in float16, between casts.

    It is converted as a model of its own: nodes that are merely excluded would hand their results on in float16.
    """
    model = onnx.shape_inference.infer_shapes(model)
    graph = model.graph
    head, body, tail = _sections(graph)
    types = {value.name: value for value in chain(graph.input, graph.value_info)}
    constants = {tensor.name: tensor for tensor in graph.initializer}
    inputs = sorted(_read(body) & (_written(head) | {value.name for value in graph.input}))
    outputs = sorted(_written(body) & _read(tail))
    inner = helper.make_graph(
        body,
        "body",
        [types[name] for name in inputs],
        [types[name] for name in outputs],
        [constants[name] for name in sorted(_read(body) & constants.keys())],
    )
    half = convert_float_to_float16(
        helper.make_model(inner, opset_imports=model.opset_import, ir_version=model.ir_version), keep_io_types=True
    ).graph
    # The exporter shares equal constants, so that head and tail may use one that is now in float16.
    outer = [*head, *tail]
    kept = {name: f"{name}.float32" for name in sorted(_read(outer) & constants.keys())}
    for node in outer:
        node.input[:] = [kept.get(name, name) for name in node.input]
    for name, new in kept.items():
        constants[name].name = new
    initializers = [*half.initializer, *(constants[name] for name in kept)]
    merged = helper.make_graph([*head, *half.node, *tail], graph.name, graph.input, graph.output, initializers)
    OnnxModel.graph_topological_sort(merged)  # the casts come last
    return helper.make_model(merged, opset_imports=model.opset_import, ir_version=model.ir_version)


def _in_integers(model: ModelProto, calibration: NDArray[np.uint8]) -> ModelProto:
    """Weights as signed 8-bit integers per channel, activations as unsigned ones, which is what VNNI multiplies."""
    with tempfile.TemporaryDirectory() as folder:
        source, prepared, quantised = (Path(folder) / f"{name}.onnx" for name in ("source", "prepared", "quantised"))
        onnx.save(model, source)
        # Shapes are static but for the batch: no need to solve for them.
        quant_pre_process(source, prepared, skip_symbolic_shape=True)
        graph = onnx.load(prepared).graph
        _, _, tail = _sections(graph)
        quantize_static(
            prepared,
            quantised,
            _Batches(calibration),
            op_types_to_quantize=_quantised_types(graph),
            nodes_to_exclude=[node.name for node in tail],
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        model = onnx.load(quantised)
    # ONNX Runtime declares every operator set it knows.
    used = {node.domain for node in model.graph.node}
    operator_sets = [entry for entry in model.opset_import if entry.domain in used]
    del model.opset_import[:]
    model.opset_import.extend(operator_sets)
    return model


def _quantised_types(graph: GraphProto) -> list[str]:
    """What to compute in integers.

    BatchNorm keeps the sums of a residual network in bounds, and integers save time there. Where LayerNorm is the norm,
    sums grow from block to block, in a few channels most, which cannot share one scale with the others: of a ViT-S/16
    with random weights they lower the mean cosine to float32 from 0.999 to 0.985.
    """
    if any(node.op_type == "LayerNormalization" for node in graph.node):
        return [*QUANTISED]
    return [*QUANTISED, "Add"]


class _Batches(CalibrationDataReader):  # type: ignore[misc]
    """Evenly spaced images, so that every class of a sorted gallery is among them."""

    def __init__(self, pixels: NDArray[np.uint8]) -> None:
        rows = np.unique(np.linspace(0, len(pixels) - 1, MOST_CALIBRATION_IMAGES).round().astype(np.int64))
        self._batches = (pixels[rows[i : i + CALIBRATION_BATCH]] for i in range(0, len(rows), CALIBRATION_BATCH))

    def get_next(self) -> dict[str, NDArray[np.uint8]] | None:
        batch = next(self._batches, None)
        return None if batch is None else {"images": batch}


def _sections(graph: GraphProto) -> tuple[list[NodeProto], list[NodeProto], list[NodeProto]]:
    """Nodes before the first weights, the backbone's, and those from the whitening on, which has the last weights."""
    nodes = list(graph.node)
    weighted = [row for row, node in enumerate(nodes) if node.op_type in WEIGHTED]
    features = nodes[weighted[-1]].input[0]
    centring = next(row for row, node in enumerate(nodes) if features in node.output)
    return nodes[: weighted[0]], nodes[weighted[0] : centring], nodes[centring:]


def _read(nodes: Iterable[NodeProto]) -> set[str]:
    return {name for node in nodes for name in node.input if name}


def _written(nodes: Iterable[NodeProto]) -> set[str]:
    return {name for node in nodes for name in node.output if name}


@dataclass(frozen=True)
class Agreement:
    """How well a converted encoder agrees with float32.

    Attributes:
        images: how many were compared.
        min_cosine, mean_cosine: of each image's two embeddings.
        knn_top1, knn_top1_fp32: share of the held-out images that their neighbours name rightly; NaN without any.
    """

    images: int
    min_cosine: float
    mean_cosine: float
    knn_top1: float
    knn_top1_fp32: float


def check_conversion(
    fp32: NDArray[np.float32],
    converted: NDArray[np.float32],
    labels: NDArray[np.generic],
    held_out: NDArray[np.bool_],
    precision: Precision,
    paths: Sequence[Path],
) -> Agreement:
    """Compare the embeddings (n, d) that two models gave of the same images, of which `held_out` are the queries.

    Args:
        labels, held_out, paths: of each image, (n,).

    Raises:
        GateFailed: float16 has moved an image too far, or the conversion loses k-NN top-1; to gain some is no failure.
    """
    cosines = np.einsum("nd,nd->n", fp32, converted)
    agreement = Agreement(
        images=len(cosines),
        min_cosine=float(cosines.min()),
        mean_cosine=float(cosines.mean()),
        knn_top1=_knn_top1(converted, labels, held_out),
        knn_top1_fp32=_knn_top1(fp32, labels, held_out),
    )
    queries = int(held_out.sum())
    bound = MIN_COSINE.get(precision, -1.0)
    lost = (agreement.knn_top1_fp32 - agreement.knn_top1) * queries
    findings = []
    if agreement.min_cosine < bound:
        findings.append(f"cosine {agreement.min_cosine:.5f}, at least {bound} needed")
    if lost > max(1.0, MAY_LOSE[precision] / 100 * queries) + 1e-6:
        findings.append(
            f"k-NN top-1 {agreement.knn_top1:.4f} of {queries} held-out images, {agreement.knn_top1_fp32:.4f} in fp32"
        )
    if findings:
        moved = np.argsort(cosines, kind="stable")[:NAMED]
        named = ", ".join(f"{paths[row]} ({cosines[row]:.5f})" for row in moved)
        raise GateFailed(
            f"the encoder in {precision} differs from fp32: {'; '.join(findings)}. Moved most, with their cosines: "
            f"{named}. No bundle was written: export with another --precision"
        )
    return agreement


def _knn_top1(embeddings: NDArray[np.float32], labels: NDArray[np.generic], held_out: NDArray[np.bool_]) -> float:
    """Top-1 of votes weighted by exp(similarity / T), as in DINO's evaluation (arXiv 2104.14294)."""
    names, classes = np.unique(labels, return_inverse=True)
    similarities, rows = ExactIndex(embeddings[~held_out]).search(embeddings[held_out], NEIGHBORS)
    votes = np.zeros((len(rows), len(names)))
    np.add.at(votes, (np.arange(len(rows))[:, None], classes[~held_out][rows]), np.exp(similarities / TEMPERATURE))
    return top1(names[votes.argmax(axis=1)], labels[held_out])
