"""Captioned pictures as one encoder sees them: as a table that is kept whole, and as the `Items` that drift compares.

A reference keeps the table itself, so that it stays what it was when the champion's data is long gone. Words are kept
beside it as counts over the champion's training captions: which words of a caption are rare is judged by them.
Shape letters: N items.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from components.drift_features import (
    CAPTION_ROW,
    PICTURE_ROW,
    ROWS,
    THUMBNAIL,
    FeatureJob,
    read_pictures_seen,
    read_texts_seen,
    stack,
)
from components.drift_kernels import words_of
from components.drift_streams import Items, Texts
from components.near_duplicates import duplicate_flags
from components.simple_statistics import RARE_BELOW, caption_statistics

NUMBERS = ("brightness", "saturation")
SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("sha256", "caption")),
        *((name, pa.int32()) for name in ("width_px", "height_px")),
        *((name, pa.float64()) for name in NUMBERS),
        *((name, ROWS) for name in (PICTURE_ROW, THUMBNAIL, CAPTION_ROW)),
    ]
)
WORDS_SCHEMA = pa.schema([("word", pa.string()), ("captions", pa.int64())])


@dataclass(frozen=True)
class Captioned:
    """One picture by the hash of its bytes, with its size as it arrived."""

    sha256: str
    caption: str
    width_px: int
    height_px: int


def item_table(items: Sequence[Captioned], job: FeatureJob) -> pa.Table:
    """Join items with what the encoder sees of them, in their order; all of it must be stored."""
    seen = read_pictures_seen(job.pictures, [item.sha256 for item in items])
    columns: dict[str, Any] = {name: [getattr(item, name) for item in items] for name in SCHEMA.names[:4]}
    columns |= {name: seen[name] for name in NUMBERS}
    columns |= {name: list(seen[name]) for name in (PICTURE_ROW, THUMBNAIL)}
    columns[CAPTION_ROW] = list(read_texts_seen(job.texts, [item.caption for item in items]))
    return pa.table(columns, schema=SCHEMA)


def make_items(table: pa.Table, encoder: str, known: Mapping[str, int], rejected: Any) -> Items:
    """What `drift.look` compares. `known` counts training captions by word; `rejected` is 1 or 0 for each candidate."""
    captions = tuple(table["caption"].to_pylist())
    width, height = (table[name].to_numpy() for name in ("width_px", "height_px"))
    statistics: dict[str, Any] = caption_statistics(captions, known)
    statistics |= {"megapixels": width * height / 1e6, "aspect_ratio": width / np.maximum(height, 1)}
    statistics |= {name: table[name].to_numpy() for name in NUMBERS}
    statistics["rejected"] = np.asarray(rejected, np.float64)
    rows = {name: stack(table[name].to_pylist()) for name in (PICTURE_ROW, THUMBNAIL, CAPTION_ROW)}
    return Items(encoder, rows[PICTURE_ROW], rows[THUMBNAIL], Texts(captions, rows[CAPTION_ROW]), statistics)


def with_near_duplicates(reference: Items, arrivals: Items) -> tuple[Items, Items]:
    """Both sides with the statistic `near_duplicate`, which is only told over both together."""
    flags = duplicate_flags(np.concatenate([reference.picture_rows_ND, arrivals.picture_rows_ND]))
    parts = (flags[: len(reference)], flags[len(reference) :])
    one, other = (
        replace(side, statistics={**side.statistics, "near_duplicate": part})
        for side, part in zip((reference, arrivals), parts, strict=True)
    )
    return one, other


def word_counts(captions: Iterable[str]) -> pa.Table:
    """Captions by word, those alone that are not rare: the others are as if unknown."""
    counts = Counter(word for caption in captions for word in set(words_of(caption)))
    kept = sorted((word, number) for word, number in counts.items() if number >= RARE_BELOW)
    return pa.table({"word": [word for word, _ in kept], "captions": [n for _, n in kept]}, schema=WORDS_SCHEMA)


def flags(share_of: int, total: int, most: int, seed: int) -> np.ndarray:
    """`share_of` ones among `total`, or a seeded sample of `most` of them, as 0 and 1."""
    size = min(total, most)
    ones = int(np.random.default_rng(seed).hypergeometric(share_of, total - share_of, size)) if size else 0
    return np.repeat([1.0, 0.0], [ones, size - ones])
