"""What several commands ask for, and how they speak."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

__all__ = ["FORMS", "BundlePath", "Data", "Device", "Group", "Strict", "Threads", "console", "show_rejected"]

FORMS = "a folder with one folder of images per class, or a .csv or .parquet file with a row for each image"
Data = Annotated[Path, typer.Argument(help=f"Labelled images: {FORMS}.", show_default=False)]
BundlePath = Annotated[Path, typer.Argument(help="A bundle directory.", show_default=False)]
Strict = Annotated[bool, typer.Option("--strict", help="Stop at the first image that cannot be read.")]
Group = Annotated[
    str | None,
    typer.Option(
        help="Keep images of one object on one side of the split: the column that names it, or for a folder a "
        "regular expression whose first group finds it in the path below the class.",
        show_default=False,
    ),
]
Device = Annotated[
    str,
    typer.Option(
        envvar="COTERIE_DEVICE",
        help="Where the encoder runs: auto (a GPU if one answers), cpu, cuda, cuda:1, cuda:0,1 or cuda:all; tensorrt "
        "likewise.",
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        envvar="COTERIE_THREADS",
        help="CPU threads of the encoder, by default one for each processor.",
        min=1,
        show_default=False,
    ),
]

console = Console()


def show_rejected(rejected: tuple[object, ...], most: int = 10) -> None:
    """Name and count the images that were left out, on stderr."""
    if not rejected:
        return
    errors = Console(stderr=True)
    errors.print(f"[yellow]{len(rejected)} images were left out:[/]")
    for entry in rejected[:most]:
        errors.print(f"  {entry}", markup=False, highlight=False)
    if len(rejected) > most:
        errors.print(f"  … and {len(rejected) - most} more")
