"""Pixels to embeddings: one ONNX Runtime session with its providers, threads and batch buckets.

This class owns every choice about the session and logs it. It knows nothing of labels or galleries.
"""

import ctypes
import logging
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from coterie.errors import BundleError, DeviceError
from coterie.machine import processors

__all__ = ["BUCKETS", "Encoder", "processors"]

logger = logging.getLogger("coterie.encoder")

# On GPUs, where every new shape costs a search for convolution algorithms, batches are padded up to these sizes.
BUCKETS = (1, 2, 4, 8, 16, 32, 64)


class Encoder:
    """Runs an exported encoder: uint8 images in, unit-length float32 embeddings out.

    Args:
        model: `model.onnx` with input `images` uint8 (n, h, w, 3) and output `embedding` float32 (n, d).
        device: `auto` takes a GPU if one answers, else the CPU; `cpu`; `cuda` or `cuda:N`.
        threads: of the CPU session; by default as many as this process may use.

    Raises:
        DeviceError: the device was asked for by name and cannot be had.
        BundleError: the file is not such a model.
    """

    def __init__(self, model: Path, *, device: str = "auto", threads: int | None = None) -> None:
        self.threads = threads or processors()
        options = ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # Decoding shares the cores; threads that spin between batches would take them away.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        providers = _providers(device)
        try:
            self._session = ort.InferenceSession(model, options, providers=providers)
        except Exception as error:  # ONNX Runtime raises a dozen types of its own, all derived from Exception
            raise BundleError(f"{model} cannot be loaded by ONNX Runtime: {error}") from error
        # By default a failing GPU session moves itself to the CPU for good and says so only on stdout.
        self._session.disable_fallback()
        self.provider: str = self._session.get_providers()[0]
        self._any_batch = self.provider == "CPUExecutionProvider"
        if device.startswith("cuda") and self.provider != "CUDAExecutionProvider":
            raise DeviceError(_no_cuda(device))
        self.input_size, self.dim = _shapes(self._session, model)
        logger.info("encoder on %s, %d threads, dim %d", self.provider, self.threads, self.dim)

    def embed(self, pixels: NDArray[np.uint8], progress: Callable[[int], None] | None = None) -> NDArray[np.float32]:
        """Embed images of the encoder's size.

        Args:
            pixels: uint8 (n, h, w, 3); n may be 0.
            progress: called with the number of images after each batch.

        Returns:
            float32 (n, d), each row of unit length.

        Raises:
            ValueError: wrong shape or dtype.
            BundleError: the model gave NaN or a row that is not of unit length.
        """
        expected = (*self.input_size, 3)
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[1:] != expected:
            raise ValueError(
                f"pixels must be uint8 (n, {', '.join(map(str, expected))}), not {pixels.dtype} {pixels.shape}"
            )
        embeddings = np.empty((len(pixels), self.dim), dtype=np.float32)
        for start in range(0, len(pixels), BUCKETS[-1]):
            part = pixels[start : start + BUCKETS[-1]]
            embeddings[start : start + len(part)] = self._run(part)
            if progress:
                progress(len(part))
        _check(embeddings)
        return embeddings

    def warm_up(self, max_batch: int = BUCKETS[-1]) -> None:
        """Run every bucket up to `max_batch` once, so that no request pays for a first time."""
        for bucket in BUCKETS:
            if bucket <= max_batch:
                self.embed(np.zeros((bucket, *self.input_size, 3), dtype=np.uint8))

    def _run(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        count = len(pixels)
        bucket = count if self._any_batch else next(size for size in BUCKETS if size >= count)
        if bucket != count:
            padded = np.zeros((bucket, *pixels.shape[1:]), dtype=np.uint8)
            padded[:count] = pixels
            pixels = padded
        (embeddings,) = self._session.run(["embedding"], {"images": np.ascontiguousarray(pixels)})
        return np.asarray(embeddings, dtype=np.float32)[:count]


def _providers(device: str) -> list[str | tuple[str, dict[str, str]]]:
    name, _, number = device.partition(":")
    if device == "cpu" or (device == "auto" and not _has_cuda_driver()):
        return ["CPUExecutionProvider"]
    if device == "auto" or (name == "cuda" and (not number or number.isdigit())):
        if "CUDAExecutionProvider" not in ort.get_available_providers():
            if device == "auto":
                return ["CPUExecutionProvider"]
            raise DeviceError(_no_cuda(device))
        ort.preload_dlls(directory="")
        settings = {"device_id": number or "0", "cudnn_conv_algo_search": "HEURISTIC"}
        return [("CUDAExecutionProvider", settings), "CPUExecutionProvider"]
    raise DeviceError(f"no device {device!r}: use auto, cpu, cuda or cuda:N")


def _has_cuda_driver() -> bool:
    try:
        ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        return False
    return True


def _no_cuda(device: str) -> str:
    return (
        f"{device} cannot be had here: check the driver with nvidia-smi and install CUDA's libraries with coterie[cuda]"
    )


def _shapes(session: ort.InferenceSession, model: Path) -> tuple[tuple[int, int], int]:
    inputs = {value.name: value for value in session.get_inputs()}
    outputs = {value.name: value for value in session.get_outputs()}
    if set(inputs) != {"images"} or "embedding" not in outputs:
        raise BundleError(f"{model} has inputs {sorted(inputs)} and outputs {sorted(outputs)}, not images → embedding")
    images, embedding = inputs["images"], outputs["embedding"]
    match images.type, images.shape, embedding.shape:
        case "tensor(uint8)", [_, int(height), int(width), 3], [_, int(dim)]:
            return (height, width), dim
    raise BundleError(
        f"{model} maps {images.type} {images.shape} to {embedding.shape}, not uint8 (n, height, width, 3) to (n, d)"
    )


def _check(embeddings: NDArray[np.float32]) -> None:
    # One pass finds NaN, infinity and zero length alike.
    lengths = np.einsum("nd,nd->n", embeddings, embeddings)
    bad = np.flatnonzero(~(np.abs(lengths - 1) < 1e-3))
    if len(bad):
        raise BundleError(f"the encoder gave an embedding of squared length {lengths[bad[0]]} for image {bad[0]}")
