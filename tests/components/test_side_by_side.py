"""Calls at the same time: order, threads, gradients off, errors only once all have ended."""

import threading

import pytest
import torch
from torch import Tensor

from components.models import make_tiny
from components.side_by_side import MOST_PARTS, SMALLEST_PART, SideBySide
from tests.engine_desk import Desk, check_alike, picture


def test_parts_are_worth_a_thread_each() -> None:
    assert [SideBySide(2).parts(rows) for rows in (1, 2 * SMALLEST_PART - 1, 2 * SMALLEST_PART, 64)] == [1, 1, 2, 2]
    assert SideBySide(1).parts(64) == 1 and SideBySide(100).parts(10_000) == MOST_PARTS


def test_calls_meet_and_return_in_order() -> None:
    meeting = threading.Barrier(3, timeout=30)
    calls = SideBySide(3)

    def call(number: int) -> Tensor:
        meeting.wait()  # all three are under way, or nobody passes
        assert torch.is_inference_mode_enabled()
        return torch.tensor(number)

    with torch.inference_mode():
        found = calls([lambda number=number: call(number) for number in range(3)])  # type: ignore[misc]
    calls.close()
    assert [int(value) for value in found] == [0, 1, 2]


@pytest.mark.parametrize("failing", [0, 1])
def test_error_waits_for_the_others(failing: int) -> None:
    ended: list[int] = []
    raised = threading.Event()
    calls = SideBySide(2)

    def call(number: int) -> Tensor:
        if number == failing:
            raised.set()
            raise MemoryError("no room")
        assert raised.wait(30)
        ended.append(number)
        return torch.zeros(1)

    with pytest.raises(MemoryError):
        calls([lambda number=number: call(number) for number in range(2)])  # type: ignore[misc]
    assert ended == [1 - failing]
    calls.close()


def test_engine_draws_each_row_as_alone_when_its_calls_are_cut() -> None:
    parts = make_tiny("stable_diffusion")
    desk = Desk(parts, calls_at_once=2)
    asked = {f"r{seed}": picture(seed=seed, steps=3 + seed % 3, guidance_scale=float(seed % 4)) for seed in range(12)}
    for name, row in asked.items():
        desk.ask(name, row)
    desk.finish()
    for name, row in asked.items():
        check_alike(desk.inbox.pictures(name), parts, row)
    helpers = [thread for thread in threading.enumerate() if thread.name.startswith("denoise-part")]
    assert helpers, "the calls were cut"
    desk.engine.close()
    assert not any(thread.is_alive() for thread in helpers)
