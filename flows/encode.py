"""The second half of `prepare`: latents and text states of a dataset version, computed once, packed for training.

What is stored already (whatever dataset it was stored for) is not computed again. A killed run loses the shard in the
making. Training maps the packed tables into memory; the rows are those of `dataset.split(split)`, in that order.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cluster import artifacts, stage
from cluster.carry import Carry
from cluster.errors import StorageError
from cluster.placement import PlacementSection
from cluster.session import local_session
from cluster.shards import ActorPool, map_blocks
from components import dataset as versions
from components import encode
from components.dataset import SPLITS, DatasetVersion
from components.examine import SHARD_ROWS
from components.store import ShardStore
from flows.config import Config
from flows.console import live, say, step

SMALL_BLOCK_ROWS = 64
PROGRESS_EVERY_S = 10


@dataclass(frozen=True)
class EncodedPaths:
    """Packed tables by split (`encode.open_latents`, `encode.open_text`); row i is dataset.split(split)[i]."""

    latents: dict[str, Path]
    text: dict[str, Path]
    """Empty when the text encoder trains: its states are never cached then."""
    pixels: Path
    """Pixel store, for `encode.read_pictures(pixels, sha256s)`."""


def ensure_encoded(config: Config, dataset: DatasetVersion, base_dir: Path, with_text: bool) -> EncodedPaths:
    """Encode what is not stored yet and pack the tables of every split; says so when there is nothing to do."""
    from components.models import component_fingerprint

    workspace = artifacts.open_workspace(config.workspace)
    resolution_px = config.data.resolution_px
    text_fingerprint = component_fingerprint(base_dir, "text_encoder")
    job = encode.EncodeJob(
        base=base_dir.resolve(),
        pixels=workspace.encoded / encode.pixels_name(resolution_px),
        latents=workspace.encoded / encode.latents_name(component_fingerprint(base_dir, "vae"), resolution_px),
        text=workspace.encoded / encode.text_name(text_fingerprint),
        device="cuda" if config.placement.gpus_per_worker else "cpu",
    )
    for store in (job.pixels, job.latents, *([job.text] if with_text else [])):
        stage.fetch_tree(store, without=artifacts.BY_THEMSELVES)
    _encode_missing(config, dataset, job, with_text)
    for store in (job.latents, job.text):
        stage.keep_tree(store, without=artifacts.BY_THEMSELVES)
    latents, text = {}, {}
    for split in SPLITS:
        items = dataset.split(split)
        latents[split] = job.latents / "tables" / encode.table_name(split, [item.sha256 for item in items])
        if with_text:
            text[split] = job.text / "tables" / encode.table_name(split, [item.caption for item in items])
    paths = EncodedPaths(latents, text, job.pixels)
    pack_tables(dataset, paths)
    if with_text:
        _note_truncated(dataset, ShardStore(job.text), text_fingerprint)
    return paths


def pack_tables(dataset: DatasetVersion, paths: EncodedPaths) -> None:
    """Pack the tables that are not on this machine, from the stores beside them."""
    for split in SPLITS:
        items = dataset.split(split)
        path = paths.latents[split]
        with _disk_errors(path):
            encode.pack_latents_table(_store_of(path), [item.sha256 for item in items], path)
        if split in paths.text:
            path = paths.text[split]
            with _disk_errors(path):
                encode.pack_text_table(_store_of(path), [item.caption for item in items], path)


def _store_of(table: Path) -> ShardStore:
    """Return the store that a packed table is made of, with its shards where the table is still to be made."""
    store = ShardStore(table.parents[1])
    if not table.is_dir():
        stage.fetch_tree(store.directory, without=artifacts.BY_THEMSELVES)
    return store


def _encode_missing(config: Config, dataset: DatasetVersion, job: encode.EncodeJob, with_text: bool) -> None:
    pictures = {item.sha256 for item in dataset.items} - ShardStore(job.latents).keys()
    captions: set[str] = set()
    if with_text:
        stored = ShardStore(job.text).keys()
        wanted = {encode.EMPTY_CAPTION, *(item.caption for item in dataset.items)}
        captions = {caption for caption in wanted if encode.caption_key(caption) not in stored}
    if not pictures and not captions:
        say("encodings: all stored, nothing to do")
        return
    step(f"prepare: encoding {len(pictures)} pictures and {len(captions)} captions with {job.base.name}")
    rows = block_rows(len(pictures) + len(captions), config.placement)
    blocks = [
        *encode.latents_work(pictures, ShardStore(job.pixels).index(), rows),
        *encode.text_work(captions, rows),
    ]
    placement = config.placement
    pool = ActorPool(placement.workers, placement.cpus_per_worker, placement.gpus_per_worker)
    progress, done = progress_of("encoded", len(pictures) + len(captions)), 0
    with local_session(placement):
        carry = Carry.of(fetch=[job.pixels], keep=[job.latents, job.text], whole=[job.base])
        for report in map_blocks(blocks, encode.make_encoder, job, pool, carry):
            done += report["rows"][0].as_py()
            progress(done)


def _note_truncated(dataset: DatasetVersion, store: ShardStore, text_fingerprint: str) -> None:
    """Write into the card, once for each text encoder, how many captions are longer than it reads."""
    path = dataset.directory / versions.CARD
    card = artifacts.read_json(path)
    if card is None or text_fingerprint in card["captions"]["truncated"]:
        return
    count = encode.count_truncated(store, [item.caption for item in dataset.items])
    if count:
        say(
            f"note: {count} of {len(dataset.items)} captions are longer than the text encoder reads; their ends are cut"
        )
    card["captions"]["truncated"][text_fingerprint] = count
    artifacts.write_json_atomic(path, card)


def block_rows(total: int, placement: PlacementSection) -> int:
    """Rows of one block (one shard): few enough to share the work out, at most what one kill may lose."""
    return min(SHARD_ROWS, max(SMALL_BLOCK_ROWS, -(-total // placement.workers)))


def progress_of(verb: str, total: int) -> Callable[[int], None]:
    """Return what to call with the count done so far: a live count, and a whole line now and then."""
    last = time.monotonic()

    def report(done: int) -> None:
        nonlocal last
        live(f"  {verb} {done} of {total}")
        if time.monotonic() - last >= PROGRESS_EVERY_S or done >= total:
            say(f"  {verb} {done} of {total}")
            last = time.monotonic()

    return report


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(artifacts.disk_message(path, error)) from error
