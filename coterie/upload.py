"""Image files into a running service: read here, embedded and kept there. The same work again goes on where it stopped.

What is there already is asked of the service, by the ids that images have from their bytes. So there is no journal that
could be lost or be wrong, and nothing is sent twice.
"""

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from coterie.client import Client
from coterie.dataset import Rejected
from coterie.decoding import ImageRow
from coterie.enrolment import Enrolled, Example, read_example, same_bytes
from coterie.errors import ServiceError

__all__ = ["upload"]

# Of one request, which as base64 takes a third more; the service takes 64 MB.
REQUEST_BYTES = 24 * 2**20
# Of images that wait until there are enough of their class for a request.
WAITING_BYTES = 128 * 2**20


@dataclass(frozen=True)
class _Sent:
    added: tuple[str, ...]
    known: int
    rejected: tuple[Rejected, ...]


def upload(
    client: Client,
    images: Iterable[ImageRow],
    root: Path,
    *,
    label: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> Enrolled:
    """Enrol images whose files lie below `root`; several requests are under way at a time.

    An image with the bytes of one that came before is left out, even under another label. An image that is in the
    gallery under another label moves to this one.

    Args:
        label: of all images, instead of their own.

    Raises:
        ServiceError: the service refuses or cannot be reached. What came before is enrolled.
    """
    added: list[str] = []
    rejected: list[Rejected] = []
    known = 0

    def take(done: Future[_Sent]) -> None:
        nonlocal known
        sent = done.result()
        added.extend(sent.added)
        rejected.extend(sent.rejected)
        known += sent.known
        if progress:
            progress(len(sent.added) + len(sent.rejected) + sent.known)

    def left_out(one: Rejected) -> None:
        rejected.append(one)
        if progress:
            progress(1)

    pending: deque[Future[_Sent]] = deque()
    pool = ThreadPoolExecutor(client.concurrency, thread_name_prefix="upload")
    try:
        for part in _parts(_readable(images, root, label, left_out), client.batch):
            pending.append(pool.submit(_send, client, part))
            if len(pending) > client.concurrency:
                take(pending.popleft())
        while pending:
            take(pending.popleft())
    finally:
        pool.shutdown(cancel_futures=True)
    return Enrolled(tuple(added), known, tuple(rejected))


def _readable(
    images: Iterable[ImageRow], root: Path, label: str | None, left_out: Callable[[Rejected], None]
) -> Iterator[Example]:
    seen: dict[str, tuple[str, str]] = {}  # path and label of each id
    for row in images:
        example = read_example(row, root, label)
        if isinstance(example, Rejected):
            left_out(example)
        elif example.id in seen:
            left_out(Rejected(Path(example.path), same_bytes(*seen[example.id], example)))
        else:
            seen[example.id] = example.path, example.label
            yield example


def _parts(examples: Iterable[Example], batch: int) -> Iterator[list[Example]]:
    """Examples of one class each, as many as go in a request; however mixed they come."""
    waiting: dict[str, list[Example]] = defaultdict(list)
    sizes: dict[str, int] = defaultdict(int)
    for example in examples:
        name, size = example.label, len(example.content)
        if waiting[name] and sizes[name] + size > REQUEST_BYTES:
            sizes.pop(name)
            yield waiting.pop(name)
        waiting[name].append(example)
        sizes[name] += size
        if len(waiting[name]) == batch:
            sizes.pop(name)
            yield waiting.pop(name)
        elif sum(sizes.values()) > WAITING_BYTES:
            largest = max(sizes, key=sizes.__getitem__)
            sizes.pop(largest)
            yield waiting.pop(largest)
    yield from (part for part in waiting.values() if part)


def _send(client: Client, part: list[Example]) -> _Sent:
    there = {item.id: item.label for item in client.items([example.id for example in part])}
    wanted = [example for example in part if there.get(example.id) != example.label]
    added, rejected = _enroll(client, wanted)
    return _Sent(tuple(added), len(part) - len(wanted), tuple(rejected))


def _enroll(client: Client, part: list[Example]) -> tuple[list[str], list[Rejected]]:
    if not part:
        return [], []
    try:
        done = client.enroll(
            part[0].label,
            [example.content for example in part],
            # The name of a file need not be UTF-8, and JSON is.
            metadata=[{"path": example.path.encode("utf-8", "backslashreplace").decode()} for example in part],
            partial=True,
        )
    except ServiceError as error:
        if error.status != 413:
            raise
        if len(part) == 1:
            return [], [Rejected(Path(part[0].path), str(error))]
        # This service takes less at a time.
        halves = [_enroll(client, half) for half in (part[: len(part) // 2], part[len(part) // 2 :])]
        return halves[0][0] + halves[1][0], halves[0][1] + halves[1][1]
    rejected = [
        Rejected(Path(part[one.index].path), one.message.removeprefix(f"image {one.index}: ")) for one in done.refused
    ]
    return [item.id for item in done.items], rejected
