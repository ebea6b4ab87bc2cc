"""How long it is from `coterie serve` to a service that is ready, and what the time goes into.

    python -m benchmarks.cold_start [--runs 5] [--json FILE]

A light encoder (ResNet-8 at 16 pixels) with a gallery of 20,000 items, and ResNet-50 at 224 pixels; weights and gallery
are random. The clock runs from the command to the first 200 of /readyz, with bytecode compiled and files in the page
cache. `parent` is the share of that before the worker process begins: the command's own check and BentoML's start. The
worker's phases are measured in a process that does as it does. Exits with 1 where a goal is missed.
"""

import argparse
import http.client
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import psutil
from PIL import Image

from benchmarks.embed import make_bundle
from coterie.bundle import Bundle, write_bundle
from coterie.calibration import calibrate
from coterie.clusters import ClassClusters
from coterie.files import write_text
from coterie.gallery import GalleryItems, Snapshot
from coterie.machine import processors, versions

ITEMS, CLASSES, HELD_OUT = 20_000, 100, 20
# Encoder, side of its images, whether with the large gallery, seconds that it may take.
CASES = (("cifar_resnet8", 16, True, 5.0), ("resnet50", 224, False, 15.0))

WORKER = """
import json, sys, time
from pathlib import Path
began, phases = time.perf_counter(), {}
def phase(name):
    global began
    phases[name] = time.perf_counter() - began
    began = time.perf_counter()
import _bentoml_impl.worker.service
import serving.service
phase("imports")
from coterie.bundle import Bundle
from serving.engine import MAX_BATCH, Engine
bundle = Bundle.open(Path(sys.argv[1]), device="cpu")
phase("bundle")
encoder = bundle.encoder
phase("encoder")
gallery = bundle.gallery(Path(sys.argv[2]))
phase("gallery")
encoder.warm_up(MAX_BATCH)
phase("warm_up")
gallery.close()
print(json.dumps(phases))
"""


def random_images(folder: Path) -> Path:
    generator = np.random.default_rng(0)
    for label in range(10):
        (folder / str(label)).mkdir(parents=True)
        for number in range(8):
            pixels = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / str(label) / f"{number}.png")
    return folder


def with_gallery(bundle: Bundle, path: Path) -> Bundle:
    """The bundle with a gallery of `ITEMS` random embeddings in its stead."""
    generator = np.random.default_rng(0)
    labels = np.asarray([f"class {row % CLASSES}" for row in range(ITEMS)])
    centres = generator.normal(size=(CLASSES, bundle.manifest.encoder.embedding_dim))

    def around(rows: int) -> np.ndarray:
        found = centres[np.arange(rows) % CLASSES] + 0.5 * generator.normal(size=(rows, centres.shape[1]))
        return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)

    embeddings, held_out = around(ITEMS), (around(HELD_OUT * CLASSES), labels[: HELD_OUT * CLASSES])
    items = GalleryItems(
        ids=tuple(f"{row:032x}" for row in range(ITEMS)),
        labels=labels,
        embeddings=embeddings,
        positions=embeddings[:, :2].copy(),
        thumbnails=tuple(generator.bytes(1500) for _ in range(ITEMS)),
        metadata=tuple({"row": row} for row in range(ITEMS)),
    )
    snapshot = Snapshot(items, ClassClusters.fit(embeddings, labels, held_out))
    changes = {
        "classes": snapshot.clusters.labels,
        "gallery_size": ITEMS,
        "calibration": calibrate(snapshot, *held_out),
    }
    manifest = bundle.manifest.model_copy(update=changes)
    model = (bundle.path / "model.onnx").read_bytes()
    return write_bundle(path, model=model, snapshot=snapshot, card="# Large\n", manifest=manifest)


def start(bundle: Bundle, state: Path, log: Path) -> tuple[float, float]:
    """Seconds until the service is ready, and until its worker began."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "coterie_cli", "serve", str(bundle.path), "--port", str(port)]
    command += ["--state", str(state), "--device", "cpu"]
    began = time.perf_counter()
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        while not ready(port):
            if process.poll() is not None or time.perf_counter() - began > 120:
                raise SystemExit(f"the service did not start: {log.read_text()}")
            time.sleep(0.01)
        took = time.perf_counter() - began
        parent = psutil.Process(process.pid)
        return took, max(child.create_time() for child in parent.children()) - parent.create_time()
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def ready(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def phases(bundle: Bundle, state: Path) -> dict[str, float]:
    """Seconds of each thing that a worker does."""
    environment = {**os.environ, "COTERIE_BUNDLE": str(bundle.path), "COTERIE_STATE": str(state)}
    command = [sys.executable, "-c", WORKER, str(bundle.path), str(state)]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results, missed = {}, False
    with TemporaryDirectory() as name:
        folder = Path(name)
        images = random_images(folder / "images")
        os.environ["BENTOML_HOME"] = str(folder / "bentoml")
        for network, side, large, goal in CASES:
            bundle = make_bundle(network, side, images, folder / network)
            if large:
                bundle = with_gallery(bundle, folder / f"{network}-large")
            log, state = folder / "log", folder / "state"
            start(bundle, state, log)
            taken = [start(bundle, state, log) for _ in range(arguments.runs)]
            worker = [phases(bundle, state) for _ in range(arguments.runs)]
            ready_after = statistics.median(seconds for seconds, _ in taken)
            parts = {"parent": statistics.median(seconds for _, seconds in taken)}
            parts |= {name: statistics.median(run[name] for run in worker) for name in worker[0]}
            missed |= ready_after > goal
            results[f"{network} at {side}, {bundle.manifest.gallery_size:,} items"] = {
                "seconds": ready_after,
                "runs": [seconds for seconds, _ in taken],
                "goal": goal,
                "phases": parts,
            }
    for case, found in results.items():
        said = ", ".join(f"{part} {seconds:.2f}" for part, seconds in found["phases"].items())
        print(f"{case}: ready after {found['seconds']:.2f} s (goal {found['goal']:g}); {said}")
    if arguments.json:
        facts = {
            "processors": processors(),
            "versions": versions("bentoml", "onnxruntime-gpu", "faiss-cpu", "scikit-learn", "numpy"),
            "runs": arguments.runs,
            "results": results,
        }
        write_text(arguments.json, json.dumps(facts, indent=1) + "\n")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
