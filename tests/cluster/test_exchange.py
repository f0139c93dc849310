"""The exchange without Ray: who waits for whom, what a dead group gets again, what is never told twice."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from cluster import exchange
from cluster.exchange import ENDED, FAILURE, FATAL, OVER, Exchange

LIMIT_S = 5


def report(step: int, over: bool = False) -> dict[str, float]:
    return {"step": float(step), OVER: float(over)}


WAITING: set[asyncio.Future] = set()


def behind(call: Coroutine[Any, Any, Any]) -> asyncio.Future:
    """Start a call that will wait, and keep it."""
    WAITING.add(future := asyncio.ensure_future(call))
    return future


def scenario(body: Callable[[Exchange], Coroutine[Any, Any, None]]) -> None:
    """Run one story on one exchange; nothing in it may wait for ever."""
    asyncio.run(asyncio.wait_for(body(Exchange()), LIMIT_S))


async def offered(
    made: Exchange, run_id: str = "a", past: tuple = (), finished: bool = False, failures: int = 1
) -> None:
    made.offer(run_id, f"task {run_id}", past, finished, failures)


def test_group_waits_at_every_report_for_the_searchs_answer() -> None:
    async def body(made: Exchange) -> None:
        await offered(made)
        first = behind(made.advance("a"))
        assert await made.take(0) == "task a"
        answer = behind(made.report(0, report(0)))
        assert (await first)["step"] == 0
        await asyncio.sleep(0.05)
        assert not answer.done()
        second = behind(made.advance("a"))
        assert await answer is True
        answer = behind(made.report(0, report(10)))
        assert (await second)["step"] == 10
        leaving = behind(made.release("a"))
        assert await answer is False
        await asyncio.sleep(0.05)
        assert not leaving.done(), "the checkpoint is not written yet"
        made.done(0)
        await leaving
        made.close()
        assert await made.take(0) == ENDED

    scenario(body)


def test_past_is_told_without_a_group_and_a_finished_run_never_reaches_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "TAKE_WAIT_S", 0.05)

    async def body(made: Exchange) -> None:
        await offered(made, past=(report(0), report(10)), finished=True)
        assert [(await made.advance("a"))["step"] for _ in range(2)] == [0, 10]
        assert (await made.advance("a"))[OVER]
        assert await made.take(0) is None
        await made.release("a")
        await offered(made, "b", past=(report(0), report(10)))
        assert [(await made.advance("b"))["step"] for _ in range(2)] == [0, 10]
        third = behind(made.advance("b"))
        await asyncio.sleep(0)
        assert await made.take(0) == "task b"
        assert await made.report(0, report(0)) and await made.report(0, report(10)), "known already"
        behind(made.report(0, report(20)))
        assert (await third)["step"] == 20

    scenario(body)


def test_group_that_died_gets_its_run_again_and_the_search_hears_nothing_twice() -> None:
    async def body(made: Exchange) -> None:
        await offered(made)
        first = behind(made.advance("a"))
        assert await made.take(0) == "task a"
        lost = behind(made.report(0, report(0)))
        await first  # told, not answered; now the group dies
        made.note(0, "RuntimeError: connection closed")
        assert await made.take(0) == "task a"
        again = behind(made.report(0, report(0)))
        second = behind(made.advance("a"))
        assert await again is True and await lost is True
        behind(made.report(0, report(10)))
        assert (await second)["step"] == 10
        third = behind(made.advance("a"))
        taken = behind(made.take(0))  # died again: once too often
        failure = (await third)[FAILURE]
        assert failure["name"] == "WorkerError" and "max_failures=1" in failure["message"]
        assert "connection closed" in failure["message"]
        await offered(made, "b")
        behind(made.advance("b"))
        assert await taken == "task b"

    scenario(body)


def test_group_that_dies_while_it_leaves_a_released_run_is_free() -> None:
    async def body(made: Exchange) -> None:
        await offered(made)
        first = behind(made.advance("a"))
        await made.take(0)
        behind(made.report(0, report(0)))
        await first
        leaving = behind(made.release("a"))
        await asyncio.sleep(0)
        made.close()
        assert await made.take(0) == ENDED
        await leaving

    scenario(body)


def test_failure_reaches_the_search_and_the_group_goes_on() -> None:
    async def body(made: Exchange) -> None:
        await offered(made)
        await offered(made, "b")
        first, second = (behind(made.advance(run_id)) for run_id in "ab")
        await asyncio.sleep(0)
        await made.take(0)
        made.failed(0, {"name": "NonFiniteError"})
        assert (await first) == {FAILURE: {"name": "NonFiniteError"}}
        await made.release("a")
        assert await made.take(0) == "task b"
        made.break_down("no group can be kept alive")
        assert (await second)[FAILURE][FATAL]
        assert (await made.advance("b"))[FAILURE][FATAL]

    scenario(body)


def test_concluding_waits_for_what_follows_the_last_report() -> None:
    async def body(made: Exchange) -> None:
        await offered(made)
        first = behind(made.advance("a"))
        await made.take(0)
        answer = behind(made.report(0, report(5, over=True)))
        assert (await first)[OVER]
        end = behind(made.conclude("a"))
        assert await answer is True
        assert not end.done()
        made.done(0)
        assert await end == {}

    scenario(body)
