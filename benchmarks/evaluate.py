"""Offline evaluation by size: what `evaluate` computes after embedding, and its memory.

    python -m benchmarks.evaluate [--gallery 50000] [--queries 10000] [--dim 128] [--classes 10] [--runs 3]
        [--spread 3] [--unknown 1000] [--json FILE]

Embeddings are drawn around class centres, so that a few queries are wrong; calibration is as exports fit it. Timed is
the whole of `evaluation.evaluate.evaluate` on a bundle whose encoder is never asked for more than the single images of
the latency: k-NN over all k, clusters, linear probe, Recall@k, R-precision and MAP@R over the whole gallery,
silhouette, calibration, risk and coverage, leaks, unknown images, five random splits of classes taken from the gallery,
and 1,000 bootstrap draws of everything. The goal: 20 s and 2 GB on two cores; exits with 1 where it is missed.
With a spread of 0.1 all items of a class are so similar that each query's picture is compared with three of them.
"""

import argparse
import json
import multiprocessing
import resource
import statistics
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from coterie.bundle import FORMAT, Bundle, EncoderCard, Manifest, write_bundle
from coterie.calibration import calibrate
from coterie.classifier import Calibration
from coterie.clusters import ClassClusters
from coterie.dataset import LabelledPixels
from coterie.gallery import GalleryItems, Snapshot
from coterie.images import thumbnail
from coterie.machine import processors, versions
from evaluation.evaluate import evaluate
from evaluation.queries import Queries
from evaluation.unknown import random_splits

SIDE = 8
MOST_SECONDS, MOST_GB = 20.0, 2.0


def clouds(count: int, arguments: argparse.Namespace, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors float32 (count, dim) around class centres, and their classes."""
    rng, dim, classes = np.random.default_rng(seed), arguments.dim, arguments.classes
    centres = np.random.default_rng(0).normal(size=(classes, dim)) / np.sqrt(dim)
    labels = rng.integers(classes, size=count)
    vectors = centres[labels] + rng.normal(size=(count, dim)) * arguments.spread / np.sqrt(dim)
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32), labels


def pictures(count: int, seed: int) -> tuple[bytes, ...]:
    """Thumbnails of some hundred different images, over and over."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (256, 8, 8, 3), dtype=np.uint8)
    made = [thumbnail(Image.fromarray(image).resize((64, 64), Image.Resampling.BICUBIC)) for image in coarse]
    return tuple(made[row % len(made)] for row in range(count))


def once(arguments: argparse.Namespace) -> dict[str, Any]:
    """Build a bundle and queries, and evaluate; seconds, peak memory and some of the numbers."""
    width = len(str(arguments.classes - 1))
    names = np.asarray([f"{number:0{width}}" for number in range(arguments.classes)])
    gallery, own = clouds(arguments.gallery, arguments, 1)
    held, held_own = clouds(2000, arguments, 3)
    items = GalleryItems(
        ids=tuple(f"{row:024x}" for row in range(len(gallery))),
        labels=names[own],
        embeddings=gallery,
        positions=gallery[:, :2].copy(),
        thumbnails=pictures(len(gallery), 1),
        metadata=({},) * len(gallery),
    )
    snapshot = Snapshot(items, ClassClusters.fit(gallery, items.labels, (held, names[held_own])))
    embeddings, labels = clouds(arguments.queries, arguments, 2)
    queries = Queries(_images(labels, names), embeddings, 1.0)
    strangers = np.random.default_rng(4).normal(size=(arguments.unknown, arguments.dim)).astype(np.float32)
    strangers /= np.linalg.norm(strangers, axis=1, keepdims=True)
    unknown = Queries(_images(np.zeros(len(strangers), np.int64), names), strangers, 1.0)
    splits = random_splits(names.tolist(), 0)
    with TemporaryDirectory() as folder:
        bundle = _bundle(Path(folder), snapshot, calibrate(snapshot, held, names[held_own]), arguments.dim)
        before = _peak()
        began = time.perf_counter()
        found = evaluate(bundle, queries, unknown, held_out=splits)
        seconds = time.perf_counter() - began
    shown = ("top1", "knn_top1", "probe_top1", "map_at_r", "ece", "silhouette", "held_out_auroc")
    return {
        "seconds": seconds,
        "peak_gb": _peak(),
        "peak_gb_before": before,
        **{name: getattr(found, name) for name in shown},
    }


def _images(labels: np.ndarray, names: np.ndarray) -> LabelledPixels:
    """Whose pixels do not matter: their embeddings are there already."""
    return LabelledPixels(
        pixels=np.zeros((len(labels), SIDE, SIDE, 3), dtype=np.uint8),
        labels=labels,
        classes=tuple(names.tolist()),
        paths=tuple(Path(f"{row}.png") for row in range(len(labels))),
        hashes=tuple(f"f{row:063x}" for row in range(len(labels))),
        rows=np.arange(len(labels)),
        thumbnails=pictures(len(labels), 2),
    )


def _bundle(folder: Path, snapshot: Snapshot, calibration: Calibration, dim: int) -> Bundle:
    """A bundle whose encoder is a random projection: its answers do not matter."""
    weights = np.random.default_rng(0).normal(size=(SIDE * SIDE * 3, dim)).astype(np.float32)
    constants = {"flat": np.asarray([-1, SIDE * SIDE * 3]), "weights": weights, "bias": np.ones(dim, np.float32)}
    nodes = [
        helper.make_node("Cast", ["images"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Reshape", ["float", "flat"], ["rows"]),
        helper.make_node("Gemm", ["rows", "weights", "bias"], ["projected"]),
        helper.make_node("LpNormalization", ["projected"], ["embedding"], axis=1),
    ]
    graph = helper.make_graph(
        nodes,
        "random",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["n", SIDE, SIDE, 3])],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["n", dim])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    manifest = Manifest(
        format=FORMAT,
        name="clouds",
        encoder=EncoderCard(input_size=(SIDE, SIDE), mean=(0, 0, 0), std=(1, 1, 1), embedding_dim=dim),
        classes=snapshot.clusters.labels,
        gallery_size=len(snapshot.items),
        calibration=calibration,
        accuracy={},
        provenance={},
        files={},
    )
    return write_bundle(
        folder / "bundle", model=model.SerializeToString(), snapshot=snapshot, card="# Clouds\n", manifest=manifest
    )


def _peak() -> float:
    """Of this process, in GB; the kernel counts in kB, macOS in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)


def main() -> None:
    """Evaluate in a fresh process each time, and print medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gallery", type=int, default=50_000)
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--spread", type=float, default=3.0, help="of a class, in distances from the origin")
    parser.add_argument("--unknown", type=int, default=1000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    runs = []
    for _ in range(arguments.runs):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            runs.append(pool.apply(once, (arguments,)))
        print("  ".join(f"{name} {value:.4g}" for name, value in runs[-1].items()), flush=True)
    seconds, peak = (statistics.median(run[name] for run in runs) for name in ("seconds", "peak_gb"))
    print(f"{arguments.queries:,} queries × {arguments.gallery:,} × {arguments.dim}: {seconds:.1f} s, {peak:.2f} GB")
    if arguments.json:
        result = {
            "gallery": arguments.gallery,
            "queries": arguments.queries,
            "dim": arguments.dim,
            "classes": arguments.classes,
            "spread": arguments.spread,
            "unknown": arguments.unknown,
            "seconds": seconds,
            "peak_gb": peak,
            "runs": runs,
            "device": f"{processors()} CPU cores",
            "versions": versions("numpy", "scipy", "scikit-learn", "faiss-cpu"),
        }
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    if seconds > MOST_SECONDS or peak > MOST_GB:
        sys.exit(f"the goal is {MOST_SECONDS:g} s and {MOST_GB:g} GB")


if __name__ == "__main__":
    main()
