"""One iteration of the engine: which rows leave and join, which group steps, and what came out of it.

No threads and no events here. What other threads may ask about at any time (queue, groups, times) is changed under the
lock that the owner passes in; the step itself runs without it.

Shape letters: B rows, C channels, H, W latent height and width.
"""

import threading
import time
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from components.admission import FairQueue, FairShares, Room, StepTimes, check_deadline
from components.engine_status import EngineCounters, EngineLimits
from components.live_rows import AcceptedRequest, Group, LiveRow

MAX_STEPS_IN_FLIGHT = 2
"""On a GPU the host may run ahead of the device by so many steps: enough to keep it busy, few enough to cancel soon."""


@dataclass
class StepOutcome:
    """What one iteration leads to; the latents are on the model's device."""

    moved: list[LiveRow] = field(default_factory=list)
    failed: dict[AcceptedRequest, Exception] = field(default_factory=dict)
    partial: list[tuple[LiveRow, Tensor]] = field(default_factory=list)
    """Rows at a step where an early picture is asked, with their clean estimate."""
    final: list[tuple[LiveRow, Tensor]] = field(default_factory=list)


class StepLoop:
    """The rows that wait and the groups of rows at work."""

    def __init__(self, limits: EngineLimits, lock: threading.Condition) -> None:
        self.limits = limits
        self.queue: FairQueue[LiveRow] = FairQueue(limits.max_waiting_rows)
        self.times = StepTimes()
        self._lock = lock
        self._groups: dict[Hashable, Group] = {}
        self._shares = FairShares()
        self._in_flight: deque[Any] = deque()

    @property
    def busy(self) -> bool:
        return bool(self._groups) or len(self.queue) > 0

    @property
    def num_rows(self) -> int:
        return sum(len(group.rows) for group in self._groups.values())

    @property
    def backlog_pixel_steps(self) -> int:
        """What is still to be made, of rows at work and rows that wait."""
        live = (row for group in self._groups.values() for row in group.rows)
        return self.queue.pixel_steps + sum(row.step_pixels * row.steps_left for row in live)

    def check_deadline(self, accepted: AcceptedRequest, decode_s: float) -> None:
        """Under the lock: DeadlineError with the numbers when the measured speed says that a new request comes late."""
        limit_s = accepted.request.deadline_s
        expected = None if limit_s is None else self.expected_s(accepted)
        if limit_s is None or expected is None:
            return
        waiting_s, drawing_s, alone_s = expected
        check_deadline(limit_s, waiting_s, drawing_s + decode_s, alone_s + decode_s)

    def expected_s(self, accepted: AcceptedRequest) -> tuple[float, float, float] | None:
        """Under the lock: seconds a new request would wait and draw, and draw alone; None before anything was measured.

        It takes the groups as they are now: who comes later makes it slower, who leaves faster.
        """
        row = max(accepted.rows, key=lambda row: row.pixel_steps)
        mates = self._groups.get(_group_name(row))
        own_pixels = sum(own.step_pixels for own in accepted.rows)
        full_pixels = row.step_pixels // row.call_rows * self.limits.max_batch_rows
        step_s = self.times.seconds(row.shape, min(own_pixels + (mates.step_pixels if mates else 0), full_pixels))
        alone_step_s = self.times.seconds(row.shape, min(own_pixels, full_pixels))
        if step_s is None or alone_step_s is None:
            return None
        alone_s = row.steps_left * alone_step_s
        rest = sum(group.weight for group in self._groups.values() if group is not mates)
        weight = accepted.request.priority + (mates.weight if mates else 0.0)
        drawing_s = row.steps_left * step_s * (weight + rest) / weight
        if self.room(row) is Room.YES and not len(self.queue):
            return 0.0, drawing_s, alone_s
        before = self.queue.pixel_steps_before(row)
        slot_s = min((mate.steps_left for mate in mates.rows), default=0) * step_s if mates else 0.0
        return before / (self.times.rate or 1.0) + slot_s, drawing_s, alone_s

    def room(self, row: LiveRow) -> Room:
        """Whether a row fits beside those at work; alone it always does."""
        if not self._groups:
            return Room.YES
        group = self._groups.get(_group_name(row))
        if group is not None and group.call_rows + row.call_rows > self.limits.max_batch_rows:
            return Room.BATCH_FULL
        live_pixels = sum(own.pixels for other in self._groups.values() for own in other.rows)
        return Room.YES if live_pixels + row.pixels <= self.limits.max_live_pixels else Room.NO_MEMORY

    def change_rows(self, now: float) -> list[AcceptedRequest]:
        """Drop rows of requests that ended, start waiting ones; returns those that miss their deadline."""
        with self._lock, torch.inference_mode():
            for name, group in list(self._groups.items()):
                group.keep([place for place, row in enumerate(group.rows) if not row.owner.ended])
                if not group.rows:
                    del self._groups[name]
            late = {row.owner: None for row in self.queue if self._is_late(row, now)}
            late |= {row.owner: None for g in self._groups.values() for row in g.rows if self._is_late(row, now)}
            strict_rows = self.limits.max_batch_rows if self.limits.strict else None
            while (row := self.queue.take(self.room)) is not None:
                if row.owner.started_at is None:
                    row.owner.started_at = now
                name = _group_name(row)
                if name not in self._groups:
                    self._groups[name] = Group(row.owner.version, strict_rows)
                self._groups[name].add(row)
            return list(late)

    def _is_late(self, row: LiveRow, now: float) -> bool:
        """Whether its time is over, or for a row that has not begun: too short even if it were drawn alone."""
        deadline = row.owner.deadline
        if deadline is None:
            return False
        begun = row.owner.started_at is not None
        step_s = None if begun else self.times.seconds(row.shape, row.step_pixels)
        return now + row.steps_left * (step_s or 0.0) > deadline

    @torch.inference_mode()
    def step(self, counters: EngineCounters) -> StepOutcome:
        """Make one step of the group that was served least; an empty outcome when no row is at work."""
        with self._lock:
            weights = {name: group.weight for name, group in self._groups.items()}
            if not weights:
                return StepOutcome()
            name = self._shares.next(weights)
            group = self._groups[name]
            shape, pixels, call_rows = group.rows[0].shape, group.step_pixels, group.call_rows
        start = time.perf_counter()
        failed = group.advance()
        self._pace(group.version.device)
        seconds = time.perf_counter() - start
        with self._lock:
            self._shares.charge(name, pixels, weights[name])
            self.times.observe(shape, pixels, seconds)
            counters.steps += 1
            counters.call_rows += call_rows
            counters.row_steps += len(group.rows)
            counters.stepping_s += seconds
            outcome = _outcome(group, failed)
            group.keep([place for place, row in enumerate(group.rows) if row.steps_left])
            if not group.rows:
                del self._groups[name]
            return outcome

    def _pace(self, device: torch.device) -> None:
        """On a GPU, wait for the step before last, so that the host does not queue up work nobody can cancel."""
        if device.type != "cuda":
            return
        event = torch.cuda.Event()
        event.record()
        self._in_flight.append(event)
        if len(self._in_flight) > MAX_STEPS_IN_FLIGHT:
            self._in_flight.popleft().synchronize()


def _group_name(row: LiveRow) -> Hashable:
    return row.owner.version.name, row.shape


def _outcome(group: Group, failed: dict[AcceptedRequest, Exception]) -> StepOutcome:
    """Count the step on every row and sort them by what happens to them next."""
    outcome = StepOutcome(failed=failed)
    for place, row in enumerate(group.rows):
        assert group.batch is not None
        row.step += 1
        outcome.moved.append(row)
        if not row.steps_left:
            outcome.final.append((row, group.batch.latents_BCHW[place]))
        elif row.step in row.partial_steps:
            outcome.partial.append((row, group.batch.clean_BCHW[place]))
    return outcome
