"""When is it time again? Ticks of a cron expression in a time zone; those that were missed count as one.

Five fields (minute, hour, day of the month, month, day of the week) with the meaning of Debian's cron, by `cronsim`:
a daily time that the spring change skips comes right after it, one that the autumn change repeats comes once. Moments
are Unix seconds; the zone only says when an hour is. A clock that was set back brings no tick a second time.
"""

from dataclasses import dataclass
from datetime import UTC, datetime
from zoneinfo import ZoneInfo

EXAMPLE = '"0 3 * * 1" (minute hour day-of-month month day-of-week: Mondays at 03:00)'
FIELDS = ("minute", "hour", "day-of-month", "month", "day-of-week")
MAX_COUNTED = 1000
"""Missed ticks that are counted; beyond that it is "at least"."""
FAR_AHEAD_S = 86400.0
"""A last tick that lies further in the future was written by a clock that was wrong, and is not believed."""


@dataclass(frozen=True)
class Due:
    """At least one tick passed since the last one that was heeded."""

    first: float
    """The earliest of them, in Unix seconds."""
    count: int


def check(expression: str) -> str:
    """Return the expression; ValueError names the field that is wrong and gives an example."""
    from cronsim import CronSim, CronSimError

    parts = expression.split()
    if len(parts) != len(FIELDS):
        raise ValueError(f"expected five fields such as {EXAMPLE}, found {len(parts)}")
    for index, name in enumerate(FIELDS):
        alone = ["*"] * len(FIELDS)
        alone[index] = parts[index]
        try:
            CronSim(" ".join(alone), datetime.now(UTC))
        except (CronSimError, AssertionError):  # its parser asserts what "5L/2" breaks
            found = f"found {parts[index]!r} in field {index + 1}"
            raise ValueError(f"expected {'an' if name == 'hour' else 'a'} {name}, {found}; e.g. {EXAMPLE}") from None
    try:
        happens = next(CronSim(expression, datetime.now(UTC)), None)
    except CronSimError:
        happens = None
    if happens is None:
        raise ValueError(f"expected a day that some year has, found {expression!r}, which never comes; e.g. {EXAMPLE}")
    return expression


def due(expression: str, time_zone: str, last: float, now: float) -> Due | None:
    """Return the ticks after `last` and up to `now` as one, None when there is none (or `now` is before `last`)."""
    if last > now + FAR_AHEAD_S:
        last = now
    first = following(expression, time_zone, last)
    if first is None or first > now:
        return None
    count, tick = 1, first
    while count < MAX_COUNTED and (after := following(expression, time_zone, tick)) is not None and after <= now:
        count, tick = count + 1, after
    return Due(first, count)


def following(expression: str, time_zone: str, moment: float) -> float | None:
    """Return the first tick after a moment; None when there is none within 50 years."""
    from cronsim import CronSim

    zone = ZoneInfo(time_zone)
    start = datetime.fromtimestamp(moment, UTC).astimezone(zone)
    for tick in CronSim(expression, start):
        # An hour that the autumn change repeats: the library answers with its first pass, also when that is over.
        if tick.timestamp() > moment:
            return tick.timestamp()
    return None


def written(moment: float, time_zone: str) -> str:
    """Write a moment as people of that zone do."""
    local = datetime.fromtimestamp(moment, UTC).astimezone(ZoneInfo(time_zone))
    return f"{local:%Y-%m-%d %H:%M} {time_zone}"
