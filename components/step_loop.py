"""One iteration of the engine: which rows leave and join, which group steps, and what came out of it.

No threads and no events here. What other threads may ask about at any time (queue, groups, times) is changed under the
lock that the owner passes in; the step itself runs without it.

Shape letters: B rows, C channels, H, W latent height and width.
"""

import threading
from collections import Counter
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor

from components.admission import FairQueue, FairShares, Room, check_deadline
from components.decode_stage import DecodeStage
from components.engine_status import EngineCounters, EngineLimits
from components.errors import InputError
from components.live_rows import AcceptedRequest, Group, LiveRow
from components.side_by_side import SideBySide
from components.step_times import StepTimer, StepTimes
from components.threads import calls_at_once


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

    def __init__(self, limits: EngineLimits, lock: threading.Condition, decoder: DecodeStage) -> None:
        """`decoder` is asked how much waits there: no row starts while it is far behind."""
        self.limits, self._decoder = limits, decoder
        self.queue: FairQueue[LiveRow] = FairQueue(limits.max_waiting_rows)
        self.times = StepTimes()
        self._lock = lock
        self._groups: dict[Hashable, Group] = {}
        self._shares = FairShares()
        self._timer = StepTimer()
        self._calls: SideBySide | None = None

    @property
    def busy(self) -> bool:
        return bool(self._groups) or len(self.queue) > 0

    @property
    def can_step(self) -> bool:
        """Whether a row is at work or may start; the decoder may keep those that wait waiting."""
        return bool(self._groups) or (len(self.queue) > 0 and not self._decoder.full)

    @property
    def num_rows(self) -> int:
        return sum(len(group.rows) for group in self._groups.values())

    @property
    def backlog_pixel_steps(self) -> int:
        """What is still to be made for those who wait, of rows at work and rows in the queue."""
        rows = chain(self.queue, (row for group in self._groups.values() for row in group.rows))
        return sum(row.step_pixels * row.steps_left for row in rows if not row.owner.request.background)

    @property
    def backlog_s(self) -> float | None:
        """Seconds of that at the measured speed and of what waits to be decoded; None before anything was measured."""
        rate = self.times.rate
        return None if rate is None else self.backlog_pixel_steps / rate + self._decoder.expected_s()

    def check_room(self, num_rows: int, key: str, priority: float) -> None:
        """Under the lock: QueueFullError when so many more rows of a key would not be accepted now."""
        self.queue.check(num_rows, key, priority, self.backlog_pixel_steps, self.backlog_s)

    def accept(self, accepted: AcceptedRequest) -> None:
        """Under the lock: let a request's rows wait; InputError, DeadlineError or QueueFullError if they cannot."""
        largest = max(row.pixels for row in accepted.rows)
        if largest > self.limits.max_live_pixels:
            raise InputError(
                f"picture expected at most {self.limits.max_live_pixels} pixels (max_live_pixels), found {largest}"
            )
        self._check_deadline(accepted)
        self.queue.push(accepted.rows, self.backlog_pixel_steps, self.backlog_s)

    def _check_deadline(self, accepted: AcceptedRequest) -> None:
        limit_s = accepted.request.deadline_s
        expected = None if limit_s is None else self.expected_s(accepted)
        if limit_s is None or expected is None:
            return
        waiting_s, drawing_s, alone_s = expected
        decode_s = self._decoder.expected_s(len(accepted.rows))
        check_deadline(limit_s, waiting_s, drawing_s + decode_s, alone_s + decode_s, accepted.request.waited_s)

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
        weights = self._weights(accepted)
        drawing_s = row.steps_left * step_s * sum(weights.values()) / weights[_group_name(row)]
        if self.room(row) is Room.YES and not len(self.queue):
            return 0.0, drawing_s, alone_s
        before = self.queue.pixel_steps_before(row)
        slot_s = min((mate.steps_left for mate in mates.rows), default=0) * step_s if mates else 0.0
        return before / (self.times.rate or 1.0) + slot_s, drawing_s, alone_s

    def _weights(self, newcomer: AcceptedRequest | None = None) -> dict[Hashable, float]:
        """Return each group's share of the steps, a newcomer's among them.

        A key has its priority, split between its requests at work and again between the rows of each.
        """
        rows = [(name, row) for name, group in self._groups.items() for row in group.rows]
        rows += [(_group_name(row), row) for row in newcomer.rows] if newcomer is not None else []
        requests = Counter(owner.request.key for owner in {row.owner for _, row in rows})
        weights: dict[Hashable, float] = {}
        for name, row in rows:
            weights[name] = weights.get(name, 0.0) + row.weight / requests[row.key]
        return weights

    def room(self, row: LiveRow) -> Room:
        """Whether a row fits beside those at work; alone it always does."""
        if not self._groups:
            return Room.YES
        group = self._groups.get(_group_name(row))
        if group is not None:
            most = min(self.limits.max_batch_rows, group.most_call_rows or self.limits.max_batch_rows)
            if group.call_rows + row.call_rows > most:
                return Room.BATCH_FULL
        live_pixels = sum(own.pixels for other in self._groups.values() for own in other.rows)
        return Room.YES if live_pixels + row.pixels <= self.limits.max_live_pixels else Room.NO_MEMORY

    def change_rows(self, now: float, requests: Iterable[AcceptedRequest]) -> list[AcceptedRequest]:
        """Drop rows of requests that ended, start waiting ones; returns the `requests` that miss their deadline."""
        with self._lock:
            for name, group in list(self._groups.items()):
                group.keep([place for place, row in enumerate(group.rows) if not row.owner.ended])
                if not group.rows:
                    del self._groups[name]
            late = {row.owner: None for row in self.queue if self._is_hopeless(row, now)}
            late |= {accepted: None for accepted in requests if accepted.is_late(now)}
            while not self._decoder.full and (row := self.queue.take(self.room)) is not None:
                if row.owner.started_at is None:
                    row.owner.started_at = now
                name = _group_name(row)
                if name not in self._groups:
                    self._groups[name] = Group(row.owner.version, self.limits.buckets, self._side_by_side())
                self._groups[name].add(row)
            return list(late)

    def _side_by_side(self) -> SideBySide:
        """Made with the first row: the number of threads is settled by then."""
        if self._calls is None:
            self._calls = SideBySide(self.limits.calls_at_once or calls_at_once())
        return self._calls

    def close(self) -> None:
        """End the threads that make calls; no step comes after it."""
        if self._calls is not None:
            self._calls.close()

    def _is_hopeless(self, row: LiveRow, now: float) -> bool:
        """Whether the time left is too short for a row that has not begun, even if it were drawn alone."""
        deadline = row.owner.deadline
        if deadline is None or row.owner.started_at is not None:
            return False
        return now + row.steps_left * (self.times.seconds(row.shape, row.step_pixels) or 0.0) > deadline

    @torch.inference_mode()
    def step(self, counters: EngineCounters) -> StepOutcome:
        """Make one step of the group that was served least; an empty outcome when no row is at work."""
        with self._lock:
            if not self._groups:
                return StepOutcome()
            weights = self._weights()
            name = self._shares.next(weights)
            group = self._groups[name]
            shape, pixels, call_rows = group.rows[0].shape, group.step_pixels, group.call_rows
        device = group.version.device
        self._timer.begin(device)
        failed = group.advance()
        timed = self._timer.end(device, shape, pixels)
        with self._lock:
            self._shares.charge(name, pixels, weights[name])
            for step in timed:
                self.times.observe(step.shape, step.pixel_steps, step.seconds)
                counters.stepping_s += step.seconds
            counters.steps += 1
            counters.call_rows += call_rows
            counters.row_steps += len(group.rows)
            outcome = _outcome(group, failed)
            group.keep([place for place, row in enumerate(group.rows) if row.steps_left])
            if not group.rows:
                del self._groups[name]
            return outcome


def _group_name(row: LiveRow) -> Hashable:
    return row.owner.version.name, row.shape


def _outcome(group: Group, failed: dict[AcceptedRequest, Exception]) -> StepOutcome:
    """Count the step on every row and sort them by what happens to them next."""
    outcome = StepOutcome(failed=failed)
    for place, row in enumerate(group.rows):
        row.step += 1
        outcome.moved.append(row)
        if not row.steps_left:
            outcome.final.append((row, group.latents_at(place)))
        elif row.step in row.partial_steps:
            outcome.partial.append((row, group.clean_at(place)))
    return outcome
