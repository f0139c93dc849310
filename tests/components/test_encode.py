"""Encodings computed once by real tiny encoders, and read back row by row as the live encoders give them."""

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from components.encode import (
    EMPTY_ROW,
    EncodeJob,
    caption_key,
    count_truncated,
    latents_work,
    make_encoder,
    open_latents,
    open_text,
    pack_latents_table,
    pack_text_table,
    read_pictures,
    table_name,
    text_work,
)
from components.errors import DataError, InputError, NonFiniteError
from components.images import to_pixels, to_png
from components.models import encode_images, encode_text, load_parts, make_tiny, save_parts
from components.store import ShardStore

SIDE_PX = 16
CAPTIONS = ["a red circle", "", "a blue square", "one " * 40]
FAMILIES = ("stable_diffusion", "z_image")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", params=FAMILIES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp(request.param)
    save_parts(make_tiny(request.param), directory)
    return directory


@pytest.fixture
def job(base: Path, tmp_path: Path) -> EncodeJob:
    store = ShardStore(tmp_path / "pixels")
    for first in range(0, 6, 3):
        pngs = [to_png(picture(index)) for index in range(first, first + 3)]
        store.write(pa.table({"key": [f"key{index}" for index in range(first, first + 3)], "png": pngs}))
    return EncodeJob(base, store.directory, tmp_path / "latents", tmp_path / "text")


def picture(index: int) -> Image.Image:
    rng = np.random.default_rng(index)
    return Image.fromarray(rng.integers(0, 256, (SIDE_PX, SIDE_PX, 3), dtype=np.uint8))


def encode_all(job: EncodeJob) -> None:
    index = ShardStore(job.pixels).index()
    encode = make_encoder(job)
    for block in [*latents_work(index, index, rows=4), *text_work(CAPTIONS, rows=3)]:
        assert encode(block)["rows"].to_pylist() == [len(block)]


def test_packed_rows_are_what_the_live_encoders_give(job: EncodeJob, tmp_path: Path) -> None:
    encode_all(job)
    parts = load_parts(job.base)
    order = [4, 0, 5]
    keys = [f"key{index}" for index in order]
    pack_latents_table(ShardStore(job.latents), keys, tmp_path / "table")
    latents = open_latents(tmp_path / "table")
    mean, spread = encode_images(parts.vae, torch.from_numpy(to_pixels([picture(index) for index in order])))
    # Batches of other sizes move float32 results by about 1e-6.
    np.testing.assert_allclose(latents.mean, mean.numpy(), atol=1e-5)
    np.testing.assert_allclose(latents.spread, spread.numpy(), atol=1e-5)

    captions = ["a blue square", "a red circle", "a blue square"]
    pack_text_table(ShardStore(job.text), captions, tmp_path / "words")
    text = open_text(tmp_path / "words")
    live = encode_text(parts, ["", *captions])
    rows = np.array([EMPTY_ROW, *text.rows])
    assert len(text.states) == 3
    for row, states_LD, mask_L in zip(rows, live.states_BLD.numpy(), live.mask_BL.numpy(), strict=True):
        np.testing.assert_allclose(text.states[row][text.mask[row]], states_LD[mask_L], atol=1e-5)
        assert text.mask[row].sum() == mask_L.sum()


def test_the_text_table_is_as_long_as_its_longest_caption(job: EncodeJob, tmp_path: Path) -> None:
    encode_all(job)
    pack_text_table(ShardStore(job.text), ["a red circle"], tmp_path / "words")
    text = open_text(tmp_path / "words")
    assert text.mask.any(axis=0).all()
    assert (text.states[~text.mask] == 0).all()


def test_captions_beyond_the_tokenizer_are_counted_with_repeats(job: EncodeJob) -> None:
    encode_all(job)
    # The tiny tokenizers read 16 and 48 tokens; the long caption has 40 words of several tokens each.
    assert count_truncated(ShardStore(job.text), ["one " * 40, "a red circle", "one " * 40]) == 2


def test_pictures_come_back_in_the_asked_order(job: EncodeJob) -> None:
    pictures = read_pictures(job.pixels, ["key5", "key1", "key5"])
    assert [np.asarray(one).tolist() for one in pictures] == [np.asarray(picture(i)).tolist() for i in (5, 1, 5)]


def test_packing_is_skipped_when_the_table_is_there(job: EncodeJob, tmp_path: Path) -> None:
    encode_all(job)
    pack_latents_table(ShardStore(job.latents), ["key1"], tmp_path / "table")
    before = (tmp_path / "table" / "mean.npy").stat().st_mtime_ns
    pack_latents_table(ShardStore(tmp_path / "nothing"), ["key1"], tmp_path / "table")
    assert (tmp_path / "table" / "mean.npy").stat().st_mtime_ns == before


def test_packing_with_a_row_missing_leaves_no_table(job: EncodeJob, tmp_path: Path) -> None:
    encode_all(job)
    with pytest.raises(DataError, match="1 missing"):
        pack_latents_table(ShardStore(job.latents), ["key1", "no such key"], tmp_path / "table")
    with pytest.raises(DataError, match="1 missing"):
        pack_text_table(ShardStore(job.text), ["never encoded"], tmp_path / "words")
    assert not [path.name for path in tmp_path.iterdir() if "table" in path.name or "words" in path.name]
    with pytest.raises(InputError, match="run `fresco prepare`"):
        open_latents(tmp_path / "table")


def test_an_empty_split_packs_to_an_empty_table(tmp_path: Path) -> None:
    pack_latents_table(ShardStore(tmp_path / "none"), [], tmp_path / "table")
    assert len(open_latents(tmp_path / "table").mean) == 0


def test_weights_that_overflow_store_nothing(tmp_path: Path) -> None:
    parts = make_tiny("stable_diffusion")
    with torch.no_grad():
        parts.vae.encoder.conv_in.weight.fill_(float("nan"))
    save_parts(parts, tmp_path / "base")
    buffer = io.BytesIO()
    picture(0).save(buffer, "PNG")
    pixels = ShardStore(tmp_path / "pixels")
    shard = pixels.write(pa.table({"key": ["k"], "png": [buffer.getvalue()]}))
    encode = make_encoder(EncodeJob(tmp_path / "base", pixels.directory, tmp_path / "latents", tmp_path / "text"))
    with pytest.raises(NonFiniteError, match="vae expected to encode entry k to finite numbers"):
        encode(latents_work(["k"], {"k": shard}, rows=1)[0])
    assert ShardStore(tmp_path / "latents").keys() == set()


def test_names_tell_orders_splits_and_captions_apart() -> None:
    assert len({table_name("train", ["a", "b"]), table_name("train", ["b", "a"]), table_name("test", ["a", "b"])}) == 3
    assert caption_key("a") != caption_key("a ")


def test_importing_the_module_does_not_import_torch() -> None:
    """Workers that only decode pictures import it too and must start fast."""
    code = "import sys, components.encode, components.examine; print('torch' in sys.modules, 'ray' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "False False\n"
