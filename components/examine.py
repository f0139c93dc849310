"""Which candidates are usable pictures with captions, and what are their pixels at the training resolution?

One worker's part of `prepare`: read, hash, decode, check, crop and scale, store the pixels under the hash of the bytes,
and report one row for each candidate. A picture whose pixels are stored already is hashed but not decoded again, nor is
a table's row that a sample (`Sampling`) cannot take.
How bytes are read is handed in; nothing here knows where they are.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
import pyarrow as pa

from components.dataset import Found
from components.images import DECOMPRESSION_BOMB, TOO_SMALL, Limits, PictureError, decode, preprocess, to_png
from components.reservoir import Keys, Reservoir, add, key_of, would_enter
from components.sources import (
    MISSING_FILE,
    UNREADABLE_CAPTION,
    Candidate,
    caption_problem,
    decode_caption,
    parquet_rows,
    parse_emblems,
)
from components.store import KEY, ShardStore

SHARD_ROWS = 256
CANDIDATE_SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("name", "path", "caption", "caption_path")),
        *((name, pa.int32()) for name in ("row_group", "index")),
        ("problem", pa.string()),
    ]
)
FOUND_SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("uri", "caption", "sha256")),
        *((name, pa.int32()) for name in ("width_px", "height_px")),
        *((name, pa.string()) for name in ("reason", "shard")),
    ]
)
PIXELS_SCHEMA = pa.schema(
    [(KEY, pa.string()), ("png", pa.binary()), ("width_px", pa.int32()), ("height_px", pa.int32())]
)


class SourceFiles(Protocol):
    """Reads files by their path relative to the source; FileNotFoundError when one is gone."""

    def read(self, path: str) -> bytes: ...

    def open_file(self, path: str) -> BinaryIO: ...

    def uri(self, name: str) -> str: ...


@dataclass(frozen=True)
class Sampling:
    """A sample that is all somebody wants of the rows of tables: the smallest priorities by the hash of their bytes."""

    size: int
    seed: int
    waited_for: tuple[str, ...]
    """Reasons of rows that the sample does not take."""
    known: Keys
    """Keys of pictures that it does not take, sorted."""


@dataclass(frozen=True)
class ExamineJob:
    """What a worker needs besides its candidates."""

    source: str
    files: SourceFiles
    limits: Limits
    resolution_px: int
    pixels: Path
    """Folder of the pixel store."""
    sampling: Sampling | None = None
    """Rows of tables that this sample cannot take are told with their hash alone, width 0; None: all are examined."""


def candidate_blocks(candidates: list[Candidate], rows: int = SHARD_ROWS) -> list[pa.Table]:
    """Deal candidates to blocks of at most `rows`; a Parquet row group, which stands for many, is a block alone."""
    groups = [candidate for candidate in candidates if candidate.row_group >= 0]
    single = [candidate for candidate in candidates if candidate.row_group < 0]
    dealt = [single[first : first + rows] for first in range(0, len(single), rows)] + [[group] for group in groups]
    return [pa.Table.from_pylist([asdict(one) for one in block], schema=CANDIDATE_SCHEMA) for block in dealt]


def read_found(table: pa.Table) -> list[Found]:
    """Turn a worker's report back into values."""
    return [Found(**row) for row in table.drop_columns(["shard"]).to_pylist()]


def make_examiner(job: ExamineJob) -> Callable[[pa.Table], pa.Table]:
    """Return the function that examines a block of candidates and reports FOUND_SCHEMA rows."""
    store = ShardStore(job.pixels)
    sizes = stored_sizes(store)
    sampler = _Sampler(job.sampling) if job.sampling is not None else None

    def examine(block: pa.Table) -> pa.Table:
        rows, pending = [], []
        for row in block.to_pylist():
            wanted = sampler if row["row_group"] >= 0 else None
            for candidate, content in _contents(Candidate(**row), job):
                found, png = _examine_one(candidate, content, job, sizes, wanted)
                rows.append({**asdict(found), "uri": job.files.uri(candidate.name), "shard": ""})
                if png is not None:
                    sizes[found.sha256] = (found.width_px, found.height_px)
                    pending.append((rows[-1], png))
                if len(pending) >= SHARD_ROWS:
                    _write_pixels(store, pending)
        _write_pixels(store, pending)
        return pa.Table.from_pylist(rows, schema=FOUND_SCHEMA)

    return examine


class _Sampler:
    """Which rows may the sample take that were read here? What it takes of all rows is among them."""

    def __init__(self, sampling: Sampling) -> None:
        self._rules = sampling
        self._best = Reservoir(sampling.size, sampling.seed)

    def passes_over(self, sha256: str) -> bool:
        key, known, kept = np.uint64(key_of(sha256)), self._rules.known, self._best.keys
        place = int(np.searchsorted(known, key))
        if place < len(known) and known[place] == key:
            return True
        return bool(len(kept) and key != kept[-1] and not would_enter(self._best, [key])[0])

    def take(self, found: Found) -> None:
        if found.reason not in self._rules.waited_for:
            self._best = add(self._best, [key_of(found.sha256)], {})


def stored_sizes(store: ShardStore) -> dict[str, tuple[int, int]]:
    """Return the original (width_px, height_px) of every picture whose pixels are stored."""
    sizes: dict[str, tuple[int, int]] = {}
    for table in store.scan(["width_px", "height_px"]):
        sizes |= {row[KEY]: (row["width_px"], row["height_px"]) for row in table.to_pylist()}
    return sizes


def _contents(candidate: Candidate, job: ExamineJob) -> Iterator[tuple[Candidate, bytes | None]]:
    """Yield the candidate, or each one that it stands for, with its bytes; None when they are missing."""
    if candidate.index >= 0:
        from components.emblems import example

        emblems = parse_emblems(job.source)
        image, caption = example(emblems.world, emblems.seed, candidate.index, job.resolution_px)
        yield Candidate(candidate.name, caption=caption), to_png(image)
    elif candidate.row_group >= 0:
        try:
            with job.files.open_file(candidate.path) as file:
                yield from parquet_rows(file, candidate.path, candidate.row_group)
        except FileNotFoundError:
            yield candidate, None
    else:
        try:
            yield _with_caption(candidate, job), job.files.read(candidate.path)
        except FileNotFoundError:
            yield candidate, None


def _with_caption(candidate: Candidate, job: ExamineJob) -> Candidate:
    if not candidate.caption_path:
        return candidate
    caption = decode_caption(job.files.read(candidate.caption_path))
    problem = UNREADABLE_CAPTION if caption is None else caption_problem(caption)
    return Candidate(candidate.name, candidate.path, caption, problem=problem)


def _examine_one(
    candidate: Candidate,
    content: bytes | None,
    job: ExamineJob,
    sizes: dict[str, tuple[int, int]],
    sampler: _Sampler | None,
) -> tuple[Found, bytes | None]:
    """Return what was found and, when they are not stored yet, the preprocessed pixels as PNG."""
    caption = (candidate.caption or "").strip()
    reason = candidate.problem or ("" if content is not None else MISSING_FILE)
    if reason or content is None:
        return Found("", caption, reason=reason), None
    sha256 = hashlib.sha256(content).hexdigest()
    if sampler is not None and content and sampler.passes_over(sha256):
        return Found("", caption, sha256), None
    found, png = _decoded(caption, sha256, content, job, sizes)
    if sampler is not None:
        sampler.take(found)
    return found, png


def _decoded(
    caption: str, sha256: str, content: bytes, job: ExamineJob, sizes: dict[str, tuple[int, int]]
) -> tuple[Found, bytes | None]:
    if sha256 in sizes:
        width_px, height_px = sizes[sha256]
        return Found("", caption, sha256, width_px, height_px, _size_problem(width_px, height_px, job.limits)), None
    try:
        image = decode(content, job.limits)
    except PictureError as rejection:
        return Found("", caption, sha256, reason=str(rejection)), None
    png = to_png(preprocess(image, job.resolution_px))
    return Found("", caption, sha256, image.width, image.height), png


def _size_problem(width_px: int, height_px: int, limits: Limits) -> str:
    """The checks of `decode` on a picture that is known to be readable."""
    if width_px * height_px > limits.max_pixels:
        return DECOMPRESSION_BOMB
    return TOO_SMALL if min(width_px, height_px) < limits.min_side_px else ""


def _write_pixels(store: ShardStore, pending: list[tuple[dict, bytes]]) -> None:
    """Write the waiting pixels as one shard, note its name in their rows, and empty the list."""
    if not pending:
        return
    rows = [
        {KEY: row["sha256"], "png": png, "width_px": row["width_px"], "height_px": row["height_px"]}
        for row, png in pending
    ]
    name = store.write(pa.Table.from_pylist(rows, schema=PIXELS_SCHEMA))
    for row, _ in pending:
        row["shard"] = name
    pending.clear()
