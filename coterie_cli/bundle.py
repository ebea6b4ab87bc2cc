"""`coterie bundle`: look at, check and publish bundles."""

from pathlib import Path

import typer
from rich.table import Table
from rich.text import Text

from coterie.errors import GateFailed
from coterie_cli.options import BundlePath, console

__all__ = ["bundle_app", "push_bundle"]

bundle_app = typer.Typer(help="Look at, check and publish bundles.", no_args_is_help=True)


@bundle_app.command("info")
def bundle_info(bundle: BundlePath) -> None:
    """Show what a bundle is.

    Example: coterie bundle info bundles/photos
    """
    from coterie.bundle import Bundle

    manifest = Bundle.open(bundle).manifest
    card = manifest.encoder
    rows = {
        "id": manifest.id,
        "architecture": str(manifest.provenance.get("architecture", "unknown")),
        "input": f"{card.input_size[0]} × {card.input_size[1]}, {card.resize}, {card.interpolation}",
        "embedding": f"{card.embedding_dim} dimensions, {card.precision}",
        "gallery": f"{manifest.gallery_size:,} images in {len(manifest.classes)} classes",
        "classes": ", ".join(manifest.classes[:20]) + (" …" if len(manifest.classes) > 20 else ""),
        **{measure: f"{value:g}" for measure, value in manifest.accuracy.items()},
        **{name: f"{entry.size:,} bytes" for name, entry in manifest.files.items()},
    }
    table = Table(title=Text(manifest.name), show_header=False)
    for name, value in rows.items():
        table.add_row(Text(name), Text(value))  # no markup: a class may be called [red]
    console.print(table)


@bundle_app.command("verify")
def bundle_verify(bundle: BundlePath) -> None:
    """Compare every file of a bundle with its checksum and with the others; exits with 1 if one does not fit.

    Example: coterie bundle verify bundles/photos
    """
    from coterie.bundle import Bundle
    from coterie.errors import BundleError

    try:
        opened = Bundle.open(bundle)
        opened.verify_parts()
    except BundleError as error:
        raise GateFailed(str(error)) from error
    console.print(f"{bundle} is whole: {opened.manifest.id}", markup=False)


@bundle_app.command("push")
def bundle_push(bundle: BundlePath) -> None:
    """Put a bundle into the BentoML model store.

    Example: coterie bundle push bundles/photos
    """
    push_bundle(bundle)


def push_bundle(path: Path) -> None:
    """Push and say under which tag."""
    from coterie.bundle import Bundle
    from serving.model_store import push

    console.print(f"In the BentoML model store: [bold]{push(Bundle.open(path))}[/]")
