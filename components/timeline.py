"""What happened to a model, in which order? Lines of the journal in, a story out.

The journal may be long, may hold only some of the events, and lines that a crash cut short or another version wrote:
what cannot be read is counted and left out, never guessed. Lines are taken in the order in which they were written,
which also holds where a clock went back. Nothing is read from a disk here.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from components.story import PROMOTE, WAIT, Cycle, Dataset, Entry, Judgement, Look, Reign, Stage, Story, Stream, Waits

Line = Mapping[str, Any]
MOST_REASONS = 3
"""Different reasons that a group of waits keeps."""
YEARS = range(1970, 2200)
"""Of a clock, even one that was never set; other years are no times but accidents, and would stretch any axis."""
SHOWN = ("decision", "verdict", "stage", "state", "version", "champion", "previous", "dataset", "images", "search")


@dataclass
class _Reading:
    """A story in the making."""

    story: Story
    cycles: dict[str, Cycle] = field(default_factory=dict)
    waiting: int | None = None
    """Place of the entry of the group of waits that the next wait belongs to."""


def tell(lines: Iterable[Any], name: str, reigns: Sequence[Line] = ()) -> Story:
    """Read journal lines about the model `name`; `reigns` are its alias moves with `since` and `until`."""
    story = Story(name)
    reading = _Reading(story)
    before = 0.0
    for line in lines:
        story.lines += 1
        time = time_of(line.get("time")) if isinstance(line, Mapping) else None
        if time is None or not isinstance(line.get("event"), str):
            story.unread += 1
            continue
        if not _is_about(line, name):
            continue
        story.went_back += time < before
        before = time
        try:
            _take(reading, line, time)
        except (TypeError, ValueError, AttributeError, LookupError, OverflowError):
            story.unread += 1
    story.cycles = list(reading.cycles.values())
    story.reigns = [reign for reign in map(_reign, reigns) if reign is not None]
    return story


def time_of(text: Any) -> float | None:
    """Return Unix seconds of a journal's time; None for anything else."""
    try:
        moment = datetime.fromisoformat(text)
        return moment.timestamp() if moment.tzinfo is not None and moment.year in YEARS else None
    except (TypeError, ValueError, OverflowError):
        return None


def cycle_of(line: Line) -> str:
    """Return the id of the cycle that a line belongs to; empty where it names none."""
    return str(line.get("cycle") or (line.get("id") if line.get("event") == "cycle" else "") or "")


def _is_about(line: Line, name: str) -> bool:
    """Lines of the loop name no model: a workspace has one loop."""
    if line["event"] == "dataset":
        return str(line.get("dataset", "")).rpartition("@")[0] == name
    return line.get("name") in (None, name)


def _take(reading: _Reading, line: Line, time: float) -> None:
    story, event = reading.story, line["event"]
    if event == "trigger" and line.get("decision") == WAIT:
        _wait(reading, line, time)
        return
    if event in ("trigger", "stage", "cycle"):
        cycle_id = cycle_of(line)
        cycle = reading.cycles.setdefault(cycle_id or f"since {line['time']}", Cycle(cycle_id, time))
        {"trigger": _trigger, "stage": _stage, "cycle": _end}[event](cycle, line, time)
    elif event == "monitor":
        story.looks.append(_look(line, time))
    elif event == PROMOTE and "decision" in line:
        story.judgements.append(_judgement(line, time))
    elif event == "dataset":
        story.datasets.append(_dataset(story.datasets, line, time))
    if event != "monitor":
        reading.waiting = None
    story.entries.append(Entry(time, event, _in_short(line)))


def _wait(reading: _Reading, line: Line, time: float) -> None:
    """Begin a group of waits, or go on with the one before: looks between two waits are no end to it."""
    story, reasons = reading.story, _texts(line.get("reasons"))
    if reading.waiting is None:
        reading.waiting = len(story.entries)
        story.waits.append(Waits(time, time, 1, reasons[-MOST_REASONS:]))
        story.entries.append(Entry(time, WAIT, "; ".join(reasons)))
        return
    last = story.waits[-1]
    kept = [reason for reason in last.reasons if reason not in reasons]
    group = Waits(last.first, time, last.number + 1, (*kept, *reasons)[-MOST_REASONS:])
    story.waits[-1] = group
    story.entries[reading.waiting] = Entry(time, WAIT, f"{group.number} times: {'; '.join(group.reasons)}")


def _trigger(cycle: Cycle, line: Line, time: float) -> None:
    cycle.began, cycle.trigger = time, _texts(line.get("reasons"))


def _stage(cycle: Cycle, line: Line, time: float) -> None:
    name, numbers = str(line["stage"]), line.get("numbers")
    numbers = numbers if isinstance(numbers, Mapping) else {}
    cycle.stages[name] = Stage(
        name, str(line["state"]), _number(line.get("seconds")), _text(numbers.get("report")), _text(line.get("error"))
    )
    cycle.dataset = _text(numbers.get("dataset")) or cycle.dataset
    cycle.run_id = _text(numbers.get("run_id")) or cycle.run_id


def _end(cycle: Cycle, line: Line, time: float) -> None:
    cycle.ended, cycle.decision, cycle.reasons = time, str(line["decision"]), _texts(line.get("reasons"))
    cycle.champion_before, cycle.champion_after = (
        _count(line.get("champion_before")),
        _count(line.get("champion_after")),
    )
    cycle.dataset = _text(line.get("dataset")) or cycle.dataset
    cycle.run_id = _text(line.get("run_id")) or cycle.run_id
    trigger = line.get("trigger")
    if not cycle.trigger and isinstance(trigger, Mapping):
        cycle.trigger = _texts(trigger.get("reasons"))


def _look(line: Line, time: float) -> Look:
    streams = line.get("streams") or {}
    measured = {
        str(name): Stream(
            _number(one.get("effect")),
            _number(one.get("threshold")),
            _number(one.get("p_value")),
            _text(one.get("verdict")),
        )
        for name, one in streams.items()
    }
    images = _count(line.get("new_images"))
    return Look(time, str(line["verdict"]), _texts(line.get("reasons")), measured, images, _text(line.get("report")))


def _judgement(line: Line, time: float) -> Judgement:
    return Judgement(
        time,
        _count(line.get("version", line.get("champion"))),
        str(line["decision"]),
        bool(line.get("forced")),
        _texts(line.get("reasons")),
        _text(line.get("run_id")),
        _text(line.get("dataset")),
        _text(line.get("report")),
    )


def _dataset(known: Sequence[Dataset], line: Line, time: float) -> Dataset:
    parent, images = _text(line.get("parent")), _count(line.get("images"))
    before = next((one.images for one in reversed(known) if one.id == parent), None) if parent else 0
    added = images - before if images is not None and before is not None else None
    return Dataset(time, str(line["dataset"]), images, parent, added)


def _reign(line: Line) -> Reign | None:
    since, until = time_of(line.get("since", line.get("time"))), time_of(line.get("until"))
    if since is None:
        return None
    return Reign(
        _count(line.get("champion")),
        since,
        until,
        _text(line.get("event")),
        _texts(line.get("reasons")),
        _text(line.get("run_id")),
        _text(line.get("dataset")),
        _text(line.get("report")),
    )


def _in_short(line: Line) -> str:
    told = [f"{key.replace('_', ' ')} {line[key]}" for key in SHOWN if line.get(key) not in (None, "")]
    reasons = _texts(line.get("reasons"))
    return ", ".join([cycle_of(line)] * bool(cycle_of(line)) + told) + (f": {reasons[0]}" if reasons else "")


def _texts(value: Any) -> tuple[str, ...]:
    return tuple(str(one) for one in value) if isinstance(value, list | tuple) else ()


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _number(value: Any) -> float | None:
    """A finite number; None for anything else, NaN among it."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < float("inf") else None


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
