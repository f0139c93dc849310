"""What does the monitor's encoder see of pictures and captions? Computed once, kept beside the encoded data.

One worker's part: take preprocessed pictures from the pixel store (and captions as they are), encode them, and write a
shard into a store that is named by the encoder, so that a reference and the arrivals share what both have. Beside the
encoder's rows stand what needs the pixels as well: the 8x8 thumbnail, brightness, saturation.
Shape letters: N items, D feature width.
"""

import io
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from components.drift_streams import thumbnails
from components.encode import caption_key
from components.simple_statistics import picture_statistics
from components.store import KEY, ShardStore

ROWS = pa.list_(pa.float32())
PICTURE_ROW, THUMBNAIL, CAPTION_ROW = "picture_row", "thumbnail", "caption_row"
PICTURE_COLUMNS = (PICTURE_ROW, THUMBNAIL, "brightness", "saturation")
WORK_SCHEMA = pa.schema([(KEY, pa.string()), ("caption", pa.string())])
"""`caption` is null where the key is a picture's."""
PICTURE_SCHEMA = pa.schema(
    [
        (KEY, pa.string()),
        (PICTURE_ROW, ROWS),
        (THUMBNAIL, ROWS),
        ("brightness", pa.float64()),
        ("saturation", pa.float64()),
    ]
)
TEXT_SCHEMA = pa.schema([(KEY, pa.string()), (CAPTION_ROW, ROWS)])


@dataclass(frozen=True)
class FeatureJob:
    """Where one worker reads and writes: a CLIP directory and three stores."""

    clip: Path
    pixels: Path
    pictures: Path
    texts: Path


def stores_of(encoded: Path, identity: str, pixels_name: str) -> tuple[Path, Path]:
    """The folders for what an encoder sees of the pictures of a pixel store, and of texts."""
    return encoded / f"seen-{identity}-{pixels_name}", encoded / f"seen-{identity}-texts"


def feature_work(pictures: Collection[str], captions: Collection[str], rows: int) -> list[pa.Table]:
    """Deal pictures (by sha256) and captions to blocks of at most `rows`, one kind in each."""
    kinds: list[list[dict[str, Any]]] = [
        [{KEY: key, "caption": None} for key in sorted(pictures)],
        [{KEY: caption_key(caption), "caption": caption} for caption in sorted(captions)],
    ]
    blocks = [kind[first : first + rows] for kind in kinds for first in range(0, len(kind), rows)]
    return [pa.Table.from_pylist(block, schema=WORK_SCHEMA) for block in blocks]


def make_featurer(job: FeatureJob) -> Callable[[pa.Table], pa.Table]:
    """Return the function that encodes one block of work, stores it as one shard and reports its row count."""
    import transformers.utils.logging

    from components.clip_encoder import ClipEncoder

    transformers.utils.logging.disable_progress_bar()
    encoder = ClipEncoder(job.clip)

    def encode(block: pa.Table) -> pa.Table:
        if block["caption"].null_count:
            ShardStore(job.pictures).write(_pictures(encoder.images, job.pixels, block[KEY].to_pylist()))
        else:
            rows_ND = encoder.texts(block["caption"].to_pylist())
            columns = {KEY: block[KEY], CAPTION_ROW: list(rows_ND)}
            ShardStore(job.texts).write(pa.table(columns, schema=TEXT_SCHEMA))
        return pa.table({"rows": [block.num_rows]})

    return encode


def _pictures(encode: Callable[[list[Image.Image]], Any], pixels: Path, keys: Sequence[str]) -> pa.Table:
    tables = []
    for table in ShardStore(pixels).read(keys, ["png"]):
        shown = [Image.open(io.BytesIO(png)).convert("RGB") for png in table["png"].to_pylist()]
        plain = [picture_statistics(picture, picture.width, picture.height) for picture in shown]
        columns = {
            KEY: table[KEY],
            PICTURE_ROW: list(encode(shown)),
            THUMBNAIL: list(thumbnails(shown)),
            "brightness": [one["brightness"] for one in plain],
            "saturation": [one["saturation"] for one in plain],
        }
        tables.append(pa.table(columns, schema=PICTURE_SCHEMA))
    return pa.concat_tables(tables)


def read_pictures_seen(store: Path, keys: Sequence[str]) -> dict[str, np.ndarray]:
    """The columns of `PICTURE_COLUMNS` as arrays, row i for keys[i]; DataError when some are not stored."""
    return _columns(store, keys, PICTURE_COLUMNS)


def read_texts_seen(store: Path, captions: Sequence[str]) -> np.ndarray:
    """The encoder's rows of texts, (N, D)."""
    return _columns(store, [caption_key(caption) for caption in captions], (CAPTION_ROW,))[CAPTION_ROW]


def stack(lists: Iterable[Sequence[float]]) -> np.ndarray:
    """Rows of numbers as one float32 array, (N, D); (0, 0) for none."""
    rows = [np.asarray(row, np.float32) for row in lists]
    return np.stack(rows) if rows else np.zeros((0, 0), np.float32)


def _columns(store: Path, keys: Sequence[str], names: Sequence[str]) -> dict[str, np.ndarray]:
    found: dict[str, dict[str, Any]] = {}
    for table in ShardStore(store).read(set(keys), names):
        found |= {row[KEY]: row for row in table.to_pylist()}
    numbers = {"brightness", "saturation"}
    return {
        name: np.array([found[key][name] for key in keys])
        if name in numbers
        else stack(found[key][name] for key in keys)
        for name in names
    }
