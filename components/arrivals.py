"""Which files of a growing source are whole, complete and new, which are not yet, and which are gone?

A picture arrives when it and its caption have both come to rest: unchanged, in size and ETag, since an earlier look.
What the dataset version before had (by name, size and ETag) is held and no arrival; what it had and the source has no
more is missing, which takes nothing from the dataset. Whatever still changes, is empty, half there, or lacks its other
half is pending with the reason. Pure: listings come in as streams in the order of names, nothing is read here.
"""

import posixpath
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from components.listings import Seen, merge
from components.sources import METADATA_NAMES, PICTURE_SUFFIXES, Candidate

CHANGING = "still_changing"
EMPTY = "zero_bytes"
NO_CAPTION_YET = "caption_not_here_yet"
NO_PICTURE_YET = "picture_not_here_yet"
CAPTIONS_CHANGING = "metadata_still_changing"
DAMAGED = "unreadable_or_half_written"
ODD_NAME = "unreadable_name"
CHANGING_REASONS = (CHANGING, CAPTIONS_CHANGING)
"""Those that pass by themselves."""
WORDS = {
    CHANGING: "still changing",
    EMPTY: "empty",
    NO_CAPTION_YET: "no caption",
    NO_PICTURE_YET: "no picture",
    CAPTIONS_CHANGING: "metadata still changing",
    DAMAGED: "unreadable or half written",
    ODD_NAME: "unreadable name",
}
CAPTIONS, METADATA, TABLES = "captions", "metadata", "tables"


@dataclass(frozen=True)
class Pending:
    """A file that is there and no arrival yet."""

    uri: str
    reason: str


@dataclass(frozen=True)
class Arrival:
    """Something new for a dataset: one picture with its caption, or one row group of a table."""

    candidate: Candidate
    """What `prepare` examines."""
    files: tuple[Seen, ...]
    """What it was made of, as it was then."""
    sha256: str = ""
    """Of the picture; empty for a row group, whose pictures are only told apart when they are examined."""
    pictures: int = 1


@dataclass(frozen=True)
class Arrivals:
    """What a look at a source found; the tuples hold at most as many as were asked for, `counts` counts all."""

    new: tuple[Arrival, ...]
    pending: tuple[Pending, ...]
    repeated: tuple[Arrival, ...]
    """Pictures whose bytes the dataset has already, or that came twice, under another name or caption."""
    missing: tuple[str, ...]
    """Files that the dataset version was made of and that are gone or were replaced; it keeps what it has."""
    counts: dict[str, int]
    cursor: dict[str, Any]
    """Small and JSON: give it to the next look."""

    @property
    def num_pictures(self) -> int:
        return sum(arrival.pictures for arrival in self.new)

    @property
    def waiting(self) -> dict[str, int]:
        """How many files are pending for which reason; those beyond what is listed are `more`."""
        listed = Counter(one.reason for one in self.pending)
        more = self.counts["pending"] - listed.total()
        return {**dict(sorted(listed.items())), **({"more": more} if more > 0 else {})}


@dataclass(frozen=True)
class State:
    """One file now, against what is held and what the look before found."""

    seen: Seen
    held: bool
    settled: bool

    @property
    def problem(self) -> str:
        if self.held:
            return ""
        if self.seen.size_bytes == 0:
            return EMPTY
        return "" if self.settled else CHANGING


@dataclass(frozen=True)
class Whole:
    """Files that belong together, all of them at rest and at least one of them new."""

    files: tuple[Seen, ...]


def words(waiting: dict[str, int]) -> str:
    """Say how many files wait, and what for."""
    named = [(WORDS.get(reason, reason.replace("_", " ")), count) for reason, count in waiting.items()]
    told = ", ".join(f"{word} ({count})" for word, count in named) if len(named) > 1 else named[0][0]
    return f"{sum(waiting.values())} files wait: {told}"


def carried_over(now: Iterable[Seen], before: Iterable[Seen], at: float) -> Iterator[Seen]:
    """Yield the files of a look at time `at` (Unix seconds), each with the time since when it is as it is.

    A clock that was set back since makes a file wait anew, never settle early.
    """
    for one, earlier in merge(now, before):
        if one is None:
            continue
        if earlier is None or not one.same_as(earlier) or earlier.since > at:
            yield Seen(one.uri, one.size_bytes, one.etag, at)
        else:
            yield Seen(one.uri, one.size_bytes, one.etag, earlier.since, earlier.sha256)


def states(now: Iterable[Seen], held: Iterable[Seen], at: float, settle_s: float) -> Iterator[State | str]:
    """Yield every file's state, and the uri of every held file that is gone or was replaced by another."""
    for one, before in merge(now, held):
        same = one is not None and before is not None and one.same_as(before)
        if before is not None and not same:
            yield before.uri
        if one is not None:
            yield State(one, same, at - one.since >= settle_s)


def pairs(files: Iterable[State]) -> Iterator[Whole | Pending]:
    """Pair pictures with same-named caption files. Only names that may still find their other half are held.

    All files of one name (`a.png`, `a.txt`) lie between the first and the last that begin with `a.`; so a name whose
    range has been passed is complete.
    """
    open_names: list[tuple[str, list[State]]] = []
    for state in files:
        uri = state.seen.uri
        while open_names and not uri.startswith(f"{open_names[-1][0]}."):
            yield from _judged(open_names.pop()[1])
        if not (is_picture(uri) or is_caption(uri)):
            continue
        name = posixpath.splitext(uri)[0]
        if not open_names or open_names[-1][0] != name:
            open_names.append((name, []))
        open_names[-1][1].append(state)
    while open_names:
        yield from _judged(open_names.pop()[1])


def singles(files: Iterable[State], is_wanted: Any) -> Iterator[Whole | Pending]:
    """Judge every wanted file by itself."""
    for state in files:
        if is_wanted(state.seen.uri) and not state.held:
            yield Pending(state.seen.uri, state.problem) if state.problem else Whole((state.seen,))


def layout_of(uris: Iterable[str]) -> str:
    """Say which layout a source has, by the same order of preference as `sources.find_candidates`."""
    found = CAPTIONS
    for uri in uris:
        if is_metadata(uri):
            return METADATA
        if is_table(uri):
            found = TABLES
    return found


def is_picture(uri: str) -> bool:
    return uri.lower().endswith(PICTURE_SUFFIXES)


def is_caption(uri: str) -> bool:
    return uri.lower().endswith(".txt")


def is_table(uri: str) -> bool:
    return uri.lower().endswith(".parquet")


def is_metadata(uri: str) -> bool:
    return posixpath.basename(uri) in METADATA_NAMES


def _judged(group: list[State]) -> Iterator[Whole | Pending]:
    """Judge the pictures of one name and its caption."""
    captions = [state for state in group if is_caption(state.seen.uri)]
    pictures = [state for state in group if not is_caption(state.seen.uri)]
    if not captions:
        yield from (Pending(one.seen.uri, one.problem or NO_CAPTION_YET) for one in pictures if not one.held)
        return
    # Of captions that differ only in the case of their suffix, the last by name counts, as in `sources`.
    caption = captions[-1]
    if not pictures and not caption.held:
        yield Pending(caption.seen.uri, caption.problem or NO_PICTURE_YET)
    for picture in pictures:
        if picture.held and caption.held:
            continue
        waiting = next((state for state in (picture, caption) if state.problem), None)
        if waiting is not None:
            yield Pending(waiting.seen.uri, waiting.problem)
        else:
            yield Whole((picture.seen, caption.seen))
