"""Groups of rows: who leaves before the first step takes nobody's place, and what fails takes nobody with it."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from components.draw_requests import Cancelled, Done, Failed
from components.models import Parts
from tests.engine_desk import BLUE, RED, Desk, check_alike, make, picture


@pytest.fixture(scope="module")
def parts() -> Parts:
    return make("v_prediction")


@pytest.fixture
def desk(parts: Parts) -> Iterator[Desk]:
    desk = Desk(parts)
    yield desk
    desk.engine.close()


def test_a_row_cancelled_before_its_first_step_leaves_its_neighbour_alone(desk: Desk, parts: Parts) -> None:
    desk.ask("a", picture(steps=6))
    desk.engine.step()
    gone, kept = picture(BLUE, seed=1, width_px=32), picture(RED, seed=2, width_px=32)
    desk.ask("gone", gone)
    desk.ask("kept", kept)
    desk.engine.step()
    assert desk.engine.status().live_rows == 3, "the wide rows have joined, and the other group stepped"
    desk.engine.cancel("gone")
    desk.finish()
    check_alike(desk.inbox.pictures("kept"), parts, kept)


@pytest.mark.parametrize("leaves", ["old", "new", "both"])
def test_rows_that_leave_while_others_wait_for_their_first_step_change_no_picture(
    desk: Desk, parts: Parts, leaves: str
) -> None:
    rows = {name: picture(BLUE, seed=seed, steps=6) for seed, name in enumerate(["old", "stays", "new", "newer"])}
    desk.ask("old", rows["old"])
    desk.ask("stays", rows["stays"])
    desk.ask("wide", picture(width_px=32, steps=9))
    while not any(row.step for row in rows_at_work(desk, "old")):
        desk.engine.step()
    desk.ask("new", rows["new"])
    desk.ask("newer", rows["newer"])
    desk.engine._loop.change_rows(0.0, [])
    gone = {"old", "new"} if leaves == "both" else {leaves}
    for name in gone:
        desk.engine.cancel(name)
    desk.engine._loop.change_rows(0.0, [])
    desk.finish()
    for name in rows:
        end = desk.inbox.end_of(name)
        assert isinstance(end, Cancelled if name in gone else Done), end
        if isinstance(end, Done):
            check_alike(end.pictures, parts, rows[name])


def rows_at_work(desk: Desk, name: str) -> list[Any]:
    rows = [row for group in desk.engine._loop._groups.values() for row in group.rows]
    return [row for row in rows if row.owner.request.request_id == name]


class Limited:
    """A denoiser that has memory for a few rows only, as a GPU; it counts the calls that found too little."""

    def __init__(self, parts: Parts, most_rows: int) -> None:
        self.most_rows, self.refused, self.calls = most_rows, 0, 0
        self.hook = parts.denoiser.register_forward_pre_hook(self._look)

    def _look(self, module: Any, args: Any) -> None:
        self.calls += 1
        if len(args[0]) > self.most_rows:
            self.refused += 1
            raise torch.OutOfMemoryError("out of memory")


def test_a_batch_too_large_for_memory_is_drawn_in_parts_told_once_and_not_tried_again(
    desk: Desk, parts: Parts, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [picture(RED, seed=seed, steps=5, guidance_scale=0.0) for seed in range(8)]
    limited = Limited(parts, 4)
    for number, row in enumerate(rows):
        desk.ask(f"r{number}", row)
    try:
        desk.finish()
    finally:
        limited.hook.remove()
    for number, row in enumerate(rows):
        check_alike(desk.inbox.pictures(f"r{number}"), parts, row)
    assert (limited.refused, limited.calls) == (1, 11), "a whole step that fails, then two halves a step"
    told = [record for record in caplog.records if "out of memory" in record.getMessage()]
    assert len(told) == 1 and told[0].levelname == "WARNING"


def test_rows_wait_while_a_group_cannot_take_as_many_as_the_limit_says(desk: Desk, parts: Parts) -> None:
    limited = Limited(parts, 4)
    try:
        desk.ask("first", *[picture(seed=seed, steps=5, guidance_scale=0.0) for seed in range(8)])
        desk.engine.step()
        desk.ask("more", picture(seed=9, guidance_scale=0.0))
        desk.engine.step()
        assert desk.engine.status().waiting_rows == 1
        desk.finish()
    finally:
        limited.hook.remove()
    assert isinstance(desk.inbox.end_of("first"), Done) and isinstance(desk.inbox.end_of("more"), Done)


def test_no_memory_to_join_fails_the_joiners_alone(desk: Desk, parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    from components import live_rows

    row = picture(RED, seed=1, steps=5)
    desk.ask("first", row)
    desk.engine.step()
    desk.ask("joins", picture(BLUE, seed=2))
    real = live_rows.join

    def no_memory(batches: Any) -> Any:
        if len(batches) > 1:
            raise torch.OutOfMemoryError("out of memory")
        return real(batches)

    monkeypatch.setattr(live_rows, "join", no_memory)
    desk.finish()
    end = desk.inbox.end_of("joins")
    assert isinstance(end, Failed) and isinstance(end.error, torch.OutOfMemoryError)
    check_alike(desk.inbox.pictures("first"), parts, row)
