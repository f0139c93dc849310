"""How is the listing of a source with millions of files kept, compared and continued in little memory?

As a Parquet file of `Seen` rows in the order of their uris. Listings are written as a stream and merged as streams, row
group by row group, so what is held is a few thousand rows, whatever the size of the source.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from components.errors import DataError

LISTING = "listing.parquet"
GROUP_ROWS = 8192
SCHEMA = pa.schema(
    [
        ("uri", pa.string()),
        ("size_bytes", pa.int64()),
        ("etag", pa.string()),
        ("since", pa.float64()),
        ("sha256", pa.string()),
    ]
)


@dataclass(frozen=True)
class Seen:
    """One file of a source, as one look found it."""

    uri: str
    size_bytes: int
    etag: str
    since: float = 0.0
    """When it was first found like this, by the clock of whoever looked; Unix seconds."""
    sha256: str = ""
    """Of its bytes; empty while nobody needed to know."""

    def same_as(self, other: "Seen") -> bool:
        """Say whether the content is the same, as far as a listing tells; an empty ETag is any."""
        return not self.etag or not other.etag or (self.size_bytes, self.etag) == (other.size_bytes, other.etag)


def write_listing(target: Path | BinaryIO, rows: Iterable[Seen]) -> tuple[str, int]:
    """Write rows that come in the order of their uris; return (digest over uri, size and ETag, number of rows).

    DataError when they are not in order: a storage that lists so cannot be compared in one pass.
    """
    digest, number, last = hashlib.sha256(), 0, ""
    with pq.ParquetWriter(target, SCHEMA, compression="zstd") as writer:
        rows = iter(rows)
        while group := list(islice(rows, GROUP_ROWS)):
            for row in group:
                if number and row.uri <= last:
                    raise DataError(
                        f"listing expected in the order of names, found {row.uri!r} after {last!r}: this storage lists"
                        " in another order, which cannot be followed; use a general purpose bucket or a folder"
                    )
                digest.update(json.dumps([row.uri, row.size_bytes, row.etag]).encode())
                last, number = row.uri, number + 1
            writer.write_table(pa.Table.from_pylist([vars(row) for row in group], schema=SCHEMA))
    return digest.hexdigest()[:24], number


def read_listing(path: Path) -> Iterator[Seen]:
    """Yield the rows of a listing in order; nothing when there is no such file."""
    if not path.is_file():
        return
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=GROUP_ROWS):
                for row in batch.to_pylist():
                    yield Seen(**row)
    except pa.ArrowInvalid as error:
        raise DataError(f"{path} expected to be a whole listing, found it damaged: {error}; remove it") from error


@contextmanager
def draft_listing(folder: Path) -> Iterator[Path]:
    """Hold the name of a file in `folder` that is gone after the block, unless it was moved."""
    folder.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=folder, prefix=".look-", suffix=".parquet")
    os.close(handle)
    try:
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


def merge(left: Iterable[Seen], right: Iterable[Seen]) -> Iterator[tuple[Seen | None, Seen | None]]:
    """Pair the rows of two listings by uri, in order; None where one of them has no such file."""
    left, right = iter(left), iter(right)
    one, other = next(left, None), next(right, None)
    while one is not None or other is not None:
        if other is None or (one is not None and one.uri < other.uri):
            yield one, None
            one = next(left, None)
        elif one is None or other.uri < one.uri:
            yield None, other
            other = next(right, None)
        else:
            yield one, other
            one, other = next(left, None), next(right, None)


def union(older: Iterable[Seen], newer: Iterable[Seen]) -> Iterator[Seen]:
    """Yield the files of both listings in order, as the newer one has them."""
    for one, other in merge(older, newer):
        row = other or one
        assert row is not None
        yield row
