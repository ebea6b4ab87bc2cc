"""From single images to full batches.

Every item is prepared on its own in a thread pool, so that what waits in the queue can be run; what cannot be prepared
fails its own request only. A batch leaves the moment a runner is free, filled in order of arrival from small and large
requests alike; there is no delay, for waiting items gather by themselves while a runner is busy. Knows nothing of HTTP,
images or encoders.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from serving.errors import OverloadedError
from serving.observer import Observer

__all__ = ["Batcher", "ItemError"]

Item = TypeVar("Item")
Prepared = TypeVar("Prepared")
Result = TypeVar("Result")


class ItemError(Exception):
    """One item of a request failed, and the request with it; its `__cause__` is what was raised."""

    def __init__(self, index: int) -> None:
        super().__init__(f"item {index} failed")
        self.index = index


@dataclass(eq=False, slots=True)
class _Job(Generic[Prepared, Result]):
    """One prepared item and the future of its result; a cancelled future is a client that left."""

    value: Prepared
    result: "asyncio.Future[Result]"
    since: float


class Batcher(Generic[Item, Prepared, Result]):
    """Runs items of many requests together.

    Args:
        prepare: makes one item ready; called in a pool of `threads` threads.
        run: takes 1 to `max_batch` prepared items and returns as many results in their order, where an exception
            stands for the failure of its item; called in a pool of `runners` threads. If it raises, the batch is
            halved until the failure is that of one item.
        capacity: how many items may be under way, from arrival to answer.
        observer: is told how long items waited for a runner.

    Attributes:
        under_way: items between arrival and answer.
    """

    def __init__(
        self,
        prepare: Callable[[Item], Prepared],
        run: Callable[[list[Prepared]], Sequence[Result | Exception]],
        *,
        max_batch: int,
        capacity: int,
        threads: int,
        runners: int = 1,
        observer: Observer = Observer(),
    ) -> None:
        self._prepare, self._run, self._observer = prepare, run, observer
        self.max_batch, self.capacity = max_batch, capacity
        self._preparers = ThreadPoolExecutor(threads, thread_name_prefix="prepare")
        self._runners = ThreadPoolExecutor(runners, thread_name_prefix="run")
        self._free = runners
        self._queue: deque[_Job[Prepared, Result]] = deque()
        self.under_way = 0

    async def submit(self, items: Sequence[Item]) -> list[Result]:
        """Prepare and run the items of one request; results in their order.

        Cancelling the call takes what has not yet left out of the queue.

        Raises:
            OverloadedError: more items would be under way than there is capacity for.
            ItemError: the first that failed, named by its index.
        """
        if self.under_way + len(items) > self.capacity:
            raise OverloadedError("too many images are waiting: try again in a moment", headers={"Retry-After": "1"})
        self.under_way += len(items)
        try:
            loop = asyncio.get_running_loop()
            prepared = await _all(loop.run_in_executor(self._preparers, self._prepare, item) for item in items)
            now = time.perf_counter()
            jobs = [_Job(value, loop.create_future(), now) for value in prepared]
            self._queue.extend(jobs)
            self._dispatch()
            return await _all(job.result for job in jobs)
        finally:
            self.under_way -= len(items)

    @property
    def waiting(self) -> int:
        """Items that are prepared and wait for a runner."""
        return len(self._queue)

    def close(self) -> None:
        """Let go of the threads; nothing may be submitted afterwards."""
        self._preparers.shutdown(wait=False, cancel_futures=True)
        self._runners.shutdown(wait=False, cancel_futures=True)

    def _dispatch(self) -> None:
        while self._free and (batch := self._next_batch()):
            self._free -= 1
            now = time.perf_counter()
            for job in batch:
                self._observer.waited(1, now - job.since)
            outcome = asyncio.get_running_loop().run_in_executor(
                self._runners, self._run_apart, [job.value for job in batch]
            )
            outcome.add_done_callback(lambda done, batch=batch: self._deliver(batch, done))  # type: ignore[misc]

    def _next_batch(self) -> list[_Job[Prepared, Result]]:
        batch: list[_Job[Prepared, Result]] = []
        while self._queue and len(batch) < self.max_batch:
            job = self._queue.popleft()
            if not job.result.done():
                batch.append(job)
        return batch

    def _run_apart(self, values: list[Prepared]) -> Sequence[Result | Exception]:
        """Run a batch so that a failure stays with the item that causes it."""
        try:
            results = self._run(values)
            if len(results) != len(values):
                raise RuntimeError(f"{len(values)} items went in and {len(results)} results came out")
            return results
        except Exception as error:
            if len(values) == 1:
                return [error]
            half = len(values) // 2
            return [*self._run_apart(values[:half]), *self._run_apart(values[half:])]

    def _deliver(
        self, batch: list[_Job[Prepared, Result]], outcome: "asyncio.Future[Sequence[Result | Exception]]"
    ) -> None:
        self._free += 1
        try:
            results = outcome.result()
        except BaseException:  # the pool was closed, or its thread told to stop
            for job in batch:
                job.result.cancel()
            return
        for job, result in zip(batch, results, strict=True):
            if job.result.done():
                continue
            if isinstance(result, Exception):
                job.result.set_exception(result)
            else:
                job.result.set_result(result)
        self._dispatch()


async def _all(futures: Iterable["asyncio.Future[Any]"]) -> list[Any]:
    """Await all futures; the first in order that failed is raised as `ItemError`."""
    results = await asyncio.gather(*futures, return_exceptions=True)
    for index, result in enumerate(results):
        if isinstance(result, asyncio.CancelledError):  # by `close`; a cancelled caller does not come this far
            raise result
        if isinstance(result, Exception):
            raise ItemError(index) from result
    return results
