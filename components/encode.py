"""How are pictures and captions turned into latents and text states once, and read back as fast as memory?

Latents are kept as mean and spread per picture (drawing from them stays random), text states per distinct caption and
only for its real tokens. A store's folder name hashes the encoder's weights and the preprocessing, its keys hash the
content: one changed picture is one encoding. Nothing here draws random numbers.
Shape letters: N pictures, U distinct captions, B batch, C channels, H, W latent height and width, L tokens, D width.
"""

import hashlib
import io
import json
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from components.errors import InputError, NonFiniteError
from components.images import PREPROCESSING_VERSION, to_pixels
from components.store import KEY, RowFile, ShardStore, whole_folder

LATENTS, TEXT = "latents", "text"
EMPTY_CAPTION = ""
EMPTY_ROW = 0
"""Row of the empty caption in every text table, for caption dropout."""
PIXELS_PER_BATCH = 2**21
MAX_BATCH_IMAGES = 64
CAPTIONS_PER_BATCH = 16
WORK_SCHEMA = pa.schema([("kind", pa.string()), (KEY, pa.string()), ("value", pa.string())])


@dataclass(frozen=True)
class EncodeJob:
    """Where one worker reads and writes: the base's diffusers directory and the three stores."""

    base: Path
    pixels: Path
    latents: Path
    text: Path
    device: str = "cpu"


@dataclass(frozen=True)
class LatentsTable:
    """Memory maps, row i for item i of the split: (N, C, H, W) float32, scaled as the denoiser sees them."""

    mean: np.ndarray
    spread: np.ndarray


@dataclass(frozen=True)
class TextTable:
    """Memory maps over distinct captions: states (U, L, D) float32, mask (U, L) bool; row 0 is the empty caption."""

    states: np.ndarray
    mask: np.ndarray
    rows: np.ndarray
    """(N,) int64: the row of each item of the split."""


def caption_key(caption: str) -> str:
    return hashlib.sha256(caption.encode()).hexdigest()


def pixels_name(resolution_px: int) -> str:
    """Name of the pixel store's folder."""
    return f"pixels-{resolution_px}px-{PREPROCESSING_VERSION}"


def latents_name(vae_fingerprint: str, resolution_px: int) -> str:
    return f"latents-{_short_hash(vae_fingerprint, str(resolution_px), PREPROCESSING_VERSION)}"


def text_name(text_encoder_fingerprint: str) -> str:
    return f"text-{_short_hash(text_encoder_fingerprint)}"


def table_name(split: str, keys: Sequence[str]) -> str:
    """Name of the packed table of these rows in this order."""
    return f"{split}-{_short_hash(*keys)}"


def latents_work(missing: Collection[str], shard_of: dict[str, str], rows: int) -> list[pa.Table]:
    """Deal pictures to blocks of `rows`, neighbours in the pixel store together; the value names the pixel shard."""
    ordered = sorted(missing, key=lambda key: (shard_of[key], key))
    return _blocks([(LATENTS, key, shard_of[key]) for key in ordered], rows)


def text_work(missing: Collection[str], rows: int) -> list[pa.Table]:
    """Deal captions to blocks of `rows`; the value is the caption."""
    return _blocks([(TEXT, caption_key(caption), caption) for caption in sorted(missing)], rows)


def make_encoder(job: EncodeJob) -> Callable[[pa.Table], pa.Table]:
    """Return the function that encodes one block of work, stores it as one shard and reports its row count.

    The encoder is loaded when the first block of its kind comes, and the other kind's is dropped.
    """
    from components.models import load_parts

    loaded: dict[str, Any] = {}

    def encode(block: pa.Table) -> pa.Table:
        kind = block["kind"][0].as_py()
        if kind not in loaded:
            loaded.clear()
            only = {"vae"} if kind == LATENTS else {"text_encoder", "tokenizer"}
            loaded[kind] = load_parts(job.base, device=job.device, only=only)
        if kind == LATENTS:
            ShardStore(job.latents).write(_encode_pictures(block, loaded[kind], ShardStore(job.pixels)))
        else:
            ShardStore(job.text).write(_encode_captions(block, loaded[kind]))
        return pa.table({"kind": [kind], "rows": [block.num_rows]})

    return encode


def read_pictures(pixels: Path, keys: Sequence[str]) -> list[Image.Image]:
    """Return the preprocessed RGB pictures of these sha256 keys, in their order."""
    pictures = {}
    for table in ShardStore(pixels).read(set(keys), ["png"]):
        for row in table.to_pylist():
            pictures[row[KEY]] = Image.open(io.BytesIO(row["png"])).convert("RGB")
    return [pictures[key] for key in keys]


def pack_latents_table(store: ShardStore, keys: Sequence[str], path: Path) -> None:
    """Write `path`/mean.npy and spread.npy with row i for keys[i]; nothing to do when the folder is there."""
    if path.is_dir():
        return
    row_of = {key: row for row, key in enumerate(keys)}
    with whole_folder(path) as folder:
        for name in ("mean", "spread"):
            with ExitStack() as opened:
                file = None
                for table in store.read(keys, [name]):
                    if file is None:
                        file = opened.enter_context(RowFile(folder / f"{name}.npy", (len(keys), *_shape(table)), "f4"))
                    matrix_ND = table[name].combine_chunks().flatten().to_numpy().reshape(len(table), -1)
                    for key, values_D in zip(table[KEY].to_pylist(), matrix_ND, strict=True):
                        file.put(row_of[key], values_D)
                if file is None:
                    np.save(folder / f"{name}.npy", np.zeros((0, 0, 0, 0), np.float32))


def open_latents(path: Path) -> LatentsTable:
    """Map a packed latents table into memory, read-only."""
    return LatentsTable(_open(path / "mean.npy"), _open(path / "spread.npy"))


def pack_text_table(store: ShardStore, captions: Sequence[str], path: Path) -> None:
    """Write the states of the distinct captions (row 0: the empty one) and each item's row; skipped when it is there.

    L is the longest stored caption of the table: positions after a caption's own tokens are zero and masked out.
    """
    if path.is_dir():
        return
    distinct = [EMPTY_CAPTION, *sorted(set(captions) - {EMPTY_CAPTION})]
    row_of = {caption_key(caption): row for row, caption in enumerate(distinct)}
    lengths: dict[str, int] = {}
    width = 0
    for table in store.read(row_of, ["num_tokens"]):
        lengths |= {row[KEY]: row["num_tokens"] for row in table.to_pylist()}
        width = _shape(table)[0]
    size = (len(distinct), max(lengths.values()), width)
    with whole_folder(path) as folder:
        with RowFile(folder / "states.npy", size, "f4") as states, RowFile(folder / "mask.npy", size[:2], "?") as masks:
            for table in store.read(row_of, ["states"]):
                for key, values in zip(table[KEY].to_pylist(), table["states"], strict=True):
                    states.put(row_of[key], values.values.to_numpy())
                    masks.put(row_of[key], np.ones(lengths[key], dtype=bool))
        rows = np.array([row_of[caption_key(caption)] for caption in captions], dtype=np.int64)
        np.save(folder / "rows.npy", rows)


def open_text(path: Path) -> TextTable:
    """Map a packed text table into memory, read-only."""
    return TextTable(_open(path / "states.npy"), _open(path / "mask.npy"), _open(path / "rows.npy"))


def count_truncated(store: ShardStore, captions: Sequence[str]) -> int:
    """Count the captions (with repeats) that are longer than the text encoder reads."""
    cut: set[str] = set()
    for table in store.read({caption_key(caption) for caption in captions}, ["truncated"]):
        cut |= {row[KEY] for row in table.to_pylist() if row["truncated"]}
    return sum(caption_key(caption) in cut for caption in captions)


def _encode_pictures(block: pa.Table, parts: Any, pixels: ShardStore) -> pa.Table:
    """Return key, mean and spread of the block's pictures; their (C, H, W) is in the schema's metadata."""
    import torch

    from components.models import encode_images

    images: dict[str, Image.Image] = {}
    for shard in sorted(set(block["value"].to_pylist())):
        wanted = block.filter(pa.compute.equal(block["value"], shard))[KEY].to_pylist()
        for row in pixels.read_shard(shard, wanted, ["png"]).to_pylist():
            images[row[KEY]] = Image.open(io.BytesIO(row["png"]))
    keys = block[KEY].to_pylist()
    side = images[keys[0]].width
    batch = max(1, min(MAX_BATCH_IMAGES, PIXELS_PER_BATCH // side**2))
    device = next(parts.vae.parameters()).device
    means, spreads = [], []
    for first in range(0, len(keys), batch):
        pixels_BCHW = torch.from_numpy(to_pixels([images[key] for key in keys[first : first + batch]])).to(device)
        mean_BCHW, spread_BCHW = encode_images(parts.vae, pixels_BCHW)
        means.append(mean_BCHW.float().cpu().numpy())
        spreads.append(spread_BCHW.float().cpu().numpy())
    mean_NCHW, spread_NCHW = np.concatenate(means), np.concatenate(spreads)
    _refuse_non_finite(keys, mean_NCHW, "vae")
    schema_metadata = {"shape": json.dumps(mean_NCHW.shape[1:])}
    columns = {KEY: pa.array(keys, pa.string()), "mean": _rows(mean_NCHW), "spread": _rows(spread_NCHW)}
    return pa.table(columns).replace_schema_metadata(schema_metadata)


def _encode_captions(block: pa.Table, parts: Any) -> pa.Table:
    """Return key, states of the real tokens, their number, and whether the caption was cut."""
    from components.models import encode_text

    captions = block["value"].to_pylist()
    states, counts, width = [], [], 0
    for first in range(0, len(captions), CAPTIONS_PER_BATCH):
        encoded = encode_text(parts, captions[first : first + CAPTIONS_PER_BATCH])
        states_BLD, mask_BL = encoded.states_BLD.float().cpu().numpy(), encoded.mask_BL.cpu().numpy()
        width = states_BLD.shape[2]
        for states_LD, mask_L in zip(states_BLD, mask_BL, strict=True):
            states.append(states_LD[mask_L].ravel())
            counts.append(int(mask_L.sum()))
    keys = block[KEY].to_pylist()
    _refuse_non_finite(keys, states, "text_encoder")
    columns = {
        KEY: pa.array(keys, pa.string()),
        "states": pa.array(states, pa.large_list(pa.float32())),
        "num_tokens": pa.array(counts, pa.int32()),
        "truncated": pa.array([_is_cut(caption, parts.tokenizer) for caption in captions], pa.bool_()),
    }
    return pa.table(columns).replace_schema_metadata({"shape": json.dumps([width])})


def _is_cut(caption: str, tokenizer: Any) -> bool:
    tokens = tokenizer(caption, truncation=False, verbose=False).input_ids
    return len(tokens) > tokenizer.model_max_length


def _refuse_non_finite(keys: Sequence[str], rows: Any, encoder: str) -> None:
    """Stop before NaN or infinity is stored under a key that says nothing about it."""
    for key, values in zip(keys, rows, strict=True):
        if not np.isfinite(values).all():
            raise NonFiniteError(
                f"{encoder} expected to encode entry {key} to finite numbers, found NaN or infinity; check the weights"
                " of model.base (half-precision autoencoders are known to overflow)"
            )


def _blocks(entries: list[tuple[str, str, str]], rows: int) -> list[pa.Table]:
    names = WORK_SCHEMA.names
    return [
        pa.Table.from_pylist(
            [dict(zip(names, entry, strict=True)) for entry in entries[first : first + rows]], schema=WORK_SCHEMA
        )
        for first in range(0, len(entries), rows)
    ]


def _rows(array_NCHW: np.ndarray) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(array_NCHW.ravel()), int(np.prod(array_NCHW.shape[1:])))


def _shape(table: pa.Table) -> tuple[int, ...]:
    return tuple(json.loads(table.schema.metadata[b"shape"]))


def _open(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (FileNotFoundError, ValueError) as error:
        raise InputError(f"expected a packed table at {str(path)!r}, found: {error}; run `fresco prepare`") from error


def _short_hash(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]
