"""Who draws next: rows wait in fair queues, and groups of rows take turns.

Start-time fair queueing (Goyal et al. 1996) between keys, and again between the picture sizes of each key: a row's cost
is its pixel-steps (pixels of the picture times denoiser evaluations), a key's share grows with its priority, and a key
that sends several sizes splits its share between them. So small and large requests advance side by side, and a row that
does not fit now is passed by rows of other sizes; what passes a row that waits for memory costs at most what it costs
itself, then memory is kept for it. A row is charged when it is taken, so what is cancelled before costs nothing and
what was drawn is never forgiven. Pure bookkeeping: no clock is read, no thread is started.
"""

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Generic, Protocol, TypeVar

from components.errors import DeadlineError, QueueFullError

LEAST_TOLD_S = 0.01


def check_deadline(limit_s: float, waiting_s: float, drawing_s: float, alone_s: float, passed_s: float = 0.0) -> None:
    """DeadlineError with the numbers when what has passed, waiting and drawing take longer than `limit_s` together.

    `alone_s` is what drawing would take with nothing else at work. Where that is within the limit, others are the
    reason (or what held the request up before), and `retry_after_s` says when so much of their work will be done that
    the same request would be accepted.
    """
    expected_s = passed_s + waiting_s + drawing_s
    if expected_s <= limit_s:
        return
    passed = f"{passed_s:.2f} s had passed, " if passed_s >= LEAST_TOLD_S else ""
    reason = f"({passed}{waiting_s:.2f} s waiting, {drawing_s:.2f} s drawing), found {limit_s:.2f}"
    message = f"deadline_s expected at least {expected_s:.2f} at the measured speed {reason}; "
    if alone_s > limit_s:
        raise DeadlineError(f"{message}it takes {alone_s:.2f} s alone: ask for fewer steps or a later deadline")
    why = "it was held up" if passed_s > waiting_s else "others are at work"
    error = DeadlineError(f"{message}{why}, alone it would take {alone_s:.2f} s: ask again later")
    error.retry_after_s = expected_s - limit_s
    raise error


class WaitingRow(Protocol):
    """What the queue must know of a row."""

    @property
    def key(self) -> str: ...
    @property
    def shape(self) -> Hashable:
        """Rows of one shape share a denoiser call."""
        ...

    @property
    def pixel_steps(self) -> int: ...
    @property
    def priority(self) -> float:
        """Share against other keys; positive."""
        ...


Row = TypeVar("Row", bound=WaitingRow)


class Room(Enum):
    """Whether a row fits beside those at work."""

    YES = "yes"
    BATCH_FULL = "batch full"
    NO_MEMORY = "no memory"


@dataclass(eq=False)
class _Flow(Generic[Row]):
    """Rows of one key and shape."""

    shape: Hashable
    start: float = 0.0
    """Its key's virtual time at which its first row is due."""
    rows: deque[Row] = field(default_factory=deque)
    passed_pixel_steps: int = 0
    """Of rows that were taken while the first one waited for memory."""


@dataclass(eq=False)
class _Key(Generic[Row]):
    name: str
    priority: float = 1.0
    start: float = 0.0
    """Virtual time of the queue at which its next row is due."""
    virtual: float = 0.0
    """Its own virtual time, shared by its flows."""
    flows: dict[Hashable, _Flow[Row]] = field(default_factory=dict)

    def __len__(self) -> int:
        return sum(len(flow.rows) for flow in self.flows.values())

    def in_order(self) -> Iterator[tuple[float, Row]]:
        """The rows as they are due, each with its virtual time within the key."""
        return heapq.merge(*[_due(flow) for flow in self.flows.values()], key=lambda due: due[0])


def _due(flow: _Flow[Row]) -> Iterator[tuple[float, Row]]:
    costs = itertools.accumulate((row.pixel_steps for row in flow.rows), initial=flow.start)
    return zip(costs, flow.rows, strict=False)


class FairQueue(Generic[Row]):
    """Rows that wait, at most `max_rows`; not safe for several threads at once: its owner holds a lock."""

    def __init__(self, max_rows: int) -> None:
        self.max_rows = max_rows
        self.pixel_steps = 0
        """Of all rows that wait."""
        self._num_rows = 0
        self._virtual = 0.0
        self._keys: dict[str, _Key[Row]] = {}

    def __len__(self) -> int:
        return self._num_rows

    def __iter__(self) -> Iterator[Row]:
        return (row for key in self._keys.values() for flow in key.flows.values() for row in flow.rows)

    def push(self, rows: Sequence[Row], backlog: int = 0, backlog_s: float | None = None) -> None:
        """Let a request's rows wait, all or none, where `check` finds room for them."""
        self.check(len(rows), rows[0].key, rows[0].priority, backlog, backlog_s)
        for row in rows:
            key = self._keys.setdefault(row.key, _Key(row.key))
            if not len(key):
                key.start = max(key.start, self._virtual)
            flow = key.flows.setdefault(row.shape, _Flow(row.shape))
            if not flow.rows:
                flow.start = max(flow.start, key.virtual)
            key.priority = row.priority
            flow.rows.append(row)
            self._count(row, 1)

    def check(self, num_rows: int, key: str, priority: float, backlog: int = 0, backlog_s: float | None = None) -> None:
        """QueueFullError, which says how long the backlog is, when so many more rows of a key may not wait.

        Once more than half of the places are taken, a key that holds some may hold no more than its share by priority,
        one share being left for a key that holds none yet; the empty key (nobody was asked for one) may hold all.
        `backlog` are the pixel-steps still to be made, of rows at work too, and `backlog_s` the seconds they will
        take, None before anything was measured.
        """
        found = self._refused(num_rows, key, priority)
        if found:
            known = "at a speed not measured yet" if backlog_s is None else f"about {backlog_s:.1f} s"
            error = QueueFullError(f"{found} ({backlog} pixel-steps, {known}); send it again later")
            error.retry_after_s = backlog_s
            raise error

    def take(self, room: Callable[[Row], Room]) -> Row | None:
        """Return the next row that fits, or None; the caller asks again until None."""
        passed: list[_Flow[Row]] = []
        full: set[Hashable] = set()
        for key in sorted((key for key in self._keys.values() if len(key)), key=lambda key: key.start):
            waiting = (flow for flow in key.flows.values() if flow.rows)
            for flow in sorted(waiting, key=lambda flow: flow.start):
                row = flow.rows[0]
                # Places that fall free add up for the row that found too few of them.
                found = Room.BATCH_FULL if flow.shape in full else room(row)
                if found is Room.BATCH_FULL:
                    full.add(flow.shape)
                if found is Room.NO_MEMORY:
                    passed.append(flow)
                cost = row.pixel_steps
                if found is Room.YES and all(o.passed_pixel_steps + cost <= o.rows[0].pixel_steps for o in passed):
                    for other in passed:
                        other.passed_pixel_steps += cost
                    self._charge(key, flow)
                    return row
        return None

    def remove(self, unwanted: Callable[[Row], bool]) -> list[Row]:
        """Take rows out that need not be drawn any more."""
        removed = []
        for key in self._keys.values():
            for flow in key.flows.values():
                leaving = [row for row in flow.rows if unwanted(row)]
                if not leaving:
                    continue
                if leaving[0] is flow.rows[0]:
                    flow.passed_pixel_steps = 0
                flow.rows = deque(row for row in flow.rows if not unwanted(row))
                for row in leaving:
                    self._count(row, -1)
                removed += leaving
        self._forget_idle()
        return removed

    def pixel_steps_before(self, row: Row) -> int:
        """Return what would be taken before a row that came now, if everything fitted."""
        own = self._keys.get(row.key, _Key(row.key))
        mates = own.flows.get(row.shape, _Flow(row.shape))
        due = max(mates.start, own.virtual) + sum(mate.pixel_steps for mate in mates.rows)
        earlier = [mate for mate_due, mate in own.in_order() if mate_due <= due]
        due = max(own.start, self._virtual) + sum(mate.pixel_steps / mate.priority for mate in earlier)
        before = sum(mate.pixel_steps for mate in earlier)
        for key in self._keys.values():
            key_due = key.start
            for _, other in key.in_order() if key is not own else ():
                if key_due > due:
                    break
                key_due += other.pixel_steps / other.priority
                before += other.pixel_steps
        return before

    def _refused(self, num_rows: int, name: str, priority: float) -> str:
        """Return why rows find no place; empty when they do."""
        after = self._num_rows + num_rows
        if after > self.max_rows:
            return f"queue expected room for {num_rows} pictures, found {self._num_rows} of {self.max_rows} waiting"
        held = len(self._keys[name]) if name in self._keys else 0
        if not name or not held or after <= self.max_rows / 2:
            return ""
        others = sum(key.priority for key in self._keys.values() if len(key) and key.name != name)
        most = int(self.max_rows * priority / (2 * priority + others))
        if held + num_rows <= most:
            return ""
        return (
            f"key expected to hold at most {most} of {self.max_rows} places, found {held} and {num_rows} more:"
            " the rest is left to other keys"
        )

    def _charge(self, key: _Key[Row], flow: _Flow[Row]) -> None:
        row = flow.rows.popleft()
        flow.passed_pixel_steps = 0
        self._virtual = max(self._virtual, key.start)
        key.start += row.pixel_steps / row.priority
        key.virtual = max(key.virtual, flow.start)
        flow.start += row.pixel_steps
        self._count(row, -1)
        self._forget_idle()

    def _count(self, row: Row, sign: int) -> None:
        self._num_rows += sign
        self.pixel_steps += sign * row.pixel_steps

    def _forget_idle(self) -> None:
        """Drop keys that owe nothing any more, so that one seen once costs no memory; nobody owes an empty queue."""
        if not self._num_rows:
            self._virtual = max((key.start for key in self._keys.values()), default=self._virtual)
        for key in list(self._keys.values()):
            if not len(key):
                key.flows.clear()
                if key.start <= self._virtual:
                    del self._keys[key.name]
            for shape in [s for s, flow in key.flows.items() if not flow.rows and flow.start <= key.virtual]:
                del key.flows[shape]


class FairShares:
    """Which group of live rows makes the next step: the one that was served least for its weight."""

    def __init__(self) -> None:
        self._service: dict[Hashable, float] = {}

    def next(self, weights: dict[Hashable, float]) -> Hashable:
        """Return one of the groups named in `weights` (at least one); a new group starts level with the least served.

        A group's weight is its rows' part of the shares of their keys (`StepLoop._weights`).
        """
        known = [self._service[name] for name in weights if name in self._service]
        level = min(known, default=0.0)
        self._service = {name: self._service.get(name, level) for name in weights}
        return min(weights, key=lambda name: self._service[name])

    def charge(self, name: Hashable, pixel_steps: int, weight: float) -> None:
        self._service[name] += pixel_steps / weight
