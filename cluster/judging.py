"""Which versions is a command judging right now? A lease for each says so, and ends with its holder, however that ends.

A candidate has no alias while the gate decides: endpoints follow aliases, and what is not decided draws for nobody.
Retention leaves what is being judged alone.
"""

import posixpath
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from cluster.lease import hold_lease, read_lease
from cluster.registry import Registry
from cluster.storage import iter_files, join

LOCK_SUFFIX = ".lock"
WAIT_S = 30.0
"""For another command that judges the same version."""


@contextmanager
def judging(
    registry: Registry, name: str, number: int, notify: Callable[[str], None] | None = None
) -> Iterator[Callable[[], Any]]:
    """Hold the right to judge a version for the block; StorageError where another command judges it already."""
    owner = f"judging of version {number}"
    with hold_lease(_place(registry, name, number), owner, wait_s=WAIT_S, notify=notify) as confirm:
        yield confirm


def judged_now(registry: Registry, name: str) -> list[int]:
    """Return the versions that a living command is judging, in order."""
    folder = _folder(registry, name)
    leases = {posixpath.basename(posixpath.dirname(entry.uri)) for entry in iter_files(folder)}
    found = [int(number) for number, rest in (lease.split(".", 1) for lease in leases) if number.isdecimal() and rest]
    return sorted(number for number in found if read_lease(_place(registry, name, number)) is not None)


def _place(registry: Registry, name: str, number: int) -> str:
    return join(_folder(registry, name), f"{number}{LOCK_SUFFIX}")


def _folder(registry: Registry, name: str) -> str:
    return registry.workspace.place("locks", f"judging-{name}")
