"""What it costs to enrol, to search meanwhile, and to start again, with 50,000 enrolled items.

    OMP_NUM_THREADS=1 python -m benchmarks.gallery [--items 50000] [--rounds 5] [--seconds 2] [--json FILE]

Durable adds come one by one, each followed by a search that must find it: the time until the add returns, and that of
the search, which has to learn of the change first. Then one thread searches while another process adds without pause,
in turns with rest; last, while a new foundation is laid in the background, again and again. A rounds' first searches
are timed like all others. Items are 128 wide, in 100 classes of a simulated encoder, with thumbnails of 2 kB and, where
it says so, images of 20 kB. `sync` is what the disk itself takes for 8 kB, without which no add can be durable.
Exits with 1 where a goal is missed: an add at most 2 ms at the median, a restart 2 s, the 99th percentile of searches
1.5 times that at rest while others add, and 4 times while a foundation is laid.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coterie.calibration import calibrate
from coterie.classifier import Calibration, classify
from coterie.clusters import ClassClusters
from coterie.files import write_text
from coterie.gallery import Gallery
from coterie.items import GalleryItems, item_id
from coterie.machine import processors, versions
from coterie.snapshot import Snapshot
from coterie.store import Store, StoredItem, StoreOptions

DIM, CLASSES, BUNDLED, K = 128, 100, 2000, 10
GOALS = {"add_ms": 2.0, "restart_s": 2.0, "while_adding": 1.5, "while_settling": 4.0}
OPTIONS = StoreOptions(class_quota=10**6)


class Source:
    """Draws labelled embeddings around the centres of 100 classes."""

    def __init__(self, seed: int) -> None:
        centres = np.random.default_rng(0).normal(size=(CLASSES, DIM))
        self._centres = centres / np.linalg.norm(centres, axis=1, keepdims=True)
        self._rng = np.random.default_rng(seed)

    def draw(self, count: int) -> tuple[NDArray[np.float32], NDArray[np.str_]]:
        classes = self._rng.integers(0, CLASSES, count)
        points = self._centres[classes] + self._rng.normal(size=(count, DIM)) * 0.6 / np.sqrt(DIM)
        points /= np.linalg.norm(points, axis=1, keepdims=True)
        return points.astype(np.float32), np.char.add("class ", classes.astype(np.str_))

    def items(self, count: int, *, image_bytes: int = 0) -> list[StoredItem]:
        items = []
        for embedding, label in zip(*self.draw(count), strict=True):
            image = self._rng.bytes(image_bytes or 16)
            original = image if image_bytes else None
            picture = self._rng.bytes(2000)
            items.append(StoredItem(item_id(image), str(label), embedding, {"path": "a/b.jpg"}, picture, original))
        return items


def base() -> Snapshot:
    embeddings, labels = Source(1).draw(BUNDLED)
    names = tuple(f"bundled {row}" for row in range(BUNDLED))
    positions = np.zeros((BUNDLED, 2), dtype=np.float32)
    items = GalleryItems(names, labels, embeddings, positions, (b"",) * BUNDLED, ({},) * BUNDLED)
    return Snapshot(items, ClassClusters.fit(embeddings, labels))


@cache
def calibration() -> Calibration:
    return calibrate(base(), *Source(6).draw(1000))


def opened(path: Path) -> Gallery:
    return Gallery(base(), Store(path, encoder="benchmark", options=OPTIONS))


def milliseconds(seconds: list[float]) -> dict[str, float]:
    return {
        "n": len(seconds),
        "p50_ms": round(1e3 * float(np.percentile(seconds, 50)), 3),
        "p99_ms": round(1e3 * float(np.percentile(seconds, 99)), 3),
        "max_ms": round(1e3 * max(seconds), 3),
    }


def timed(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def fill(path: Path, count: int) -> float:
    """Seconds to enrol `count` items in batches of 500."""
    with opened(path) as gallery:
        batches = [Source(2).items(count)[start : start + 500] for start in range(0, count, 500)]
        return timed(lambda: [gallery.add(batch) for batch in batches])


def sync_seconds(folder: Path, rounds: int = 200) -> list[float]:
    """Of writing and syncing 8 kB over what is there."""
    with (folder / "sync").open("w+b", buffering=0) as file:
        file.write(bytes(8192 * rounds))
        os.fsync(file.fileno())
        block, seconds = os.urandom(8192), []
        for number in range(rounds):

            def write(place: int = 8192 * number) -> None:
                os.pwrite(file.fileno(), block, place)
                os.fdatasync(file.fileno())

            seconds.append(timed(write))
    return seconds


def adds(gallery: Gallery, items: list[StoredItem]) -> dict[str, Any]:
    """Each item added, found, and one of the bundle classified."""
    adding, finding, classifying = [], [], []
    for item in items:
        adding.append(timed(lambda item=item: gallery.add([item])))
        began = time.perf_counter()
        (answer,) = gallery.search(item.embedding[None], K)
        finding.append(time.perf_counter() - began)
        if item.id not in {near.id for near in answer}:
            raise SystemExit("an item that was added is not found")
        snapshot = gallery.snapshot()
        classifying.append(timed(lambda item=item, now=snapshot: classify(item.embedding[None], now, calibration())))
    return {
        "add": milliseconds(adding),
        "first_search_after": milliseconds(finding),
        "first_classify_after": milliseconds(classifying),
    }


def adds_by_threads(gallery: Gallery, threads: int, each: int) -> float:
    """Items a second, with as many threads adding one by one."""
    work = [Source(100 + thread).items(each) for thread in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        seconds = timed(lambda: list(pool.map(lambda items: [gallery.add([item]) for item in items], work)))
    return threads * each / seconds


@contextmanager
def another_process_adding(path: Path, seed: int) -> Iterator[None]:
    """Runs `add_for_ever` in a process of its own while the block does."""
    command = [sys.executable, "-m", "benchmarks.gallery", "--add-for-ever", str(path), "--seed", str(seed)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    try:
        process.stdout.readline()
        yield
        if process.poll() is not None:
            raise SystemExit("the process that adds has failed")
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def add_for_ever(path: Path, seed: int) -> None:
    store, source = Store(path, encoder="benchmark", options=OPTIONS), Source(seed)
    items = source.items(20_000)
    print("ready", flush=True)
    for item in items:
        store.add([item])


def searches(ask: Callable[[NDArray[np.float32]], Any], stop: Callable[[], bool]) -> tuple[list[float], list[float]]:
    """When each search began, and the seconds that it took."""
    queries, _ = Source(3).draw(512)
    began, seconds = [], []
    while not stop():
        query = queries[len(began) % 512][None]
        began.append(time.perf_counter())
        ask(query)
        seconds.append(time.perf_counter() - began[-1])
    return began, seconds


def after(seconds: float) -> Callable[[], bool]:
    end = time.perf_counter() + seconds
    return lambda: time.perf_counter() > end


def while_adding(path: Path, gallery: Gallery, rounds: int, seconds: float, seed: int) -> dict[str, Any]:
    """Searches and classifications at rest and while another process adds, in turns."""
    asks: dict[str, Callable[[NDArray[np.float32]], Any]] = {
        "search": lambda query: gallery.search(query, K),
        "classify": lambda query: classify(query, gallery.snapshot(), calibration()),
    }
    found: dict[str, Any] = {}
    for number, (name, ask) in enumerate(asks.items()):
        rest, busy, before = list[float](), list[float](), len(gallery.snapshot().items)
        for turn in range(rounds):
            rest += searches(ask, after(seconds))[1]
            with another_process_adding(path, seed + 100 * number + turn):
                busy += searches(ask, after(seconds))[1]
        added = len(gallery.snapshot().items) - before
        found[name] = {
            "rest": milliseconds(rest),
            "adding": milliseconds(busy),
            "p99_ratio": round(float(np.percentile(busy, 99) / np.percentile(rest, 99)), 2),
            "adds_per_second": round(added / rounds / seconds),
        }
    return found


def while_settling(gallery: Gallery, windows: int) -> dict[str, Any]:
    """Searches that were under way while a new foundation was laid."""
    spans: list[tuple[float, float]] = []
    done = threading.Event()

    def settle() -> None:
        for _ in range(windows):
            time.sleep(0.1)
            began = time.perf_counter()
            gallery._settle(gallery.snapshot())  # type: ignore[arg-type]
            spans.append((began, time.perf_counter()))
        done.set()

    thread = threading.Thread(target=settle)
    thread.start()
    began, seconds = searches(lambda query: gallery.search(query, K), done.is_set)
    thread.join()
    during, rest = [], []
    for start, took in zip(began, seconds, strict=True):
        touches = any(start < end and start + took > first for first, end in spans)
        (during if touches else rest).append(took)
    return {
        "windows": windows,
        "window_ms": round(1e3 * statistics.median(end - first for first, end in spans), 1),
        "rest": milliseconds(rest),
        "settling": milliseconds(during),
        "p99_ratio": round(float(np.percentile(during, 99) / np.percentile(rest, 99)), 2),
    }


def restarts(path: Path, rounds: int = 3) -> list[float]:
    """Seconds from nothing but the bundle's own items to the first answer."""
    own, query, seconds = base(), Source(3).draw(1)[0], []
    for _ in range(rounds):
        began = time.perf_counter()
        with Gallery(own, Store(path, encoder="benchmark", options=OPTIONS)) as gallery:
            classify(query, gallery.snapshot(), calibration())
            seconds.append(time.perf_counter() - began)
    return seconds


def measure(path: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    filled = fill(path, arguments.items)
    result: dict[str, Any] = {
        "machine": f"{platform.machine()}, {processors()} processors, load average {os.getloadavg()[0]:.1f}",
        "versions": versions("numpy", "faiss-cpu"),
        "items": arguments.items,
        "bulk_add_per_second": round(arguments.items / filled),
        "sync": milliseconds(sync_seconds(path.parent)),
        "restart_s": round(statistics.median(restarts(path)), 3),
    }
    with opened(path) as gallery:
        result["one_by_one"] = adds(gallery, Source(4).items(300))
        result["one_by_one_with_images"] = adds(gallery, Source(5).items(300, image_bytes=20_000))
        result["adds_per_second_by_threads"] = {
            str(threads): round(adds_by_threads(gallery, threads, 1000 // threads)) for threads in (1, 4, 16, 64)
        }
        result["while_adding"] = while_adding(path, gallery, arguments.rounds, arguments.seconds, 1000)
        result["while_settling"] = while_settling(gallery, 20)
    return result


def missed(result: dict[str, Any]) -> list[str]:
    reached = {
        "add_ms": result["one_by_one"]["add"]["p50_ms"],
        "restart_s": result["restart_s"],
        "while_adding": result["while_adding"]["search"]["p99_ratio"],
        "while_settling": result["while_settling"]["p99_ratio"],
    }
    return [f"{name}: {reached[name]} is over {goal}" for name, goal in GOALS.items() if reached[name] > goal]


def show(result: dict[str, Any]) -> None:
    print(f"{result['machine']}; {result['items']:,} enrolled items")
    rows = {
        "sync of 8 kB": result["sync"],
        "add": result["one_by_one"]["add"],
        "add with an image": result["one_by_one_with_images"]["add"],
        "first search after": result["one_by_one"]["first_search_after"],
        "first classify after": result["one_by_one"]["first_classify_after"],
        "search at rest": result["while_adding"]["search"]["rest"],
        "search, others add": result["while_adding"]["search"]["adding"],
        "classify at rest": result["while_adding"]["classify"]["rest"],
        "classify, others add": result["while_adding"]["classify"]["adding"],
        "search, settling": result["while_settling"]["settling"],
    }
    print(f"{'':>22} {'n':>7} {'p50 ms':>8} {'p99 ms':>8} {'max ms':>8}")
    for name, row in rows.items():
        print(f"{name:>22} {row['n']:>7} {row['p50_ms']:>8.2f} {row['p99_ms']:>8.2f} {row['max_ms']:>8.2f}")
    print(f"restart {result['restart_s']} s; adds a second by threads {result['adds_per_second_by_threads']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=50_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--dir", type=Path, help="where the store is; its disk is what is measured")
    parser.add_argument("--add-for-ever", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.add_for_ever:
        add_for_ever(arguments.add_for_ever, arguments.seed)
        return
    sys.setswitchinterval(0.0005)  # as the service does
    with TemporaryDirectory(dir=arguments.dir) as folder:
        result = measure(Path(folder) / "gallery.sqlite", arguments)
    show(result)
    if arguments.json:
        write_text(arguments.json, json.dumps(result, indent=1) + "\n")
    if failures := missed(result):
        sys.exit("\n".join(failures))


if __name__ == "__main__":
    main()
