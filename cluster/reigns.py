"""Who was champion, from when until when? As the journal tells it: the moves of the alias among its lines."""

from collections.abc import Mapping, Sequence
from typing import Any

PROMOTE, ROLLBACK, FOUND = "promote", "rollback", "champion_found"
"""Events that may move the champion; a `promote` that was refused moved nothing."""


def reigns(journal: Sequence[Mapping[str, Any]], name: str) -> list[dict[str, Any]]:
    """Return the journal's alias moves of a model, oldest first, each with `since` and, once it ended, `until`."""
    moves = [dict(line) for line in journal if is_move(line, name)]
    for line, following in zip(moves, [*moves[1:], {}], strict=False):  # of no moves, one too many
        line.setdefault("since", line["time"])
        line["until"] = following.get("since", following.get("time"))
    return moves


def is_move(line: Mapping[str, Any], name: str) -> bool:
    """Whether a line of the journal tells that the champion of a model changed."""
    moved = line["event"] in (ROLLBACK, FOUND) or (line["event"] == PROMOTE and "move" in line)
    return moved and line.get("name") == name
