"""Who draws next: rows wait in fair queues, and what they will cost in time is known before they start.

Start-time fair queueing (Goyal et al. 1996) over flows, one for each (key, picture size): a row's cost is its
pixel-steps (pixels of the picture times denoiser evaluations), a flow's share grows with its priority, and a key that
sends several sizes splits its share between them. So small and large requests advance side by side, and a row that does
not fit now is passed by rows of other sizes; what passes a row that waits for memory costs at most what it costs
itself, then memory is kept for it. Pure bookkeeping: no clock is read, no thread is started.
"""

from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Generic, Protocol, TypeVar

from components.errors import DeadlineError, QueueFullError

FORGETTING = 0.98
"""Weight of a measured step against the next one: about the last fifty count."""


def check_room(num_rows: int, num_waiting: int, max_waiting: int, pixel_steps: int, rate: float | None) -> None:
    """QueueFullError when so many more rows may not wait; it says how long the backlog of `pixel_steps` is."""
    if num_waiting + num_rows <= max_waiting:
        return
    seconds = None if not rate else pixel_steps / rate
    known = "at a speed not measured yet" if seconds is None else f"about {seconds:.1f} s"
    error = QueueFullError(
        f"queue expected room for {num_rows} pictures, found {num_waiting} of {max_waiting} waiting"
        f" ({pixel_steps} pixel-steps, {known}); send it again later"
    )
    error.retry_after_s = seconds
    raise error


def check_deadline(limit_s: float, waiting_s: float, drawing_s: float, alone_s: float) -> None:
    """DeadlineError with the numbers when waiting and drawing take longer than `limit_s`.

    `alone_s` is what drawing would take with nothing else at work. Where that is within the limit, others are the
    reason, and `retry_after_s` says when so much of their work will be done that the same request would be accepted.
    """
    expected_s = waiting_s + drawing_s
    if expected_s <= limit_s:
        return
    reason = f"({waiting_s:.2f} s waiting, {drawing_s:.2f} s drawing), found {limit_s:.2f}"
    message = f"deadline_s expected at least {expected_s:.2f} at the measured speed {reason}; "
    if alone_s > limit_s:
        raise DeadlineError(f"{message}it takes {alone_s:.2f} s alone: ask for fewer steps or a later deadline")
    error = DeadlineError(f"{message}others are at work, alone it would take {alone_s:.2f} s: ask again later")
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
        """Share against other flows; positive."""
        ...


Row = TypeVar("Row", bound=WaitingRow)


class Room(Enum):
    """Whether a row fits beside those at work."""

    YES = "yes"
    BATCH_FULL = "batch full"
    NO_MEMORY = "no memory"


@dataclass(eq=False)
class _Entry(Generic[Row]):
    row: Row
    start: float
    finish: float
    passed_pixel_steps: int = 0


@dataclass
class _Flow(Generic[Row]):
    entries: deque[_Entry[Row]] = field(default_factory=deque)
    finish: float = 0.0


class FairQueue(Generic[Row]):
    """Rows that wait, at most `max_rows`; not safe for several threads at once: its owner holds a lock."""

    def __init__(self, max_rows: int) -> None:
        self.max_rows = max_rows
        self.pixel_steps = 0
        """Of all rows that wait."""
        self._num_rows = 0
        self._virtual = 0.0
        self._flows: dict[tuple[str, Hashable], _Flow[Row]] = {}

    def __len__(self) -> int:
        return self._num_rows

    def __iter__(self) -> Iterator[Row]:
        return (entry.row for flow in self._flows.values() for entry in flow.entries)

    def push(self, rows: Sequence[Row], rate: float | None = None) -> None:
        """Let a request's rows wait, all or none; QueueFullError says how long the backlog is.

        `rate` is the measured speed in pixel-steps a second, None before anything was measured.
        """
        check_room(len(rows), self._num_rows, self.max_rows, self.pixel_steps, rate)
        for row in rows:
            flow = self._flows.setdefault((row.key, row.shape), _Flow())
            start = max(self._virtual, flow.finish)
            flow.finish = start + row.pixel_steps / self._share(row, flow)
            flow.entries.append(_Entry(row, start, flow.finish))
            self._num_rows += 1
            self.pixel_steps += row.pixel_steps

    def take(self, room: Callable[[Row], Room]) -> Row | None:
        """Return the next row that fits, or None; the caller asks again until None."""
        waiting = [flow for flow in self._flows.values() if flow.entries]
        passed: list[_Entry[Row]] = []
        for flow in sorted(waiting, key=lambda flow: flow.entries[0].start):
            entry = flow.entries[0]
            found = room(entry.row)
            if found is Room.NO_MEMORY:
                passed.append(entry)
            if found is not Room.YES:
                continue
            cost = entry.row.pixel_steps
            if any(other.passed_pixel_steps + cost > other.row.pixel_steps for other in passed):
                continue
            for other in passed:
                other.passed_pixel_steps += cost
            flow.entries.popleft()
            self._left(entry)
            self._virtual = max(self._virtual, entry.start)
            self._forget_idle()
            return entry.row
        return None

    def remove(self, unwanted: Callable[[Row], bool]) -> list[Row]:
        """Take rows out that need not be drawn any more."""
        removed = []
        for flow in self._flows.values():
            leaving = [entry for entry in flow.entries if unwanted(entry.row)]
            if leaving:
                flow.entries = deque(entry for entry in flow.entries if entry not in leaving)
                # What is not drawn is not charged either.
                flow.finish = flow.entries[-1].finish if flow.entries else self._virtual
            for entry in leaving:
                self._left(entry)
                removed.append(entry.row)
        self._forget_idle()
        return removed

    def pixel_steps_before(self, row: Row) -> int:
        """Return what would be taken before a row that came now, if everything fitted."""
        flow = self._flows.get((row.key, row.shape))
        start = max(self._virtual, flow.finish if flow else 0.0)
        return sum(e.row.pixel_steps for f in self._flows.values() for e in f.entries if e.start <= start)

    def _share(self, row: Row, flow: _Flow[Row]) -> float:
        others = sum(
            1 for (key, _), other in self._flows.items() if key == row.key and other is not flow and other.entries
        )
        return row.priority / (1 + others)

    def _left(self, entry: _Entry[Row]) -> None:
        self._num_rows -= 1
        self.pixel_steps -= entry.row.pixel_steps

    def _forget_idle(self) -> None:
        """Drop flows that owe nothing any more, so that keys seen once cost no memory; nobody owes an empty queue."""
        if not self._num_rows:
            self._virtual = max((flow.finish for flow in self._flows.values()), default=self._virtual)
        idle = [name for name, flow in self._flows.items() if not flow.entries and flow.finish <= self._virtual]
        for name in idle:
            del self._flows[name]


class FairShares:
    """Which group of live rows makes the next step: the one that was served least for its weight."""

    def __init__(self) -> None:
        self._service: dict[Hashable, float] = {}

    def next(self, weights: dict[Hashable, float]) -> Hashable:
        """Return one of the groups named in `weights` (at least one); a new group starts level with the least served.

        A group's weight is the sum of its rows' priorities, each divided by the rows of its request.
        """
        known = [self._service[name] for name in weights if name in self._service]
        level = min(known, default=0.0)
        self._service = {name: self._service.get(name, level) for name in weights}
        return min(weights, key=lambda name: self._service[name])

    def charge(self, name: Hashable, pixel_steps: int, weight: float) -> None:
        self._service[name] += pixel_steps / weight


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
