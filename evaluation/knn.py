"""The offline k-NN script: what `coterie evaluate` measures, as JSON on stdout.

python -m evaluation.knn BUNDLE DATA [--compare OTHER] [--unknown DATA] [--hold-out 8,9] [--corruptions] [--few-shot]
"""

import argparse
import sys
import warnings
from pathlib import Path

from coterie.errors import CoterieError, CoterieWarning
from evaluation.plain import as_text
from evaluation.study import Gate, Wanted, check_wanted, run_study

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> int:
    """Evaluate and print JSON; returns the exit code."""
    options = _parser().parse_args(arguments)
    warnings.showwarning = _show_warning
    gate = Gate(options.min_top1, options.max_ece, options.max_drop)
    wanted = Wanted(
        unknown=options.unknown,
        hold_out=options.hold_out,
        false_reject=options.false_reject,
        corruptions=options.corruptions,
        few_shot=options.few_shot,
        seed=options.seed,
        strict=options.strict,
        device=options.device,
        threads=options.threads,
    )
    try:
        check_wanted(wanted, gate, options.compare)
        study = run_study(options.bundle, options.data, options.compare, wanted)
    except CoterieError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(as_text(study.to_json()), end="")
    if failures := gate.failures(study):
        print(f"error: {'; '.join(failures)}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m evaluation.knn", description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path, help="bundle directory")
    parser.add_argument("data", type=Path, help="labelled images: a class-per-folder tree, a CSV or a Parquet file")
    parser.add_argument("--compare", type=Path, action="append", default=[], help="another bundle; may be repeated")
    parser.add_argument("--unknown", type=Path, help="images of no known class: a folder of them, or a table")
    parser.add_argument("--hold-out", help="classes to meet as unknown, as 8,9, or random for five splits")
    parser.add_argument("--false-reject", type=float, default=0.05, help="share of known images that may be refused")
    parser.add_argument("--corruptions", action="store_true", help="15 corruptions at 5 severities")
    parser.add_argument("--few-shot", action="store_true", help="1 to 20 gallery images of each class")
    parser.add_argument("--seed", type=int, default=0, help="of every draw")
    parser.add_argument("--min-top1", type=float, help="exit with 1 if top-1 is lower")
    parser.add_argument("--max-ece", type=float, help="exit with 1 if the calibration error is higher")
    parser.add_argument("--max-drop", type=float, help="exit with 1 if top-1 is that much below the compared bundle's")
    parser.add_argument("--strict", action="store_true", help="stop at the first image that cannot be read")
    parser.add_argument("--device", default="auto", help="where the encoder runs: auto, cpu, cuda …")
    parser.add_argument("--threads", type=int, help="CPU threads of the encoder, by default one for each processor")
    return parser


def _show_warning(message: Warning | str, category: type[Warning], *where: object, **more: object) -> None:
    if issubclass(category, CoterieWarning):
        print(f"warning: {message}", file=sys.stderr)


if __name__ == "__main__":
    raise SystemExit(main())
