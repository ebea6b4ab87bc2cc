"""One encoder on every device that is named: the same embeddings, how fast, and what padding batches costs.

    python -m benchmarks.devices [--model FILE] [--devices cpu cuda …] [--runs 15] [--threads N] [--json FILE]

ResNet-18 at 224, two threads of a shared machine, medians of 5, three runs of the whole:

    batch         1         8        32        64
    images/s   114–123   135–143   135–141   135–140      a padded batch takes 1.26 to 1.29 times as long

Not yet run on a GPU.

Without a model file, a ResNet-18 at 224 with random weights, exported as benchmarks/export.py does it. Of each device:
seconds to load and to warm up, images a second by batch, and the smallest cosine to the CPU's embeddings. CUDA graphs
and TensorRT's half precision are asked for by the environment: docs/settings.md.

Padding: 60 batches of 1 to 32 images in random order, at their own size and filled up with black images to the next
bucket, taking turns. GPUs pad by themselves, so this is about the CPU.

Exits with 1 if CUDA's embeddings differ from the CPU's by more than 1e-5 in cosine.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coterie.encoder import Encoder
from coterie.files import write_text
from coterie.machine import processors, versions
from coterie.session import BUCKETS

BATCHES = (1, 8, 32, 64)
PADDED_BATCHES, PADDED_UP_TO = 60, 32
TOLERANCE = 1e-5


def random_model(path: Path) -> Path:
    """Write a ResNet-18 at 224 with random weights that keeps images apart."""
    from benchmarks.export import MODELS, PREPROCESSING, encoder_of, read_images
    from export.onnx import to_onnx

    path.write_bytes(to_onnx(encoder_of(MODELS["resnet18"], read_images(None)[:64]), PREPROCESSING.input_size, {}))
    return path


def measure(model: Path, device: str, threads: int, runs: int) -> tuple[dict[str, Any], NDArray[np.float32]]:
    """Everything about one device, and its embeddings of the largest batch."""
    started = time.perf_counter()
    encoder = Encoder(model, device=device, threads=threads)
    loaded = time.perf_counter()
    encoder.embed(images(encoder, 1))
    encoder.warm_up()
    warm = time.perf_counter()
    pixels = images(encoder, BATCHES[-1])
    batches = {}
    for batch in BATCHES:
        times = [_milliseconds(encoder, pixels[:batch]) for _ in range(runs)]
        batches[batch] = {"ms": statistics.median(times), "images_per_second": 1000 * batch / statistics.median(times)}
    return (
        {
            "provider": encoder.provider,
            "load_seconds": loaded - started,
            "warm_up_seconds": warm - loaded,
            "batches": batches,
        },
        encoder.embed(pixels),
    )


def padding(model: Path, threads: int) -> dict[str, float]:
    """Images a second of the CPU at batches' own size and filled up to buckets, and the median cost of filling up."""
    encoder = Encoder(model, device="cpu", threads=threads)
    pixels = images(encoder, PADDED_UP_TO)
    black = np.zeros_like(pixels)
    sizes = np.random.default_rng(0).integers(1, PADDED_UP_TO + 1, PADDED_BATCHES).tolist()
    own, filled = [], []
    for size in sizes:
        bucket = next(bucket for bucket in BUCKETS if bucket >= size)
        own.append(_milliseconds(encoder, pixels[:size]))
        filled.append(_milliseconds(encoder, np.concatenate([pixels[:size], black[: bucket - size]])))
    return {
        "own_images_per_second": 1000 * sum(sizes) / sum(own),
        "padded_images_per_second": 1000 * sum(sizes) / sum(filled),
        "median_padded_by_own": statistics.median(b / a for a, b in zip(own, filled, strict=True)),
    }


def images(encoder: Encoder, count: int) -> NDArray[np.uint8]:
    """Noise of the encoder's size, uint8 (count, h, w, 3)."""
    return np.random.default_rng(0).integers(0, 256, (count, *encoder.input_size, 3), dtype=np.uint8)


def _milliseconds(encoder: Encoder, pixels: NDArray[np.uint8]) -> float:
    started = time.perf_counter()
    encoder.embed(pixels)
    return (time.perf_counter() - started) * 1000


def print_table(results: dict[str, dict[str, Any]], padded: dict[str, float] | None) -> None:
    """One line for each device, and one about padding."""
    print(f"{'':16}{'load, s':>9}{'warm, s':>9}{'cosine':>12}" + "".join(f"{f'{b}: img/s':>12}" for b in BATCHES))
    for device, result in results.items():
        rates = "".join(f"{found['images_per_second']:12.1f}" for found in result["batches"].values())
        print(
            f"{device:16}{result['load_seconds']:9.2f}{result['warm_up_seconds']:9.2f}{result['min_cosine']:12.8f}{rates}"
        )
    if padded:
        print(
            f"on the CPU, batches of 1 to {PADDED_UP_TO}: {padded['own_images_per_second']:.1f} images/s, padded "
            f"{padded['padded_images_per_second']:.1f}; a padded batch takes {padded['median_padded_by_own']:.2f} times"
        )


def main() -> int:
    """Measure, print a table and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="the model.onnx of a bundle")
    parser.add_argument("--devices", nargs="+", default=["cpu"])
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--threads", type=int, default=processors())
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model or random_model(Path(folder) / "model.onnx")
        truth = Encoder(model, device="cpu", threads=arguments.threads)
        expected = truth.embed(images(truth, BATCHES[-1]))
        results = {}
        for device in arguments.devices:
            result, found = measure(model, device, arguments.threads, arguments.runs)
            results[device] = result | {"min_cosine": float(np.einsum("nd,nd->n", expected, found).min())}
        padded = padding(model, arguments.threads) if "cpu" in arguments.devices else None
    print_table(results, padded)
    if arguments.json:
        report = {
            "threads": arguments.threads,
            "runs": arguments.runs,
            "devices": results,
            "padding": padded,
            "load_average": os.getloadavg()[0],
            "versions": versions("onnxruntime-gpu", "onnxruntime"),
        }
        write_text(arguments.json, json.dumps(report, indent=1) + "\n")
    return int(any(r["min_cosine"] < 1 - TOLERANCE for device, r in results.items() if device.startswith("cuda")))


if __name__ == "__main__":
    sys.exit(main())
