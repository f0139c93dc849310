"""How looks at the data went over time: how sure, how large, and what was spent of the false-alarm budget.

Drawn with the placeholders of `components/plots.py`. A stream has its own marker and line, so that the drawing needs no
colours of its own; looks that found drift are accented.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from matplotlib.axes import Axes
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter, date2num
from matplotlib.lines import Line2D

from components.plots import ACCENT, INK, LINE, OTHER, SOFT, make_figure, to_svg

MARKERS = {"images": "o", "captions": "s", "alignment": "D", "prompts": "^"}
FEWEST_SURE = -3.0
"""Powers of ten below its level at which evidence is drawn at the lower edge."""


@dataclass(frozen=True)
class PastLook:
    """One look that tested."""

    time_s: float
    """Unix seconds."""
    drift: bool
    spent: float
    streams: Mapping[str, tuple[float, float, float]] = field(default_factory=dict)
    """(p-value, level, effect) by stream."""


def plot_evidence(looks: Sequence[PastLook]) -> str:
    """By how many powers of ten each stream's p-value lies below its level; above zero it is significant."""
    figure, axes = make_figure()
    axes.axhline(0, color=INK, linewidth=1, linestyle=(0, (3, 3)))
    values = {
        name: [
            (look, max(FEWEST_SURE, math.log10(look.streams[name][1] / look.streams[name][0])))
            for look in looks
            if name in look.streams
        ]
        for name in MARKERS
    }
    _lines(axes, values)
    axes.set_ylabel("powers of ten", color=SOFT, fontsize=10.5)
    return to_svg(figure)


def plot_effects(looks: Sequence[PastLook], smallest: float) -> str:
    """Each stream's effect; the dashed line is the smallest that counts."""
    figure, axes = make_figure()
    axes.axhline(smallest, color=INK, linewidth=1, linestyle=(0, (3, 3)))
    values = {name: [(look, look.streams[name][2]) for look in looks if name in look.streams] for name in MARKERS}
    _lines(axes, values)
    axes.set_ylim(bottom=0)
    return to_svg(figure)


def plot_budget(looks: Sequence[PastLook], per_year: float) -> str:
    """False alarms to be expected so far, and the most that the budget allows by then."""
    figure, axes = make_figure()
    times = [_day(look.time_s) for look in looks]
    axes.step(times, [look.spent for look in looks], where="post", color=ACCENT, linewidth=2)
    axes.plot(times, [look.spent for look in looks], "o", color=ACCENT, markersize=4)
    start, end = looks[0].time_s, looks[-1].time_s
    allowed = [looks[0].spent, looks[0].spent + per_year * (end - start) / (365 * 86_400)]
    axes.plot([_day(start), _day(end)], allowed, color=OTHER, linewidth=1.6)
    axes.annotate("allowed", (_day(end), allowed[1]), (4, 4), textcoords="offset points", color=OTHER, fontsize=10.5)
    axes.set_ylim(0, 1.15 * max(allowed[1], looks[-1].spent))
    _dates(axes, looks)
    return to_svg(figure)


def _lines(axes: Axes, values: Mapping[str, Sequence[tuple[PastLook, float]]]) -> None:
    handles: list[Line2D] = []
    looks: list[PastLook] = []
    for name, points in values.items():
        if not points:
            continue
        looks += [look for look, _ in points]
        times = [_day(look.time_s) for look, _ in points]
        axes.plot(times, [value for _, value in points], color=OTHER, linewidth=1.2, alpha=0.7)
        for drift, colour in ((False, OTHER), (True, ACCENT)):
            chosen = [(_day(look.time_s), value) for look, value in points if look.drift == drift]
            if chosen:
                axes.plot(*zip(*chosen, strict=True), MARKERS[name], color=colour, markersize=6)
        handles.append(Line2D([], [], color=OTHER, marker=MARKERS[name], linewidth=1.2, label=name))
    _dates(axes, looks)
    axes.legend(
        handles=handles,
        frameon=False,
        labelcolor=SOFT,
        fontsize=10.5,
        ncols=len(handles),
        loc="lower left",
        bbox_to_anchor=(-0.02, 1.0),
        borderpad=0,
        handletextpad=0.3,
        columnspacing=1.2,
    )


def _dates(axes: Axes, looks: Sequence[PastLook]) -> None:
    locator = AutoDateLocator(minticks=2, maxticks=6)
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(ConciseDateFormatter(locator))
    times = [_day(look.time_s) for look in looks]
    room = max((max(times) - min(times)) * 0.06, 1 / 48)
    axes.set_xlim(min(times) - room, max(times) + room)
    axes.spines["bottom"].set_color(LINE)


def _day(time_s: float) -> float:
    return float(date2num(datetime.fromtimestamp(time_s, UTC)))
