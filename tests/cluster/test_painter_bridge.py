"""The bridge: loading, events in order, callers that leave at any moment, names, and what follows the champion.

The painter here stands at the border that the contract draws: it ends its requests when the test says so.
"""

import asyncio
import sys
import threading
import types
from collections.abc import Coroutine, Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from typing import Any

import pytest

from cluster.api_errors import ApiError, once
from cluster.images_schema import ImagesRequest, make_order
from cluster.painter_bridge import PainterBridge
from cluster.painter_contract import Finished, Job, Partial, Receiver, SwappingError
from cluster.painter_loading import Follow, choices
from cluster.placement import ServeSection
from tests.endpoint import wait_for

INFO = {"width_px": 16, "height_px": 16, "size_multiple_px": 8, "min_side_px": 16, "model_version": 3}
FINISHED = Finished((b"picture",), "16x16", {"model_version": 3}, ())


class HeldPainter:
    """Accepts while its gate is open, and ends a request only when it is told to."""

    encoder = None

    def __init__(self, error: str = "") -> None:
        self.error = error
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.at_work: dict[str, Receiver] = {}
        self.cancelled: list[str] = []
        self.swapped: list[Mapping[str, Any]] = []
        self.jobs: list[Job] = []
        self.closed = False
        self.busy = ""

    def warm_up(self) -> None:
        if self.error:
            raise ValueError(self.error)

    def info(self, version: int | None = None) -> dict[str, Any]:
        return dict(INFO)

    def versions(self) -> list[int]:
        return [3]

    def swapping(self) -> str:
        return self.busy

    def numbers(self) -> dict[str, Any]:
        return {}

    def check(self, job: Job) -> None:
        if job.request_id == "no room!":
            raise ApiError("full")

    def submit(self, job: Job, receive: Receiver) -> None:
        self.entered.set()
        assert self.gate.wait(30)
        if job.request_id == "refused!":
            raise ApiError("not this one")
        if self.busy:
            raise SwappingError(self.busy)
        self.jobs.append(job)
        self.at_work[job.request_id] = receive

    def cancel(self, request_id: str) -> bool:
        receive = self.at_work.pop(request_id, None)
        if receive is None:
            return False
        self.cancelled.append(request_id)
        receive(end_cancelled)
        return True

    def problem(self) -> str:
        return ""

    def swap(self, arguments: Mapping[str, Any]) -> None:
        if arguments.get("error"):
            raise ValueError(arguments["error"])
        self.swapped.append(arguments)

    def close(self) -> None:
        self.closed = True


def end_cancelled() -> Finished:
    raise once(499, "the request was cancelled", "request_cancelled")


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> HeldPainter:
    painter = HeldPainter()
    module = types.ModuleType("held_painter")
    module.wanted = {}  # type: ignore[attr-defined]
    module.make = lambda error="": HeldPainter(error) if error else painter  # type: ignore[attr-defined]
    module.resolve = lambda: module.wanted  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "held_painter", module)
    return painter


@pytest.fixture
def bridge(held: HeldPainter) -> Iterator[PainterBridge]:
    with closing(PainterBridge("held_painter:make", {})) as bridge:
        wait_for(lambda: bridge.state == "ready")
        yield bridge
    assert held.closed


def job(name: str, key: str = "") -> Job:
    return Job(name, make_order(ImagesRequest(prompt="x"), ServeSection(), INFO), key)


async def until(condition: Any) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.005)


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(work)


def test_events_come_in_order_and_the_last_one_ends_the_drawing(bridge: PainterBridge, held: HeldPainter) -> None:
    async def draw() -> list[Any]:
        drawing = await bridge.submit(job("first"))
        receive = held.at_work["first"]
        for event in (Partial(0, 0, b"early"), None, FINISHED):
            receive(lambda event=event: event)  # type: ignore[misc]
        with closing(drawing):
            return [event async for event in drawing]

    assert run(draw()) == [Partial(0, 0, b"early"), FINISHED]
    assert bridge._keys == {}


def test_painter_that_cannot_load_says_why(held: HeldPainter, capfd: pytest.CaptureFixture[str]) -> None:
    with closing(PainterBridge("held_painter:make", {"error": "weights are damaged"})) as bridge:
        wait_for(lambda: bridge.state == "failed")
        assert bridge.error == "ValueError: weights are damaged" and "weights" in bridge.problem
        assert "Traceback" in capfd.readouterr().err
        with pytest.raises(ApiError, match="weights are damaged") as refused:
            run(bridge.submit(job("first")))
        assert refused.value.status == 503 and refused.value.headers["Retry-After"]


def test_painter_with_a_missing_factory_says_why(capfd: pytest.CaptureFixture[str]) -> None:
    with closing(PainterBridge("no_such_module:make", {})) as bridge:
        wait_for(lambda: bridge.state == "failed")
        assert "no_such_module" in bridge.error and bridge.info == {}


def test_check_refuses_what_submit_would_and_accepts_nothing(bridge: PainterBridge, held: HeldPainter) -> None:
    async def work() -> None:
        await bridge.check(job("first"))
        with pytest.raises(ApiError, match="full"):
            await bridge.check(job("no room!"))
        with closing(await bridge.submit(job("first"))), pytest.raises(ApiError, match="at work"):
            await bridge.check(job("first"))

    run(work())
    assert held.cancelled == ["first"] and not bridge._keys


def test_refusal_reaches_the_caller_and_leaves_no_name_behind(bridge: PainterBridge) -> None:
    for _ in range(2):
        with pytest.raises(ApiError, match="not this one"):
            run(bridge.submit(job("refused!")))
    wait_for(lambda: bridge._keys == {})


def test_caller_that_leaves_while_it_waits_ends_its_request(bridge: PainterBridge, held: HeldPainter) -> None:
    async def leave() -> None:
        drawing = await bridge.submit(job("first"))
        waiting = asyncio.ensure_future(drawing.finished())
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        drawing.close()
        drawing.close()

    run(leave())
    assert held.cancelled == ["first"] and bridge._keys == {}


def test_drawing_that_nobody_iterates_ends_when_it_is_dropped(bridge: PainterBridge, held: HeldPainter) -> None:
    async def drop() -> None:
        await bridge.submit(job("first"))

    run(drop())
    wait_for(lambda: held.cancelled == ["first"])


def test_caller_that_leaves_while_its_job_is_being_accepted_leaves_nothing_at_work(
    bridge: PainterBridge, held: HeldPainter
) -> None:
    async def leave() -> None:
        held.gate.clear()
        submitting = asyncio.ensure_future(bridge.submit(job("first")))
        await until(held.entered.is_set)
        submitting.cancel()
        await asyncio.gather(submitting, return_exceptions=True)
        held.gate.set()
        await until(lambda: held.cancelled == ["first"])

    run(leave())
    wait_for(lambda: bridge._keys == {})


def test_only_the_key_that_asked_may_cancel_and_a_name_at_work_is_taken(
    bridge: PainterBridge, held: HeldPainter
) -> None:
    async def cancel() -> None:
        drawing = await bridge.submit(job("first", "studio"))
        with pytest.raises(ApiError, match="at work") as taken:
            await bridge.submit(job("first", "other"))
        assert taken.value.status == 409 and held.cancelled == []
        assert not bridge.cancel("first", "other") and not bridge.cancel("second", "studio")
        assert bridge.cancel("first", "studio")
        with closing(drawing), pytest.raises(ApiError, match="was cancelled"):
            await drawing.finished()

    run(cancel())


def test_request_that_is_still_being_accepted_is_cancelled_all_the_same(
    bridge: PainterBridge, held: HeldPainter
) -> None:
    async def cancel() -> None:
        held.gate.clear()
        submitting = asyncio.ensure_future(bridge.submit(job("first", "studio")))
        await until(held.entered.is_set)
        assert not bridge.cancel("first", "other") and bridge.cancel("first", "studio")
        held.gate.set()
        with pytest.raises(ApiError, match="was cancelled") as ended:
            await submitting
        assert ended.value.status == 499 and ended.value.headers == {"x-should-retry": "false"}
        assert held.cancelled == ["first"] and not bridge.cancel("first", "studio")
        # The name is free again, and its cancelling is forgotten.
        with closing(await bridge.submit(job("first", "studio"))):
            assert "first" in held.at_work

    run(cancel())
    assert bridge._keys == {} and bridge._accepting == bridge._cancelled == set()


def test_files_that_take_their_time_keep_nobody_from_being_accepted(bridge: PainterBridge, held: HeldPainter) -> None:
    made = threading.Event()

    def make() -> Finished:
        assert made.wait(30)
        return FINISHED

    async def draw() -> None:
        drawings = []
        for number in range(12):
            drawings.append(await bridge.submit(job(f"large-{number}")))
            held.at_work.pop(f"large-{number}")(make)
        finishing = [asyncio.ensure_future(drawing.finished()) for drawing in drawings]
        await asyncio.sleep(0)
        async with asyncio.timeout(20):
            with closing(await bridge.submit(job("small"))):
                made.set()
                assert await asyncio.gather(*finishing) == [FINISHED] * 12
        for drawing in drawings:
            drawing.close()

    try:
        run(draw())
    finally:
        made.set()


def test_painter_follows_what_the_resolver_names_and_stays_where_it_cannot(
    held: HeldPainter, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = sys.modules["held_painter"]
    follow = Follow("held_painter:resolve", {}, every_s=0.01)
    with closing(PainterBridge("held_painter:make", {}, follow)) as bridge:
        wait_for(lambda: held.swapped == [{}])  # what it began with may name a challenger too
        wanted.wanted = {"model": 2}  # type: ignore[attr-defined]
        wait_for(lambda: held.swapped == [{}, {"model": 2}])
        wanted.wanted = {"error": "no such file"}  # type: ignore[attr-defined]
        wait_for(lambda: bridge.swap_error == "ValueError: no such file")
        assert bridge.state == "ready"
        wanted.wanted = None  # type: ignore[attr-defined]
        wanted.wanted = {"model": 3}  # type: ignore[attr-defined]
        wait_for(lambda: held.swapped == [{}, {"model": 2}, {"model": 3}])
        wait_for(lambda: bridge.swap_error == "")
    assert "goes on" in caplog.text


def test_model_that_could_not_be_loaded_is_tried_again(held: HeldPainter, monkeypatch: pytest.MonkeyPatch) -> None:
    away = {"error": "the disk is away"}
    sys.modules["held_painter"].wanted = away  # type: ignore[attr-defined]
    monkeypatch.setattr("cluster.painter_loading.FIRST_PAUSE_S", 0.05)
    with closing(PainterBridge("held_painter:make", {}, Follow("held_painter:resolve", {}, every_s=0.01))) as bridge:
        wait_for(lambda: bridge.state == "ready" and bridge.swap_error == "ValueError: the disk is away")
        monkeypatch.setattr(held, "swap", held.swapped.append)
        wait_for(lambda: held.swapped == [away])
        wait_for(lambda: bridge.swap_error == "")


async def held_requests(bridge: PainterBridge, *jobs: Job) -> list[asyncio.Task[Any]]:
    waiting = [asyncio.ensure_future(bridge.submit(one)) for one in jobs]
    await until(lambda: bridge.numbers()["held_requests"] == len(jobs))
    return waiting


def test_requests_wait_while_the_painter_makes_room_and_go_on_afterwards(
    bridge: PainterBridge, held: HeldPainter
) -> None:
    async def wait() -> None:
        held.busy = "version 5 needs room"
        assert bridge.swapping == "version 5 needs room"
        dated = replace(job("dated"), order=replace(job("dated").order, deadline_s=30.0))
        waiting = await held_requests(bridge, job("first"), dated)
        assert held.at_work == {} and not any(one.done() for one in waiting)
        held.busy = ""
        for one in waiting:
            (await one).close()
        assert {one.request_id for one in held.jobs} == {"first", "dated"}
        arrived = next(one.arrived for one in held.jobs if one.request_id == "dated")
        assert arrived == dated.arrived, "waiting counts"

    run(wait())
    assert bridge._keys == {} and bridge._held == set()


def test_request_that_waits_can_be_cancelled_and_leaves_nothing_behind_when_its_caller_goes(
    bridge: PainterBridge, held: HeldPainter
) -> None:
    async def end() -> None:
        held.busy = "version 5 needs room"
        cancelled, left = await held_requests(bridge, job("cancelled", "studio"), job("left"))
        assert not bridge.cancel("cancelled", "other") and bridge.cancel("cancelled", "studio")
        with pytest.raises(ApiError, match="was cancelled") as ended:
            await cancelled
        assert ended.value.status == 499
        left.cancel()
        await asyncio.gather(left, return_exceptions=True)

    run(end())
    assert bridge._keys == {} and bridge._held == set() and held.jobs == []


@pytest.mark.parametrize("limit", [{"wait_s": 0.0}, {"most_waiting": 0}])
def test_request_that_would_wait_too_long_or_beside_too_many_is_told_to_come_again(
    held: HeldPainter, limit: dict[str, Any]
) -> None:
    follow = Follow("held_painter:resolve", {}, every_s=60.0, **limit)
    with closing(PainterBridge("held_painter:make", {}, follow)) as bridge:
        wait_for(lambda: bridge.state == "ready")
        held.busy = "version 5 needs room"
        with pytest.raises(ApiError, match="version 5 needs room") as refused:
            run(bridge.submit(job("first")))
        assert refused.value.status == 503 and refused.value.headers["Retry-After"] and refused.value.code == "swapping"
        assert bridge._keys == {} and bridge._held == set()


def test_replica_that_starts_late_tries_what_should_serve_then_what_drew_last_then_what_it_was_given(
    held: HeldPainter,
) -> None:
    follow = Follow("held_painter:told", {"of": "wanted"}, every_s=60.0, before={"of": "drawn"})
    told: dict[str, Any] = {"wanted": {"error": "no such file"}, "drawn": {"error": ""}}
    sys.modules["held_painter"].told = lambda of: told[of]  # type: ignore[attr-defined]
    assert choices({}, follow) == [{"error": "no such file"}, {"error": ""}, {}]
    with closing(PainterBridge("held_painter:make", {}, follow)) as bridge:
        wait_for(lambda: bridge.state == "ready")
        assert bridge.swap_error == "ValueError: no such file" and bridge.painter is held
    told["wanted"] = None
    assert choices({"error": ""}, follow) == [{"error": ""}]
    del told["drawn"]
    assert choices({}, follow) == [{}]
