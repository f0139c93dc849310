"""Who was champion, from when until when? As the journal tells it: the moves of the alias among its lines."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
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


def was_rolled_back(journal: Sequence[Mapping[str, Any]], name: str, number: int) -> bool:
    """Whether a version's last reign ended through a roll-back that was not undone, and it is not champion now."""
    moves: list[dict[str, Any]] = []
    for move in reigns(journal, name):
        if moves and move["event"] == moves[-1]["event"] == ROLLBACK:
            moves.pop()  # the second of two undoes the first
        else:
            moves.append(move)
    ended = [after["event"] for before, after in pairwise(moves) if before["champion"] == number]
    return bool(ended) and ended[-1] == ROLLBACK and moves[-1]["champion"] != number


def is_move(line: Mapping[str, Any], name: str) -> bool:
    """Whether a line of the journal tells that the champion of a model changed."""
    moved = line["event"] in (ROLLBACK, FOUND) or (line["event"] == PROMOTE and "move" in line)
    return moved and line.get("name") == name
