"""The whole road on scikit-learn's handwritten digits, by the same functions as the other commands.

Trains on 0 to 7, shows that 8 and 9 come back as unknown, enrols five of each, shows that they are known.
"""

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from coterie.bundle import Bundle
from coterie.classifier import score
from coterie.errors import CoterieError
from coterie.files import write_text
from coterie.gallery import GalleryItems, Snapshot
from coterie.store import StoredItem
from coterie_cli.serve import listening_address, serve_bundle
from evaluation.evaluate import Evaluation, evaluate
from evaluation.queries import Queries, embed_folder
from evaluation.report import write_report
from evaluation.study import Study

__all__ = ["run_demo"]

KNOWN = range(8)
EXAMPLES = 5
DRAWS = 10
TEST_SHARE = 0.25
MARKER = ".coterie-demo"
HOST = "127.0.0.1"

console = Console()


@dataclass(frozen=True)
class Enrolled:
    """Mean over draws of the five examples, after enrolling 8 and 9."""

    enrolled_top1: float
    enrolled_accepted_top1: float
    known_top1_after: float
    known_accepted_top1: float


def run_demo(folder: Path, *, serve: bool, json_file: Path | None, port: int) -> None:
    """Train, export, evaluate, enrol and, with `serve`, become the server process."""
    started = time.monotonic()
    if serve:
        listening_address(HOST, port)
    _start_fresh(folder)
    _step("Writing scikit-learn's digits as folders of PNG files")
    write_digits(folder / "data")
    _step("Training a SupCon encoder on 0 to 7")
    run = _train(folder)
    _step("Exporting it to an ONNX bundle with its gallery and clusters")
    bundle = _export(run, folder)
    _step("Evaluating on held-out images, with 8 and 9 as unknown")
    known, new = embed_folder(bundle, folder / "data" / "test"), embed_folder(bundle, folder / "data" / "new")
    before = evaluate(bundle, known, new)
    write_report(Study.of(bundle, known, before), folder / "report.html")
    _step(f"Enrolling {EXAMPLES} images each of 8 and 9, {DRAWS} draws")
    after = _enrol(bundle, known, new)
    _remember(bundle, new, folder)
    seconds = time.monotonic() - started
    _show(before, after, seconds, folder)
    if json_file:
        write_text(json_file, json.dumps(_numbers(before, after, seconds, bundle), indent=1) + "\n")
    if serve:
        _show_curls(folder, port)
        serve_bundle(bundle.path, host=HOST, port=port, state=folder / "state")


def write_digits(root: Path) -> None:
    """Write train/ and test/ with the classes 0 to 7, and new/ with 8 and 9, as 8-bit PNG files."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = (digits.images * (255 / 16)).round().astype(np.uint8)
    known = np.flatnonzero(np.isin(digits.target, KNOWN))
    train, test = train_test_split(known, test_size=TEST_SHARE, random_state=0, stratify=digits.target[known])
    parts = {"train": train, "test": test, "new": np.setdiff1d(np.arange(len(images)), known)}
    for part, rows in parts.items():
        for row in rows:
            folder = root / part / str(digits.target[row])
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images[row]).save(folder / f"{row:04d}.png")


def _start_fresh(folder: Path) -> None:
    if folder.exists() and not (folder / MARKER).exists() and any(folder.iterdir()):
        raise CoterieError(f"{folder} holds something that is not the demo's: choose another folder with --dir")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / MARKER).touch()


def _train(folder: Path) -> Path:
    from training.pretrain import train
    from training.recipe import load_recipe

    train(folder / "data" / "train", load_recipe("digits"), folder / "run")
    return folder / "run"


def _export(run: Path, folder: Path) -> Bundle:
    from export.package import export_run
    from training.run import Run

    result = export_run(Run.open(run), folder / "data" / "train", folder / "bundle")
    console.print(f"  parity with torch: cosine {result.parity:.7f}")
    return result.bundle


def _draws(new: Queries) -> Iterator[np.ndarray]:
    """Rows of EXAMPLES random images of each new class, (2 · EXAMPLES,), DRAWS times."""
    for seed in range(DRAWS):
        rng = np.random.default_rng(seed)
        classes = [np.flatnonzero(new.labels == label) for label in np.unique(new.labels)]
        yield np.concatenate([rng.choice(rows, EXAMPLES, replace=False) for rows in classes])


def _items(new: Queries, rows: np.ndarray) -> list[StoredItem]:
    images = new.images
    return [
        StoredItem(
            id=images.hashes[row][:24],
            label=str(new.labels[row]),
            embedding=new.embeddings[row],
            metadata={"path": images.paths[row].as_posix()},
            thumbnail=images.thumbnails[row],
        )
        for row in rows
    ]


def _enrol(bundle: Bundle, known: Queries, new: Queries) -> Enrolled:
    results = []
    for rows in _draws(new):
        added = GalleryItems.enrolled(_items(new, rows), new.embeddings.shape[1])
        snapshot = bundle.base.with_items(added)
        others = np.ones(len(new.labels), dtype=bool)
        others[rows] = False
        on_new = _right(bundle, snapshot, new.embeddings[others], new.labels[others])
        results.append((*on_new, *_right(bundle, snapshot, known.embeddings, known.labels)))
    return Enrolled(*np.mean(results, axis=0).tolist())


def _right(bundle: Bundle, snapshot: Snapshot, embeddings: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Share of right labels, and of labels both right and accepted at 5 % false reject."""
    calibration = bundle.manifest.calibration
    scores = score(embeddings, snapshot, calibration)
    right = np.asarray(snapshot.clusters.labels)[scores.best] == labels
    accepted = scores.accepted(calibration.limit(0.05))
    return float(right.mean()), float((right & accepted).mean())


def _remember(bundle: Bundle, new: Queries, folder: Path) -> None:
    """Enrol the first draw for good, so that the service that is started knows 8 and 9."""
    bundle.gallery(folder / "state").add(_items(new, next(_draws(new))))


def _numbers(before: Evaluation, after: Enrolled, seconds: float, bundle: Bundle) -> dict[str, float | str]:
    assert before.unknown is not None
    return {
        "known_top1": before.top1,
        "unknown_auroc": before.unknown.auroc,
        "enrolled_top1": after.enrolled_top1,
        "known_top1_after": after.known_top1_after,
        "known_accepted_top1": after.known_accepted_top1,
        "enrolled_accepted_top1": after.enrolled_accepted_top1,
        "seconds": round(seconds, 1),
        "bundle": str(bundle.path.resolve()),
    }


def _step(text: str) -> None:
    console.print(f"[bold blue]»[/] {text}")


def _show(before: Evaluation, after: Enrolled, seconds: float, folder: Path) -> None:
    assert before.unknown is not None
    table = Table(title=f"Digits, {seconds:.0f} s")
    table.add_column("")
    table.add_column("right label", justify="right")
    table.add_column("right and accepted", justify="right")
    table.add_row(f"0 to 7, {before.images} held-out images", f"{before.top1:.4f}", f"{before.accepted_top1:.4f}")
    table.add_row(
        "0 to 7, after 8 and 9 are enrolled", f"{after.known_top1_after:.4f}", f"{after.known_accepted_top1:.4f}"
    )
    table.add_row(
        f"8 and 9, from {EXAMPLES} examples each", f"{after.enrolled_top1:.4f}", f"{after.enrolled_accepted_top1:.4f}"
    )
    console.print(table)
    unknown = before.unknown
    console.print(
        f"Before they were enrolled, {1 - unknown.accepted:.1%} of the {unknown.images} eights and nines came back as "
        f"unknown (AUROC {unknown.auroc:.4f})."
    )
    console.print(f"Report: {folder / 'report.html'}   Bundle: {folder / 'bundle'}", highlight=False)


def _show_curls(folder: Path, port: int) -> None:
    url = f"http://{HOST}:{port}"
    digit = next((folder / "data" / "test" / "3").iterdir())
    other = next((folder / "data" / "new" / "8").iterdir())
    console.print(f"\nServing on [bold]{url}[/] until Ctrl-C. Try, in another terminal:\n")
    for line in (
        f"curl -s {url}/v1/classify --data-binary @{digit} -H 'Content-Type: image/png'",
        f"curl -s {url}/v1/classify -F file=@{digit} -F file=@{other}",
        f"curl -s {url}/v1/embeddings --data-binary @{other} -H 'Content-Type: image/png'",
    ):
        console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)
    console.print()
