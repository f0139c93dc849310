"""One iteration of the engine: what waits for the decoder holds rows back, and is late like any other."""

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from components.decode_stage import MAX_WAITING_FINAL
from components.draw_requests import Cancelled, Done, Failed
from components.errors import DeadlineError, InputError, QueueFullError
from components.models import Parts
from tests.engine_desk import LIMIT_S, Desk, make, picture


@pytest.fixture(scope="module")
def parts() -> Parts:
    return make("v_prediction")


class SlowDecoder:
    """Holds the decoding thread inside a call of the autoencoder until it is released."""

    def __init__(self, parts: Parts) -> None:
        self.entered, self.released = threading.Event(), threading.Event()
        self.rows = 0
        self.hook = parts.vae.decoder.register_forward_pre_hook(self._wait)

    def _wait(self, module: Any, args: Any) -> None:
        self.rows += len(args[0])
        self.entered.set()
        assert self.released.wait(LIMIT_S)


@pytest.fixture
def slow(parts: Parts) -> Iterator[SlowDecoder]:
    slow = SlowDecoder(parts)
    yield slow
    slow.released.set()
    slow.hook.remove()


def step_all(desk: Desk) -> None:
    while desk.engine.step():
        pass


def test_rows_wait_while_the_decoder_is_behind_until_the_queue_refuses(parts: Parts, slow: SlowDecoder) -> None:
    desk = Desk(parts, max_waiting_rows=8, max_batch_rows=8)
    accepted = []
    with pytest.raises(QueueFullError):
        for number in range(10 * MAX_WAITING_FINAL):
            desk.ask(f"r{number}", picture(steps=1, seed=number, guidance_scale=0.0))
            accepted.append(f"r{number}")
            step_all(desk)
    assert MAX_WAITING_FINAL <= len(accepted) - desk.engine.status().waiting_rows < MAX_WAITING_FINAL + 8
    slow.released.set()
    desk.finish()
    assert all(isinstance(desk.inbox.end_of(name), Done) for name in accepted)
    desk.engine.close()


def test_rows_that_wait_for_the_decoder_count_in_the_backlog_and_against_deadlines(
    parts: Parts, slow: SlowDecoder
) -> None:
    desk = Desk(parts)
    slow.released.set()
    desk.ask("measured", *[picture(steps=3, seed=seed) for seed in range(2)])
    desk.finish()
    desk.inbox.end_of("measured")
    slow.released.clear()
    slow.entered.clear()
    desk.ask("held", *[picture(steps=1, seed=seed) for seed in range(20)])
    step_all(desk)
    assert slow.entered.wait(LIMIT_S)
    desk.engine._decode.picture_s = 10.0
    assert desk.engine.status().backlog_s == pytest.approx(200.0), "no steps are left, twenty pictures are"
    with pytest.raises(DeadlineError):
        desk.ask("late", picture(steps=1), picture(steps=1), deadline_s=215.0)
    desk.ask("in time", picture(steps=1), deadline_s=250.0)
    slow.released.set()
    desk.engine.close(drain=False)


@pytest.mark.parametrize("in_thread", [False, True])
def test_a_request_past_its_deadline_in_front_of_the_decoder_fails_and_is_not_decoded(
    parts: Parts, slow: SlowDecoder, in_thread: bool
) -> None:
    desk = Desk(parts)
    now = 0.0
    desk.engine._clock = lambda: now
    desk.ask("in hand", picture(steps=1), deadline_s=0.05)
    step_all(desk)
    assert slow.entered.wait(LIMIT_S)
    desk.ask("waits", picture(steps=1, width_px=32), deadline_s=0.05)
    desk.ask("gone", picture(steps=1, height_px=32))
    step_all(desk)
    desk.engine.cancel("gone")
    if in_thread:
        # The loop has nothing to step: it wakes up by itself when a deadline passes.
        desk.engine.start()
    now = 100.0
    if not in_thread:
        desk.engine.step()
    for name in ("in hand", "waits"):
        end = desk.inbox.end_of(name)
        assert isinstance(end, Failed) and isinstance(end.error, DeadlineError)
    slow.released.set()
    desk.engine.close()
    assert isinstance(desk.inbox.end_of("gone"), Cancelled)
    assert slow.rows == 1


def test_a_picture_that_is_decoded_too_late_is_a_failure(parts: Parts, slow: SlowDecoder) -> None:
    desk = Desk(parts)
    now = 0.0
    desk.engine._clock = lambda: now
    desk.ask("r", picture(steps=1), deadline_s=1.0)
    step_all(desk)
    assert slow.entered.wait(LIMIT_S)
    now = 2.0
    slow.released.set()
    end = desk.inbox.end_of("r")
    assert isinstance(end, Failed) and isinstance(end.error, DeadlineError)
    desk.engine.close()


def test_a_refusal_counts_the_rows_that_are_being_drawn(parts: Parts) -> None:
    desk = Desk(parts, max_waiting_rows=2, max_batch_rows=2)
    desk.ask("drawn", picture(steps=50))
    for _ in range(3):
        desk.engine.step()
    desk.ask("waits", picture(steps=1), picture(steps=1))
    with pytest.raises(QueueFullError) as told:
        desk.ask("more", picture(steps=1))
    status = desk.engine.status()
    assert status.rate is not None and status.backlog_pixel_steps == (47 + 2) * 2 * 16 * 16
    assert told.value.retry_after_s == pytest.approx(status.backlog_pixel_steps / status.rate)
    assert "(25088 pixel-steps" in str(told.value)
    desk.engine.close(drain=False)


def test_a_request_that_is_prepared_while_the_engine_closes_is_refused(parts: Parts) -> None:
    desk = Desk(parts)
    desk.engine.start()
    version = desk.engine._versions["v1"]
    prepare = version.prepare

    def closes(request: Any) -> Any:
        desk.engine.close()
        return prepare(request)

    version.prepare = closes
    with pytest.raises(InputError, match="closing"):
        desk.ask("r", picture())
    assert desk.engine.status().versions == {"v1": 0} and not desk.engine._requests


def test_a_fault_of_the_decoding_thread_fails_every_request_and_shows(parts: Parts) -> None:
    desk = Desk(parts)

    def broken(*args: Any) -> None:
        raise KeyError("gone")

    desk.engine._decoded = broken
    desk.ask("r", picture(steps=1))
    desk.engine.start()
    end = desk.inbox.end_of("r")
    assert isinstance(end, Failed) and isinstance(end.error, KeyError)
    assert desk.engine.broken is end.error
    desk.engine.close()


def made_by_key(desk: Desk) -> dict[str, int]:
    made: dict[str, int] = {}
    for group in desk.engine._loop._groups.values():
        for row in group.rows:
            made[row.key] = made.get(row.key, 0) + row.step * row.step_pixels
    return made


def test_many_requests_of_one_key_leave_half_of_the_steps_to_another_key(parts: Parts) -> None:
    desk = Desk(parts)
    for number in range(16):
        desk.ask(f"small {number}", picture(steps=99, guidance_scale=0.0, seed=number), key="many")
    desk.ask("large", picture(steps=99, guidance_scale=0.0, width_px=32, height_px=32), key="one")
    for _ in range(40):
        desk.engine.step()
    made = made_by_key(desk)
    assert made["one"] == pytest.approx(made["many"], rel=0.15)
    desk.engine.close(drain=False)


def test_a_keys_priority_is_its_share_of_the_steps_whatever_it_asks(parts: Parts) -> None:
    desk = Desk(parts)
    for number in range(4):
        desk.ask(f"a {number}", picture(steps=99, guidance_scale=0.0, seed=number), key="a")
    for number in range(2):
        row = picture(steps=99, guidance_scale=0.0, seed=number, width_px=32)
        desk.ask(f"b {number}", row, key="b", priority=3.0)
    for _ in range(60):
        desk.engine.step()
    made = made_by_key(desk)
    assert made["b"] == pytest.approx(3 * made["a"], rel=0.15)
    desk.engine.close(drain=False)
