"""Image files to pixels in processes of their own, for work by the million.

Small JPEGs decode in less time than Python takes to hand the interpreter lock around, so threads would stand in line.
Where the system can, the processes are forked from one that has loaded nothing but this module, which therefore imports
little: neither pyarrow nor ONNX Runtime.
"""

import hashlib
import os
import signal
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import forkserver, get_all_start_methods, get_context, parent_process
from multiprocessing.context import BaseContext
from pathlib import Path
from threading import Thread

import numpy as np
from numpy.typing import NDArray

from coterie.errors import ImageError
from coterie.images import Preprocessing, load_pixels, read_file

__all__ = ["Decoded", "DecodedRow", "ImageRow", "decode_rows", "decoding_processes", "load_ahead"]

_FORKSERVER = "forkserver" in get_all_start_methods()


@dataclass(frozen=True)
class ImageRow:
    """An image before it is read: the file at `path`, or `content`, which are its encoded bytes."""

    path: str
    label: str | None = None
    content: bytes | None = None


@dataclass(frozen=True)
class DecodedRow:
    """An image that was read, with the sha256 of its encoded bytes, hexadecimal."""

    path: str
    label: str | None
    sha256: str


@dataclass(frozen=True)
class Decoded:
    """Consecutive images that were read, and those that could not be.

    Attributes:
        rows: those in `pixels`, in their order.
        pixels: uint8 (n, height, width, 3).
        rejected: path and reason of each of the others.
    """

    rows: tuple[DecodedRow, ...]
    pixels: NDArray[np.uint8]
    rejected: tuple[tuple[str, str], ...]


def decode_rows(root: Path, preprocessing: Preprocessing, rows: Sequence[ImageRow]) -> Decoded:
    """Read and decode images whose files lie below `root`."""
    pixels = np.empty((len(rows), *preprocessing.input_size, 3), dtype=np.uint8)
    kept: list[DecodedRow] = []
    rejected: list[tuple[str, str]] = []
    for row in rows:
        # What follows is written as UTF-8, which the name of a file need not be.
        path = row.path.encode("utf-8", "backslashreplace").decode()
        try:
            content = read_file(root / row.path) if row.content is None else row.content
            pixels[len(kept)] = load_pixels(content, preprocessing)
        except ImageError as error:
            rejected.append((path, str(error)))
        except ValueError as error:  # a path from a table with a null character
            rejected.append((path, f"cannot be read ({error})"))
        else:
            kept.append(DecodedRow(path, row.label, hashlib.sha256(content).hexdigest()))
    return Decoded(tuple(kept), pixels[: len(kept)], tuple(rejected))


def load_ahead() -> None:
    """Begin to load what decoding processes start from, beside whatever this process does next."""
    if _FORKSERVER:
        _context()
        forkserver.ensure_running()


def decoding_processes(workers: int) -> ProcessPoolExecutor:
    """A pool whose processes are on their way when this returns, and end with this process, even when it is killed."""
    pool = ProcessPoolExecutor(workers, mp_context=_context(), initializer=_follow_parent)
    for _ in range(workers):
        pool.submit(os.getpid)  # each starts a process, which otherwise waits for work
    return pool


def _context() -> BaseContext:
    # A fork of this process would copy the locks of ONNX Runtime's threads in whatever state they are.
    context = get_context("forkserver" if _FORKSERVER else "spawn")
    context.set_forkserver_preload([__name__])
    return context


def _follow_parent() -> None:
    # Ctrl-C reaches every process of the terminal; the parent decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
