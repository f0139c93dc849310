"""What one look at a source has found so far: kept while there is room, counted always.

A list holds at most `limit` findings of its kind, so that a look at millions of files fits into memory. What a refused
attempt had is kept apart, so that it takes no place from what nobody has tried.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from components.arrivals import Arrival, Pending, Whole
from flows.prepare import SourceFiles
from flows.snapshot import key_of


@dataclass
class Look:
    """What one look has found so far."""

    files: SourceFiles
    known: set[str]
    """Hashes of the pictures that the dataset version has."""
    limit: int
    wanted: Callable[[Whole], bool]
    new: list[Arrival] = field(default_factory=list)
    unread: list[Arrival] = field(default_factory=list)
    pending: list[Pending] = field(default_factory=list)
    repeated: list[Arrival] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    again: list[Arrival] = field(default_factory=list)
    """Those of `refused`."""
    refused: set[str] = field(default_factory=set)
    """Keys of arrivals that a refused attempt had, less those that were found in this look."""
    counts: Counter[str] = field(default_factory=Counter)
    hashes: dict[str, str] = field(default_factory=dict)
    """uri -> hash of what was read in this look."""

    def note(self, kind: str, value: Any) -> None:
        """Count a finding and keep it while there is room."""
        kept: list[Any] = getattr(self, kind)
        self.counts[kind] += 1
        if len(kept) < self.limit:
            kept.append(value)

    def note_picture(self, arrival: Arrival) -> None:
        """Take a picture whose bytes are known: the first with these bytes is new."""
        if arrival.sha256 in self.known:
            self.note("repeated", arrival)
        else:
            self.note_new(arrival)
        self.known.add(arrival.sha256)

    def note_new(self, arrival: Arrival) -> None:
        """Take what the dataset version lacks: what a refused attempt had takes no place from the rest."""
        key = key_of(arrival)
        self.counts["refused"] += arrival.pictures if key in self.refused else 0
        self.note("again" if key in self.refused else "new", arrival)
        self.refused.discard(key)

    def path(self, uri: str) -> str:
        return uri.removeprefix(self.files.root).lstrip("/")
