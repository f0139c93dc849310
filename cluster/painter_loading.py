"""Which model draws behind the routes: made by an importable factory, then exchanged as what should serve changes.

The factory and the resolver are named as `module:function`, so this folder never learns what a diffusion model is.
"""

import importlib
import logging
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from cluster.painter_contract import Painter

LOG = logging.getLogger(__name__)
FIRST_PAUSE_S, LONGEST_PAUSE_S = 10.0, 300.0
"""Between two tries to load a model that could not be."""


@dataclass(frozen=True)
class Follow:
    """Where to look for the model that should serve: an importable `module:function` and its keyword arguments.

    It returns the factory's arguments for that model, or None when nothing can be said.
    """

    resolver: str
    arguments: Mapping[str, Any]
    every_s: float
    before: Mapping[str, Any] | None = None
    """The resolver's arguments for what drew last: for a replica that starts while another cannot be loaded."""
    wait_s: float = 60.0
    """How long a request is held while a swap leaves nothing to draw it with; 503 afterwards."""
    most_waiting: int = 64
    """Requests held at a time; 503 beyond."""


NOTHING_TO_FOLLOW = Follow("", {}, every_s=0.0)


def first_that_draws(factory: str, choices: Sequence[Mapping[str, Any]]) -> tuple[Painter | None, str]:
    """Return the painter of the first arguments with which a picture can be drawn, and what was wrong before it."""
    problem = ""
    for arguments in choices:
        try:
            painter: Painter = _import(factory)(**arguments)
            with ExitStack() as otherwise:
                otherwise.callback(painter.close)  # what cannot draw must not stay in memory beside what can
                painter.warm_up()
                otherwise.pop_all()
            return painter, problem
        except Exception as error:  # whatever a model's code raises: the endpoint must say it, not vanish
            traceback.print_exc()
            problem = f"{type(error).__name__}: {error}"
    return None, problem


def choices(given: Mapping[str, Any], follow: Follow | None) -> list[Mapping[str, Any]]:
    """Return what a replica that starts should try: the model that should serve, the one that drew last, the given one.

    It may start long after the endpoint did, and must then draw as the replicas do that were there before it.
    """
    found: list[Mapping[str, Any]] = []
    for arguments in (follow.arguments, follow.before) if follow is not None else ():
        try:
            known = _import(follow.resolver)(**arguments) if follow is not None and arguments is not None else None
            found += [known] if known is not None else []
        except Exception:  # of a disk or a registry: the replica begins with the next
            LOG.exception("which model should serve could not be read")
    return [one for place, one in enumerate([*found, given]) if one not in [*found, given][:place]]


def keep_following(painter: Painter, follow: Follow, closing: threading.Event, tell: Callable[[str], None]) -> None:
    """Hand on what should serve until `closing`; `tell` hears why it does not, or nothing once it does.

    What cannot be loaded is tried again when it changes, and after a while, twice as long each time: a disk may have
    been away, or memory short.
    """
    resolve = _import(follow.resolver)
    done: dict[str, Any] | None = None
    failed: dict[str, Any] | None = None
    pause_s, again_at = FIRST_PAUSE_S, 0.0
    while not closing.wait(follow.every_s):
        wanted: dict[str, Any] | None = None
        try:
            wanted = resolve(**follow.arguments)
            if wanted is None or wanted == done or (wanted == failed and time.monotonic() < again_at):
                continue
            painter.swap(wanted)
            done, failed = wanted, None
            tell("")
        except Exception as error:  # of a registry, a disk or a model: what serves goes on serving
            pause_s = min(LONGEST_PAUSE_S, 2 * pause_s if wanted == failed else FIRST_PAUSE_S)
            failed, done, again_at = wanted, None, time.monotonic() + pause_s
            tell(f"{type(error).__name__}: {error}")
            LOG.exception("a model that should be loaded could not be; what drew before goes on")


def _import(name: str) -> Callable[..., Any]:
    module, _, function = name.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return found
