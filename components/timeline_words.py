"""How the timeline's page words things: moments, durations, counts, outcomes, and texts that may be long or linked."""

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from html import escape

Link = Callable[[str], str]
"""From a file that the journal names to the address of it seen from the page; empty where it is not there."""
MOST_CHARS = 280
OUTCOMES = {
    "promoted": ("promoted", "good"),
    "refused": ("refused", ""),
    "wait": ("waited for more", ""),
    "rolled_back": ("rolled back", "bad"),
    "failed": ("failed", "bad"),
    "promote": ("promoted", "good"),
    "hold": ("held", ""),
    "reject": ("rejected", "bad"),
}


def linked(text: str, href: str) -> str:
    """A text, with a link where there is an address."""
    return f'<a href="{escape(href, quote=True)}">{escape(text)}</a>' if href else escape(text)


def short(text: str) -> str:
    """A text that fits into a few lines."""
    return text if len(text) <= MOST_CHARS else text[:MOST_CHARS].rstrip() + " …"


def figure(value: float | None) -> str:
    """A number with three digits; a question mark where it was not measured."""
    return "?" if value is None else f"{value:.3g}"


def counted(number: int, what: str) -> str:
    """A number with its noun."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def when(time: float) -> str:
    """A moment as people write it, in UTC."""
    moment = datetime.fromtimestamp(time, UTC)
    return f"{moment.day} {moment:%b %Y %H:%M}"


def stamp(time: float) -> str:
    """A moment as the journal writes it."""
    return datetime.fromtimestamp(time, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def lasting(seconds: float | None) -> str:
    """A duration in its two largest units."""
    if seconds is None:
        return "?"
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds // 60:.0f} min {seconds % 60:.0f} s"
    if seconds < 86400:
        return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:.0f} min"
    return f"{seconds // 86400:.0f} d {seconds % 86400 // 3600:.0f} h"


def deciding(reasons: Sequence[str]) -> str:
    """The first reason that gives a measured change, else the first of all; empty where there is none."""
    return next((reason for reason in reasons if "%" in reason), next(iter(reasons), ""))


def left_out(number: int, what: str) -> str:
    """A paragraph that says how much of a long history is not shown; empty for nothing."""
    return f'<p class="rest">{number:,} older {what} are in timeline.json.</p>' if number > 0 else ""
