"""`coterie gallery …`: look at a gallery and change it, with or without a service that runs on it.

Changes are kept in the state folder, where services that serve the same gallery see them at their next request.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from coterie.errors import DataError
from coterie_cli.options import FORMS, BundlePath, Device, console, show_rejected

if TYPE_CHECKING:
    from coterie.bundle import Bundle
    from coterie.gallery import Gallery

__all__ = ["gallery_app"]

gallery_app = typer.Typer(help="Look at a bundle's gallery and what was enrolled, and change it.", no_args_is_help=True)

State = Annotated[
    Path | None,
    typer.Option(
        envvar="COTERIE_STATE", help="Where changes are kept; else the user's state folder.", show_default=False
    ),
]
Originals = Annotated[
    bool,
    typer.Option(envvar="COTERIE_ORIGINALS", help="Keep the images, for encoders to come; --no-originals does not."),
]
Quota = Annotated[
    int, typer.Option("--class-quota", envvar="COTERIE_CLASS_QUOTA", help="Enrolled items of a class at most.", min=1)
]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write it to this file.", show_default=False)]
DEFAULT_QUOTA = 10_000


@gallery_app.command("list")
def list_(
    bundle: BundlePath,
    label: Annotated[str | None, typer.Option(help="List the items of this class.", show_default=False)] = None,
    state: State = None,
    json_file: JsonFile = None,
) -> None:
    """Show the classes, or the items of one.

    Example: coterie gallery list bundles/photos --label boot
    """
    with _opened(bundle, state) as (opened, gallery):
        snapshot, enrolled = gallery.snapshot(), gallery.enrolled_ids()
        items = snapshot.items
        if label is not None:
            rows = snapshot.members(label).tolist()
            if not rows:
                raise DataError(
                    f"the gallery has no class {label!r}: its classes are {', '.join(snapshot.clusters.labels)}"
                )
            entries: list[dict[str, Any]] = [
                {"id": items.ids[row], "enrolled": items.ids[row] in enrolled, "metadata": items.metadata[row]}
                for row in rows
            ]
            for entry in entries:
                origin = "enrolled" if entry["enrolled"] else "bundle  "
                print(entry["id"], origin, json.dumps(entry["metadata"], ensure_ascii=False))
        else:
            added = [items.label(row) for row, name in enumerate(items.ids) if name in enrolled]
            clusters = snapshot.clusters
            entries = [
                {"label": name, "items": count, "enrolled": added.count(name), "radius": round(radius, 4)}
                for name, count, radius in zip(
                    clusters.labels, clusters.counts.tolist(), clusters.reaches.tolist(), strict=True
                )
            ]
            table = Table(title=f"{opened.manifest.name}, {len(items):,} items")
            for heading in ("class", "items", "enrolled", "radius"):
                table.add_column(heading, justify="left" if heading == "class" else "right")
            for entry in entries:
                table.add_row(entry["label"], f"{entry['items']:,}", f"{entry['enrolled']:,}", f"{entry['radius']:.4f}")
            console.print(table)
    _write(json_file, entries)


@gallery_app.command("add")
def add(
    bundle: BundlePath,
    data: Annotated[
        list[Path],
        typer.Argument(help=f"Images: {FORMS}; or, with --label, image files and folders.", show_default=False),
    ],
    label: Annotated[str | None, typer.Option(help="The class of all of them.", show_default=False)] = None,
    state: State = None,
    originals: Originals = True,
    class_quota: Quota = DEFAULT_QUOTA,
    device: Device = "auto",
) -> None:
    """Enrol images; the same command again goes on where it was stopped.

    An image is one item: enrolled again under another label, it moves there.

    Example: coterie gallery add bundles/photos new/boots --label boot
    """
    from coterie.decoding import ImageRow
    from coterie.enrolment import enrol
    from coterie.images import IMAGE_SUFFIXES
    from coterie.progress import progress_bar
    from coterie.stream import open_stream

    added = known = 0
    rejected: list[object] = []
    with _opened(bundle, state, originals, class_quota, device) as (opened, gallery):
        for path in data:
            if path.is_file() and path.suffix.lower() in IMAGE_SUFFIXES:
                rows, count, root = iter([ImageRow(path.name)]), 1, path.parent
            else:
                stream = open_stream(path)
                rows, count, root = stream.rows(0), len(stream), stream.root
            with progress_bar(f"enrolling {path.name}", count) as advance:
                done = enrol(opened, gallery, rows, root, label=label, progress=advance)
            added, known = added + len(done.added), known + done.known
            rejected += done.rejected
    if not added and not known:
        raise DataError(f"none of the {len(rejected)} images could be enrolled; the first: {rejected[0]}")
    show_rejected(tuple(rejected))
    console.print(f"Enrolled {added:,} images" + (f"; {known:,} were there already." if known else "."))


@gallery_app.command("remove")
def remove(
    bundle: BundlePath,
    identifiers: Annotated[list[str] | None, typer.Option("--id", help="An item.", show_default=False)] = None,
    label: Annotated[str | None, typer.Option(help="All items of this class.", show_default=False)] = None,
    state: State = None,
) -> None:
    """Erase items, with their pictures and images, or hide the bundle's own.

    Example: coterie gallery remove bundles/photos --id 0a3be07cf08a37a55eb4d8f2 --id 5d41402abc4b2a76b9719d91
    """
    if not identifiers and label is None:
        raise DataError("remove needs to know what: give --id, once or more, or --label")
    with _opened(bundle, state) as (_, gallery):
        there = set(gallery.snapshot().rows)
        for identifier in identifiers or ():
            if identifier not in there:
                raise DataError(f"the gallery has no item {identifier}; nothing was removed")
        removed = gallery.remove(identifiers or (), label=label)
    console.print(f"Removed {len(removed):,} items.")


@gallery_app.command("duplicates")
def duplicates(
    bundle: BundlePath,
    threshold: Annotated[float, typer.Option(help="The least similarity of a pair.", min=-1, max=1)] = 0.98,
    most: Annotated[int, typer.Option(help="Pairs to show.", min=0)] = 20,
    state: State = None,
    json_file: JsonFile = None,
) -> None:
    """Find items that are nearly the same, and show how similar items are, to choose the threshold by.

    Example: coterie gallery duplicates bundles/photos --threshold 0.99
    """
    from dataclasses import asdict

    from coterie.duplicates import find_duplicates
    from coterie.progress import progress_bar

    with _opened(bundle, state) as (_, gallery):
        items = gallery.snapshot().items
        with progress_bar("comparing", len(items)) as advance:
            found = find_duplicates(items, threshold, progress=advance)
    histogram = Table(title="Similarity of each item to its nearest neighbour", show_header=False, box=None)
    largest = max((*found.counts, 1))
    for low, high, count in zip(found.edges[:-1], found.edges[1:], found.counts, strict=True):
        if count:
            histogram.add_row(f"{low:g} to {high:g}", f"{count:,}", "█" * max(1, round(40 * count / largest)))
    console.print(histogram)
    if most and found.pairs:
        table = Table("similarity", "first", "", "second", "", title="Most similar pairs")
        for pair in found.pairs[:most]:
            table.add_row(f"{pair.similarity:.4f}", pair.first, pair.first_label, pair.second, pair.second_label)
        console.print(table)
    console.print(
        f"{found.within + found.between:,} pairs of at least {threshold:g}: {found.within:,} within a class, "
        f"{found.between:,} between two."
    )
    _write(json_file, asdict(found))


@gallery_app.command("merge")
def merge(
    bundle: BundlePath,
    out: Annotated[Path, typer.Option(help="The bundle directory to write.")],
    held_out: Annotated[
        Path | None,
        typer.Option(
            help=f"Labelled images that neither training nor the gallery has seen, to calibrate with: {FORMS}.",
            show_default=False,
        ),
    ] = None,
    state: State = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the bundle in --out.")] = False,
    device: Device = "auto",
) -> None:
    """Fold the changes into a new bundle with the same encoder.

    Example: coterie gallery merge bundles/photos --out bundles/photos-2 --held-out photos/test
    """
    from coterie.errors import CoterieError
    from coterie.merging import merge as merge_bundle
    from evaluation.queries import embed_folder
    from export.card import model_card

    if out.exists() and not overwrite:
        raise CoterieError(f"{out} exists already: replace it with --overwrite, or choose another --out")
    with _opened(bundle, state, device=device) as (opened, gallery):
        unseen = None
        if held_out is not None:
            queries = embed_folder(opened, held_out)
            there = gallery.snapshot().rows
            new = [row for row, digest in enumerate(queries.images.hashes) if digest[:24] not in there]
            if not new:
                raise DataError(f"every image of {held_out} is in the gallery: give ones that it has not seen")
            unseen = queries.embeddings[new], queries.labels[new]
            show_rejected(queries.images.rejected)
        merged = merge_bundle(opened, gallery, out, card=model_card, held_out=unseen, overwrite=overwrite)
    manifest = merged.manifest
    measured = f" Top-1 on held-out images {manifest.accuracy['held_out_top1']:.4f}." if manifest.accuracy else ""
    console.print(
        f"{manifest.gallery_size:,} items in {len(manifest.classes)} classes.{measured} Bundle: [bold]{out}[/]"
    )


@gallery_app.command("export")
def export(
    bundle: BundlePath,
    file: Annotated[Path, typer.Argument(help="The Parquet file to write.", show_default=False)],
    state: State = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
) -> None:
    """Write what was enrolled, with pictures and images, to a Parquet file.

    Example: coterie gallery export bundles/photos enrolled.parquet
    """
    from coterie.exchange import export_items
    from coterie.progress import progress_bar

    if file.exists() and not overwrite:
        raise DataError(f"{file} exists already: choose another file, or give --overwrite")
    with _opened(bundle, state) as (opened, gallery), progress_bar("exporting", len(gallery.enrolled_ids())) as advance:
        count = export_items(opened, gallery, file, progress=advance)
    console.print(f"Exported {count:,} items: [bold]{file}[/]")


@gallery_app.command("import")
def import_(
    bundle: BundlePath,
    file: Annotated[Path, typer.Argument(help="A file that `coterie gallery export` wrote.", show_default=False)],
    state: State = None,
    originals: Originals = True,
    class_quota: Quota = DEFAULT_QUOTA,
    device: Device = "auto",
) -> None:
    """Enrol what another gallery exported; images are embedded anew if its encoder was another.

    Example: coterie gallery import bundles/photos enrolled.parquet
    """
    from coterie.exchange import import_items
    from coterie.progress import progress_bar

    with (
        _opened(bundle, state, originals, class_quota, device) as (opened, gallery),
        progress_bar("importing", None) as advance,
    ):
        count, rejected = import_items(opened, gallery, file, progress=lambda n, total: advance(n, f"of {total:,}"))
    show_rejected(tuple(rejected))
    console.print(f"Enrolled {count:,} items.")


@gallery_app.command("backup")
def backup(
    bundle: BundlePath,
    folder: Annotated[Path, typer.Argument(help="The folder to write.", show_default=False)],
    state: State = None,
) -> None:
    """Copy what was enrolled while services go on; the copy can take the place of the gallery's state folder.

    Example: coterie gallery backup bundles/photos backups/monday
    """
    from coterie.progress import progress_bar

    with _opened(bundle, state) as (_, gallery), progress_bar("copying images", None) as advance:
        gallery.backup(folder, lambda done, total: advance(1, f"of {total:,}"))
    console.print(f"Copied to [bold]{folder}[/]")


@contextmanager
def _opened(
    path: Path, state: Path | None, originals: bool = True, class_quota: int = DEFAULT_QUOTA, device: str = "auto"
) -> Iterator["tuple[Bundle, Gallery]"]:
    from coterie.bundle import Bundle
    from coterie.store import StoreOptions
    from serving.settings import Settings

    bundle = Bundle.open(path, device=device)
    folder = state or Settings.from_environment().state
    options = StoreOptions(originals=originals, class_quota=class_quota)
    with bundle.gallery(folder, options=options) as gallery:
        yield bundle, gallery


def _write(file: Path | None, values: Any) -> None:
    from coterie.files import write_text

    if file is not None:
        write_text(file, json.dumps(values, indent=1, ensure_ascii=False) + "\n")
