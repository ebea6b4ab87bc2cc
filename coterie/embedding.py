"""Any number of images into one Parquet file of embeddings, in bounded memory, at the speed of all processors.

What a shard holds depends on its images alone. So work that was killed goes on at its first unfinished shard, and the
file it ends with is to the byte that of work never disturbed. Memory does not grow with the number of images, but for
the list of paths that a folder or a CSV file is.
"""

import shutil
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from functools import partial
from itertools import islice
from pathlib import Path

from coterie.bundle import MODEL, Bundle
from coterie.decoding import Decoded, ImageRow, decode_rows, decoding_processes
from coterie.encoder import Encoder
from coterie.errors import CoterieError, DataError
from coterie.images import Preprocessing
from coterie.machine import processors
from coterie.progress import Advance, progress_bar
from coterie.providers import CPU
from coterie.session import BUCKETS
from coterie.shards import Batch, Embedded, Plan, count_parts, hold, join, take_up, write_part
from coterie.stream import open_stream

__all__ = ["Embedded", "embed_images"]

SHARD = 4096  # images; at 2,048 dimensions 32 MB
# One batch on one processor: 20 images of 224 × 224, which ResNet-18 embeds 1.02 times as fast as 5 at a time.
BATCH_PIXELS = 2**20


def embed_images(
    bundle: Path,
    data: Path,
    out: Path,
    *,
    device: str = "auto",
    threads: int | None = None,
    workers: int | None = None,
    shard: int = SHARD,
    overwrite: bool = False,
    restart: bool = False,
) -> Embedded:
    """Embed the images of a folder, a CSV or a Parquet file, as `open_stream` takes them, into the Parquet file `out`.

    Columns: path, label (null where there is none), sha256 of the encoded bytes in hexadecimal, embedding float32 (d)
    of unit length. Rows are in the order of `data`; images with the same bytes stay.

    Args:
        device: where the encoder runs, see `coterie.encoder.Encoder`.
        threads: that embed on the CPU; by default as many as this process may use.
        workers: processes that decode, by default one for each processor; 0 decodes in this process. A script that
            calls this with any needs the guard `if __name__ == "__main__":`.
        shard: images that are written, and after a kill done again, at a time.
        overwrite: replace `out`.
        restart: throw away what an unfinished run left, and begin again.

    Raises:
        DataError: the input cannot be used or none of its images can be read; `out` exists, or holds the unfinished
            work of other input.
        CoterieError: another process is writing `out`, or a decoding process was killed.
    """
    if out.suffix != ".parquet":
        raise DataError(f"{out} does not end in .parquet: name the file that is to be written so")
    if out.resolve() == data.resolve():
        raise DataError(f"{out} is the table that is to be read: choose another name for the embeddings")
    _refuse_existing(out, overwrite)
    opened = Bundle.open(bundle, device=device)
    # Batches side by side, each on one processor, wait for nobody; the threads of one batch wait for each other.
    encoder = Encoder(opened.path / MODEL, device=device, threads=1)
    with progress_bar("Looking through the images", None):
        stream = open_stream(data)
    plan = Plan(opened.manifest.id, opened.manifest.files[MODEL].sha256, stream.fingerprint, len(stream), shard)
    folder = out.with_name(out.name + ".parts")
    with hold(folder):
        _refuse_existing(out, overwrite)
        take_up(folder, plan, restart)
        done = count_parts(folder)
        start = min(done * shard, len(stream))
        preprocessing = opened.manifest.encoder.preprocessing
        streams = (threads or processors()) if encoder.provider == CPU.provider else encoder.concurrency
        batches = _embedded(stream.rows(start), stream.root, preprocessing, encoder, shard, streams, workers)
        with closing(batches), progress_bar("Embedding", len(stream) - start) as advance:
            for number, part in enumerate(_shards(_shown(batches, advance), shard), done):
                write_part(folder, number, part, encoder.dim)
        result = join(folder, out, plan, encoder.dim)
        shutil.rmtree(folder, ignore_errors=True)
    if not result.images:
        raise DataError(f"none of the {len(stream):,} images in {data} can be read: {result.rejects} has the reasons")
    return result


def _embedded(
    rows: Iterator[ImageRow],
    root: Path,
    preprocessing: Preprocessing,
    encoder: Encoder,
    shard: int,
    streams: int,
    workers: int | None,
) -> Generator[Batch, None, None]:
    """Batches in order, none of them across the border of two shards; while some are embedded, others are decoded."""
    workers = processors() if workers is None else workers
    height, width = encoder.input_size
    size = BUCKETS[-1]
    if encoder.provider == CPU.provider:
        size = min(size, max(1, BATCH_PIXELS // (height * width)))
    decode = partial(decode_rows, root, preprocessing)
    processes = decoding_processes(workers) if workers else None
    threads = ThreadPoolExecutor(streams)
    pending: deque[Future[Batch]] = deque()

    def submit(chunk: list[ImageRow]) -> Future[Batch]:
        decoded = processes.submit(decode, chunk).result if processes else partial(decode, chunk)
        return threads.submit(lambda: _embed(encoder, decoded()))

    try:
        for chunk in _chunks(rows, size, shard):
            pending.append(submit(chunk))
            # Twice as many as can be worked on: while the first is waited for, nobody runs dry.
            if len(pending) >= 2 * (streams + workers):
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise CoterieError(
            "a process that decodes images was killed, most likely for want of memory: run the same command again to "
            "go on where it stopped, with fewer --workers"
        ) from error
    finally:
        for pool in filter(None, (processes, threads)):
            pool.shutdown(cancel_futures=True)


def _embed(encoder: Encoder, decoded: Decoded) -> Batch:
    # The pixels go: a shard's batches are kept until it is written.
    return Batch(decoded.rows, encoder.embed(decoded.pixels), decoded.rejected)


def _chunks(rows: Iterator[ImageRow], size: int, shard: int) -> Iterator[list[ImageRow]]:
    position = 0
    while chunk := list(islice(rows, min(size, shard - position))):
        yield chunk
        position = (position + len(chunk)) % shard


def _shown(batches: Iterable[Batch], advance: Advance) -> Iterator[Batch]:
    """The same batches, with their number on the progress bar."""
    began, images = time.monotonic(), 0
    for batch in batches:
        images += len(batch)
        advance(len(batch), f"{images / (time.monotonic() - began):,.0f} images/s")
        yield batch


def _shards(batches: Iterable[Batch], shard: int) -> Iterator[list[Batch]]:
    part: list[Batch] = []
    size = 0
    for batch in batches:
        part.append(batch)
        size += len(batch)
        if size == shard:
            yield part
            part, size = [], 0
    if part:
        yield part


def _refuse_existing(out: Path, overwrite: bool) -> None:
    if out.exists() and not overwrite:
        raise DataError(f"{out} exists already: choose another file, or give --overwrite")
