"""Exported encoders in float32, float16 and 8-bit integers: do they agree, and how long do they take?

    python -m benchmarks.export [--models resnet18 …] [--images FOLDER] [--runs 15] [--threads N] [--json FILE]

Two threads of an AMD EPYC with VNNI, 120 photographs, medians of 9 (docs/results/export.json); least cosine to torch,
and speed as a multiple of float32's, which for a lone image took 8.6, 19.7, 30.9, 27.4 and 5.4 ms:

                       MB                 cosine                     fp16 at 1, 8, 32      int8 at 1, 8, 32
                       fp32  fp16  int8   fp32      fp16    int8
    resnet18             46    23    12   1.000000  0.99999  0.973   1.01  1.00  1.00      2.36  2.68  2.69
    resnet50            111    64    41   1.000000  0.99731  0.386   1.01  1.01  1.00      2.46  2.81  3.03
    vit-s16              87    44    23   1.000000  1.00000  0.994   0.85  0.86  0.88      1.42  1.39  1.62
    convnext-t          114    58    31   1.000000  0.99999  0.995   0.89  0.80  0.79      1.69  1.58  1.83
    efficientnet-b0      23    15    11   1.000000  0.99957  −0.175  1.01  0.99  1.03      0.68  0.66  0.76

An Intel machine with VNNI gave ResNet-18 2.52, 2.47 and 2.47 beside much other work. EfficientNet's int8 gains nothing
and is inexact, also without its depthwise or squeezing convolutions (cosine 0.65 on average): its export would be
refused.

Weights are random, so that nothing is downloaded: what BatchNorm and LayerNorm scale by is drawn anew, for many
networks start with blocks that do nothing, BatchNorm's statistics are those of the images, and the mean feature is
subtracted, without which all embeddings of such a network point one way. Conversions of such a network err more than
those of a trained one; whether a bundle's do, its export measures.

Cosines are to torch's embeddings, of images that did not calibrate, the least at batches of 1, 7 and 32. Latencies are
medians of runs in which the precisions take turns, on as many threads as the service would use. Exits with 1 where
ResNet-18 misses its goal on a CPU that multiplies 8-bit integers (VNNI): 2 times float32's speed one by one, 2.4 times
in batches.
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
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from torch import nn

from coterie.encoder import Encoder
from coterie.files import write_text
from coterie.images import IMAGE_SUFFIXES, Preprocessing, load_pixels
from coterie.machine import processors, versions
from export.onnx import to_onnx
from export.precision import Precision, convert
from training.encoders import EncoderSpec, ImageEncoder, build_encoder
from training.monitor import embed

MODELS = {
    "resnet18": "resnet18",
    "resnet50": "resnet50",
    "vit-s16": "timm:vit_small_patch16_224",
    "convnext-t": "timm:convnext_tiny",
    "efficientnet-b0": "timm:efficientnet_b0",
}
PREPROCESSING = Preprocessing(input_size=(224, 224))
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CALIBRATION, COMPARED = 64, 56
PARITY_BATCHES, LATENCY_BATCHES = (1, 7, 32), (1, 8, 32)
GOALS = {1: 2.0, 8: 2.4, 32: 2.4}


def read_images(folder: Path | None) -> NDArray[np.uint8]:
    """Photographs of `folder`, in the order of their names, or smoothed noise: uint8 (n, 224, 224, 3)."""
    wanted = CALIBRATION + COMPARED
    if folder:
        files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)[:wanted]
        if len(files) < wanted:
            raise SystemExit(f"{folder} holds {len(files)} images, {wanted} are needed")
        return np.stack([load_pixels(file, PREPROCESSING) for file in files])
    generator = np.random.default_rng(0)
    return np.stack([_smooth_noise(generator) for _ in range(wanted)])


def _smooth_noise(generator: np.random.Generator) -> NDArray[np.uint8]:
    """Blobs of a random size over the whole range of values, in 7 × 7 to 56 × 56 cells."""
    cells = int(generator.integers(7, 57))
    noise = Image.fromarray(generator.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
    return np.asarray(noise.resize((224, 224), Image.Resampling.BICUBIC).filter(ImageFilter.GaussianBlur(1)))


@torch.no_grad()
def encoder_of(name: str, pixels: NDArray[np.uint8]) -> ImageEncoder:
    """A random network that passes its images on, in evaluation mode."""
    torch.manual_seed(0)
    encoder = build_encoder(EncoderSpec(name, 64, MEAN, STD, PREPROCESSING))
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean of all batches
            module.reset_running_stats()
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
    for parameter_name, parameter in encoder.named_parameters():
        if parameter_name.endswith("gamma"):  # a LayerScale, which starts at 1e-6
            nn.init.uniform_(parameter, 0.05, 0.5)
    batches = (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255).split(16)
    for batch in batches:
        encoder.train()(batch)
    encoder.eval()
    encoder.centre.copy_(torch.cat([encoder(batch) for batch in batches]).mean(0))
    return encoder


def agreement(
    encoders: dict[Precision, Encoder], expected: NDArray[np.float32], pixels: NDArray[np.uint8]
) -> dict[str, dict[int, dict[str, float]]]:
    """Smallest and mean cosine to torch's embeddings (n, d), by precision and batch."""
    found: dict[str, dict[int, dict[str, float]]] = {}
    for precision, encoder in encoders.items():
        found[precision] = {}
        for batch in PARITY_BATCHES:
            parts = [encoder.embed(pixels[start : start + batch]) for start in range(0, len(pixels), batch)]
            cosines = np.einsum("nd,nd->n", expected, np.concatenate(parts))
            found[precision][batch] = {"min_cosine": float(cosines.min()), "mean_cosine": float(cosines.mean())}
    return found


def latencies(encoders: dict[Precision, Encoder], pixels: NDArray[np.uint8], runs: int) -> dict[int, dict[str, float]]:
    """Median milliseconds by batch and precision, after one run to warm up."""
    medians = {}
    for batch in LATENCY_BATCHES:
        times: dict[str, list[float]] = {precision: [] for precision in encoders}
        for run in range(runs + 1):
            for precision, encoder in encoders.items():
                started = time.perf_counter()
                encoder.embed(pixels[:batch])
                if run:
                    times[precision].append((time.perf_counter() - started) * 1000)
        medians[batch] = {precision: statistics.median(found) for precision, found in times.items()}
    return medians


def measure(name: str, pixels: NDArray[np.uint8], runs: int, threads: int) -> dict[str, Any]:
    """Everything about one network."""
    calibration, compared = pixels[:CALIBRATION], pixels[CALIBRATION:]
    encoder = encoder_of(MODELS[name], calibration)
    exported = to_onnx(encoder, PREPROCESSING.input_size, {})
    expected = embed(encoder, torch.from_numpy(compared)).numpy()
    models = {precision: convert(exported, precision, calibration) for precision in Precision}
    with tempfile.TemporaryDirectory() as folder:
        for precision, model in models.items():
            (Path(folder) / precision).write_bytes(model)
        encoders = {precision: Encoder(Path(folder) / precision, device="cpu", threads=threads) for precision in models}
    return {
        "megabytes": {precision: len(model) / 1e6 for precision, model in models.items()},
        "agreement": agreement(encoders, expected, compared),
        "milliseconds": latencies(encoders, compared, runs),
        "load_average": os.getloadavg()[0],
    }


def print_table(results: dict[str, dict[str, Any]], runs: int) -> None:
    """One line a network and precision; speeds beside float32's in brackets."""
    batches = "".join(f"{f'batch {batch}, ms':>18}" for batch in LATENCY_BATCHES)
    print(f"{'':22}{'MB':>8}{'min cosine':>12}{'mean':>10}{batches}   medians of {runs}")
    for name, result in results.items():
        for precision in Precision:
            cosines = result["agreement"][precision].values()
            least, mean = (min(found[name] for found in cosines) for name in ("min_cosine", "mean_cosine"))
            cells = ""
            for found in result["milliseconds"].values():
                cells += f"{found[precision]:11.1f} ({found[Precision.FP32] / found[precision]:.2f})"
            print(f"{name:16} {precision:5}{result['megabytes'][precision]:8.1f}{least:12.6f}{mean:10.6f}{cells}")


def main() -> int:
    """Measure, print a table and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--images", type=Path, help="a folder of photographs; smoothed noise by default")
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--threads", type=int, default=processors())
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    pixels = read_images(arguments.images)
    results = {name: measure(name, pixels, arguments.runs, arguments.threads) for name in arguments.models}
    print_table(results, arguments.runs)
    found = results.get("resnet18", {"milliseconds": {}})["milliseconds"]
    ratios = {batch: times[Precision.FP32] / times[Precision.INT8] for batch, times in found.items()}
    vnni = "vnni" in Path("/proc/cpuinfo").read_text("utf-8") if sys.platform == "linux" else None
    if arguments.json:
        report = {
            "threads": arguments.threads,
            "runs": arguments.runs,
            "vnni": vnni,
            "images": "photographs" if arguments.images else "smoothed noise",
            "models": results,
            "resnet18_int8_speed": ratios,
            "versions": versions("onnxruntime-gpu", "onnxruntime", "onnx", "torch", "timm"),
        }
        write_text(arguments.json, json.dumps(report, indent=1) + "\n")
    return int(bool(vnni) and any(ratio < GOALS[batch] for batch, ratio in ratios.items()))


if __name__ == "__main__":
    sys.exit(main())
