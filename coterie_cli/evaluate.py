"""`coterie evaluate`: its options, and what it shows of the result."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from coterie.errors import CoterieError, GateFailed
from coterie_cli.options import BundlePath, Data, Device, Strict, Threads, console, show_rejected

if TYPE_CHECKING:
    from evaluation.compare import Comparison
    from evaluation.evaluate import Evaluation
    from evaluation.study import Study

__all__ = ["evaluate"]

ROWS = {
    "top1": "top-1, rejection ignored",
    "top5": "top-5",
    "knn_top1": "k-NN top-1 (k=20, T=0.07)",
    "cluster_top1": "nearest-cluster top-1",
    "probe_top1": "linear probe top-1",
    "balanced_accuracy": "balanced accuracy",
    "recall_at_1": "Recall@1",
    "map_at_r": "MAP@R",
    "ece": "calibration error (ECE)",
    "ece_of_vote": "the same of the plain vote",
}


def evaluate(
    bundle: BundlePath,
    data: Data,
    compare: Annotated[
        list[Path] | None, typer.Option(help="Another bundle on the same images; may be repeated.", show_default=False)
    ] = None,
    unknown: Annotated[
        Path | None, typer.Option(help="Images of no known class: a folder of them, or a table as of DATA.")
    ] = None,
    hold_out: Annotated[
        str | None,
        typer.Option(help="Classes to meet as unknown: 8,9 or, for five splits, random.", show_default=False),
    ] = None,
    false_reject: Annotated[float, typer.Option(help="Share of known images that may be called unknown.")] = 0.05,
    corruptions: Annotated[
        bool, typer.Option("--corruptions", help="Also on 15 corruptions of the images at 5 severities.")
    ] = False,
    few_shot: Annotated[
        bool, typer.Option("--few-shot", help="Also with 1, 2, 5, 10 and 20 gallery images of each class.")
    ] = False,
    report: Annotated[Path | None, typer.Option(help="Write an HTML report to this file.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the numbers to this file.")] = None,
    min_top1: Annotated[float | None, typer.Option(help="Exit with 1 if top-1 is lower.")] = None,
    max_ece: Annotated[float | None, typer.Option(help="Exit with 1 if the calibration error is higher.")] = None,
    max_drop: Annotated[
        float | None, typer.Option(help="Exit with 1 if top-1 is more below that of the bundle of --compare.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of every draw.")] = 0,
    device: Device = "auto",
    threads: Threads = None,
    strict: Strict = False,
) -> None:
    """Measure a bundle on labelled images, through the very code that serves it.

    Example: coterie evaluate bundles/photos photos/test --report report.html --min-top1 0.95

    Or: coterie evaluate bundles/photos-int8 photos/test --compare bundles/photos --max-drop 0.005
    """
    from coterie.files import write_text
    from evaluation.plain import as_text
    from evaluation.study import Gate, Wanted, check_wanted, run_study

    wanted = Wanted(unknown, hold_out, false_reject, corruptions, few_shot, seed, strict, device, threads)
    gate = Gate(min_top1, max_ece, max_drop)
    check_wanted(wanted, gate, compare or [])
    for option, file in (("--report", report), ("--json", json_file)):
        if file and file.is_dir():
            raise CoterieError(f"{option} {file} is a folder: name a file in it")
    if report:
        import plotly  # noqa: F401  that it is not here is said before any work
    study = run_study(bundle, data, compare or [], wanted)
    show_rejected(study.first.rejected)
    _show(study)
    if json_file:
        write_text(json_file, as_text(study.to_json()))
    if report:
        from evaluation.report import write_report

        write_report(study, report)
        console.print(f"Report: [bold]{report}[/]")
    if failures := gate.failures(study):
        raise GateFailed("; ".join(failures))


def _show(study: "Study") -> None:
    result = study.first
    table = Table(title=Text(f"{result.name} on {result.images:,} images"))
    for column in ("", "", "95 % interval"):
        table.add_column(column, justify="left" if not table.columns else "right")
    for name, row in ROWS.items():
        _add(table, row, result, name)
        if name == "top5":
            _add(table, f"right and accepted, {result.false_reject:.0%} false reject", result, "accepted_top1")
    if unknown := result.unknown:
        for row, name in (("known against unknown, AUROC", "auroc"), ("unknown given a label", "accepted")):
            table.add_row(row, f"{getattr(unknown, name):.4f}", _range(unknown.intervals[name]))
    for split in result.held_out:
        row = Text(f"AUROC without {', '.join(split.classes)}")
        table.add_row(row, f"{split.unknown.auroc:.4f}", _range(split.unknown.intervals["auroc"]))
    if len(result.held_out) > 1:
        _add(table, f"the same, mean of {len(result.held_out)} splits", result, "held_out_auroc")
    if study.robustness:
        found = study.robustness[0]
        table.add_row("error, mean of 75 corruptions", f"{found.mean_error:.4f}", _range(found.mean_error_interval))
    for few in study.few_shot[0] if study.few_shot else ():
        row = f"top-1 from {few.shots} of each class, ± over {few.draws} draws"
        table.add_row(row, f"{few.classifier:.4f}", f"± {few.classifier_deviation:.4f}")
    console.print(table)
    for comparison in study.comparisons:
        console.print(_compared(comparison))
    leaks = result.leaks
    if leaks.same_bytes or leaks.near:
        console.print(
            f"[yellow]warning:[/] the gallery holds {leaks.same_bytes + leaks.near} of these images already "
            f"({leaks.same_bytes} byte for byte): the numbers are too good"
        )


def _compared(comparison: "Comparison") -> Table:
    table = Table(title=Text(f"{comparison.first} less {comparison.other}"))
    for column in ("", comparison.first, comparison.other, "difference", "95 % interval", "McNemar p"):
        table.add_column(Text(column), justify="right" if table.columns else "left")
    for one in comparison.differences:
        p = "" if one.p is None else f"{one.p:.3g}"
        bounds = f"{_number(one.low, '+')} … {_number(one.high, '+')}"
        name = one.measure.replace("_", " ")
        table.add_row(name, _number(one.first), _number(one.other), _number(one.difference, "+"), bounds, p)
    return table


def _add(table: Table, row: str, result: "Evaluation", name: str) -> None:
    table.add_row(row, _number(getattr(result, name)), _range(result.intervals[name]))


def _range(bounds: tuple[float, float]) -> str:
    return f"{_number(bounds[0])} … {_number(bounds[1])}"


def _number(value: float, sign: str = "-") -> str:
    return "–" if math.isnan(value) else f"{value:{sign}.4f}"
