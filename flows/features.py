"""Encode pictures and captions with the monitor's encoder: a handful in this process, many on Ray Data.

What is stored already, for whatever reference or window it was stored, is not computed again.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from cluster import stage
from cluster.artifacts import Workspace
from cluster.carry import Carry
from cluster.session import local_session
from cluster.shards import ActorPool, map_blocks
from components.drift_features import FeatureJob, feature_work, make_featurer, stores_of
from components.encode import caption_key, pixels_name
from components.errors import InputError
from components.store import ShardStore
from flows.config import Config
from flows.console import say
from flows.encode import block_rows, progress_of

HANDFUL = 512
"""So many are encoded here: starting a Ray session takes longer."""


@dataclass(frozen=True)
class Eye:
    """The monitor's encoder, not loaded."""

    directory: Path
    identity: str


def monitor_eye(config: Config) -> Eye:
    """Return the encoder that `monitor.encoder` names; InputError when there is none."""
    from components.clip_encoder import directory_identity
    from components.models import embedded_clip

    given = config.monitor.encoder
    directory = Path(given).expanduser().absolute() if given else embedded_clip()
    if not (directory / "config.json").is_file():
        raise InputError(
            f"monitor.encoder expected a CLIP directory with a config.json, found none at {given!r}; name a directory"
            " saved from transformers' CLIPModel, or leave it empty for the embedded CLIP"
        )
    return Eye(directory, directory_identity(directory))


def ensure_features(
    config: Config, workspace: Workspace, eye: Eye, pictures: Collection[str], captions: Collection[str]
) -> FeatureJob:
    """Encode what is not stored yet; the job says where everything lies. The pictures' pixels must be stored."""
    pixels = pixels_name(config.data.resolution_px)
    stores = stores_of(workspace.encoded, eye.identity, pixels)
    job = FeatureJob(eye.directory, workspace.encoded / pixels, *stores)
    for store in stores:
        stage.fetch_tree(store)
    new_pictures = set(pictures) - ShardStore(job.pictures).keys()
    stored = ShardStore(job.texts).keys()
    new_captions = {caption for caption in captions if caption_key(caption) not in stored}
    total = len(new_pictures) + len(new_captions)
    if not total:
        return job
    say(f"  encoding {len(new_pictures)} pictures and {len(new_captions)} captions with {eye.identity}")
    blocks = feature_work(new_pictures, new_captions, block_rows(total, config.placement))
    progress, done = progress_of("encoded", total), 0
    carry = Carry.of(fetch=[job.pixels], keep=stores)
    for report in run_blocks(config, blocks, make_featurer, job, (total, carry)):
        done += report["rows"][0].as_py()
        progress(done)
    for store in stores:
        stage.fetch_tree(store)
    return job


def run_blocks(
    config: Config,
    blocks: Sequence[pa.Table],
    make: Callable[[Any], Callable[[Any], Any]],
    job: Any,
    load: tuple[int, Carry],
) -> Iterator[pa.Table]:
    """Yield `make(job)(block)` for every block: here where all rows are a handful, else on Ray Data actors.

    `load` is the number of rows, and what the work reads and writes in a workspace on S3.
    """
    rows, carry = load
    if rows <= HANDFUL:
        carry.before()
        yield from map(make(job), blocks)
        carry.after()
        return
    placement = config.placement
    with local_session(placement):
        yield from map_blocks(blocks, make, job, ActorPool(placement.workers, placement.cpus_per_worker), carry)
