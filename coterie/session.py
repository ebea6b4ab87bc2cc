"""One ONNX Runtime session on one device: pixels of a batch in, what the model makes of them out.

Owns the session's options and threads, the sizes that batches are padded to, and device memory. Tells the model's
faults from the device's. Nothing that comes out is checked.
"""

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from coterie.errors import BundleError, CoterieError, DeviceError
from coterie.providers import CPU, Placement, not_taken, provider_options

__all__ = ["BUCKETS", "Session", "model_shapes"]

# On GPUs, where every new shape costs a search for convolution algorithms, batches are padded up to these sizes.
BUCKETS = (1, 2, 4, 8, 16, 32, 64)
# How ONNX Runtime, C++ and CUDA say it.
NO_MEMORY = re.compile("bad_alloc|allocate memory|out of memory", re.IGNORECASE)


class Session:
    """One session on one device; safe to use from many threads.

    Args:
        size: of the model's images, which TensorRT has to know beforehand.

    Attributes:
        under_way: batches that it was given and has not answered; kept by the encoder.
    """

    def __init__(self, model: Path, placement: Placement, size: tuple[int, int], threads: int) -> None:
        self.placement, self.under_way = placement, 0
        self._model = model
        self._session = _load(model, placement, size, threads)
        self.input_size, self.dim = _shapes(self._session, model)
        self._idle: dict[int, list[_Binding]] = {bucket: [] for bucket in BUCKETS}
        # A recorded graph belongs to the thread that recorded it and to one binding's memory: one thread runs them all.
        self._only_thread = ThreadPoolExecutor(1, thread_name_prefix="graphs") if placement.graphs else None

    def run(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Embed uint8 (n, h, w, 3) with n from 1 to the largest bucket: float32 (n, d), not checked.

        Raises:
            DeviceError: the device failed; BundleError: the model did.
        """
        try:
            if self.placement == CPU:
                # Shapes cost nothing here, padding does: docs/decisions.md has the figures.
                (embeddings,) = self._session.run(["embedding"], {"images": np.ascontiguousarray(pixels)})
                return np.asarray(embeddings)
            if self._only_thread:
                return self._only_thread.submit(self._run_bound, pixels).result()
            return self._run_bound(pixels)
        except Exception as error:  # as `_load` says
            raise _blame(error, self.placement, f"{self._model} cannot be run by ONNX Runtime") from error

    def _run_bound(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        bucket = next(size for size in BUCKETS if size >= len(pixels))
        # As many bindings of a bucket come to be as threads ask for at once; list methods are atomic.
        try:
            binding = self._idle[bucket].pop()
        except IndexError:
            binding = _Binding(self._session, self.placement, (bucket, *self.input_size), self.dim)
        try:
            return binding.run(pixels)
        finally:
            self._idle[bucket].append(binding)


class _Binding:
    """Device memory for a batch of one size, bound to a session: nothing is allocated from one batch to the next."""

    def __init__(
        self, session: ort.InferenceSession, placement: Placement, size: tuple[int, int, int], dim: int
    ) -> None:
        bucket, where = size[0], (placement.memory, placement.number)
        self._session = session
        self._padded = np.zeros((*size, 3), dtype=np.uint8)
        self._images = ort.OrtValue.ortvalue_from_shape_and_type(self._padded.shape, np.uint8, *where)
        self._embeddings = ort.OrtValue.ortvalue_from_shape_and_type((bucket, dim), np.float32, *where)
        self._binding = session.io_binding()
        self._binding.bind_ortvalue_input("images", self._images)
        self._binding.bind_ortvalue_output("embedding", self._embeddings)
        self._options = ort.RunOptions()
        if placement.graphs:
            self._options.add_run_config_entry("gpu_graph_id", str(bucket))

    def run(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        # What an earlier batch left in the rows beyond is embedded too and dropped: images do not see each other.
        self._padded[: len(pixels)] = pixels
        self._images.update_inplace(self._padded)
        self._session.run_with_iobinding(self._binding, self._options)
        return np.array(self._embeddings.numpy()[: len(pixels)])


def _load(model: Path, placement: Placement, size: tuple[int, int], threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Decoding shares the cores; threads that spin between batches would take them away.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    providers = provider_options(placement, model, size, BUCKETS[-1])
    try:
        # By default a GPU session that fails moves itself to the CPU for good and says so only on stdout.
        session = ort.InferenceSession(model, options, providers=providers, enable_fallback=0)
    except Exception as error:  # ONNX Runtime raises a dozen types of its own, all derived from Exception
        raise _blame(error, placement, f"{model} cannot be loaded by ONNX Runtime") from error
    if session.get_providers()[0] != placement.provider:
        raise not_taken(placement)
    return session


def model_shapes(model: Path) -> tuple[tuple[int, int], int]:
    """Height and width of a model's images and the dimension of its embeddings, in half the time of a real session.

    Raises:
        BundleError: the file is not such a model.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = ort.InferenceSession(model, options, providers=[CPU.provider], enable_fallback=0)
    except Exception as error:  # as above
        raise _blame(error, CPU, f"{model} cannot be loaded by ONNX Runtime") from error
    return _shapes(session, model)


def _blame(error: Exception, placement: Placement, what: str) -> CoterieError:
    """The device's error where it wants memory or is a GPU, else the model's."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    if isinstance(error, MemoryError) or NO_MEMORY.search(str(error)):
        return DeviceError(f"{placement} has too little memory: {what}: {reason}")
    return BundleError(f"{what}: {reason}") if placement == CPU else DeviceError(f"{placement}: {what}: {reason}")


def _shapes(session: ort.InferenceSession, model: Path) -> tuple[tuple[int, int], int]:
    inputs = {value.name: value for value in session.get_inputs()}
    outputs = {value.name: value for value in session.get_outputs()}
    if set(inputs) != {"images"} or "embedding" not in outputs:
        raise BundleError(f"{model} has inputs {sorted(inputs)} and outputs {sorted(outputs)}, not images → embedding")
    images, embedding = inputs["images"], outputs["embedding"]
    match images.type, images.shape, embedding.type, embedding.shape:
        case "tensor(uint8)", [_, int(height), int(width), 3], "tensor(float)", [_, int(dim)]:
            return (height, width), dim
    raise BundleError(
        f"{model} maps {images.type} {images.shape} to {embedding.type} {embedding.shape}, "
        "not uint8 (n, height, width, 3) to (n, d) in float32"
    )
