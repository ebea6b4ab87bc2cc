"""One recipe with some of its values varied, each combination from several seeds: what is reached, and how steadily.

A sweep is a folder: a run for each trial below `runs/`, `sweep.json` with what each reached, and `sweep.png`, the box
plots that arXiv 2004.11362 shows in figure 4a. Accuracy is that on the images each run held out, after its last epoch.
"""

import hashlib
import io
import json
import os
import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from coterie.errors import RecipeError, TrainingStopped
from coterie.files import write_bytes, write_text
from training.pretrain import train
from training.recipe import Recipe, load_recipe
from training.run import Run

__all__ = ["Outcome", "Summary", "Sweep", "Trial", "as_yaml", "parse_variation", "plan", "run_sweep", "summarise"]

MEASURE = "knn_top1"
SHOWN = 60  # characters of a setting in a run's name


@dataclass(frozen=True)
class Trial:
    """One run to be made.

    Attributes:
        settings: the varied values, by their keys in the recipe.
        seed: of the run.
    """

    settings: dict[str, Any]
    seed: int

    @property
    def name(self) -> str:
        """Of the run's folder: readable, and different for different settings."""
        text = "_".join(f"{key}={as_yaml(value)}" for key, value in self.settings.items()) or "as-given"
        plain = re.sub(r"=-(?!\d)", "=", re.sub(r"[^\w.=+-]+", "-", text)).strip("-")
        if plain != text or len(plain) > SHOWN:
            plain = f"{plain[:SHOWN]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
        return f"{plain}_seed={self.seed}"

    def recipe(self, name_or_file: str, chosen: Sequence[str]) -> Recipe:
        """The recipe with the settings chosen for all trials, and those of this one."""
        own = [f"{key}={as_yaml(value)}" for key, value in self.settings.items()]
        return load_recipe(name_or_file, [*chosen, *own, f"seed={self.seed}"])


@dataclass(frozen=True)
class Outcome:
    """What a trial came to: the metrics of its last epoch and its seconds of training, or why it failed."""

    trial: Trial
    run: Path
    metrics: dict[str, float]
    error: str | None = None


@dataclass(frozen=True)
class Summary:
    """Of the trials that share their settings: held-out k-NN top-1 over seeds, those that failed left out.

    Attributes:
        deviation: sample standard deviation; NaN of fewer than two.
        failed: how many failed.
    """

    settings: dict[str, Any]
    accuracies: tuple[float, ...]
    failed: int

    @property
    def mean(self) -> float:
        return statistics.mean(self.accuracies) if self.accuracies else float("nan")

    @property
    def deviation(self) -> float:
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else float("nan")


@dataclass(frozen=True)
class Sweep:
    """A recipe, what all of its trials have in common, and the trials."""

    recipe: str
    chosen: tuple[str, ...]
    trials: tuple[Trial, ...]

    @property
    def keys(self) -> list[str]:
        return list(dict.fromkeys(key for trial in self.trials for key in trial.settings))


def parse_variation(text: str) -> tuple[str, list[Any]]:
    """`optimizer.lr=[0.01, 0.03]` as key and values.

    Raises:
        RecipeError: it is not of that form.

    >>> parse_variation("loss.temperature=[0.07, 0.1]")
    ('loss.temperature', [0.07, 0.1])
    """
    key, separator, listed = text.partition("=")
    try:
        values = yaml.safe_load(listed)
    except yaml.YAMLError:
        values = None
    if not key or not separator or not isinstance(values, list) or not values:
        raise RecipeError(f"--vary {text!r}: write it as key=[value, value], for example 'optimizer.lr=[0.01, 0.03]'")
    if key == "seed":
        raise RecipeError("--vary seed: every combination is trained from --seeds seeds already")
    return key, values


def plan(variations: Sequence[tuple[str, list[Any]]], seeds: int, *, one_at_a_time: bool = False) -> tuple[Trial, ...]:
    """All combinations, or the recipe as it is and each value alone; all of them from one seed before the next.

    >>> [trial.name for trial in plan([("optimizer.lr", [0.1, 0.3])], 1)]
    ['optimizer.lr=0.1_seed=0', 'optimizer.lr=0.3_seed=0']
    """
    if one_at_a_time:
        combinations = [{}, *({key: value} for key, values in variations for value in values)]
    else:
        keys = [key for key, _ in variations]
        combinations = [
            dict(zip(keys, chosen, strict=True)) for chosen in product(*(values for _, values in variations))
        ]
    trials = [Trial(settings, seed) for seed in range(seeds) for settings in combinations]
    return tuple({trial.name: trial for trial in trials}.values())


def run_sweep(
    data: Path, sweep: Sweep, out: Path, *, group: str | None = None, strict: bool = False
) -> Iterator[Outcome]:
    """Train what is missing, one trial after another, and write the sweep's table and picture after each.

    Trials that were trained before are taken as they are, those that were interrupted go on. One that fails, because
    its loss became NaN for instance, is told of and left behind.

    Raises:
        RecipeError: a trial's recipe is not valid, or `out` holds one of another recipe, before anything is trained; or
            one of other images.
        DataError, TrainingStopped: as of training.pretrain.train.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RecipeError(
            "a sweep is one process: start one for each GPU (CUDA_VISIBLE_DEVICES) with an --out of its own"
        )
    recipes = [trial.recipe(sweep.recipe, sweep.chosen) for trial in sweep.trials]
    runs = [Run(out / "runs" / trial.name) for trial in sweep.trials]
    for run, recipe in zip(runs, recipes, strict=True):
        _check_recipe(run, recipe)
    outcomes: list[Outcome] = []
    for trial, run, recipe in zip(sweep.trials, runs, recipes, strict=True):
        outcomes.append(_train(data, trial, run, recipe, group=group, strict=strict))
        _check_images(outcomes)
        _write(sweep, outcomes, out)
        yield outcomes[-1]


def summarise(outcomes: Sequence[Outcome]) -> list[Summary]:
    """One for each combination of settings, the best first."""
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(json.dumps(outcome.trial.settings), []).append(outcome)
    found = [
        Summary(
            of[0].trial.settings,
            tuple(one.metrics[MEASURE] for one in of if not one.error),
            sum(one.error is not None for one in of),
        )
        for of in groups.values()
    ]
    return sorted(found, key=lambda one: (not one.accuracies, -one.mean))


def as_yaml(value: Any) -> str:
    """A value as it stands in a recipe, on one line."""
    return str(yaml.safe_dump(value, default_flow_style=True, width=1 << 20, sort_keys=False)).partition("\n")[0]


def _check_recipe(run: Run, recipe: Recipe) -> None:
    if not run.started:
        return
    before = run.recipe()
    if recipe.precision == "auto":  # a run stays with what it began with
        recipe = recipe.model_copy(update={"precision": before.precision})
    if before != recipe:
        raise RecipeError(f"{run.path} was trained by another recipe: go on with the same, or choose another --out")


def _train(data: Path, trial: Trial, run: Run, recipe: Recipe, *, group: str | None, strict: bool) -> Outcome:
    if not (run.path / "encoder.safetensors").exists():
        try:
            train(data, recipe, run.path, group=group, strict=strict, resume=run.started)
        except RecipeError as error:
            return Outcome(trial, run.path, {}, str(error))
        except TrainingStopped as error:
            raise TrainingStopped(f"{trial.name} was stopped and saved: the same command again goes on") from error
    rows = run.metrics()
    return Outcome(trial, run.path, {**rows[-1], "seconds": sum(row["seconds"] for row in rows)})


def _check_images(outcomes: Sequence[Outcome]) -> None:
    first, last = (Run(outcomes[row].run) for row in (0, -1))
    if first.started and last.started and first.dataset().fingerprint != last.dataset().fingerprint:
        raise RecipeError(f"{first.path} and {last.path} were trained on other images: choose another --out")


def _write(sweep: Sweep, outcomes: Sequence[Outcome], out: Path) -> None:
    values = {
        "recipe": sweep.recipe,
        "set": list(sweep.chosen),
        "measure": MEASURE,
        "summary": [
            {
                "settings": one.settings,
                "mean": one.mean if one.accuracies else None,
                "deviation": one.deviation if len(one.accuracies) > 1 else None,
                "accuracies": list(one.accuracies),
                "failed": one.failed,
            }
            for one in summarise(outcomes)
        ],
        "trials": [
            {
                "settings": one.trial.settings,
                "seed": one.trial.seed,
                "run": one.run.relative_to(out).as_posix(),
                "metrics": one.metrics,
                "error": one.error,
            }
            for one in outcomes
        ],
    }
    write_text(out / "sweep.json", json.dumps(values, indent=1) + "\n")
    if any(not one.error for one in outcomes) and sweep.keys:
        _draw(sweep.keys, outcomes, out / "sweep.png")


def _draw(keys: Sequence[str], outcomes: Sequence[Outcome], path: Path) -> None:
    """A panel for each key: a box for each of its values, over all seeds and all other values."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(keys), 4), layout="constrained")
    panels = figure.subplots(1, len(keys), sharey=True, squeeze=False)[0]
    for axes, key in zip(panels, keys, strict=True):
        boxes: dict[str, list[float]] = {}
        for one in outcomes:
            if not one.error:
                value = as_yaml(one.trial.settings[key]) if key in one.trial.settings else "as given"
                boxes.setdefault(value, []).append(one.metrics[MEASURE])
        axes.boxplot(list(boxes.values()), tick_labels=[value[:SHOWN] for value in boxes])
        for place, values in enumerate(boxes.values(), start=1):
            axes.plot([place] * len(values), values, ".", alpha=0.5)
        axes.set(title=key)
        axes.tick_params(axis="x", rotation=20)
        axes.grid(axis="y", alpha=0.3)
    panels[0].set(ylabel="held-out k-NN top-1")
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120, format="png")
    write_bytes(path, buffer.getvalue())
