"""How large was the drift, look by look? One plot for each stream.

A long history is thinned to the largest effect of each place on the axis: an alarm is never thinned away.
"""

from collections.abc import Sequence
from datetime import UTC, datetime

from matplotlib.dates import AutoDateLocator, ConciseDateFormatter, date2num

from components.plots import ACCENT, OTHER, SOFT, make_figure, to_svg
from components.story import DRIFT, NOT_ENOUGH, PROMOTE, Look, Reign, Stream

MOST_POINTS = 300
HALF_AN_HOUR_DAYS = 0.5 / 24
Point = tuple[float, Stream]


def points_of(looks: Sequence[Look], name: str) -> list[Point]:
    """(time, what was measured) of a stream, oldest first; at most MOST_POINTS, drift and large effects first."""
    found = [(look.time, look.streams[name]) for look in looks if name in look.streams]
    found = sorted((point for point in found if point[1].effect is not None), key=lambda point: point[0])
    if len(found) <= MOST_POINTS:
        return found
    first, last = found[0][0], found[-1][0]
    best: dict[int, Point] = {}
    for time, stream in found:
        place = int((time - first) / max(1.0, last - first) * (MOST_POINTS - 1))
        if place not in best or _weight(stream) > _weight(best[place][1]):
            best[place] = (time, stream)
    return list(best.values())


def plot_effects(points: Sequence[Point], reigns: Sequence[Reign]) -> str:
    """Effects of the looks; dotted lines stand where a new champion came."""
    figure, axes = make_figure(height=2.7)
    times = [_day(time) for time, _ in points]
    effects = [stream.effect or 0.0 for _, stream in points]
    axes.plot(times, effects, color=OTHER, linewidth=1.4)
    for kind, colour, size in ((NOT_ENOUGH, SOFT, 3), ("", OTHER, 3), (DRIFT, ACCENT, 6)):
        own = [place for place, (_, stream) in enumerate(points) if _kind(stream) == kind]
        face = "none" if kind == NOT_ENOUGH else colour
        axes.plot(
            [times[place] for place in own],
            [effects[place] for place in own],
            color=colour,
            marker="o",
            markersize=size,
            markerfacecolor=face,
            linestyle="none",
        )
    if len(points) == 1:  # else the axis would be of years around it
        axes.set_xlim(times[0] - HALF_AN_HOUR_DAYS, times[0] + HALF_AN_HOUR_DAYS)
    low, high = axes.get_xlim()
    for reign in reigns:
        if reign.event == PROMOTE and low < _day(reign.since) < high:
            axes.axvline(_day(reign.since), color=SOFT, linewidth=0.9, linestyle=(0, (1, 2)))
    axes.set_xlim(low, high)
    axes.set_ylim(bottom=min(0.0, *effects))
    locator = AutoDateLocator(minticks=3, maxticks=6, tz=UTC)
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(ConciseDateFormatter(locator, tz=UTC))
    axes.xaxis.get_offset_text().set_color(SOFT)
    return to_svg(figure)


def _kind(stream: Stream) -> str:
    return stream.verdict if stream.verdict in (DRIFT, NOT_ENOUGH) else ""


def _weight(stream: Stream) -> tuple[bool, float]:
    return stream.verdict == DRIFT, stream.effect or 0.0


def _day(time: float) -> float:
    return float(date2num(datetime.fromtimestamp(time, UTC)))
