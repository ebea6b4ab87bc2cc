"""An evaluation as one HTML file that needs nothing else: no scripts, no network, light and dark."""

import base64
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from coterie.files import write_text
from evaluation.evaluate import Evaluation

__all__ = ["write_report"]


def write_report(evaluation: Evaluation, name: str, path: Path) -> None:
    """Write the report on the bundle called `name`."""
    environment = Environment(
        loader=PackageLoader("evaluation", "templates"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["percent"] = lambda share: f"{share:.1%}"
    environment.filters["picture"] = lambda data: "data:image/webp;base64," + base64.b64encode(data).decode()
    template = environment.get_template("report.html")
    largest = [max(1, sum(row)) for row in evaluation.confusion]
    write_text(path, template.render(evaluation=evaluation, name=name, row_totals=largest))
