"""`coterie embed` against the limit of the machine: how many images a second, and how much memory.

    python -m benchmarks.embed FOLDER [--encoder resnet18] [--images 10000] [--runs 3] [--goal 0.9] [--json FILE]

The limit is processors ÷ (core-seconds of decoding + core-seconds of the encoder at its best batch) for an image, both
on one thread and measured in the same session. The command runs as a user would start it, its imports included. So
that other work on the machine is seen for what it is, two factors stand beside the share of the limit that was
reached: the share of the processors that it got, and the share of that which went into decoding and encoding. Memory
is that of all its processes, sampled ten times a second, at n and 2n images. The encoder's weights are random; FOLDER
holds one folder of images per class. Exits with 1 where the goal is missed.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import psutil

from coterie.bundle import FORMAT, Bundle, EncoderCard, Manifest, write_bundle
from coterie.calibration import calibrate
from coterie.clusters import ClassClusters
from coterie.dataset import read_images, read_pixels
from coterie.encoder import Encoder
from coterie.files import write_text
from coterie.gallery import GalleryItems, Snapshot
from coterie.images import Preprocessing, load_pixels
from coterie.machine import processors, versions

BATCHES = (1, 4, 16, 32, 64)
SAMPLE_SECONDS = 3.0


def make_bundle(name: str, side: int, data: Path, path: Path) -> Bundle:
    """A bundle of the encoder `name` with random weights; its gallery is a part of `data`."""
    import torch

    from export.onnx import to_onnx
    from training.encoders import EncoderSpec, build_encoder

    torch.manual_seed(0)
    preprocessing = Preprocessing(input_size=(side, side))
    normal = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
    encoder = build_encoder(EncoderSpec(name=name, width=16, preprocessing=preprocessing, **normal))
    model = to_onnx(encoder, preprocessing.input_size, {})
    path.with_suffix(".onnx").write_bytes(model)
    images = read_images(data)
    some = np.concatenate([np.flatnonzero(images.labels == label)[:8] for label in range(len(images.classes))])
    part = replace(images, paths=tuple(images.paths[row] for row in some), labels=images.labels[some])
    sample = read_pixels(part, preprocessing)
    embeddings = Encoder(path.with_suffix(".onnx"), device="cpu").embed(sample.pixels)
    first = np.arange(len(sample)) % 2 == 0
    items = GalleryItems(
        ids=tuple(np.asarray(sample.hashes)[first]),
        labels=sample.names[first],
        embeddings=embeddings[first],
        positions=embeddings[first, :2].copy(),
        thumbnails=(b"",) * int(first.sum()),
        metadata=({},) * int(first.sum()),
    )
    held_out = embeddings[~first], sample.names[~first]
    snapshot = Snapshot(items, ClassClusters.fit(items.embeddings, items.labels, held_out))
    manifest = Manifest(
        format=FORMAT,
        name=name,
        encoder=EncoderCard(**preprocessing.model_dump(), **normal, embedding_dim=encoder.dim),
        classes=snapshot.clusters.labels,
        gallery_size=len(items),
        calibration=calibrate(snapshot, *held_out),
        accuracy={},
        provenance={},
        files={},
    )
    return write_bundle(path, model=model, snapshot=snapshot, card=f"# {name}\n", manifest=manifest)


def decoding_seconds(files: list[Path], preprocessing: Preprocessing) -> float:
    """Core-seconds of reading and decoding an image."""
    began, count = time.thread_time(), 0
    for file in files:
        load_pixels(file, preprocessing)
        count += 1
        if time.thread_time() - began > SAMPLE_SECONDS:
            break
    return (time.thread_time() - began) / count


def encoding_seconds(encoder: Encoder) -> dict[int, float]:
    """Core-seconds of encoding an image, by batch."""
    pixels = np.random.default_rng(0).integers(0, 256, (BATCHES[-1], *encoder.input_size, 3), dtype=np.uint8)
    seconds = {}
    for batch in BATCHES:
        encoder.embed(pixels[:batch])
        began, count = time.thread_time(), 0
        while time.thread_time() - began < SAMPLE_SECONDS / len(BATCHES):
            encoder.embed(pixels[:batch])
            count += batch
        seconds[batch] = (time.thread_time() - began) / count
    return seconds


def run(bundle: Bundle, table: Path) -> tuple[float, float, float]:
    """Wall seconds, core-seconds and most MB of all processes of the command together."""
    out = table.with_suffix(".embeddings.parquet")
    command = [sys.executable, "-m", "coterie_cli", "embed", bundle.path, table, "--out", out, "--overwrite"]
    before, began, most = os.times(), time.perf_counter(), 0
    process = psutil.Popen([*map(str, command), "--device", "cpu"], stdout=subprocess.DEVNULL)
    decoders: dict[int, float] = {}  # core-seconds of the processes that it started, which it does not wait for
    while process.poll() is None:
        most = max(most, resident_bytes(process, decoders))
        time.sleep(0.1)
    wall, after = time.perf_counter() - began, os.times()
    if process.returncode:
        raise SystemExit("coterie embed failed")
    core = after.children_user + after.children_system - before.children_user - before.children_system
    return wall, core + sum(decoders.values()), most / 2**20


def resident_bytes(process: psutil.Popen, seconds: dict[int, float]) -> int:
    """Memory of a process and those that it started, what they share counted for each; 0 if it has just ended.

    Notes the core-seconds of those that it started in `seconds`.
    """
    try:
        children = process.children(recursive=True)
        for child in children:
            seconds[child.pid] = sum(child.cpu_times()[:2])
        return sum(one.memory_info().rss for one in (process, *children))
    except psutil.NoSuchProcess:
        return 0


def list_images(files: list[Path], count: int, table: Path) -> Path:
    """A CSV file that names `count` images, over and over if there are fewer."""
    lines = (str(files[row % len(files)].resolve()) for row in range(count))
    write_text(table, "path\n" + "\n".join(lines) + "\n")
    return table


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, object]:
    """Everything, in turns: limit, command, limit, command …"""
    bundle = make_bundle(arguments.encoder, arguments.side, arguments.folder, folder / "bundle")
    encoder = Encoder(bundle.path / "model.onnx", device="cpu", threads=1)
    images = read_images(arguments.folder)
    files = [images.root / path for path in images.paths]
    rng = np.random.default_rng(0)
    rng.shuffle(files)
    once = list_images(files, arguments.images, folder / "once.csv")
    twice = list_images(files, 2 * arguments.images, folder / "twice.csv")
    preprocessing = bundle.manifest.encoder.preprocessing
    decoding, encoding, walls, cores, memories = [], [], [], [], []
    for _ in range(arguments.runs):
        decoding.append(decoding_seconds(files, preprocessing))
        encoding.append(encoding_seconds(encoder))
        wall, core, memory = run(bundle, once)
        walls.append(wall)
        cores.append(core)
        memories.append(memory)
    by_batch = {batch: statistics.median(seconds[batch] for seconds in encoding) for batch in BATCHES}
    best = min(by_batch, key=by_batch.__getitem__)
    needed = statistics.median(decoding) + by_batch[best]
    wall, core = statistics.median(walls), statistics.median(cores)
    limit = processors() / needed
    return {
        "encoder": arguments.encoder,
        "images": arguments.images,
        "processors": processors(),
        "load_average": os.getloadavg(),
        "decoding_core_seconds": statistics.median(decoding),
        "encoding_core_seconds": by_batch,
        "best_batch": best,
        "images_per_second": arguments.images / wall,
        "limit_images_per_second": limit,
        "share_of_limit": arguments.images / wall / limit,
        "share_of_processors": core / wall / processors(),
        "share_of_work": needed * arguments.images / core,
        "seconds": walls,
        "megabytes": statistics.median(memories),
        "megabytes_at_twice": run(bundle, twice)[2],
        "versions": versions("numpy", "pillow", "onnxruntime-gpu"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--encoder", default="resnet18")
    parser.add_argument("--side", type=int, default=32)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--goal", type=float, default=0.9)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with TemporaryDirectory() as folder:
        result = measure(arguments, Path(folder))
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.json:
        write_text(arguments.json, text + "\n")
    sys.exit(0 if result["share_of_limit"] >= arguments.goal else 1)


if __name__ == "__main__":
    main()
