"""`coterie sweep`: a recipe with some of its values varied."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from coterie_cli.options import Data, Group, Strict, console

if TYPE_CHECKING:
    from training.sweep import Summary

__all__ = ["sweep"]


def sweep(
    data: Data,
    recipe: Annotated[str, typer.Option(help="A recipe's name, or a YAML file.")],
    out: Annotated[Path, typer.Option(help="The folder to write: runs, sweep.json and sweep.png.")],
    vary: Annotated[list[str], typer.Option(help="Values to try: optimizer.lr=[0.01, 0.03]; may be repeated.")],
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Replace a value in all runs: schedule.epochs=20")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Train everything from so many seeds.", min=1)] = 3,
    one_at_a_time: Annotated[
        bool, typer.Option("--one-at-a-time", help="Try each value alone beside the recipe's own, not all together.")
    ] = False,
    group: Group = None,
    strict: Strict = False,
) -> None:
    """Train a recipe with some of its values varied; the same command again goes on where it was stopped.

    Example: coterie sweep photos/train --recipe photos-cpu --vary 'optimizer.lr=[0.003, 0.01]' --out sweeps/lr

    Objectives: coterie sweep … --vary 'loss=[{objective: supcon}, {objective: cross_entropy}]' --vary …
    """
    from coterie.errors import RecipeError
    from training.sweep import Sweep, parse_variation, plan, run_sweep, summarise

    trials = plan([parse_variation(text) for text in vary], seeds, one_at_a_time=one_at_a_time)
    wanted = Sweep(recipe, tuple(settings or ()), trials)
    outcomes = []
    for outcome in run_sweep(data, wanted, out, group=group, strict=strict):
        outcomes.append(outcome)
        reached = outcome.error or f"held-out k-NN top-1 {outcome.metrics['knn_top1']:.4f}"
        console.print(f"{len(outcomes)} of {len(trials)}: {outcome.trial.name}: {reached}", markup=False)
    console.print(_table(wanted.keys, summarise(outcomes)))
    console.print(f"Sweep: [bold]{out}[/] (sweep.json, sweep.png, runs)")
    if failed := sum(outcome.error is not None for outcome in outcomes):
        raise RecipeError(f"{failed} of {len(trials)} runs failed: sweep.json says why")


def _table(keys: list[str], summaries: "list[Summary]") -> Table:
    from training.sweep import as_yaml

    table = Table(title="held-out k-NN top-1 over seeds")
    for key in keys:
        table.add_column(key, overflow="fold")
    for title in ("mean", "deviation", "lowest", "highest", "runs"):
        table.add_column(title, justify="right")
    for one in summaries:
        settings = [as_yaml(one.settings[key]) if key in one.settings else "as given" for key in keys]
        found = one.accuracies
        numbers = (one.mean, one.deviation, min(found, default=math.nan), max(found, default=math.nan))
        shown = ["–" if math.isnan(number) else f"{number:.4f}" for number in numbers]
        table.add_row(*settings, *shown, f"{len(found)}" + (f", {one.failed} failed" if one.failed else ""))
    return table
