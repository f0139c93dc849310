"""fresco rollback: the previous champion serves again, in one step, and the journal says so."""

from collections.abc import Callable
from typing import Any

from cluster.artifacts import open_workspace
from cluster.champion import roll_back
from cluster.registry import TAG_DATASET, TAG_RUN, Registry
from flows.config import Config
from flows.console import say


def run(
    config: Config, reason: str = "", expected: int | None = None, confirm: Callable[[], object] = lambda: None
) -> dict[str, Any]:
    """Swap champion and previous; a second roll-back undoes the first.

    ChampionMovedError, and nothing moved, where the champion is not the `expected` version. `confirm` is called just
    before the aliases move: what it raises leaves the champion as it is.
    """
    registry = Registry(open_workspace(config.workspace), config.placement.tracking_uri)
    move = roll_back(registry, config.name, {"reasons": [reason or "on request"]}, say, expected, confirm)
    champion, previous = move.champion, move.previous
    made = f"run {champion.tags.get(TAG_RUN)}, dataset {champion.tags.get(TAG_DATASET)}"
    say(f"champion of {config.name}: version {champion.number} again ({made})")
    if previous is not None:
        say(f"previous: version {previous.number}; the same command goes back to it")
    say(f"next: fresco serve --detach --workspace {config.workspace}")
    return {"champion": champion.number, "previous": previous.number if previous else None}


def plan(config: Config) -> list[str]:
    """Say what `run` would do."""
    return [f"move champion of {config.name} to previous and previous to the champion", "write the journal"]
