"""The encoder: what comes out is right on every device, and what goes wrong is blamed on what is to blame.

There is no GPU here. Where one is needed, `Machine` stands in for the driver and for the provider; the session below
it is real and runs on the CPU, the device memory that it is bound to is the CPU's.
"""

import ctypes
import logging
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.capi.onnxruntime_pybind11_state import EPFail, Fail

from coterie import providers
from coterie.bundle import Bundle
from coterie.encoder import Encoder
from coterie.errors import BundleError, DeviceError
from coterie.providers import check_device
from coterie.session import BUCKETS, model_shapes

SIDE, DIM = 4, 6
GPU = ["CUDAExecutionProvider", "CPUExecutionProvider"]
TENSORRT = ["TensorrtExecutionProvider", *GPU]


def write_model(path: Path, *, seed: int = 0, side: int = SIDE, offset: float = 0) -> Path:
    """An encoder that projects the pixels and divides by the length; without an offset a black image gives 0 / 0."""
    generator = np.random.default_rng(seed)
    constants = {
        "flat": np.asarray([-1, side * side * 3], dtype=np.int64),
        "offset": np.asarray([offset], dtype=np.float32),
        "weights": generator.normal(size=(side * side * 3, DIM)).astype(np.float32),
        "width": np.asarray([1], dtype=np.int64),
    }
    nodes = [
        helper.make_node("Cast", ["images"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Reshape", ["float", "flat"], ["rows"]),
        helper.make_node("Add", ["rows", "offset"], ["moved"]),
        helper.make_node("MatMul", ["moved", "weights"], ["projected"]),
        helper.make_node("ReduceSumSquare", ["projected", "width"], ["squares"], keepdims=1),
        helper.make_node("Sqrt", ["squares"], ["lengths"]),
        helper.make_node("Div", ["projected", "lengths"], ["embedding"]),
    ]
    graph = helper.make_graph(
        nodes,
        "encoder",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["n", side, side, 3])],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["n", DIM])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "model.onnx")


def images(count: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(1, 256, (count, SIDE, SIDE, 3), dtype=np.uint8)


def embedded_by_hand(model: Path, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    (weights,) = [
        numpy_helper.to_array(constant) for constant in onnx.load(model).graph.initializer if constant.name == "weights"
    ]
    projected = pixels.reshape(-1, SIDE * SIDE * 3).astype(np.float64) @ weights
    return (projected / np.linalg.norm(projected, axis=1, keepdims=True)).astype(np.float32)


class Machine:
    """A machine with GPUs, as far as the driver, the libraries and ONNX Runtime tell.

    Attributes:
        gpus: how many the driver shows; None is no driver.
        built_with, libraries: providers that ONNX Runtime was built with, and those whose libraries can be loaded.
        failure: what "load"ing a GPU's session or "run"ning it raises.
        asked: for each session that was made on a GPU, the providers with their options.
        allocated: shape and GPU of each piece of device memory.
        runs: GPU, thread, padded batch and CUDA graph of each run.
        meeting: where runs wait for each other.
    """

    def __init__(self) -> None:
        self.gpus: int | None = 2
        self.built_with = self.libraries = TENSORRT
        self.failure: dict[str, Exception] = {}
        self.asked: list[dict[str, dict[str, str]]] = []
        self.allocated: list[tuple[tuple[int, ...], int]] = []
        self.runs: list[tuple[int, int, int, str]] = []
        self.meeting: threading.Barrier | None = None

    def driver(self) -> Any:
        def count(number: Any) -> int:
            number._obj.value = self.gpus
            return 0

        if self.gpus is None:
            return None
        return SimpleNamespace(cuInit=lambda _: 0 if self.gpus else 100, cuDeviceGetCount=count)

    def library(self, name: str) -> None:
        if TENSORRT[0] not in self.libraries:
            raise OSError(f"{name}: cannot open shared object file")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    machine = Machine()
    allocate = ort.OrtValue.ortvalue_from_shape_and_type

    class SessionOnGpu(ort.InferenceSession):  # type: ignore[misc]
        def __init__(self, model: Path, options: Any, *, providers: list[Any], **more: Any) -> None:
            named = dict(entry if isinstance(entry, tuple) else (entry, {}) for entry in providers)
            self.taken = [name for name in named if name in machine.libraries]
            if len(named) > 1:
                machine.asked.append(named)
                self.options = named["CUDAExecutionProvider"]
                if "load" in machine.failure:
                    if not more.get("enable_fallback", 1):
                        raise machine.failure["load"]
                    self.taken = ["CPUExecutionProvider"]
            super().__init__(model, options, providers=["CPUExecutionProvider"], **more)

        def get_providers(self) -> list[str]:
            return self.taken

        def run_with_iobinding(self, iobinding: Any, run_options: Any = None) -> None:
            if "run" in machine.failure:
                raise machine.failure["run"]
            if machine.meeting:
                machine.meeting.wait(20)
            (batch, *_) = iobinding._bound_inputs["images"].shape()
            recorded = "enable_cuda_graph" in self.options
            graph = run_options.get_run_config_entry("gpu_graph_id") if recorded else ""
            machine.runs.append((int(self.options["device_id"]), threading.get_ident(), batch, graph))
            super().run_with_iobinding(iobinding, run_options)

    def allocate_on_gpu(shape: Any, kind: Any, device: str, number: int) -> Any:
        assert device == "cuda"
        machine.allocated.append((tuple(shape), number))
        return allocate(shape, kind, "cpu", 0)

    monkeypatch.delenv("COTERIE_CUDA_GRAPHS", raising=False)
    monkeypatch.delenv("COTERIE_TENSORRT_FP16", raising=False)
    monkeypatch.setattr(providers, "_driver", machine.driver)
    monkeypatch.setattr(ctypes, "CDLL", machine.library)
    monkeypatch.setattr(providers, "user_cache_dir", lambda *_, **__: str(tmp_path / "cache"))
    monkeypatch.setattr(ort, "get_available_providers", lambda: machine.built_with)
    monkeypatch.setattr(ort, "preload_dlls", lambda **_: None)
    monkeypatch.setattr(ort, "InferenceSession", SessionOnGpu)
    monkeypatch.setattr(ort.OrtValue, "ortvalue_from_shape_and_type", allocate_on_gpu)
    return machine


# What comes out


@pytest.mark.parametrize("device", ["cpu", "cuda", "cuda:0,1", "tensorrt"])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 64, 65, 200])
def test_embeddings_are_those_computed_by_hand(model: Path, machine: Machine, device: str, count: int) -> None:
    encoder, shown = Encoder(model, device=device, threads=1), list[int]()
    found = encoder.embed(images(count), shown.append)
    assert (found.shape, found.dtype) == ((count, DIM), np.float32)
    np.testing.assert_allclose(found, embedded_by_hand(model, images(count)), atol=1e-6)
    assert sum(shown) == count


def test_images_need_not_be_contiguous(model: Path, machine: Machine) -> None:
    pixels = images(6)[::2, ::-1]
    for device in ("cpu", "cuda"):
        found = Encoder(model, device=device).embed(pixels)
        np.testing.assert_allclose(found, embedded_by_hand(model, np.ascontiguousarray(pixels)), atol=1e-6)


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((1, SIDE, SIDE, 3), np.float32),
        np.zeros((SIDE, SIDE, 3), np.uint8),
        np.zeros((1, SIDE, 5, 3), np.uint8),
        np.zeros((1, SIDE, SIDE, 4), np.uint8),
    ],
)
def test_pixels_of_another_shape_are_the_callers_mistake(model: Path, pixels: Any) -> None:
    with pytest.raises(ValueError, match=r"pixels must be uint8 \(n, 4, 4, 3\), not"):
        Encoder(model, device="cpu").embed(pixels)


@pytest.mark.parametrize("device", ["cpu", "cuda", "cuda:0,1"])
@pytest.mark.parametrize("row", [0, 63, 64, 100, 199])
def test_an_embedding_that_is_none_is_named_by_its_image_among_all(
    model: Path, machine: Machine, device: str, row: int
) -> None:
    encoder, pixels = Encoder(model, device=device), images(200)
    pixels[row] = 0
    with pytest.raises(BundleError, match=f"squared length nan for image {row}$"):
        encoder.embed(pixels)
    pixels[row] = 1
    assert np.isfinite(encoder.embed(pixels)).all()


# Batches


def test_a_gpu_runs_few_sizes_and_keeps_its_memory(model: Path, machine: Machine) -> None:
    encoder = Encoder(model, device="cuda")
    for count in (1, 3, 5, 5, 3, 64, 33, 1):
        encoder.embed(images(count))
    assert [batch for _, _, batch, _ in machine.runs] == [1, 4, 8, 8, 4, 64, 64, 1]
    buffers = [shape for batch in (1, 4, 8, 64) for shape in ((batch, SIDE, SIDE, 3), (batch, DIM))]
    assert machine.allocated == [(shape, 0) for shape in buffers]


def test_the_cpu_runs_batches_at_their_own_size(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, run = [], ort.InferenceSession.run
    monkeypatch.setattr(
        ort.InferenceSession,
        "run",
        lambda self, names, feed, *more: (sizes.append(len(feed["images"])), run(self, names, feed, *more))[1],
    )
    Encoder(model, device="cpu").embed(images(70))
    assert sizes == [64, 6]


def test_warming_up_runs_every_bucket_on_every_gpu(tmp_path: Path, machine: Machine) -> None:
    pace = Encoder(write_model(tmp_path / "model.onnx", offset=1), device="cuda:all").warm_up(16)
    runs = [(gpu, batch) for gpu, _, batch, _ in machine.runs]
    assert runs == [*((gpu, batch) for gpu in (0, 1) for batch in (1, 2, 4, 8, 16)), (0, 16)]  # the last is timed
    assert 0 < pace < float("inf")


def test_warming_up_finds_an_encoder_that_gives_nothing_usable(model: Path) -> None:
    with pytest.raises(BundleError, match="squared length nan"):
        Encoder(model, device="cpu").warm_up()


def test_batches_go_to_the_gpu_that_is_free(model: Path, machine: Machine) -> None:
    encoder = Encoder(model, device="cuda:0,1")
    # Each run waits until another one is under way: on one GPU after the other nothing would ever come out.
    machine.meeting = threading.Barrier(4)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda seed: encoder.embed(images(5, seed)), range(4)))
    assert sorted(gpu for gpu, *_ in machine.runs) == [0, 0, 1, 1]
    for seed, embeddings in enumerate(found):
        np.testing.assert_allclose(embeddings, embedded_by_hand(model, images(5, seed)), atol=1e-6)


def test_one_call_uses_all_gpus_at_once(model: Path, machine: Machine) -> None:
    encoder = Encoder(model, device="cuda:0,1")
    machine.meeting = threading.Barrier(4)
    encoder.embed(images(4 * BUCKETS[-1]))
    assert encoder.concurrency == 4
    assert sorted(gpu for gpu, *_ in machine.runs) == [0, 0, 1, 1]


@pytest.mark.parametrize("device", ["cpu", "cuda", "cuda:0,1"])
@pytest.mark.parametrize("graphs", ["", "1"])
def test_many_threads_get_their_own_embeddings(
    model: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch, device: str, graphs: str
) -> None:
    monkeypatch.setenv("COTERIE_CUDA_GRAPHS", graphs)
    encoder = Encoder(model, device=device, threads=1)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda seed: encoder.embed(images(seed % 7 + 1, seed)), range(200)))
    for seed, embeddings in enumerate(found):
        np.testing.assert_allclose(embeddings, embedded_by_hand(model, images(seed % 7 + 1, seed)), atol=1e-6)


def test_a_gpu_that_failed_once_is_asked_again(model: Path, machine: Machine) -> None:
    encoder = Encoder(model, device="cuda")
    machine.failure["run"] = Fail("CUDA failure 2: out of memory ; GPU=0")
    with pytest.raises(DeviceError, match=r"cuda:0 has too little memory: .*model\.onnx cannot be run"):
        encoder.embed(images(1))
    machine.failure.clear()
    np.testing.assert_allclose(encoder.embed(images(1)), embedded_by_hand(model, images(1)), atol=1e-6)


# CUDA graphs


def test_cuda_graphs_are_recorded_one_for_each_bucket_and_run_by_one_thread_a_gpu(
    model: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COTERIE_CUDA_GRAPHS", "1")
    encoder = Encoder(model, device="cuda:0,1")
    assert [asked["CUDAExecutionProvider"]["enable_cuda_graph"] for asked in machine.asked] == ["1", "1"]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda count: encoder.embed(images(count)), [1, 2, 3, 5, 8, 60] * 10))
    assert all(graph == str(batch) for _, _, batch, graph in machine.runs)
    for gpu in (0, 1):
        assert len({thread for number, thread, *_ in machine.runs if number == gpu}) == 1
    # One piece of memory for each bucket of each GPU: a graph replays on the addresses that it was recorded with.
    assert len(machine.allocated) == len(set(machine.allocated))


def test_without_the_setting_there_are_no_graphs(model: Path, machine: Machine) -> None:
    Encoder(model, device="cuda").embed(images(3))
    assert "enable_cuda_graph" not in machine.asked[0]["CUDAExecutionProvider"]
    assert [graph for *_, graph in machine.runs] == [""]


# Providers and options


def test_cuda_is_asked_for_with_options_that_suit_buckets(model: Path, machine: Machine) -> None:
    encoder = Encoder(model, device="cuda:1")
    assert encoder.provider == "CUDAExecutionProvider"
    assert [list(asked) for asked in machine.asked] == [GPU]
    assert machine.asked[0]["CUDAExecutionProvider"] == {
        "device_id": "1",
        "cudnn_conv_algo_search": "HEURISTIC",
        "arena_extend_strategy": "kSameAsRequested",
        "use_tf32": "0",
    }


@pytest.mark.parametrize(
    ("device", "numbers"),
    [("cuda", [0]), ("cuda:1", [1]), ("cuda:1,0", [0, 1]), ("cuda:0,0", [0]), ("cuda:all", [0, 1]), ("auto", [0])],
)
def test_each_gpu_that_is_named_gets_one_session(
    model: Path, machine: Machine, device: str, numbers: list[int]
) -> None:
    encoder = Encoder(model, device=device)
    assert [int(asked["CUDAExecutionProvider"]["device_id"]) for asked in machine.asked] == numbers
    assert encoder.concurrency == 2 * len(numbers)


def test_tensorrt_keeps_its_engines_and_leaves_the_rest_to_cuda(model: Path, machine: Machine, tmp_path: Path) -> None:
    encoder = Encoder(model, device="tensorrt:1")
    assert encoder.provider == "TensorrtExecutionProvider"
    assert [list(asked) for asked in machine.asked] == [TENSORRT]
    options = machine.asked[0]["TensorrtExecutionProvider"]
    assert options["device_id"] == machine.asked[0]["CUDAExecutionProvider"]["device_id"] == "1"
    assert options["trt_fp16_enable"] == "False"
    assert options["trt_engine_cache_enable"] == "True"
    assert Path(options["trt_engine_cache_path"]).parent == tmp_path / "cache" / "tensorrt"
    assert Path(options["trt_engine_cache_path"]).is_dir()
    assert options["trt_profile_min_shapes"] == "images:1x4x4x3"
    assert options["trt_profile_max_shapes"] == "images:64x4x4x3"


def test_tensorrt_computes_in_half_precision_only_when_told(
    model: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COTERIE_TENSORRT_FP16", "1")
    Encoder(model, device="tensorrt")
    assert machine.asked[0]["TensorrtExecutionProvider"]["trt_fp16_enable"] == "True"


def test_two_encoders_of_one_architecture_never_share_an_engine(tmp_path: Path, machine: Machine) -> None:
    (tmp_path / "other").mkdir()
    one, other = write_model(tmp_path / "model.onnx"), write_model(tmp_path / "other" / "model.onnx", seed=1)
    for path in (one, other, one):
        Encoder(path, device="tensorrt")
    first, second, again = [asked["TensorrtExecutionProvider"]["trt_engine_cache_path"] for asked in machine.asked]
    assert first == again != second


# A device that cannot be had


@pytest.mark.parametrize(
    "device", ["tpu", "CPU", "cuda:", "cuda:x", "cuda:1,", "cuda:-1", "cpu:0", "auto:0", "", "cuda\n"]
)
def test_what_is_no_device_is_told_what_is(model: Path, device: str) -> None:
    for ask in (check_device, lambda device: Encoder(model, device=device)):
        with pytest.raises(DeviceError, match="use auto, cpu, cuda, cuda:1"):
            ask(device)


@pytest.mark.parametrize("kind", ["cuda", "tensorrt"])
@pytest.mark.parametrize(
    ("gpus", "number", "message"),
    [
        (None, "", "NVIDIA's driver is missing; install it until nvidia-smi works"),
        (0, "", "the driver shows no GPU; check nvidia-smi and CUDA_VISIBLE_DEVICES"),
        (2, ":2", "there is no GPU 2, the driver shows 2, numbered from 0"),
        (2, ":0,7", "there is no GPU 7, the driver shows 2, numbered from 0"),
    ],
)
def test_a_gpu_that_is_not_there(
    model: Path, machine: Machine, kind: str, gpus: int | None, number: str, message: str
) -> None:
    machine.gpus = gpus
    with pytest.raises(DeviceError) as raised:
        Encoder(model, device=kind + number)
    assert str(raised.value) == f"{kind}{number} cannot be had here: {message}"


@pytest.mark.parametrize(
    ("device", "built_with", "libraries", "remedy"),
    [
        ("cuda", ["CPUExecutionProvider"], TENSORRT, "use onnxruntime-gpu"),
        ("tensorrt", GPU, GPU, "use onnxruntime-gpu"),
        ("cuda", TENSORRT, ["CPUExecutionProvider"], r"install coterie\[cuda\]"),
        ("tensorrt", TENSORRT, GPU, r"libnvinfer\.so\.10\): pip install 'tensorrt-cu13<11'"),
    ],
)
def test_a_provider_that_is_not_there_says_what_to_install(
    model: Path, machine: Machine, device: str, built_with: list[str], libraries: list[str], remedy: str
) -> None:
    machine.built_with, machine.libraries = built_with, libraries
    with pytest.raises(DeviceError, match=f"{device}.* cannot be had here: .*{remedy}"):
        Encoder(model, device=device)


def test_a_session_that_took_cuda_instead_of_tensorrt_is_refused(
    model: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.libraries = GPU
    monkeypatch.setattr(machine, "library", lambda _: None)
    monkeypatch.setattr(ctypes, "CDLL", machine.library)
    with pytest.raises(DeviceError, match="tensorrt:0 cannot be had here: it needs TensorRT 10"):
        Encoder(model, device="tensorrt")


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"libraries": ["CPUExecutionProvider"]}, r"install coterie\[cuda\]"),
        ({"built_with": ["CPUExecutionProvider"]}, "use onnxruntime-gpu"),
        ({"gpus": 0}, "the driver shows no GPU"),
        ({"failure": {"load": Fail("CUDA failure 2: out of memory")}}, "cuda:0 has too little memory"),
    ],
)
def test_auto_takes_the_cpu_and_says_why_where_there_is_a_driver(
    model: Path, machine: Machine, caplog: pytest.LogCaptureFixture, change: dict[str, Any], reason: str
) -> None:
    vars(machine).update(change)
    encoder = Encoder(model)
    assert encoder.provider == "CPUExecutionProvider"
    assert encoder.concurrency == 1
    (line,) = warnings_of(caplog)
    assert line.startswith("device auto takes the CPU: ")
    assert re.search(reason, line)
    np.testing.assert_allclose(encoder.embed(images(3)), embedded_by_hand(model, images(3)), atol=1e-6)


def test_auto_takes_the_cpu_silently_where_there_is_no_driver(
    model: Path, machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    machine.gpus = None
    assert Encoder(model).provider == "CPUExecutionProvider"
    assert warnings_of(caplog) == []
    assert machine.asked == []


# What is to blame


def test_a_damaged_model_is_the_models_fault_on_every_device(tmp_path: Path, machine: Machine) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no model")
    for device in ("auto", "cpu", "cuda", "tensorrt"):
        with pytest.raises(BundleError, match=r"model\.onnx cannot be loaded by ONNX Runtime"):
            Encoder(tmp_path / "model.onnx", device=device)
    with pytest.raises(BundleError, match=r"model\.onnx cannot be loaded by ONNX Runtime"):
        model_shapes(tmp_path / "model.onnx")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (Fail("CUDA failure 2: out of memory ; GPU=0"), "cuda:0 has too little memory"),
        (RuntimeError("Failed to allocate memory for requested buffer of size 205520896"), "has too little memory"),
        (MemoryError(), "cuda:0 has too little memory: .*: MemoryError"),
        (RuntimeError("Unknown provider option: nonsense"), "cuda:0: .*Unknown provider option"),
        (Fail("This session cannot use the graph capture feature\nmore"), "cuda:0: .*graph capture feature$"),
    ],
)
def test_a_whole_model_that_a_gpu_does_not_take_is_the_gpus_fault(
    model: Path, machine: Machine, error: Exception, message: str
) -> None:
    machine.failure["load"] = error
    with pytest.raises(DeviceError, match=message):
        Encoder(model, device="cuda")


def test_a_gpu_that_fails_does_not_move_the_session_to_the_cpu(model: Path, machine: Machine) -> None:
    encoder = Encoder(model, device="cuda")
    machine.failure["run"] = EPFail("CUDA error")
    for _ in range(2):
        with pytest.raises(DeviceError, match=r"cuda:0: .*model\.onnx cannot be run by ONNX Runtime: CUDA error"):
            encoder.embed(images(1))


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory as on Linux")
def test_too_little_memory_is_not_the_models_fault(tmp_path: Path) -> None:
    write_model(tmp_path / "model.onnx", side=1024)
    script = """
import resource, sys
from pathlib import Path
import numpy as np
from coterie.bundle import Bundle
from coterie.encoder import Encoder
encoder = Encoder(Path(sys.argv[1]), device="cpu", threads=1)
pixels = np.zeros((64, 1024, 1024, 3), dtype=np.uint8)
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**28,) * 2)
encoder.embed(pixels)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "model.onnx")], capture_output=True, text=True, cwd=Path.cwd()
    )
    assert "coterie.errors.DeviceError: cpu has too little memory: " in done.stderr


def test_shapes_are_read_without_a_session_for_running(model: Path) -> None:
    assert model_shapes(model) == ((SIDE, SIDE), DIM)


def test_batches_beside_each_other_take_one_thread_each(tiny_bundle: Bundle) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, *tiny_bundle.encoder.input_size, 3), dtype=np.uint8)
    model = tiny_bundle.path / "model.onnx"
    encoder = Encoder(model, device="cpu", threads=3, side_by_side=True)
    assert encoder.concurrency == 3 and Encoder(model, device="cpu", threads=3).concurrency == 1
    assert Encoder(model, device="cpu", threads=1, side_by_side=True).concurrency == 1
    with encoder._free_session() as first, encoder._free_session() as second, encoder._free_session() as third:
        assert first is not second and second is third
        with ThreadPoolExecutor(3) as pool:
            found = list(pool.map(encoder.embed, [pixels] * 3))
    with encoder._free_session() as again:
        assert again is first
    for embeddings in found:
        np.testing.assert_allclose(embeddings, encoder.embed(pixels), atol=1e-6)


def test_a_large_model_is_in_memory_once(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coterie.encoder.SMALL_MODEL", 10)
    assert Encoder(tiny_bundle.path / "model.onnx", device="cpu", threads=3, side_by_side=True).concurrency == 1
