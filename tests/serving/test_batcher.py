"""The batcher alone, with integers for images."""

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest

from serving.batcher import Batcher, ItemError
from serving.errors import OverloadedError

DEADLINE = 20.0
POISON = 13


class Doubler:
    """Doubles integers; records its batches, and holds them back while `gate` is closed."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, values: list[int]) -> list[int | Exception]:
        self.batches.append(values)
        assert self.gate.wait(DEADLINE)
        if POISON in values:
            raise ArithmeticError("poison")
        return [2 * value for value in values]


def prepare(item: str) -> int:
    return int(item)


@pytest.fixture
def run() -> Iterator[Doubler]:
    doubler = Doubler()
    yield doubler
    doubler.gate.set()


def batcher(run: Callable[[list[int]], Any], **changes: int) -> Batcher[str, int, int]:
    settings = {"max_batch": 4, "capacity": 64, "threads": 2} | changes
    return Batcher(prepare, run, **settings)


def play(scene: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scene, DEADLINE))


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0)


def test_results_come_in_the_order_of_the_items_though_batches_are_smaller(run: Doubler) -> None:
    async def scene() -> None:
        values = [str(i) for i in range(20, 30)]
        assert await batcher(run).submit(values) == [2 * int(value) for value in values]

    play(scene())
    assert [len(batch) for batch in run.batches] == [4, 4, 2]


def test_a_lone_item_leaves_at_once(run: Doubler) -> None:
    async def scene() -> None:
        assert await batcher(run).submit(["1"]) == [2]

    play(scene())
    assert run.batches == [[1]]


def test_what_waits_while_a_runner_is_busy_leaves_together_in_order_of_arrival(run: Doubler) -> None:
    async def scene() -> None:
        one = batcher(run)
        run.gate.clear()
        first = asyncio.ensure_future(one.submit(["0"]))
        await until(lambda: len(run.batches) == 1)
        later = []
        for items in (["1"], ["2", "3", "4"], ["5"]):
            before = one.waiting
            later.append(asyncio.ensure_future(one.submit(items)))
            await until(lambda before=before, items=items: one.waiting == before + len(items))  # type: ignore[misc]
        run.gate.set()
        assert await asyncio.gather(first, *later) == [[0], [2], [4, 6, 8], [10]]

    play(scene())
    assert run.batches == [[0], [1, 2, 3, 4], [5]]


def test_two_runners_take_two_batches_at_a_time(run: Doubler) -> None:
    async def scene() -> None:
        one = batcher(run, runners=2, max_batch=2)
        run.gate.clear()
        answer = asyncio.ensure_future(one.submit(["1", "2", "3", "4", "5"]))
        await until(lambda: len(run.batches) == 2)
        assert one.waiting == 1
        run.gate.set()
        assert await answer == [2, 4, 6, 8, 10]

    play(scene())


def test_an_item_that_cannot_be_prepared_fails_its_own_request_only(run: Doubler) -> None:
    async def scene() -> None:
        one = batcher(run)
        good, bad = await asyncio.gather(one.submit(["1", "2"]), one.submit(["3", "x", "y"]), return_exceptions=True)
        assert good == [2, 4]
        assert isinstance(bad, ItemError) and bad.index == 1 and isinstance(bad.__cause__, ValueError)
        assert one.under_way == 0

    play(scene())
    assert sorted(value for batch in run.batches for value in batch) == [1, 2]


def test_an_item_that_fails_in_a_batch_does_not_harm_the_others(run: Doubler) -> None:
    async def scene() -> None:
        one = batcher(run)
        run.gate.clear()
        blocker = asyncio.ensure_future(one.submit(["0"]))
        await until(lambda: len(run.batches) == 1)
        requests = [asyncio.ensure_future(one.submit([str(value)])) for value in (1, POISON, 2, 3)]
        await until(lambda: one.waiting == 4)
        run.gate.set()
        await blocker
        results = await asyncio.gather(*requests, return_exceptions=True)
        assert [results[0], results[2], results[3]] == [[2], [4], [6]]
        assert isinstance(results[1], ItemError) and isinstance(results[1].__cause__, ArithmeticError)
        assert await one.submit(["7"]) == [14]

    play(scene())
    assert len(run.batches[1]) == 4


def test_an_exception_among_the_results_is_that_items_failure() -> None:
    async def scene() -> None:
        one = batcher(lambda values: [KeyError("no") if value == 2 else value for value in values])
        with pytest.raises(ItemError) as caught:
            await one.submit(["1", "2", "3"])
        assert caught.value.index == 1

    play(scene())


def test_a_run_that_loses_results_fails_instead_of_hanging() -> None:
    async def scene() -> None:
        with pytest.raises(ItemError) as caught:
            await batcher(lambda values: []).submit(["1", "2"])
        assert isinstance(caught.value.__cause__, RuntimeError)

    play(scene())


def test_more_than_the_capacity_is_refused_at_once_and_taken_again_later(run: Doubler) -> None:
    async def scene() -> None:
        one = batcher(run, capacity=3)
        run.gate.clear()
        first = asyncio.ensure_future(one.submit(["1", "2"]))
        await until(lambda: one.under_way == 2)
        with pytest.raises(OverloadedError) as caught:
            await one.submit(["3", "4"])
        assert caught.value.headers["Retry-After"]
        second = asyncio.ensure_future(one.submit(["3"]))
        run.gate.set()
        assert await asyncio.gather(first, second) == [[2, 4], [6]]
        assert await one.submit(["5", "6", "7"]) == [10, 12, 14]

    play(scene())


def test_the_work_of_a_cancelled_request_is_dropped_and_its_room_given_back(run: Doubler) -> None:
    async def scene() -> None:
        one = batcher(run, capacity=4)
        run.gate.clear()
        busy = asyncio.ensure_future(one.submit(["0"]))
        await until(lambda: len(run.batches) == 1)
        leaving = asyncio.ensure_future(one.submit(["1", "2"]))
        staying = asyncio.ensure_future(one.submit(["3"]))
        await until(lambda: one.waiting == 3)
        leaving.cancel()
        await until(leaving.cancelled)
        assert one.under_way == 2
        run.gate.set()
        assert await asyncio.gather(busy, staying) == [[0], [6]]

    play(scene())
    assert run.batches == [[0], [3]]


def test_a_request_that_is_cancelled_while_it_runs_frees_the_runner(run: Doubler) -> None:
    async def scene() -> None:
        one = batcher(run)
        run.gate.clear()
        leaving = asyncio.ensure_future(one.submit(["1"]))
        await until(lambda: len(run.batches) == 1)
        leaving.cancel()
        await until(leaving.cancelled)
        run.gate.set()
        assert await one.submit(["2"]) == [4]

    play(scene())


def test_a_thousand_requests_at_once_are_all_answered(run: Doubler) -> None:
    async def scene() -> None:
        one = batcher(run, capacity=2000, max_batch=32)
        answers = await asyncio.gather(*(one.submit([str(i + 100)]) for i in range(1000)))
        assert answers == [[2 * (i + 100)] for i in range(1000)]
        assert one.under_way == one.waiting == 0

    play(scene())
