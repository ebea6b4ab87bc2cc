"""A torch encoder as one ONNX file: uint8 images in, unit-length embeddings out, normalisation inside.

The file holds no source paths or stack traces, so it gives nothing away and equal encoders give equal bytes.
"""

import contextlib
import io
import logging
import warnings
from collections.abc import Mapping

import onnx
import torch
from torch import Tensor, nn

from training.encoders import ImageEncoder

__all__ = ["serialised", "to_onnx"]

OPSET = 20


class _UnitEmbedding(nn.Module):
    """uint8 (n, h, w, 3) → float32 (n, d) of unit length."""

    def __init__(self, encoder: ImageEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> Tensor:
        features = self.encoder(images.permute(0, 3, 1, 2).to(torch.float32) * (1 / 255))
        # Leaner as a graph than torch's normalize, which leaves a clip and an expand behind.
        return features * torch.rsqrt((features * features).sum(1, keepdim=True) + 1e-12)


def to_onnx(encoder: ImageEncoder, input_size: tuple[int, int], properties: Mapping[str, str]) -> bytes:
    """Export `encoder`, in evaluation mode, with a dynamic batch.

    Args:
        input_size: height and width of the images.
        properties: written to the model's own metadata.

    Returns:
        The serialised model: input `images`, output `embedding`.
    """
    example = torch.zeros((2, *input_size, 3), dtype=torch.uint8)
    with _quiet():
        program = torch.onnx.export(
            _UnitEmbedding(encoder).eval(),
            (example,),
            input_names=["images"],
            output_names=["embedding"],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=4096)},),
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    if program is None:
        raise RuntimeError("torch.onnx.export returned no program")
    return serialised(program.model_proto, properties)


def serialised(model: onnx.ModelProto, properties: Mapping[str, str]) -> bytes:
    """The checked model as bytes that are equal for equal models, with these properties and no other notes."""
    _strip(model)
    onnx.helper.set_model_props(model, dict(sorted(properties.items())))
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString(deterministic=True))


def _strip(model: onnx.ModelProto) -> None:
    """Remove what the exporter notes about the machine it ran on."""
    model.doc_string = ""
    del model.metadata_props[:]
    graphs = [model.graph, *model.functions]
    for graph in graphs:
        graph.doc_string = ""
        del graph.metadata_props[:]
        for node in graph.node:
            node.doc_string = ""
            del node.metadata_props[:]
        for value in graph.value_info:
            value.doc_string = ""
            del value.metadata_props[:]
    for value in [*model.graph.input, *model.graph.output, *model.graph.initializer]:
        value.doc_string = ""
        del value.metadata_props[:]


@contextlib.contextmanager
def _quiet():  # type: ignore[no-untyped-def]
    """The exporter reports its progress on stdout and warns of its own internals."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
