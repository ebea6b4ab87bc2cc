"""From the name of a device to ONNX Runtime's execution providers and their options.

Knows what each provider must find on the machine, and what to install where it is missing. Starts no session.
"""

import contextlib
import ctypes
import hashlib
import importlib
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import onnxruntime as ort
from platformdirs import user_cache_dir

from coterie.errors import DeviceError

__all__ = ["CPU", "DEVICES", "Placement", "check_device", "has_driver", "not_taken", "place", "provider_options"]

DEVICES = "auto, cpu, cuda, cuda:1, cuda:0,1 or cuda:all, and tensorrt likewise"
PATTERN = re.compile(r"auto|cpu|(cuda|tensorrt)(:(all|\d+(,\d+)*))?")
TENSORRT_REMEDY = "it needs TensorRT 10 (libnvinfer.so.10): pip install 'tensorrt-cu13<11'"
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}

Providers = list[tuple[str, dict[str, str]]]


@dataclass(frozen=True)
class Placement:
    """What one session runs on: the CPU, or GPU `number` by CUDA or by TensorRT.

    Attributes:
        graphs: record each bucket's work as a CUDA graph once, and replay it as a whole.
    """

    kind: Literal["cpu", "cuda", "tensorrt"]
    number: int = 0
    graphs: bool = False

    @property
    def provider(self) -> str:
        """ONNX Runtime's name of the provider that must come first in the session."""
        return PROVIDERS[self.kind]

    @property
    def memory(self) -> Literal["cpu", "cuda"]:
        """ONNX Runtime's name of the memory that inputs and outputs lie in."""
        return "cpu" if self.kind == "cpu" else "cuda"

    def __str__(self) -> str:
        return self.kind if self.kind == "cpu" else f"{self.kind}:{self.number}"


CPU = Placement("cpu")


def check_device(device: str) -> None:
    """Raise DeviceError if `device` is not the name of one, here or anywhere."""
    if not PATTERN.fullmatch(device):
        raise DeviceError(f"no device {device!r}: use {DEVICES}")


def place(device: str) -> tuple[Placement, ...]:
    """Where to run what shall run on `device`, one placement for each GPU that it names.

    Args:
        device: any but auto, which is a matter of trying.

    Raises:
        DeviceError: no such name, or the machine lacks a GPU, its driver, or the provider's libraries.
    """
    check_device(device)
    kind, _, numbers = device.partition(":")
    if kind == "cpu":
        return (CPU,)
    gpus = _count_gpus(device)
    wanted = range(gpus) if numbers == "all" else sorted({int(number) for number in (numbers or "0").split(",")})
    for number in wanted:
        if number >= gpus:
            raise _unavailable(device, f"there is no GPU {number}, the driver shows {gpus}, numbered from 0")
    _load_libraries(device)
    if kind == "tensorrt":
        return tuple(Placement("tensorrt", number) for number in wanted)
    graphs = os.environ.get("COTERIE_CUDA_GRAPHS") == "1"
    return tuple(Placement("cuda", number, graphs) for number in wanted)


def provider_options(placement: Placement, model: Path, input_size: tuple[int, int], max_batch: int) -> Providers:
    """Providers in order of precedence with their options.

    The first must run the model; those after it take the nodes that it has no kernel for.

    Args:
        model: for TensorRT, whose engines are kept by the model's content.
        input_size: height and width of the images; for TensorRT, which builds one engine for 1 to `max_batch` of them.
    """
    providers: Providers = [(PROVIDERS["cpu"], {})]
    if placement.kind != "cpu":
        providers.insert(0, (PROVIDERS["cuda"], _cuda(placement)))
    if placement.kind == "tensorrt":
        providers.insert(0, (PROVIDERS["tensorrt"], _tensorrt(placement.number, model, input_size, max_batch)))
    return providers


def has_driver() -> bool:
    """Whether NVIDIA's driver is installed, be there a GPU or not."""
    return _driver() is not None


def not_taken(placement: Placement) -> DeviceError:
    """The error for a session that did not take the provider it was to run on."""
    remedy = "CUDA's libraries cannot be loaded; install coterie[cuda]"
    return _unavailable(placement, TENSORRT_REMEDY if placement.kind == "tensorrt" else remedy)


def _unavailable(device: str | Placement, why: str) -> DeviceError:
    return DeviceError(f"{device} cannot be had here: {why}")


def _cuda(placement: Placement) -> dict[str, str]:
    options = {
        "device_id": str(placement.number),
        # The default tries every algorithm anew for each shape; no search at all takes whatever kernel comes first.
        "cudnn_conv_algo_search": "HEURISTIC",
        # Every bucket is run once before it counts, so memory need not be taken in powers of two ahead of need.
        "arena_extend_strategy": "kSameAsRequested",
        # What the manifest calls fp32 is that on a GPU too: 10 bits of mantissa would move embeddings past thresholds.
        "use_tf32": "0",
    }
    return options | ({"enable_cuda_graph": "1"} if placement.graphs else {})


def _tensorrt(number: int, model: Path, input_size: tuple[int, int], max_batch: int) -> dict[str, str]:
    # ONNX Runtime names an engine by the graph's nodes without their weights: two encoders must not share a folder.
    with model.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    cache = Path(user_cache_dir("coterie", appauthor=False)) / "tensorrt" / digest[:16]
    cache.mkdir(parents=True, exist_ok=True)
    height, width = input_size
    shape = f"x{height}x{width}x3"
    return {
        "device_id": str(number),
        "trt_fp16_enable": "True" if os.environ.get("COTERIE_TENSORRT_FP16") == "1" else "False",
        "trt_engine_cache_enable": "True",
        "trt_engine_cache_path": str(cache),
        "trt_timing_cache_enable": "True",
        "trt_timing_cache_path": str(cache),
        # Without a range, every larger batch than before would build the engine anew.
        "trt_profile_min_shapes": f"images:1{shape}",
        "trt_profile_opt_shapes": f"images:{max_batch // 2}{shape}",
        "trt_profile_max_shapes": f"images:{max_batch}{shape}",
    }


def _driver() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        return None


def _count_gpus(device: str) -> int:
    """GPUs that the driver shows to this process, CUDA_VISIBLE_DEVICES obeyed; at least 1."""
    driver = _driver()
    if driver is None:
        raise _unavailable(device, "NVIDIA's driver is missing; install it until nvidia-smi works")
    count = ctypes.c_int(0)
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        raise _unavailable(device, "the driver shows no GPU; check nvidia-smi and CUDA_VISIBLE_DEVICES")
    return count.value


def _load_libraries(device: str) -> None:
    """Load what the provider needs from Python packages, where the system's linker would not look."""
    kind = device.partition(":")[0]
    if PROVIDERS[kind] not in ort.get_available_providers():
        raise _unavailable(device, "this ONNX Runtime was built without it; use onnxruntime-gpu")
    with contextlib.redirect_stdout(sys.stderr):  # it prints what it misses
        ort.preload_dlls(directory="")
    if kind == "tensorrt":
        with contextlib.suppress(ImportError):
            importlib.import_module("tensorrt_libs")  # loads what it holds
        try:
            ctypes.CDLL("nvinfer_10.dll" if os.name == "nt" else "libnvinfer.so.10")
        except OSError as error:
            raise _unavailable(device, TENSORRT_REMEDY) from error
