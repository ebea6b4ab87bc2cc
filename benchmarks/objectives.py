"""SupCon beside the objectives its paper compares it with, at one budget, on labelled images of your own.

    python -m benchmarks.objectives TRAIN TEST [--recipe photos-cpu] [--set key=value …] [--epochs 20] [--seeds 3]
        [--rates 0.003 0.01] [--objectives supcon cross_entropy …]

Each objective trains the same encoder with the same augmentation, optimiser, schedule, steps and number of views, from
seeds 0, 1, …; N-pairs, which takes one view of an image, gets twice the images in a batch and twice the epochs. Options
are each objective's defaults; its learning rate is, of --rates, the one that was best on the images that seed 0's run
held out of TRAIN. Measured are the finished encoders on TEST: k-NN top-1 with TRAIN's images as the gallery (k = 20,
T = 0.07) and the top-1 of a linear classifier fitted to TRAIN's features. Runs are kept in --runs and taken up again:
the whole can be interrupted, and be shared by processes that are each given some --objectives.
"""

import argparse
import json
import platform
import statistics
from itertools import product
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


def recipe_for(objective: Objective, base: str, chosen: list[str], epochs: int, rate: float, seed: int) -> Recipe:
    """The base recipe with this objective and learning rate, at the common budget."""
    plain = load_recipe(base, chosen)
    one_view = objective is Objective.N_PAIRS
    settings = [
        *chosen,
        f"name={plain.name}-{objective.value}",
        f"loss={{objective: {objective.value}}}",
        f"seed={seed}",
        f"optimizer.lr={rate}",
        f"schedule.epochs={epochs * 2 if one_view else epochs}",
        f"schedule.warmup_epochs={epochs / 20 * (2 if one_view else 1)}",
        f"batch.views={1 if one_view else 2}",
        f"batch.size={plain.batch.size * (2 if one_view else 1)}",
    ]
    return load_recipe(base, settings)


def train_once(arguments: argparse.Namespace, objective: Objective, rate: float, seed: int) -> Run:
    """The finished run, trained or taken up where it was left."""
    recipe = recipe_for(objective, arguments.recipe, arguments.settings, arguments.epochs, rate, seed)
    out = arguments.runs / f"{objective.value}-{rate:g}-{seed}"
    if not (out / "encoder.safetensors").exists():
        train(arguments.train, recipe, out, resume=True)
    return Run.open(out)


def best_rate(arguments: argparse.Namespace, objective: Objective) -> float:
    """The rate whose run from seed 0 names most of the images it held out."""
    if len(arguments.rates) == 1:
        return float(arguments.rates[0])
    return float(
        max(arguments.rates, key=lambda rate: train_once(arguments, objective, rate, 0).metrics()[-1]["knn_top1"])
    )


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
    parser.add_argument("--rates", type=float, nargs="+", help="by default the recipe's")
    parser.add_argument("--objectives", type=Objective, nargs="+", default=list(Objective))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=Path, default=Path("runs/objectives"))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(processors())
    plain = load_recipe(arguments.recipe, arguments.settings)
    arguments.rates = arguments.rates or [plain.optimizer.lr]
    preprocessing = plain.data.preprocessing
    gallery, queries = (read_pixels(read_images(data), preprocessing) for data in (arguments.train, arguments.test))
    if gallery.classes != queries.classes:
        raise DataError(
            f"{arguments.train} and {arguments.test} have other classes: {gallery.classes}, {queries.classes}"
        )
    table: dict[str, dict[str, list[float]]] = {}
    rates = {objective: best_rate(arguments, objective) for objective in arguments.objectives}
    for seed, objective in product(range(arguments.seeds), arguments.objectives):
        run = train_once(arguments, objective, rates[objective], seed)
        measured = evaluate(run, gallery, queries)
        measured["seconds"] = sum(row["seconds"] for row in run.metrics())
        row = table.setdefault(objective.value, {})
        for name, value in measured.items():
            row.setdefault(name, []).append(value)
        found = "  ".join(f"{name} {value:.4f}" for name, value in measured.items())
        print(f"{objective.value:14} rate {rates[objective]:g}  seed {seed}  {found}", flush=True)
    print(f"\n{len(queries)} test images of {len(queries.classes)} classes, mean ± standard deviation over seeds")
    for name, row in sorted(table.items(), key=lambda entry: -statistics.mean(entry[1]["knn_top1"])):
        shown = "   ".join(f"{m} {statistics.mean(row[m]):.4f} ± {_deviation(row[m]):.4f}" for m in MEASURES)
        print(f"{name:14} {shown}   {statistics.mean(row['seconds']):4.0f} s")
    if arguments.json:
        result = {
            "recipe": plain.model_dump(mode="json"),
            "epochs": arguments.epochs,
            "rates": arguments.rates,
            "chosen_rates": rates,
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
