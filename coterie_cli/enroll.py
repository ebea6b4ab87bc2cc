"""`coterie enroll`: labelled images into a running service."""

import csv
import io
from pathlib import Path

from rich.console import Console

from coterie.client import Client
from coterie.dataset import Rejected
from coterie.decoding import ImageRow
from coterie.enrolment import Enrolled
from coterie.errors import DataError
from coterie.files import write_text
from coterie.images import IMAGE_SUFFIXES
from coterie.progress import progress_bar
from coterie.stream import open_stream
from coterie.upload import upload
from coterie_cli.options import show_rejected

__all__ = ["enroll_data"]

console = Console()


def enroll_data(data: Path, url: str, *, key: str | None, label: str | None, rejects: Path | None) -> Enrolled:
    """Send the images of a folder, a table or a single file; list those left out in `rejects`, or beside `data`.

    Raises:
        DataError: there are no images, or none can be used; ServiceError: the service refuses or cannot be reached.
    """
    if data.is_file() and data.suffix.lower() in IMAGE_SUFFIXES:
        rows, count, root = iter([ImageRow(data.name)]), 1, data.parent
    else:
        stream = open_stream(data)
        rows, count, root = stream.rows(0), len(stream), stream.root
    with Client(url, key) as client:
        client.classes()  # whether there is a service, and the key is good, shows before any image is read
        with progress_bar(f"enrolling {data.name}", count) as advance:
            done = upload(client, rows, root, label=label, progress=advance)
    beside = data if data.name else data.resolve()  # "." has no name
    place = rejects or beside.with_name(f"{beside.name}.rejects.csv")
    if done.rejected:
        _write_rejects(place, done.rejected)
        show_rejected(done.rejected)
        Console(stderr=True).print(f"All of them: {place}", markup=False, highlight=False, soft_wrap=True)
    if not done.added and not done.known:
        raise DataError(f"none of the {count:,} images could be enrolled: {place} has the reasons")
    already = f"; {done.known:,} were there already." if done.known else "."
    console.print(f"Enrolled {len(done.added):,} images{already}")
    return done


def _write_rejects(path: Path, rejected: tuple[Rejected, ...]) -> None:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(("path", "reason"))
    # The name of a file need not be UTF-8.
    writer.writerows((str(one.path).encode("utf-8", "backslashreplace").decode(), one.reason) for one in rejected)
    write_text(path, text.getvalue())
