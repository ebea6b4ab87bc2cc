"""The offline k-NN script: what `coterie evaluate` measures, as JSON on stdout.

python -m evaluation.knn BUNDLE DATA [--unknown DATA] [--false-reject 0.05]
"""

import argparse
import json
import sys
from pathlib import Path

from coterie.bundle import Bundle
from coterie.errors import CoterieError
from evaluation.evaluate import embed_folder, evaluate


def main(arguments: list[str] | None = None) -> int:
    """Evaluate and print JSON; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m evaluation.knn", description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path, help="bundle directory")
    parser.add_argument("data", type=Path, help="labelled images: a class-per-folder tree, a CSV or a Parquet file")
    parser.add_argument("--unknown", type=Path, help="images of no known class, in the same forms")
    parser.add_argument("--false-reject", type=float, default=0.05, help="share of known images that may be refused")
    options = parser.parse_args(arguments)
    try:
        bundle = Bundle.open(options.bundle)
        unknown = embed_folder(bundle, options.unknown) if options.unknown else None
        result = evaluate(bundle, embed_folder(bundle, options.data), unknown, false_reject=options.false_reject)
    except CoterieError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    json.dump(result.to_json(), sys.stdout, indent=1)
    print()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
