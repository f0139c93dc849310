"""Times of steps: each is booked on the step that took it, and foretold from what was seen."""

from collections.abc import Iterator

import pytest
import torch

from components.step_times import MAX_STEPS_IN_FLIGHT, StepTimer, StepTimes, TimedStep


class Device:
    """A GPU's clock: an event is reached when the work queued before it is done."""

    def __init__(self) -> None:
        self.queued_ms = self.waited = 0

    def event(self) -> "Event":
        return Event(self)


class Event:
    def __init__(self, device: Device) -> None:
        self.device, self.at_ms = device, 0

    def record(self) -> None:
        self.at_ms = self.device.queued_ms

    def synchronize(self) -> None:
        self.device.waited += 1

    def elapsed_time(self, end: "Event") -> float:
        return end.at_ms - self.at_ms


def test_on_a_gpu_each_step_is_booked_on_its_own_shape_whatever_runs_between() -> None:
    device, cuda = Device(), torch.device("cuda")
    timer, found = StepTimer(device.event), []
    steps = [("small", 10, 2)] * 4 + [("large", 100, 1000)] + [("small", 10, 2)] * 4
    for number, (shape, pixel_steps, cost_ms) in enumerate(steps):
        timer.begin(cuda)
        device.queued_ms += cost_ms
        found += timer.end(cuda, shape, pixel_steps)
        device.queued_ms += 500  # idle, or the decoder on the same stream
        assert len(found) == max(0, number + 1 - MAX_STEPS_IN_FLIGHT) == device.waited
    assert found == [TimedStep(*step[:2], step[2] / 1000) for step in steps[: len(found)]]


def test_on_a_cpu_a_step_is_booked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock: Iterator[float] = iter([1.0, 1.5])
    monkeypatch.setattr("components.step_times.time.perf_counter", lambda: next(clock))
    timer = StepTimer()
    timer.begin(torch.device("cpu"))
    assert timer.end(torch.device("cpu"), "small", 10) == [TimedStep("small", 10, 0.5)]


def test_step_times_find_the_fixed_part_and_the_part_of_each_row() -> None:
    times = StepTimes()
    times.observe("small", 100, 7.0)
    assert times.seconds("small", 100) is None and times.rate is None, "the first step pays for what is set up once"
    for pixels in (100, 400, 800, 200, 1600) * 5:
        times.observe("small", pixels, 0.010 + 0.00002 * pixels)
    assert times.seconds("small", 100) == pytest.approx(0.012)
    assert times.seconds("small", 3000) == pytest.approx(0.070)
    # A size never seen takes what all sizes took.
    assert times.seconds("large", 3000) == pytest.approx(0.070)
    assert times.rate == pytest.approx(620 / 0.0224, rel=0.2)


def test_step_times_of_one_batch_size_promise_no_speed_that_was_not_seen() -> None:
    times = StepTimes()
    for _ in range(5):
        times.observe("small", 100, 0.02)
    assert times.seconds("small", 50) == pytest.approx(0.02)
    assert times.seconds("small", 200) == pytest.approx(0.04)


def test_step_times_follow_a_machine_that_becomes_slower() -> None:
    times = StepTimes()
    for seconds in [0.01] * 200 + [0.03] * 200:
        times.observe("small", 100, seconds)
    assert times.seconds("small", 100) == pytest.approx(0.03, rel=0.05)
    assert times.rate == pytest.approx(100 / 0.03, rel=0.05)
