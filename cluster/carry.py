"""How does a worker on any machine get what it reads from a workspace on S3, and how does what it makes get there?

A `Carry` travels to the worker with its task: this process's AWS_* variables (Ray would log them in a runtime
environment), folders to fetch before the work and folders to keep after each part of it. With a local or shared folder
there is nothing to carry.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cluster import stage, storage
from cluster.whole_folders import fetch_whole


@dataclass(frozen=True)
class Carry:
    """What to fetch and keep for one task."""

    fetch: tuple[Path, ...] = ()
    keep: tuple[Path, ...] = ()
    whole: tuple[Path, ...] = ()
    """Folders to fetch that are whole or not there (models)."""
    environment: dict[str, str] = field(default_factory=dict, repr=False)
    """Holds credentials, so it shows nowhere."""

    @staticmethod
    def of(fetch: Sequence[Path] = (), keep: Sequence[Path] = (), whole: Sequence[Path] = ()) -> "Carry":
        """Return what to carry of these folders: those of a workspace on S3, or nothing."""
        environment = storage.aws_environment() if _remote([*fetch, *keep, *whole]) else {}
        return Carry(_remote(fetch), _remote(keep), _remote(whole), environment)

    def before(self) -> None:
        """Have here what the work reads."""
        storage.adopt_environment(self.environment)
        for folder in self.fetch:
            stage.fetch_tree(folder)
        for folder in self.whole:
            fetch_whole(folder)

    def after(self) -> None:
        """Bring what the work made to S3."""
        for folder in self.keep:
            stage.keep_new(folder, without=("tables",))


def _remote(folders: Sequence[Path]) -> tuple[Path, ...]:
    return tuple(path for path in folders if stage.address_of(path) is not None)


NOTHING = Carry()
