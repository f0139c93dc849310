"""How long a step takes: measured on the host or by the device's own clock, and foretold from its pixel-steps.

On a GPU the host runs ahead by some steps, so what a step took is known only later; it is booked on the step that took
it. No lock: the loop's thread measures, and its owner guards what others read.
"""

import time
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch

MAX_STEPS_IN_FLIGHT = 2
"""On a GPU the host may run ahead of the device by so many steps: enough to keep it busy, few enough to cancel soon."""
FORGETTING = 0.98
"""Weight of a measured step against the next one: about the last fifty count."""


@dataclass(frozen=True)
class TimedStep:
    """A step that is over."""

    shape: Hashable
    pixel_steps: int
    seconds: float


class StepTimer:
    """Measures steps between `begin` and `end`."""

    def __init__(self, make_event: Callable[[], Any] = lambda: torch.cuda.Event(enable_timing=True)) -> None:
        self._make_event = make_event
        self._start: Any = None
        self._in_flight: deque[tuple[Hashable, int, Any, Any]] = deque()

    def begin(self, device: torch.device) -> None:
        self._start = self._recorded() if device.type == "cuda" else time.perf_counter()

    def end(self, device: torch.device, shape: Hashable, pixel_steps: int) -> list[TimedStep]:
        """Return the steps whose time is known now: on a CPU this one, on a GPU an earlier one, waited for."""
        if device.type != "cuda":
            return [TimedStep(shape, pixel_steps, time.perf_counter() - self._start)]
        self._in_flight.append((shape, pixel_steps, self._start, self._recorded()))
        if len(self._in_flight) <= MAX_STEPS_IN_FLIGHT:
            return []
        over_shape, over_pixel_steps, start, end = self._in_flight.popleft()
        end.synchronize()
        return [TimedStep(over_shape, over_pixel_steps, start.elapsed_time(end) / 1000)]

    def _recorded(self) -> Any:
        event = self._make_event()
        event.record()
        return event


@dataclass
class _Line:
    """Sums of a weighted straight line through (pixel-steps, seconds)."""

    weight: float = 0.0
    x: float = 0.0
    y: float = 0.0
    xx: float = 0.0
    xy: float = 0.0

    def add(self, x: float, y: float) -> None:
        self.weight = FORGETTING * self.weight + 1
        self.x = FORGETTING * self.x + x
        self.y = FORGETTING * self.y + y
        self.xx = FORGETTING * self.xx + x * x
        self.xy = FORGETTING * self.xy + x * y

    def at(self, x: float) -> float:
        mean_x, mean_y = self.x / self.weight, self.y / self.weight
        variance = self.xx / self.weight - mean_x**2
        if variance < (0.05 * mean_x) ** 2:
            # Seen at one size of batch only: larger ones in proportion, smaller ones no faster.
            return mean_y * max(1.0, x / mean_x)
        slope = max(0.0, (self.xy / self.weight - mean_x * mean_y) / variance)
        offset = mean_y - slope * mean_x
        return offset + slope * x if offset >= 0 else mean_y * x / mean_x


class StepTimes:
    """Measured seconds of a step by its pixel-steps: a fixed part and a part for each row, for each shape."""

    def __init__(self) -> None:
        self._lines: dict[Hashable, _Line] = {}
        self._all = _Line()

    def observe(self, shape: Hashable, pixel_steps: int, seconds: float) -> None:
        """Take note of a step; the first of each shape is left out, since it pays for what is set up once."""
        if shape not in self._lines:
            self._lines[shape] = _Line()
            return
        self._lines[shape].add(pixel_steps, seconds)
        self._all.add(pixel_steps, seconds)

    def seconds(self, shape: Hashable, pixel_steps: int) -> float | None:
        """Return the expected seconds of one step; None before anything was measured."""
        own = self._lines.get(shape)
        line = own if own is not None and own.weight else self._all
        return line.at(pixel_steps) if line.weight else None

    @property
    def rate(self) -> float | None:
        """Pixel-steps a second over the last steps; None before anything was measured."""
        return self._all.x / self._all.y if self._all.y else None
