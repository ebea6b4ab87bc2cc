"""From requests to full batches.

A request is one job of one or more rows, ready to be run. A batch leaves the moment a runner is free, filled in order
of arrival from small and large jobs alike, of which a large one may leave in parts; there is no delay, for waiting rows
gather by themselves while a runner is busy. Only jobs that are about to be ready are waited for, a little: else the
first of many that arrive together would leave alone. Knows nothing of HTTP, images or encoders.
"""

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from serving.errors import OverloadedError
from serving.observer import Observer

__all__ = ["Batcher", "Outcome", "Part"]

Row = TypeVar("Row")
Context = TypeVar("Context")
Result = TypeVar("Result")
Results = Sequence[Result | Exception]

# The longest that a job which is ready waits for others that nearly are.
HOLD_SECONDS = 0.002
# What takes less in all is not worth dividing among runners.
DIVIDED_SECONDS = 0.02
# What is measured over less says little.
PACE_SECONDS = 1.0
# Who arrives in a turn of the event loop that has taken in others for so long, while so many rows are under way, is
# refused: else one turn would take in hundreds, and nobody else be heard for seconds.
TURN_SECONDS, MANY_UNDER_WAY = 0.5, 64


@dataclass(eq=False, slots=True)
class Part(Generic[Row, Context]):
    """Rows of one job that are in a batch together, with what the job said about them."""

    rows: Sequence[Row]
    context: Context


@dataclass(eq=False, slots=True)
class Outcome(Generic[Result]):
    """A job's results, one for each row, where an exception stands for the failure of its row.

    Attributes:
        waited: seconds that its last row was in the queue.
    """

    results: Results[Result]
    waited: float


@dataclass(eq=False, slots=True)
class _Job(Generic[Row, Context, Result]):
    """Rows that have not left yet, how many parts are out, and the results of those that are back.

    A cancelled future is a client that left.
    """

    rows: Sequence[Row]
    context: Context
    done: "asyncio.Future[None]"
    since: float
    waited: float = 0.0
    out: int = 0
    results: list[Results[Result]] = field(default_factory=list)

    def take(self, most: int) -> Part[Row, Context]:
        rows = self.rows
        taken, self.rows = (rows, rows[:0]) if len(rows) <= most else (rows[:most], rows[most:])
        self.results.append(())
        self.out += 1
        return Part(taken, self.context)

    def put(self, place: int, results: Results[Result]) -> None:
        self.results[place] = results
        self.out -= 1
        if not self.out and not len(self.rows) and not self.done.done():
            self.done.set_result(None)


class Batcher(Generic[Row, Context, Result]):
    """Runs rows of many jobs together.

    Args:
        run: takes parts of 1 to `max_batch` rows in all, and returns for each part as many results, in their order,
            where an exception stands for the failure of its row; called in a pool of `runners` threads. If it raises,
            the batch is halved until the failure is that of one row.
        capacity: how many rows may be under way, from arrival to answer.
        spread: whether a batch takes time in proportion to its rows: then, where that is long, none takes more than its
            share of the rows under way, so that a runner which becomes free finds some waiting.
        patience: seconds; further rows are refused while those under way would take longer.
        pace: rows a second that will be answered, about; it is measured anew.
        observer: is told how long rows waited for a runner.

    Attributes:
        under_way: rows between arrival and answer.
    """

    def __init__(
        self,
        run: Callable[[list[Part[Row, Context]]], list[Results[Result]]],
        *,
        max_batch: int,
        capacity: int,
        spread: bool = False,
        patience: float = math.inf,
        pace: float = math.inf,
        runners: int = 1,
        observer: Observer = Observer(),
    ) -> None:
        self._run, self._observer = run, observer
        self.max_batch, self.capacity, self._patience = max_batch, capacity, patience
        self._runners = ThreadPoolExecutor(runners, thread_name_prefix="run")
        self._free = runners
        self._shares = runners + 1 if spread else 1
        self._ran_rows, self._ran_seconds = 1.0, 0.0  # lately
        self._queue: deque[_Job[Row, Context, Result]] = deque()
        self._coming = 0
        self._holding = self._soon = False
        self.under_way = 0
        # Rows a second that were answered lately, and the count that the next measurement comes from.
        self._pace, self._measured, self._answered, self._since = pace, False, 0, 0.0
        self._turn: float | None = None  # when the first of those arrived that the loop takes in at once

    def check_room(self, rows: int = 1) -> None:
        """Whether there is room for so many more rows.

        Raises:
            OverloadedError: more would be under way than there is capacity for, or those that are would take too long,
                or the event loop is too busy with others.
        """
        ahead = self.under_way / self._pace
        if self.under_way + rows > self.capacity or ahead > self._patience or self._is_long_turn():
            raise OverloadedError(
                "too many images are waiting: try again in a moment", headers={"Retry-After": str(max(1, round(ahead)))}
            )

    @contextmanager
    def room_for(self, rows: int) -> Iterator[None]:
        """Keep room for so many rows, from their arrival until they are answered.

        Raises:
            OverloadedError: as `check_room`.
        """
        self.check_room(rows)
        if not self.under_way:  # an idle time says nothing about the pace
            self._answered, self._since = 0, time.perf_counter()
        self.under_way += rows
        try:
            yield
            self._measure_pace(rows)  # who left or was refused meanwhile says nothing of it
        finally:
            self.under_way -= rows

    @contextmanager
    def coming(self) -> Iterator[None]:
        """Make a job ready; others are held back for it for at most `HOLD_SECONDS`."""
        self._coming += 1
        try:
            yield
        finally:
            self._coming -= 1
            if not self._coming and self._queue:
                self._dispatch_soon()

    async def submit(self, rows: Sequence[Row], context: Context) -> Outcome[Result]:
        """Run the rows of one job, at least one, that can be cut by slices.

        Cancelling the call takes what has not yet left out of the queue.
        """
        job = _Job[Row, Context, Result](rows, context, asyncio.get_running_loop().create_future(), time.perf_counter())
        self._queue.append(job)
        self._dispatch_soon()
        await job.done
        parts = job.results
        return Outcome(parts[0] if len(parts) == 1 else [result for part in parts for result in part], job.waited)

    @property
    def waiting(self) -> int:
        """Rows that wait for a runner."""
        return sum(len(job.rows) for job in self._queue if not job.done.done())

    def close(self) -> None:
        """Let go of the threads; nothing may be submitted afterwards."""
        self._runners.shutdown(wait=False, cancel_futures=True)

    def _is_long_turn(self) -> bool:
        now = time.perf_counter()
        if self._turn is None:
            self._turn = now
            asyncio.get_running_loop().call_soon(self._end_turn)
        return self.under_way >= MANY_UNDER_WAY and now - self._turn > TURN_SECONDS

    def _end_turn(self) -> None:
        self._turn = None

    def _measure_pace(self, rows: int) -> None:
        """How many rows a second are answered, wherever it is that they spend their time: decoding, queue, search."""
        self._answered += rows
        now = time.perf_counter()
        if self._answered and now - self._since >= PACE_SECONDS:
            pace = self._answered / (now - self._since)
            # Large batches make single measurements jump.
            self._pace = 0.75 * self._pace + 0.25 * pace if self._measured else pace
            self._measured = True
            self._answered, self._since = 0, now

    def _dispatch_soon(self) -> None:
        """Once all that has arrived by now has been submitted: then it leaves together."""
        if not self._soon:
            self._soon = True
            asyncio.get_running_loop().call_soon(self._dispatch)

    def _dispatch(self) -> None:
        self._soon = False
        if self._free and self._queue and self._coming and self._is_early():
            return
        while self._free and (batch := self._next_batch()):
            self._free -= 1
            outcome = asyncio.get_running_loop().run_in_executor(
                self._runners, self._timed, [part for _, _, part in batch]
            )
            places = [(job, place) for job, place, _ in batch]
            outcome.add_done_callback(lambda done, places=places: self._deliver(places, done))  # type: ignore[misc]

    def _is_early(self) -> bool:
        """Whether a batch could take more, and is worth holding back for jobs that are coming; sees to its end."""
        oldest, rows = self._queue[0], 0
        for job in self._queue:
            rows += len(job.rows)
            if rows >= self._share():
                return False
        left = oldest.since + HOLD_SECONDS - time.perf_counter()
        if left <= 0:
            return False
        if not self._holding:
            self._holding = True
            asyncio.get_running_loop().call_later(left, self._let_go)
        return True

    def _let_go(self) -> None:
        self._holding = False
        self._dispatch()

    def _share(self) -> int:
        """How many rows a batch takes now, though one job may bring more."""
        if self.under_way * self._ran_seconds < DIVIDED_SECONDS * self._ran_rows:
            return self.max_batch
        return min(self.max_batch, -(-self.under_way // self._shares))

    def _next_batch(self) -> list[tuple[_Job[Row, Context, Result], int, Part[Row, Context]]]:
        """Parts for one batch, each with its job and its place among the job's results."""
        batch, room, now = [], self.max_batch, time.perf_counter()
        kept = room - self._share()
        while self._queue and room:
            job = self._queue[0]
            if not job.done.done():
                if batch and kept and len(job.rows) > room - kept:
                    break
                part = job.take(room)
                batch.append((job, len(job.results) - 1, part))
                room -= len(part.rows)
                job.waited = now - job.since
                self._observer.waited(len(part.rows), job.waited)
                if len(job.rows):
                    break
            self._queue.popleft()
        return batch

    def _timed(self, parts: list[Part[Row, Context]]) -> tuple[list[Results[Result]], float]:
        """What a batch gives, and the seconds that it took."""
        began = time.perf_counter()
        return self._run_apart(parts), time.perf_counter() - began

    def _run_apart(self, parts: list[Part[Row, Context]]) -> list[Results[Result]]:
        """Run a batch so that a failure stays with the row that causes it."""
        try:
            results = self._run(parts)
            came, went = [len(found) for found in results], [len(part.rows) for part in parts]
            if came != went:
                raise RuntimeError(f"{went} rows went in and {came} results came out")
            return results
        except Exception as error:
            count = sum(len(part.rows) for part in parts)
            if count == 1:
                return [[error]]
            first, second = _halves(parts, count // 2)
            before, after = self._run_apart(first), self._run_apart(second)
            if len(before) + len(after) > len(parts):
                return [*before[:-1], [*before[-1], *after[0]], *after[1:]]
            return before + after

    def _deliver(
        self,
        places: list[tuple[_Job[Row, Context, Result], int]],
        outcome: "asyncio.Future[tuple[list[Results[Result]], float]]",
    ) -> None:
        self._free += 1
        try:
            found, seconds = outcome.result()
        except BaseException:  # the pool was closed, or its thread told to stop
            for job, _ in places:
                job.done.cancel()
            return
        for (job, place), results in zip(places, found, strict=True):
            job.put(place, results)
        self._ran_rows = 0.9 * self._ran_rows + sum(map(len, found))
        self._ran_seconds = 0.9 * self._ran_seconds + seconds
        self._dispatch()


def _halves(parts: list[Part[Row, Context]], count: int) -> tuple[list[Part[Row, Context]], list[Part[Row, Context]]]:
    """The first `count` rows of a batch and the others; the part on the border is cut in two."""
    first: list[Part[Row, Context]] = []
    for number, part in enumerate(parts):
        if count < len(part.rows):
            if not count:
                return first, parts[number:]
            rest = Part(part.rows[count:], part.context)
            return [*first, Part(part.rows[:count], part.context)], [rest, *parts[number + 1 :]]
        first.append(part)
        count -= len(part.rows)
    return first, []
