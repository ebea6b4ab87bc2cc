"""SupCon beside the objectives its paper compares it with, at one budget, on labelled images of your own.

    python -m benchmarks.objectives TRAIN TEST [--recipe photos-cpu] [--set key=value …] [--epochs 20] [--seeds 3]

Each objective trains the same encoder with the same augmentation, optimiser, schedule, steps and number of views, from
seeds 0, 1, …; N-pairs, which takes one view of an image, gets twice the images in a batch and twice the epochs. Options
are each objective's defaults. Measured are the finished encoders on TEST: k-NN top-1 with TRAIN's images as the gallery
(k = 20, T = 0.07) and the top-1 of a linear classifier fitted to TRAIN's features. Runs are kept in --runs and taken up
again, so that the whole can be interrupted.
"""

import argparse
import json
import platform
import statistics
from pathlib import Path

import torch
from torch.nn import functional as F

from coterie.dataset import LabelledPixels, read_images, read_pixels
from coterie.errors import DataError
from coterie.files import write_text
from coterie.machine import processors
from training.monitor import features_of, knn_top1, linear_top1
from training.objectives import Objective
from training.pretrain import train
from training.recipe import Recipe, load_recipe
from training.run import Run

MEASURES = ("knn_top1", "linear_top1")


def recipe_for(objective: Objective, base: str, chosen: list[str], epochs: int, seed: int) -> Recipe:
    """The base recipe with this objective, at the common budget."""
    plain = load_recipe(base, chosen)
    one_view = objective is Objective.N_PAIRS
    settings = [
        *chosen,
        f"name={plain.name}-{objective.value}",
        f"loss={{objective: {objective.value}}}",
        f"seed={seed}",
        f"schedule.epochs={epochs * 2 if one_view else epochs}",
        f"schedule.warmup_epochs={epochs / 20 * (2 if one_view else 1)}",
        f"batch.views={1 if one_view else 2}",
        f"batch.size={plain.batch.size * (2 if one_view else 1)}",
    ]
    return load_recipe(base, settings)


def evaluate(run: Run, gallery: LabelledPixels, queries: LabelledPixels) -> dict[str, float]:
    """Accuracy of a finished run's encoder."""
    encoder, _ = run.load_encoder()
    features = [features_of(encoder, torch.from_numpy(images.pixels)) for images in (gallery, queries)]
    labels = [torch.from_numpy(images.labels) for images in (gallery, queries)]
    return {
        "knn_top1": knn_top1(F.normalize(features[0]), labels[0], F.normalize(features[1]), labels[1]),
        "linear_top1": linear_top1(features[0], labels[0], features[1], labels[1], len(gallery.classes)),
    }


def main() -> None:
    """Train what is missing, measure, print a table and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("--recipe", default="photos-cpu")
    parser.add_argument("--set", action="append", default=[], dest="settings")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=Path, default=Path("runs/objectives"))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(processors())
    preprocessing = load_recipe(arguments.recipe, arguments.settings).data.preprocessing
    gallery, queries = (read_pixels(read_images(data), preprocessing) for data in (arguments.train, arguments.test))
    if gallery.classes != queries.classes:
        raise DataError(
            f"{arguments.train} and {arguments.test} have other classes: {gallery.classes}, {queries.classes}"
        )
    table: dict[str, dict[str, list[float]]] = {}
    for seed in range(arguments.seeds):
        for objective in Objective:
            recipe = recipe_for(objective, arguments.recipe, arguments.settings, arguments.epochs, seed)
            out = arguments.runs / f"{recipe.name}-{seed}"
            if not (out / "encoder.safetensors").exists():
                train(arguments.train, recipe, out, resume=True)
            run = Run.open(out)
            measured = evaluate(run, gallery, queries)
            measured["seconds"] = sum(row["seconds"] for row in run.metrics())
            row = table.setdefault(objective.value, {})
            for name, value in measured.items():
                row.setdefault(name, []).append(value)
            print(
                f"{objective.value:14} seed {seed}  " + "  ".join(f"{n} {v:.4f}" for n, v in measured.items()),
                flush=True,
            )
    print(f"\n{len(queries)} test images of {len(queries.classes)} classes, mean ± standard deviation over seeds")
    for name, row in sorted(table.items(), key=lambda entry: -statistics.mean(entry[1]["knn_top1"])):
        shown = "   ".join(f"{m} {statistics.mean(row[m]):.4f} ± {_deviation(row[m]):.4f}" for m in MEASURES)
        print(f"{name:14} {shown}   {statistics.mean(row['seconds']):4.0f} s")
    if arguments.json:
        result = {
            "recipe": load_recipe(arguments.recipe, arguments.settings).model_dump(mode="json"),
            "epochs": arguments.epochs,
            "train_images": len(gallery),
            "test_images": len(queries),
            "train_fingerprint": gallery.fingerprint,
            "test_fingerprint": queries.fingerprint,
            "objectives": table,
            "device": f"{processors()} CPU cores",
            "versions": {"torch": torch.__version__, "python": platform.python_version()},
        }
        write_text(arguments.json, json.dumps(result, indent=1) + "\n")


def _deviation(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


if __name__ == "__main__":
    main()
