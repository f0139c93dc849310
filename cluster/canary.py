"""Which version is tried on a share of the traffic for a while, and does the process that tries it still live?

The share stands in a file of the workspace, which a running endpoint follows beside the aliases; the process that wrote
it holds a lease. So a trial whose process was killed ends by itself: endpoints look at the lease, and the next command
that settles the aliases takes the file and the alias away.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster import stage
from cluster.artifacts import read_json, write_json_atomic
from cluster.lease import hold_lease, read_lease
from cluster.registry import CHALLENGER, Registry, Version

WAIT_S = 5.0
"""For another process that tries a version of the same model."""


@dataclass(frozen=True)
class Trial:
    version: int
    share: float
    """Of the requests."""


def read_trial(registry: Registry, name: str) -> Trial | None:
    """Return the trial that is written down, None where there is none; its process may be gone."""
    written = read_json(_path(registry, name))
    return None if written is None else Trial(**written)


def trial_lives(registry: Registry, name: str) -> bool:
    """Whether the process that tries a version lives."""
    return read_lease(_lease(registry, name)) is not None


def write_trial(registry: Registry, name: str, trial: Trial | None) -> None:
    """Write a trial down, or that there is none any more."""
    if trial is None:
        stage.remove(_path(registry, name))
    else:
        write_json_atomic(_path(registry, name), asdict(trial))


@contextmanager
def hold_trial(registry: Registry, name: str, number: int) -> Iterator[Callable[[], Any]]:
    """Hold the right to try versions of a model; StorageError where another process tries one."""
    with hold_lease(_lease(registry, name), f"trial of version {number}", wait_s=WAIT_S) as confirm:
        yield confirm


def end_trial(registry: Registry, name: str) -> None:
    """Take alias and share of a trial away; a challenger that was named meanwhile stays."""
    trial, challenger = read_trial(registry, name), registry.by_alias(name, CHALLENGER)
    if trial is not None and challenger is not None and challenger.number == trial.version:
        registry.set_alias(name, CHALLENGER, None)
    write_trial(registry, name, None)


def is_tried(registry: Registry, version: Version) -> bool:
    """Whether a version has the alias `challenger`."""
    challenger = registry.by_alias(version.name, CHALLENGER)
    return challenger is not None and challenger.number == version.number


def _path(registry: Registry, name: str) -> Path:
    return registry.workspace.root / "locks" / f"trial-{name}.json"


def _lease(registry: Registry, name: str) -> str:
    return registry.workspace.place("locks", f"trial-{name}.lock")
