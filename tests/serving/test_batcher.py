"""The batcher alone, with integers for images."""

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from serving.batcher import Batcher, Part
from serving.errors import OverloadedError
from serving.observer import Observer

DEADLINE = 20.0
POISON = 13


class Doubler:
    """Doubles integers; records its batches, and holds them back while `gate` is closed."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, parts: list[Part[int, str]]) -> list[list[int | Exception]]:
        values = [value for part in parts for value in part.rows]
        self.batches.append(values)
        assert self.gate.wait(DEADLINE)
        if POISON in values:
            raise ArithmeticError("poison")
        return [[2 * value for value in part.rows] for part in parts]


@pytest.fixture
def run() -> Iterator[Doubler]:
    doubler = Doubler()
    yield doubler
    doubler.gate.set()


def batcher(run: Callable[[list[Any]], Any], **changes: Any) -> Batcher[int, str, int]:
    settings = {"max_batch": 4, "capacity": 64} | changes
    return Batcher(run, **settings)


async def ask(one: Batcher[int, str, int], *values: int) -> list[int | Exception]:
    with one.room_for(len(values)):
        return list((await one.submit(values, "")).results)


def play(scene: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scene, DEADLINE))


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0)


def test_results_come_in_the_order_of_the_rows_though_batches_are_smaller(run: Doubler) -> None:
    async def scene() -> None:
        assert await ask(batcher(run), *range(20, 30)) == [2 * value for value in range(20, 30)]

    play(scene())
    assert [len(batch) for batch in run.batches] == [4, 4, 2]


def test_a_lone_row_leaves_at_once(run: Doubler) -> None:
    async def scene() -> None:
        assert await ask(batcher(run), 1) == [2]

    play(scene())
    assert run.batches == [[1]]


def test_a_lone_row_after_a_burst_waits_for_no_timer(run: Doubler, monkeypatch: pytest.MonkeyPatch) -> None:
    def set_timer(*_: Any) -> None:
        raise AssertionError("a row that is alone was held back")

    async def scene() -> None:
        one = batcher(run)
        await asyncio.gather(*(ask(one, row) for row in range(60)))
        run.batches.clear()
        monkeypatch.setattr(asyncio.get_running_loop(), "call_later", set_timer)
        assert await ask(one, 1) == [2]

    play(scene())
    assert run.batches == [[1]]


def test_a_job_that_fills_a_batch_is_run_as_it_was_sent() -> None:
    """Nothing is copied, and nothing made for each row."""
    seen = []

    def same(parts: list[Part[int, str]]) -> list[Any]:
        seen.extend(parts)
        return [part.rows for part in parts]

    async def scene() -> None:
        values = (1, 2, 3, 4)
        outcome = await batcher(same).submit(values, "question")
        assert outcome.results is values

    play(scene())
    assert [part.context for part in seen] == ["question"]


def test_what_waits_while_a_runner_is_busy_leaves_together_in_order_of_arrival(run: Doubler) -> None:
    async def scene() -> None:
        one = batcher(run)
        run.gate.clear()
        first = asyncio.ensure_future(ask(one, 0))
        await until(lambda: len(run.batches) == 1)
        later = []
        for values in ([1], [2, 3, 4, 5, 6, 7, 8, 9], [10], [11, 12]):
            before = one.waiting
            later.append(asyncio.ensure_future(ask(one, *values)))
            await until(lambda before=before, values=values: one.waiting == before + len(values))  # type: ignore[misc]
        run.gate.set()
        assert await first == [0]
        answers = await asyncio.gather(*later)
        assert answers == [[2], [4, 6, 8, 10, 12, 14, 16, 18], [20], [22, 24]]

    play(scene())
    assert run.batches == [[0], [1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]]


def test_two_runners_take_two_batches_at_a_time(run: Doubler) -> None:
    async def scene() -> None:
        one = batcher(run, runners=2, max_batch=2)
        run.gate.clear()
        answer = asyncio.ensure_future(ask(one, 1, 2, 3, 4, 5))
        await until(lambda: len(run.batches) == 2)
        assert one.waiting == 1
        run.gate.set()
        assert await answer == [2, 4, 6, 8, 10]

    play(scene())


@pytest.mark.parametrize(
    ("long", "jobs", "sizes"),
    [
        (True, [1] * 12, [4, 4, 4]),  # four rows are left for the runner that is free first
        (True, [3, 3, 1, 5], [3, 4, 5]),  # no job is cut
        (True, [20], [16, 4]),  # but by the size of a batch
        (False, [1] * 12, [12]),
    ],
)
def test_long_work_is_divided_so_that_a_free_runner_finds_some(
    run: Doubler, monkeypatch: pytest.MonkeyPatch, long: bool, jobs: list[int], sizes: list[int]
) -> None:
    async def scene() -> None:
        one = batcher(run, runners=2, max_batch=16, spread=True)
        await ask(one, 0)  # tells how long a row takes
        run.gate.clear()
        answers = [asyncio.ensure_future(ask(one, *range(count))) for count in jobs]
        await until(lambda: len(run.batches) == 1 + min(2, len(sizes)))
        assert one.waiting == sum(sizes[2:])
        run.gate.set()
        await asyncio.gather(*answers)

    monkeypatch.setattr("serving.batcher.DIVIDED_SECONDS", 0 if long else float("inf"))
    play(scene())
    assert sorted(map(len, run.batches[1:3])) == sorted(sizes[:2])


def test_parts_of_a_job_that_come_back_in_another_order_are_put_in_theirs() -> None:
    gate = threading.Event()

    def run(parts: list[Part[int, str]]) -> list[list[int]]:
        if parts[0].rows[0] == 1:
            assert gate.wait(DEADLINE)
        else:
            gate.set()
        return [[2 * value for value in part.rows] for part in parts]

    async def scene() -> None:
        assert await ask(batcher(run, runners=2, max_batch=2), 1, 2, 3) == [2, 4, 6]

    play(scene())


@pytest.mark.parametrize("place", range(6))
def test_a_row_that_fails_does_not_harm_the_others_of_its_job_or_batch(run: Doubler, place: int) -> None:
    values = [1, 2, 3, 4, 5, 6]
    values[place] = POISON

    async def scene() -> None:
        one = batcher(run, max_batch=16)
        run.gate.clear()
        blocker = asyncio.ensure_future(ask(one, 0))
        await until(lambda: len(run.batches) == 1)
        requests = [asyncio.ensure_future(ask(one, *part)) for part in (values[:1], values[1:5], values[5:])]
        await until(lambda: one.waiting == 6)
        run.gate.set()
        await blocker
        results = [result for part in await asyncio.gather(*requests) for result in part]
        assert isinstance(results[place], ArithmeticError)
        for row, value in enumerate(values):
            assert row == place or results[row] == 2 * value
        assert await ask(one, 7) == [14]

    play(scene())
    assert run.batches[1] == values


def test_an_exception_among_the_results_is_that_rows_failure() -> None:
    error = KeyError("no")

    async def scene() -> None:
        one = batcher(lambda parts: [[error if value == 2 else value for value in part.rows] for part in parts])
        assert await ask(one, 1, 2, 3) == [1, error, 3]

    play(scene())


@pytest.mark.parametrize("answer", [[], [[]], [[1, 2], [3]], [[1, 2, 3]]])
def test_a_run_that_loses_results_fails_instead_of_hanging(answer: list[list[int]]) -> None:
    async def scene() -> None:
        results = await ask(batcher(lambda parts: answer), 1, 2)
        assert [type(result) for result in results] == [RuntimeError, RuntimeError]

    play(scene())


def test_more_than_the_capacity_is_refused_at_once_and_taken_again_later(run: Doubler) -> None:
    async def scene() -> None:
        one = batcher(run, capacity=3)
        run.gate.clear()
        first = asyncio.ensure_future(ask(one, 1, 2))
        await until(lambda: one.under_way == 2)
        with pytest.raises(OverloadedError) as caught:
            await ask(one, 3, 4)
        assert caught.value.headers["Retry-After"]
        second = asyncio.ensure_future(ask(one, 3))
        run.gate.set()
        assert await asyncio.gather(first, second) == [[2, 4], [6]]
        assert await ask(one, 5, 6, 7) == [10, 12, 14]

    play(scene())


def test_rows_are_refused_while_those_before_them_would_take_too_long(
    run: Doubler, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(now=0.0, perf_counter=lambda: clock.now)
    monkeypatch.setattr("serving.batcher.time", clock)

    async def scene() -> None:
        one = batcher(run, patience=2.0)
        run.gate.clear()
        first = asyncio.ensure_future(ask(one, 1, 2))
        await until(lambda: one.under_way == 2)
        clock.now += 2.0  # a row a second
        run.gate.set()
        await first
        run.gate.clear()
        many = asyncio.ensure_future(ask(one, 3, 4, 5))  # nothing is before them
        await until(lambda: one.under_way == 3)
        with pytest.raises(OverloadedError) as caught:
            await ask(one, 6)
        assert caught.value.headers["Retry-After"] == "3"
        run.gate.set()
        assert await many == [6, 8, 10]
        assert await ask(one, 6) == [12]

    play(scene())


def test_a_first_burst_is_measured_by_the_pace_that_was_expected(run: Doubler) -> None:
    async def scene() -> None:
        one = batcher(run, patience=2.0, pace=2.0)
        run.gate.clear()
        taken = asyncio.ensure_future(ask(one, 1, 2, 3, 4, 5))
        await until(lambda: one.under_way == 5)
        with pytest.raises(OverloadedError):
            one.check_room()
        run.gate.set()
        assert await taken == [2, 4, 6, 8, 10]

    play(scene())


def test_a_turn_of_the_loop_takes_in_no_more_than_it_has_time_for(
    run: Doubler, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(now=0.0, perf_counter=lambda: clock.now)
    monkeypatch.setattr("serving.batcher.time", clock)
    monkeypatch.setattr("serving.batcher.MANY_UNDER_WAY", 2)

    async def scene() -> None:
        one = batcher(run)
        run.gate.clear()
        taken = asyncio.ensure_future(ask(one, 1, 2))
        await until(lambda: one.under_way == 2)
        one.check_room()
        clock.now += 1.0  # with others that came at the same time
        with pytest.raises(OverloadedError):
            one.check_room()
        await asyncio.sleep(0)
        one.check_room()
        run.gate.set()
        assert await taken == [2, 4]
        one.check_room()
        clock.now += 1.0  # the loop was held up, but there is little to do
        one.check_room()

    play(scene())


def test_the_rows_of_a_cancelled_job_are_dropped_and_their_room_given_back(run: Doubler) -> None:
    async def scene() -> None:
        one = batcher(run, capacity=16)
        run.gate.clear()
        busy = asyncio.ensure_future(ask(one, *range(20, 26)))  # its first four rows run, two wait
        await until(lambda: len(run.batches) == 1)
        leaving = asyncio.ensure_future(ask(one, 1, 2))
        staying = asyncio.ensure_future(ask(one, 3))
        await until(lambda: one.waiting == 5)
        leaving.cancel()
        await until(leaving.cancelled)
        assert (one.under_way, one.waiting) == (7, 3)
        run.gate.set()
        assert await asyncio.gather(busy, staying) == [[40, 42, 44, 46, 48, 50], [6]]

    play(scene())
    assert run.batches == [[20, 21, 22, 23], [24, 25, 3]]


def test_a_job_that_is_cancelled_while_a_part_of_it_runs_frees_the_runner_and_drops_the_rest(run: Doubler) -> None:
    async def scene() -> None:
        one = batcher(run)
        run.gate.clear()
        leaving = asyncio.ensure_future(ask(one, 20, 21, 22, 23, 24))
        await until(lambda: len(run.batches) == 1)
        leaving.cancel()
        await until(leaving.cancelled)
        run.gate.set()
        assert await ask(one, 2) == [4]

    play(scene())
    assert run.batches == [[20, 21, 22, 23], [2]]


def test_a_thousand_requests_of_one_to_nine_rows_are_all_answered(
    run: Doubler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.batcher.TURN_SECONDS", float("inf"))  # on however slow a machine

    async def scene() -> None:
        one = batcher(run, capacity=10_000, max_batch=32)
        jobs = [range(100 + i, 100 + i + 1 + i % 9) for i in range(1000)]
        answers = await asyncio.gather(*(ask(one, *job) for job in jobs))
        assert answers == [[2 * value for value in job] for job in jobs]
        assert one.under_way == one.waiting == 0

    play(scene())
    assert sum(len(batch) for batch in run.batches) == sum(1 + i % 9 for i in range(1000))
    assert max(len(batch) for batch in run.batches) == 32


class Waits(Observer):
    def __init__(self) -> None:
        self.seen: list[tuple[int, float]] = []

    def waited(self, images: int, seconds: float) -> None:
        self.seen.append((images, seconds))


def test_how_long_rows_waited_is_told_and_the_longest_kept(run: Doubler) -> None:
    waits = Waits()

    async def scene() -> None:
        one = batcher(run, observer=waits)
        outcome = await one.submit([1, 2, 3, 4, 5, 6], "")
        assert outcome.waited == max(seconds for _, seconds in waits.seen) > waits.seen[0][1] >= 0

    play(scene())
    assert [images for images, _ in waits.seen] == [4, 2]


def test_a_job_waits_for_others_that_are_nearly_ready(run: Doubler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.batcher.HOLD_SECONDS", DEADLINE)

    async def scene() -> None:
        one = batcher(run)
        with one.coming():
            first = asyncio.ensure_future(ask(one, 1))
            await until(lambda: one.waiting == 1)
            assert run.batches == []
        assert await ask(one, 2) == [4]
        assert await first == [2]

    play(scene())
    assert run.batches == [[1, 2]]


def test_it_does_not_wait_for_what_takes_long(run: Doubler) -> None:
    async def scene() -> None:
        one = batcher(run)
        with one.coming():
            assert await ask(one, 1) == [2]
            assert await ask(one, 2) == [4]

    play(scene())


def test_a_full_batch_waits_for_nothing(run: Doubler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.batcher.HOLD_SECONDS", 2 * DEADLINE)

    async def scene() -> None:
        one = batcher(run)
        with one.coming():
            assert await ask(one, 1, 2, 3, 4) == [2, 4, 6, 8]

    play(scene())


def test_what_was_held_back_leaves_when_the_other_fails(run: Doubler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.batcher.HOLD_SECONDS", 2 * DEADLINE)

    async def scene() -> None:
        one = batcher(run)
        with pytest.raises(ValueError, match="no image"), one.coming():
            waiting = asyncio.ensure_future(ask(one, 1))
            await until(lambda: one.waiting == 1)
            raise ValueError("no image")
        assert await waiting == [2]

    play(scene())
