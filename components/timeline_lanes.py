"""The whole story on one axis of time: a lane each for who served, the gate, cycles, triggers, looks and data.

Inline SVG whose places are shares of the width, so that marks move apart on a wide screen and letters keep their size
on a small one. What lies too close to be told apart is drawn once: the number of marks is bounded, however long the
journal is. A mark links to its place in the page, and says in a title what it is.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from typing import TypeVar

from components.story import DRIFT, NOT_ENOUGH, ROLLBACK, Cycle, Judgement, Look, Reign, Story, Waits

T = TypeVar("T")
MOST_MARKS = 240
"""Places on the axis; of marks in one place the one that matters most is drawn."""
HEIGHT_PX, MIDDLE_PX = 26, 13
ROOM = 0.015
"""Share of the span that is left free at both ends."""
MINUTE_S, HOUR_S, DAY_S = 60.0, 3600.0, 86400.0
TICKS_S = (
    *(MINUTE_S * n for n in (1, 2, 5, 10, 15, 30)),
    *(HOUR_S * n for n in (1, 2, 3, 6, 12)),
    *(DAY_S * n for n in (1, 2, 7, 14, 28, 91, 182, 364, 728)),
)
MOST_TICKS = 6
EDGE = 8.0
"""Percent of the width, at either end, where a label would not fit around its tick."""
LETTER_SHARE = 0.028
"""Share of the width that the name of a version needs."""


@dataclass(frozen=True)
class Axis:
    """From time to a place in percent of the width."""

    start: float
    end: float

    def x(self, time: float) -> float:
        return 100.0 * (time - self.start) / (self.end - self.start)

    def place(self, time: float) -> int:
        """Which of MOST_MARKS places a time falls into."""
        return min(MOST_MARKS - 1, max(0, int(self.x(time) * MOST_MARKS / 100)))


def axis_of(story: Story) -> Axis:
    """The axis of everything told, at least a minute long."""
    first, last = story.span
    room = max(ROOM * (last - first), MINUTE_S / 2)
    return Axis(first - room, last + room)


def draw_lanes(story: Story) -> str:
    """All lanes that have something to show, with the axis below."""
    axis = axis_of(story)
    lanes = [
        ("served", _reigns(story.reigns, axis)),
        ("gate", _judgements(story.judgements, axis)),
        ("cycles", _cycles(story.cycles, axis)),
        ("triggers", _triggers(story, axis)),
        ("monitor", _looks(story.looks, axis)),
        ("data", _datasets(story, axis)),
    ]
    rows = [_lane(name, marks, axis) for name, marks in lanes if marks]
    return f'<div class="lanes">{"".join(rows)}{_labels(axis)}</div>'


def _lane(name: str, marks: Sequence[str], axis: Axis) -> str:
    lines = "".join(_standing_at(axis.x(time), f'<path d="M0 0V{HEIGHT_PX}" class="tick"/>') for time, _ in ticks(axis))
    return f'<div class="lane"><span>{name}</span><svg height="{HEIGHT_PX}">{lines}{"".join(marks)}</svg></div>'


def _labels(axis: Axis) -> str:
    texts = "".join(_label(axis.x(time), text) for time, text in ticks(axis))
    return f'<div class="lane labels"><span></span><svg height="20">{texts}</svg></div>'


def _label(x: float, text: str) -> str:
    """A name below its tick; at the ends of the axis beside it, so that nothing is cut off."""
    anchor = "start" if x < EDGE else "end" if x > 100 - EDGE else "middle"
    return f'<text x="{x:.2f}%" y="14" text-anchor="{anchor}">{escape(text)}</text>'


def ticks(axis: Axis) -> list[tuple[float, str]]:
    """At most MOST_TICKS + 1 round times (UTC) on the axis, each with its name."""
    span = axis.end - axis.start
    step = next((step for step in TICKS_S if span / step <= MOST_TICKS), math.ceil(span / MOST_TICKS / DAY_S) * DAY_S)
    first = math.ceil(axis.start / step)
    times = [number * step for number in range(first, math.floor(axis.end / step) + 1)]
    named, year = [], 0
    for index, time in enumerate(times):
        moment = datetime.fromtimestamp(time, UTC)
        day = f"{moment.day} {moment:%b}" + (f" {moment.year}" if moment.year != year and step >= DAY_S else "")
        whole = step >= DAY_S or index == 0 or time % DAY_S == 0
        hour = "" if step >= DAY_S else f"{moment:%H:%M}"
        named.append((time, f"{day} {hour}".strip() if whole else hour))
        year = moment.year
    return named


def _standing_at(x: float, path: str) -> str:
    """Give a path its place: paths themselves know no percent."""
    return f'<svg x="{x:.3f}%" overflow="visible">{path}</svg>'


def _titled(mark: str, title: str, href: str = "") -> str:
    body = f"<g>{mark}<title>{escape(title)}</title></g>"
    return f'<a href="{escape(href, quote=True)}">{body}</a>' if href else body


def _box(axis: Axis, span: tuple[float, float], kind: str, height: int, text: str = "") -> str:
    """A bar over a time, at least two pixels wide; its text is cut off at its end."""
    left, right = axis.x(span[0]), axis.x(span[1])
    top = MIDDLE_PX - height / 2
    box = f'<rect width="100%" height="{height}" rx="3" class="{kind}"/>'
    box += f'<rect width="2" height="{height}" class="{kind} edge"/>'
    name = f'<text x="6" y="{height / 2 + 4:.0f}" class="{kind}">{escape(text)}</text>' if text else ""
    return f'<svg x="{left:.3f}%" y="{top:g}" width="{max(right - left, 0.2):.3f}%" height="{height}">{box}{name}</svg>'


def _dot(x: float, radius: float, kind: str) -> str:
    return f'<circle cx="{x:.3f}%" cy="{MIDDLE_PX}" r="{radius:.1f}" class="{kind}"/>'


def _reigns(reigns: Sequence[Reign], axis: Axis) -> list[str]:
    marks = []
    for reign in _one_a_place(reigns, axis, lambda one: one.since):
        if reign.version is None:
            continue
        end = reign.until if reign.until is not None else axis.end
        kind = "now" if reign.until is None else "back" if reign.event == ROLLBACK else "then"
        wide = (end - reign.since) / (axis.end - axis.start) > LETTER_SHARE
        told = f"version {reign.version} served, by {reign.event or 'a move'}"
        box = _box(axis, (reign.since, end), kind, 20, f"v{reign.version}" if wide else "")
        marks.append(_titled(box, told, "#served"))
    return marks


def _judgements(judgements: Sequence[Judgement], axis: Axis) -> list[str]:
    marks = []
    for one in _one_a_place(judgements, axis, lambda one: one.time):
        told = f"version {one.version}: {one.decision}{' (forced)' if one.forced else ''}"
        kind = one.decision if one.decision in ("promote", "hold", "reject") else "hold"
        marks.append(_titled(_dot(axis.x(one.time), 5, kind), told, "#gate"))
    return marks


def _cycles(cycles: Sequence[Cycle], axis: Axis) -> list[str]:
    marks = []
    for cycle in _one_a_place(cycles, axis, lambda one: one.began):
        end = cycle.ended if cycle.ended is not None else axis.end
        known = {"wait": "refused", **{kind: kind for kind in ("promoted", "refused", "rolled_back", "failed")}}
        kind = known.get(cycle.decision, "working")
        told = f"{cycle.id}: {cycle.decision or 'at work'}"
        marks.append(_titled(_box(axis, (cycle.began, end), kind, 12), told, "#cycles"))
    return marks


def _triggers(story: Story, axis: Axis) -> list[str]:
    marks = []
    for group in _one_a_place(story.waits, axis, lambda one: one.first):
        bar = _box(axis, (group.first, group.last), "wait", 4)
        marks.append(_titled(bar, waited(group), "#journal"))
    for cycle in _one_a_place(story.cycles, axis, lambda one: one.began):
        path = f'<path d="M-5 {MIDDLE_PX + 6}L5 {MIDDLE_PX + 6}L0 {MIDDLE_PX - 6}Z" class="retrain"/>'
        arrow = _standing_at(axis.x(cycle.began), path)
        marks.append(_titled(arrow, f"retrain: {'; '.join(cycle.trigger)}", "#cycles"))
    return marks


def waited(group: Waits) -> str:
    """A group of waits in a sentence."""
    times = f"waited {group.number} times" if group.number > 1 else "waited"
    return f"{times}: {'; '.join(group.reasons)}"


def _looks(looks: Sequence[Look], axis: Axis) -> list[str]:
    """The verdict that matters most in each place: drift, then not enough data, then none."""
    order = {DRIFT: 2, NOT_ENOUGH: 1}
    worst: dict[int, Look] = {}
    for look in looks:
        place = axis.place(look.time)
        if place not in worst or order.get(look.verdict, 0) > order.get(worst[place].verdict, 0):
            worst[place] = look
    marks = []
    for look in worst.values():
        kind, height = {DRIFT: ("drift", 20), NOT_ENOUGH: ("enough", 8)}.get(look.verdict, ("quiet", 8))
        bar = f'<rect x="{axis.x(look.time):.3f}%" y="{MIDDLE_PX - height / 2:g}" width="3" height="{height}" rx="1.5"'
        told = f"{look.verdict.replace('_', ' ')}: {'; '.join(look.reasons[:2])}"
        marks.append(_titled(f'{bar} class="{kind}"/>', told, "#monitor"))
    return marks


def _datasets(story: Story, axis: Axis) -> list[str]:
    marks = []
    for one in _one_a_place(story.datasets, axis, lambda one: one.time):
        radius = 3 + min(6.0, math.log10(max(1, one.added or one.images or 1)) * 1.6)
        grown = f", {one.added} more than {one.parent}" if one.parent and one.added is not None else ""
        told = f"{one.id}: {one.images} pictures{grown}"
        marks.append(_titled(_dot(axis.x(one.time), radius, "grown" if one.parent else "made"), told, "#data"))
    return marks


def _one_a_place(items: Iterable[T], axis: Axis, time: Callable[[T], float]) -> list[T]:
    """At most MOST_MARKS of the items, the newest of each place."""
    return list({axis.place(time(item)): item for item in items}.values())
