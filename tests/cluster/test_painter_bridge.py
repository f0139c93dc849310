"""The model's thread: loading, order, the limit on waiting requests, and callers that leave."""

import asyncio
import sys
import threading
import time
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
from cluster.painter_thread import PainterThread, QueueFullError


class GatedPainter:
    """Draws only when its gate is open, and remembers what it drew."""

    def __init__(self, error: str = "") -> None:
        self.error = error
        self.gate = threading.Event()
        self.gate.set()
        self.started = threading.Semaphore(0)
        self.drawn: list[Any] = []

    def info(self) -> dict[str, Any]:
        return {"warm_up": {"prompt": "warm up"}, "model_version": 3}

    def draw(self, rows: Sequence[Mapping[str, Any]]) -> list[bytes]:
        if self.error:
            raise ValueError(self.error)
        self.started.release()
        assert self.gate.wait(30)
        self.drawn += [row["prompt"] for row in rows]
        return [str(row["prompt"]).encode() for row in rows]


@pytest.fixture
def gated(monkeypatch: pytest.MonkeyPatch) -> GatedPainter:
    painter = GatedPainter()
    module = types.ModuleType("gated_painter")
    module.make = lambda error="": GatedPainter(error) if error else painter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "gated_painter", module)
    return painter


@pytest.fixture
def thread(gated: GatedPainter) -> Iterator[PainterThread]:
    thread = PainterThread("gated_painter:make", {}, max_queue=2)
    wait_for(lambda: thread.state == "ready")
    assert gated.started.acquire(timeout=5)
    yield thread
    gated.gate.set()
    thread.close()


def wait_for(condition: Any, limit_s: float = 10) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        threading.Event().wait(0.005)


def rows(*prompts: str) -> list[dict[str, Any]]:
    return [{"prompt": prompt} for prompt in prompts]


def test_painter_is_ready_only_after_a_first_drawing(thread: PainterThread, gated: GatedPainter) -> None:
    assert gated.drawn == ["warm up"]
    assert thread.info["model_version"] == 3
    assert asyncio.run(thread.draw(rows("a", "b"))) == [b"a", b"b"]


def test_painter_that_cannot_load_says_why(gated: GatedPainter, capfd: pytest.CaptureFixture[str]) -> None:
    thread = PainterThread("gated_painter:make", {"error": "weights are damaged"}, max_queue=1)
    wait_for(lambda: thread.state == "failed")
    assert thread.error == "ValueError: weights are damaged"
    assert "Traceback" in capfd.readouterr().err
    with pytest.raises(RuntimeError, match="weights are damaged"):
        asyncio.run(thread.draw(rows("a")))
    thread.close()


def test_painter_with_a_missing_factory_says_why(capfd: pytest.CaptureFixture[str]) -> None:
    thread = PainterThread("no_such_module:make", {}, max_queue=1)
    wait_for(lambda: thread.state == "failed")
    assert "no_such_module" in thread.error
    thread.close()


def test_one_request_more_than_may_wait_is_refused_at_once(thread: PainterThread, gated: GatedPainter) -> None:
    async def crowd() -> list[Any]:
        gated.gate.clear()
        waiting = [asyncio.ensure_future(thread.draw(rows(name))) for name in "abc"]
        await asyncio.sleep(0)
        with pytest.raises(QueueFullError, match="2 requests are waiting"):
            await thread.draw(rows("d"))
        assert thread.retry_after_s >= 1
        gated.gate.set()
        return await asyncio.gather(*waiting)

    assert asyncio.run(crowd()) == [[b"a"], [b"b"], [b"c"]]
    assert asyncio.run(thread.draw(rows("e"))) == [b"e"]


def test_caller_that_leaves_while_waiting_frees_its_place_and_is_not_drawn(
    thread: PainterThread, gated: GatedPainter
) -> None:
    async def leave() -> None:
        gated.gate.clear()
        first, second, third = (asyncio.ensure_future(thread.draw(rows(name))) for name in "abc")
        await asyncio.to_thread(gated.started.acquire)
        second.cancel()
        await asyncio.gather(second, return_exceptions=True)
        fourth = asyncio.ensure_future(thread.draw(rows("d")))
        await asyncio.sleep(0)
        gated.gate.set()
        assert await asyncio.gather(first, third, fourth) == [[b"a"], [b"c"], [b"d"]]

    asyncio.run(leave())
    assert gated.drawn == ["warm up", "a", "c", "d"]


def test_caller_that_leaves_while_being_drawn_keeps_its_place_until_the_drawing_ends(
    thread: PainterThread, gated: GatedPainter
) -> None:
    async def leave() -> None:
        gated.gate.clear()
        first = asyncio.ensure_future(thread.draw(rows("a")))
        await asyncio.to_thread(gated.started.acquire)
        first.cancel()
        waiting = [asyncio.ensure_future(thread.draw(rows(name))) for name in "bc"]
        await asyncio.sleep(0)
        with pytest.raises(QueueFullError):
            await thread.draw(rows("d"))
        gated.gate.set()
        await asyncio.gather(*waiting)

    asyncio.run(leave())
    assert gated.drawn == ["warm up", "a", "b", "c"]
