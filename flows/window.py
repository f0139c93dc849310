"""What is compared with the reference: a uniform sample of all that has arrived since the champion's data.

Which arrivals are in the sample is a function of the source as it is now: each has a priority by its name and ETag, and
the smallest ones stay. So an interrupted monitor, one on another machine and one that begins anew take the same sample,
what was deleted from the source leaves it, and of ten million files those alone are read that may enter. Rejected ones
are part of the sample: their share is a statistic. What is kept between looks is the sample, never more.
"""

import hashlib
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from cluster import storage
from cluster.artifacts import Workspace
from cluster.carry import Carry
from components import examine
from components.arrivals import CHANGING, Arrival, Arrivals, Whole, is_table
from components.dataset import DatasetVersion, Found
from components.drift_items import Captioned
from components.images import Limits
from components.listings import Seen
from components.reservoir import Reservoir, add, key_of, priorities, would_enter
from flows import arrivals as source
from flows.config import Config
from flows.console import say
from flows.dataset_versions import pixel_store
from flows.encode import block_rows
from flows.features import run_blocks
from flows.prepare import SourceFiles
from flows.reference import WAITED_FOR

MOST_READ = 100_000
"""New files that one look reads at most; a sample of 5000 of ten million reads about 43,000 in all its looks."""

PLACE = "monitor/arrivals"
"""Where the monitor's listings lie: the loop, which looks by itself, has its own."""


@dataclass(frozen=True)
class Sampled:
    """One arrival of the sample; `reason` says why it was rejected, where it was."""

    key: int
    file: str
    """The files it came from, by names and ETags."""
    sha256: str
    caption: str = ""
    width_px: int = 0
    height_px: int = 0
    reason: str = ""

    @property
    def picture(self) -> Captioned:
        return Captioned(self.sha256, self.caption, self.width_px, self.height_px)


@dataclass(frozen=True)
class Window:
    """The sample with what one look counted; `state` is what the next look needs, small and JSON."""

    sample: tuple[Sampled, ...]
    new_images: int
    """Pictures at the source that the champion's data lacks, as far as names tell; rejected ones are left out."""
    waiting: dict[str, int]
    """Files that are no arrivals yet, by reason."""
    counts: dict[str, int]
    gone: int
    """Of the sample before: those that the source no longer has."""
    cursor: dict[str, Any]
    tables: dict[str, int] = field(default_factory=dict)
    """Parquet files that were read, with the number of their rows that are new."""
    own: dict[str, Any] = field(default_factory=dict)
    """The cursor for the next look, where nobody's is shared."""

    @property
    def pictures(self) -> tuple[Sampled, ...]:
        return tuple(one for one in self.sample if not one.reason)

    @property
    def still_changing(self) -> int:
        return self.waiting.get(CHANGING, 0)

    @property
    def state(self) -> dict[str, Any]:
        return {"cursor": self.own, "tables": self.tables, "sample": [asdict(one) for one in self.sample]}


class _Chooser:
    """Decides file by file, in one pass over the source, what must be read; notes what of the sample is still there."""

    def __init__(self, size: int, seed: int, before: dict[int, Sampled], tables: dict[str, int]) -> None:
        self.before, self.tables = before, tables
        self.alive: set[int] = set()
        self.alive_tables: set[str] = set()
        self.best = add(Reservoir(size, seed), list(before), {})

    def __call__(self, whole: Whole) -> bool:
        file = file_id(whole.files)
        if is_table(whole.files[0].uri):
            self.alive_tables |= {file} & set(self.tables)
            return file not in self.tables
        key = key_of(file)
        if key in self.before:
            self.alive.add(key)
            return False
        if not would_enter(self.best, [key])[0]:
            return False
        self.best = add(self.best, [key], {})
        return True


def take_window(
    config: Config,
    workspace: Workspace,
    parent: DatasetVersion,
    seed: int,
    state: dict[str, Any],
    at: float,
    shared: dict[str, Any] | None = None,
) -> Window:
    """Look at the source and bring the sample up to date; `state` is the window's before, empty for the first.

    `shared` is the cursor of somebody else's look just now: what has settled for them has settled here, and their
    listing stays as it is.
    `config.data.resolution_px` must be the parent's. Raises as `flows.arrivals.look` does.
    """
    size = config.monitor.window
    before = {one["key"]: Sampled(**one) for one in state.get("sample", [])}
    tables = dict(state.get("tables", {}))
    place, settle_s = (source.PLACE if shared else PLACE), config.monitor.settle_s
    cursor = shared or state.get("cursor")
    gone = 0
    while True:
        chooser = _Chooser(size, seed, before, tables)
        found = source.look(config, parent, cursor, settle_s, MOST_READ, at, chooser, place)
        cursor = shared or found.cursor
        left = {key: one for key, one in before.items() if key in chooser.alive or one.file in tables}
        tables_left = tables
        if len(chooser.alive_tables) < len(tables):  # rows of the others may have been passed over: read all anew
            left = {key: one for key, one in left.items() if one.file not in tables}
            tables_left = {}
        if (len(left), len(tables_left)) == (len(before), len(tables)):
            break
        gone += len(before) - len(left)
        before, tables = left, tables_left
    fresh, read = _examined(config, workspace, parent, found, set(chooser.best.keys.tolist()), seed)
    tables |= read
    sample = _sampled(size, seed, [*before.values(), *fresh])
    return Window(
        sample,
        max(0, _num_new(found, chooser, tables, sample)),
        dict(Counter(one.reason for one in found.pending)),
        found.counts,
        gone,
        found.cursor,
        tables,
        (state.get("cursor") or {}) if shared else found.cursor,
    )


def file_id(files: tuple[Seen, ...]) -> str:
    """Name an arrival by its picture and its caption file, where it has one of its own."""
    return hashlib.sha256("\n".join(f"{file.uri} {file.etag}" for file in files).encode()).hexdigest()


def _own_files(arrival: Arrival) -> tuple[Seen, ...]:
    """Return the files that `arrivals` judged together; metadata files, which change with every arrival, are not."""
    return arrival.files[: 2 if arrival.candidate.caption_path else 1]


def _examined(
    config: Config, workspace: Workspace, parent: DatasetVersion, found: Arrivals, chosen: set[int], seed: int
) -> tuple[tuple[Sampled, ...], dict[str, int]]:
    """Examine as `prepare` does what was chosen; every new table is read whole, and its rows that may enter examined.

    Return the sample of it, which is all that is held of it at any time, and the number of rows that each table added.
    """
    names = {arrival: file_id(_own_files(arrival)) for arrival in found.new}
    wanted = [one for one in found.new if one.candidate.row_group >= 0 or key_of(names[one]) in chosen]
    if not wanted:
        return (), {}
    root = found.cursor["source"]
    files = SourceFiles(_folder_of(wanted[0], root), storage.aws_environment() if storage.is_s3(root) else {})
    limits = Limits(config.data.min_side_px, config.data.max_pixels)
    pixels = pixel_store(config, workspace).directory
    known, size = {item.sha256 for item in parent.items}, config.monitor.window
    keys = np.sort(np.array([key_of(sha256) for sha256 in known], np.uint64))  # an eighth of the hashes' memory
    sampling = examine.Sampling(size, seed, WAITED_FOR, keys)
    job = examine.ExamineJob(config.data.source, files, limits, config.data.resolution_px, pixels, sampling)
    total = sum(arrival.pictures for arrival in wanted)
    say(f"  examining {total} arrivals")
    blocks = examine.candidate_blocks([one.candidate for one in wanted], block_rows(total, config.placement))
    single = {files.uri(one.candidate.name): names[one] for one in wanted if one.candidate.row_group < 0}
    tables: Counter[str] = Counter({names[one]: 0 for one in wanted if one.candidate.row_group >= 0})
    by_table = {files.uri(one.candidate.path): names[one] for one in wanted if one.candidate.row_group >= 0}
    sample: tuple[Sampled, ...] = ()
    for report in run_blocks(config, blocks, examine.make_examiner, job, (total, Carry.of(keep=[pixels]))):
        fresh = []
        for one in examine.read_found(report):
            if one.reason in WAITED_FOR or one.sha256 in known:
                continue
            file = single.get(one.uri) or by_table[one.uri.rpartition("#")[0]]
            if one.uri not in single:
                tables[file] += 1
            if one.reason or one.width_px:  # others were not looked at: no sample of all takes them
                fresh.append(_as_sampled(one, file, one.uri in single))
        sample = _sampled(size, seed, [*sample, *fresh])
    return sample, dict(tables)


def _as_sampled(found: Found, file: str, single: bool) -> Sampled:
    """Single files have the key that chose them; rows of a table are told apart by their bytes, or by their names."""
    name = file if single else found.sha256 or hashlib.sha256(found.uri.encode()).hexdigest()
    return Sampled(key_of(name), file, found.sha256, found.caption, found.width_px, found.height_px, found.reason)


def _sampled(size: int, seed: int, all_of_them: list[Sampled]) -> tuple[Sampled, ...]:
    """Return those of the smallest priorities, of equal bytes the first one; a sample of samples is that of all."""
    keys = np.array([one.key for one in all_of_them], np.uint64)
    ordered = [all_of_them[place] for place in np.argsort(priorities(keys, seed), kind="stable")] if len(keys) else []
    first: dict[Any, Sampled] = {}
    for one in ordered:
        first.setdefault(one.sha256 or one.key, one)
    return tuple(list(first.values())[:size])


def _num_new(found: Arrivals, chooser: _Chooser, tables: dict[str, int], sample: tuple[Sampled, ...]) -> int:
    """Count new pictures: single files by their names, rows of tables by their bytes, without rejects of the sample."""
    groups = sum(arrival.candidate.row_group >= 0 for arrival in found.new)
    single = sum(found.counts[kind] for kind in ("new", "unread", "later")) - groups - len(chooser.alive_tables)
    rejected = sum(bool(one.reason) for one in sample)
    return single - rejected + sum(tables.values())


def _folder_of(arrival: Arrival, root: str) -> str:
    """Return what candidates' paths are relative to: the folder of a source that is a single file."""
    return root.rpartition("/")[0] if arrival.files[0].uri == root else root
