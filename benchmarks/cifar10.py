"""CIFAR-10 on one GPU: how far SupCon and its cross-entropy twin come in eight minutes, and how fast.

    python -m benchmarks.cifar10 pack TREE --out packed
    python -m benchmarks.cifar10 run packed --recipe cifar10-r18 [--seed 0] [--seconds 480] [--set key=value …]
        [--probe-set key=value …]
    python -m benchmarks.cifar10 compare docs/results/cifar10-r18.json docs/results/cifar10-r18-ce.json

`pack` puts the images of TREE/train and TREE/test, one folder a class, into one Parquet file each. `run` trains in
turns of at most --seconds: where it exits with 3, the same command goes on; when training has ended it measures k-NN
(k = 20, T = 0.07, the training images as gallery) and linear top-1 (stage 2 with the paper's settings) on the test
images and writes docs/results/RECIPE.json. `compare` prints the difference of two such files on the same test images,
with its interval, and draws their courses.

Results on the JPEG copy of CIFAR-10 are not to the last tenth those on the original pixels. Not yet run on a GPU.
"""

import argparse
import base64
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch.nn import functional as F

from coterie.dataset import read_folder, read_images, read_pixels
from coterie.errors import TrainingStopped
from coterie.files import write_text
from coterie.machine import processors, versions
from training.monitor import features_of, knn_predictions
from training.pretrain import train
from training.probe import probe, probe_settings
from training.recipe import load_recipe
from training.run import Run

UNFINISHED = 3
LEVELS = (0.90, 0.93, 0.95)


def pack(tree: Path, out: Path) -> None:
    """Write out/train.parquet and out/test.parquet."""
    out.mkdir(parents=True, exist_ok=True)
    for part in ("train", "test"):
        images = read_folder(tree / part)
        table = pa.table(
            {
                "image": pa.array([images.read(row) for row in range(len(images))], pa.binary()),
                "label": [images.classes[label] for label in images.labels],
            }
        )
        pq.write_table(table, out / f"{part}.parquet", compression="zstd", compression_level=9)
        print(f"{part}: {len(images):,} images, {(out / f'{part}.parquet').stat().st_size:,} bytes")


def run(packed: Path, arguments: argparse.Namespace) -> None:
    """Train, or go on, and measure at the end."""
    recipe = load_recipe(arguments.recipe, [*arguments.settings, f"seed={arguments.seed}"])
    path = arguments.runs / f"{recipe.name}-{arguments.seed}"
    if not (path / "encoder.safetensors").exists():
        try:
            train(packed / "train.parquet", recipe, path, resume=True, time_limit=arguments.seconds)
        except TrainingStopped as stopped:
            print(stopped)
            sys.exit(UNFINISHED)
    finished = Run.open(path)
    rows = finished.metrics()
    right, knn_seconds = knn_on_test(finished, packed)
    settings = probe_settings(finished, arguments.probe_settings)
    linear = probe(finished, packed / "train.parquet", settings, test=packed / "test.parquet")
    on_gpu = torch.cuda.is_available()
    rates = [row["images_per_second"] * recipe.batch.views for row in rows[1:] or rows]  # the first compiles
    result = {
        "recipe": recipe.model_dump(mode="json"),
        "knn_top1": float(right.mean()),
        "linear_top1": linear.top1,
        "views_per_second": float(np.median(rates)),
        "seconds": sum(row["seconds"] for row in rows),
        "seconds_to": {f"{level:.0%}": seconds_to(rows, level) for level in LEVELS},
        "evaluation_seconds": {"knn": knn_seconds, "linear": linear.seconds},
        "seed": arguments.seed,
        "device": torch.cuda.get_device_name() if on_gpu else f"{processors()} CPU cores",
        "versions": versions("torch", "torchvision", "timm", "numpy") | {"cuda": torch.version.cuda},
        "commit": arguments.commit,
        "data": finished.dataset().fingerprint,
        "metrics": rows,
        "knn_right": base64.b64encode(np.packbits(right).tobytes()).decode(),
        "test_images": len(right),
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    suffix = f"-seed{arguments.seed}" if arguments.seed else ""
    target = arguments.out / f"{recipe.name}{suffix}.json"
    write_text(target, json.dumps(result, indent=1) + "\n")
    shown = ("knn_top1", "linear_top1", "views_per_second", "seconds", "seconds_to")
    print(f"{target}: " + ", ".join(f"{name} {result[name]}" for name in shown))


def knn_on_test(finished: Run, packed: Path) -> tuple[np.ndarray, float]:
    """Which test images the gallery's neighbours name rightly, bool (n,), and the seconds it took."""
    started = time.perf_counter()
    encoder, spec = finished.load_encoder()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder.to(device)
    gallery, queries = (
        read_pixels(read_images(packed / f"{part}.parquet"), spec.preprocessing) for part in ("train", "test")
    )
    if gallery.classes != queries.classes:
        raise SystemExit(f"{packed} holds other classes in train.parquet than in test.parquet")
    embeddings = [F.normalize(features_of(encoder, torch.from_numpy(i.pixels).to(device))) for i in (gallery, queries)]
    labels = torch.from_numpy(gallery.labels).to(device)
    predicted = knn_predictions(embeddings[0], labels, embeddings[1]).cpu().numpy()
    return predicted == queries.labels, time.perf_counter() - started


def seconds_to(rows: list[dict[str, float]], level: float) -> float | None:
    """Seconds of training until k-NN top-1 on the held-out images first reached `level`."""
    spent = 0.0
    for row in rows:
        spent += row["seconds"]
        if row.get("knn_top1", 0.0) >= level:
            return spent
    return None


def compare(first: Path, second: Path, picture: Path | None) -> None:
    """The first's k-NN accuracy less the second's, with a 95 % interval from 10,000 paired bootstrap draws."""
    results = [json.loads(path.read_text("utf-8")) for path in (first, second)]
    right = [_right(result) for result in results]
    if results[0]["data"] != results[1]["data"] or len(right[0]) != len(right[1]):
        raise SystemExit(f"{first} and {second} are of other images")
    difference = right[0].astype(float) - right[1]
    rng = np.random.default_rng(0)
    draws = [rng.choice(difference, len(difference)).mean() for _ in range(10_000)]
    low, high = np.quantile(draws, [0.025, 0.975])
    names = [result["recipe"]["name"] for result in results]
    for name, result in zip(names, results, strict=True):
        print(f"{name:20} k-NN {result['knn_top1']:.4f}  linear {result['linear_top1']:.4f}  {result['seconds']:.0f} s")
    print(f"{names[0]} less {names[1]}: {difference.mean():+.4f}, 95 % interval {low:+.4f} to {high:+.4f}")
    if picture is not None:
        _draw(dict(zip(names, results, strict=True)), picture)


def _right(result: dict[str, Any]) -> np.ndarray:
    packed = np.frombuffer(base64.b64decode(result["knn_right"]), dtype=np.uint8)
    return np.unpackbits(packed, count=result["test_images"]).astype(bool)


def _draw(results: dict[str, dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, result in results.items():
        measured = [row for row in result["metrics"] if "knn_top1" in row]
        spent = np.cumsum([row["seconds"] for row in result["metrics"]])
        seconds = [spent[int(row["epoch"])] for row in measured]
        axes.plot(seconds, [row["knn_top1"] for row in measured], label=name)
    axes.set(xlabel="seconds of training", ylabel="k-NN top-1 on held-out images", title="CIFAR-10 (JPEG)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    """One of pack, run and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack")
    packing.add_argument("tree", type=Path)
    packing.add_argument("--out", type=Path, default=Path("packed"))
    running = commands.add_parser("run")
    running.add_argument("packed", type=Path)
    running.add_argument("--recipe", default="cifar10-r18")
    running.add_argument("--set", action="append", default=[], dest="settings")
    running.add_argument("--probe-set", action="append", default=[], dest="probe_settings")
    running.add_argument("--seed", type=int, default=0)
    running.add_argument("--seconds", type=float, default=480.0)
    running.add_argument("--runs", type=Path, default=Path("runs"))
    running.add_argument("--out", type=Path, default=Path("docs/results"))
    running.add_argument("--commit", default=None)
    comparing = commands.add_parser("compare")
    comparing.add_argument("results", type=Path, nargs=2)
    comparing.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "pack":
        pack(arguments.tree, arguments.out)
    elif arguments.command == "run":
        arguments.commit = arguments.commit or _commit()
        torch.set_num_threads(processors())
        run(arguments.packed, arguments)
    else:
        compare(*arguments.results, arguments.picture)


def _commit() -> str:
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    except FileNotFoundError:  # a bare machine has no git
        return "unknown"
    return found.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
