"""What is in a dataset version, how is it split, and what is its name?

The split is a hash of each picture's bytes, so it stays as data grows and no picture is in two splits. The fingerprint
is over the accepted content and what decides its use (resolution, fractions): not over file order, names or location.
Nothing is written here: the flow puts the bytes made here on disk, the manifest and card first, the record last.
"""

import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from components.errors import InputError
from components.images import PREPROCESSING_VERSION

TRAIN, VALIDATION, TEST = "train", "validation", "test"
SPLITS = (TRAIN, VALIDATION, TEST)
DUPLICATE = "duplicate_bytes"
MANIFEST, CARD = "manifest.parquet", "card.json"
MANIFEST_SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("uri", "caption", "split", "sha256")),
        *((name, pa.int32()) for name in ("width_px", "height_px")),
        *((name, pa.string()) for name in ("source", "first_seen")),
    ]
)


@dataclass(frozen=True)
class Found:
    """One candidate after its examination: a usable picture, or the reason why not."""

    uri: str
    caption: str = ""
    sha256: str = ""
    width_px: int = 0
    height_px: int = 0
    reason: str = ""


@dataclass(frozen=True)
class Item:
    """One captioned picture of a dataset version."""

    sha256: str
    caption: str
    split: str
    uri: str


@dataclass(frozen=True)
class DatasetVersion:
    """Accepted pictures and captions with their split, under `name@fingerprint`."""

    name: str
    fingerprint: str
    directory: Path
    items: tuple[Item, ...]

    @property
    def id(self) -> str:
        return f"{self.name}@{self.fingerprint}"

    @cached_property
    def _by_split(self) -> dict[str, list[Item]]:
        ordered = sorted(self.items, key=lambda item: item.sha256)
        return {split: [item for item in ordered if item.split == split] for split in SPLITS}

    def split(self, split: str) -> list[Item]:
        """Return the items of train, validation or test, sorted by sha256: the row order of every packed table."""
        return self._by_split[split]


def resolve_duplicates(found: Iterable[Found]) -> tuple[list[Found], list[Found]]:
    """Return (accepted, rejected), both in an order that does not depend on the input's.

    Of pictures with equal bytes the one with the smallest caption (then uri) stays, whichever came first.
    """
    kept: dict[str, Found] = {}
    rejected = []
    for candidate in sorted(found, key=lambda one: (one.caption, one.uri)):
        if candidate.reason:
            rejected.append(candidate)
        elif candidate.sha256 in kept:
            rejected.append(Found(candidate.uri, candidate.caption, candidate.sha256, reason=DUPLICATE))
        else:
            kept[candidate.sha256] = candidate
    accepted = sorted(kept.values(), key=lambda one: one.sha256)
    return accepted, sorted(rejected, key=lambda one: (one.uri, one.reason))


def split_of(sha256: str, validation_fraction: float, test_fraction: float) -> str:
    """Place a picture by the hash of its bytes: validation below the first fraction, test below the sum, else train."""
    place = int(sha256[:13], 16) / 16**13
    if place < validation_fraction:
        return VALIDATION
    return TEST if place < validation_fraction + test_fraction else TRAIN


def dataset_fingerprint(
    accepted: Iterable[Found], resolution_px: int, validation_fraction: float, test_fraction: float
) -> str:
    """12 hex digits over pictures, captions, resolution, preprocessing and fractions."""
    digest = hashlib.sha256()
    how = [PREPROCESSING_VERSION, resolution_px, validation_fraction, test_fraction]
    digest.update(json.dumps(how).encode())
    for sha256, caption in sorted((one.sha256, one.caption) for one in accepted):
        digest.update(json.dumps([sha256, caption]).encode())
    return digest.hexdigest()[:12]


def make_manifest(
    accepted: Sequence[Found], fractions: tuple[float, float], source: str, first_seen: dict[str, str], now: str
) -> pa.Table:
    """Build the manifest, one row a picture by sha256; `first_seen` holds the times of pictures seen before `now`."""
    rows = [
        {
            "uri": one.uri,
            "caption": one.caption,
            "split": split_of(one.sha256, *fractions),
            "sha256": one.sha256,
            "width_px": one.width_px,
            "height_px": one.height_px,
            "source": source,
            "first_seen": first_seen.get(one.sha256, now),
        }
        for one in sorted(accepted, key=lambda one: one.sha256)
    ]
    return pa.Table.from_pylist(rows, schema=MANIFEST_SCHEMA)


def grow_manifest(parent: pa.Table, added: pa.Table) -> pa.Table:
    """Return the parent's rows exactly as they are, and those of `added` whose pictures the parent does not have."""
    new = added.filter(pc.invert(pc.is_in(added["sha256"], value_set=parent["sha256"].combine_chunks())))
    return pa.concat_tables([parent, new]).sort_by("sha256")


def grown_fingerprint(parent: str, manifest: pa.Table, resolution_px: int) -> str:
    """12 hex digits over the parent's fingerprint and every picture with its caption and split."""
    digest = hashlib.sha256(json.dumps([PREPROCESSING_VERSION, resolution_px, parent]).encode())
    for row in manifest.select(["sha256", "caption", "split"]).to_pylist():
        digest.update(json.dumps([row["sha256"], row["caption"], row["split"]]).encode())
    return digest.hexdigest()[:12]


def manifest_bytes(manifest: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(manifest, buffer, compression="zstd")
    return buffer.getvalue()


def load_dataset(directory: Path) -> DatasetVersion:
    """Read a dataset version from `<name>@<fingerprint>/`; InputError when it has no manifest."""
    name, _, fingerprint = directory.name.rpartition("@")
    try:
        table = pq.read_table(directory / MANIFEST, columns=["sha256", "caption", "split", "uri"])
    except (FileNotFoundError, pa.ArrowInvalid) as error:
        raise InputError(
            f"expected a dataset version with {MANIFEST} in {str(directory)!r}, found: {error}; run `fresco prepare`"
        ) from error
    return DatasetVersion(name, fingerprint, directory, tuple(Item(**row) for row in table.to_pylist()))


def load_first_seen(manifests: Iterable[Path]) -> dict[str, str]:
    """Return when each picture was first seen over several manifests: the earliest time of each sha256."""
    first: dict[str, str] = {}
    for path in manifests:
        table = pq.read_table(path, columns=["sha256", "first_seen"])
        for sha256, seen in zip(table["sha256"].to_pylist(), table["first_seen"].to_pylist(), strict=True):
            first[sha256] = min(seen, first.get(sha256, seen))
    return first


def make_card(dataset_id: str, source: str, manifest: pa.Table, rejected: Sequence[Found], now: str) -> dict[str, Any]:
    """Build the data card: where the data came from, how much of it there is, and what was left out and why."""
    captions = manifest["caption"].to_pylist()
    splits = Counter(manifest["split"].to_pylist())
    return {
        "dataset": dataset_id,
        "fingerprint": dataset_id.rpartition("@")[2],
        "source": source,
        "created": now,
        "images": manifest.num_rows,
        "splits": {split: splits[split] for split in SPLITS},
        "captions": {
            "count": len(captions),
            "distinct": len(set(captions)),
            "mean_words": round(sum(len(caption.split()) for caption in captions) / max(1, len(captions)), 2),
            "truncated": {},  # text encoder's fingerprint -> captions longer than it reads; filled when it encodes
        },
        "rejected": count_reasons(rejected),
        "rejected_items": [{"uri": one.uri, "reason": one.reason} for one in rejected],
    }


def count_reasons(rejected: Iterable[Found]) -> dict[str, int]:
    """Count rejections by reason, most frequent first."""
    return dict(sorted(Counter(one.reason for one in rejected).items(), key=lambda pair: (-pair[1], pair[0])))


def rejection_table(rejected: Sequence[Found], num_candidates: int) -> str:
    """Write the counts by reason as lines of text, each with one example."""
    examples = {one.reason: one.uri for one in reversed(rejected)}
    counts = count_reasons(rejected).items()
    lines = [f"  {count:>8}  {reason:<22} for example {examples[reason]}" for reason, count in counts]
    return "\n".join([*lines, f"  {len(rejected):>8}  of {num_candidates} candidates rejected"])
