"""Draw the pictures of a scorecard: fixed prompts x fixed seeds, kept, in this process or dealt out to Ray workers.

What is kept is named by the model's weights and by what was asked of it, so a champion's pictures are drawn once,
whatever its name and whatever dataset version the prompts came from. Requests are dealt in blocks of a fixed size and
order: a picture has the same neighbours in its batch wherever it is drawn. A killed run keeps its finished blocks.
"""

import hashlib
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from PIL import Image

from cluster import stage
from cluster.artifacts import Workspace, read_record, write_bytes_atomic, write_record
from cluster.carry import Carry
from cluster.placement import PlacementSection
from cluster.session import local_session
from cluster.shards import ActorPool, map_blocks
from components.models import SAMPLE_BATCH, load_parts
from components.sampler import PictureRequest, draw
from flows.console import say
from flows.encode import progress_of

VERSION = 2
"""Raise it when the same model and requests would be drawn differently."""
HERE_UP_TO = 128
"""More pictures than this are dealt to workers; starting Ray costs about 10 s, as long as drawing so many takes."""
REQUEST_SCHEMA = pa.schema(
    [
        ("index", pa.int64()),
        ("prompt", pa.string()),
        ("seed", pa.int64()),
        ("steps", pa.int64()),
        ("guidance_scale", pa.float64()),
        ("negative_prompt", pa.string()),
        ("width_px", pa.int64()),
        ("height_px", pa.int64()),
    ]
)


@dataclass(frozen=True)
class DrawJob:
    """What one worker needs: the diffusers directory, where pictures go, and the device."""

    model: Path
    folder: Path
    device: str


def ensure_drawn(
    placement: PlacementSection,
    workspace: Workspace,
    model: Path,
    fingerprint: str,
    requests: Sequence[PictureRequest],
) -> list[Image.Image]:
    """Return the picture of every request, drawing what is not kept yet."""
    wanted = [asdict(request) for request in requests]
    folder = workspace.reports / "measured" / f"drawn-{fingerprint_of([VERSION, fingerprint, wanted])}"
    paths = [folder / picture_name(index) for index in range(len(requests))]
    if read_record(folder) is None:
        stage.fetch_tree(folder)
        blocks = [block for block in _blocks(requests) if not all(_whole(paths[i]) for i in block["index"].to_pylist())]
        _draw_blocks(placement, blocks, model, folder)
        stage.fetch_tree(folder)
        write_record(folder, {"model": fingerprint, "pictures": len(requests), "requests": wanted})
    return [Image.open(path).convert("RGB") for path in paths]


def make_drawer(job: DrawJob) -> Callable[[pa.Table], pa.Table]:
    """Return the function that draws one block of requests into the job's folder and reports its row count."""
    parts = load_parts(job.model, device=job.device)

    def draw_block(block: pa.Table) -> pa.Table:
        rows = block.to_pylist()
        names = [picture_name(row.pop("index")) for row in rows]
        for name, picture in zip(names, draw(parts, [PictureRequest(**row) for row in rows]), strict=True):
            write_bytes_atomic(job.folder / name, to_png(picture))
        return pa.table({"rows": [len(rows)]})

    return draw_block


def fingerprint_of(facts: Any) -> str:
    """12 hex digits over anything JSON can hold."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


def picture_name(index: int) -> str:
    return f"{index:05d}.png"


def to_png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def _draw_blocks(placement: PlacementSection, blocks: list[pa.Table], model: Path, folder: Path) -> None:
    total = sum(block.num_rows for block in blocks)
    if not blocks:
        return
    progress, done = progress_of("drew", total), 0
    if total <= HERE_UP_TO and not placement.gpus_per_worker:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        say(f"  {total} pictures to draw: in this process (workers from {HERE_UP_TO + 1} on)")
        draw_block = make_drawer(DrawJob(model, folder, device))
        for block in blocks:
            done += draw_block(block)["rows"][0].as_py()
            progress(done)
        return
    say(f"  {total} pictures to draw: dealt to {min(placement.workers, len(blocks))} Ray workers")
    job = DrawJob(model.resolve(), folder, "cuda" if placement.gpus_per_worker else "cpu")
    pool = ActorPool(placement.workers, placement.cpus_per_worker, placement.gpus_per_worker)
    with local_session(placement):
        for report in map_blocks(blocks, make_drawer, job, pool, Carry.of(keep=[folder], whole=[job.model])):
            done += sum(report["rows"].to_pylist())
            progress(done)


def _blocks(requests: Sequence[PictureRequest]) -> list[pa.Table]:
    rows = [{"index": index, **asdict(request)} for index, request in enumerate(requests)]
    starts = range(0, len(rows), SAMPLE_BATCH)
    return [pa.Table.from_pylist(rows[start : start + SAMPLE_BATCH], schema=REQUEST_SCHEMA) for start in starts]


def _whole(path: Path) -> bool:
    """Whether a picture of an unfinished folder can be kept: it is there and its checksums agree."""
    try:
        with Image.open(path) as picture:
            picture.verify()
    except (OSError, SyntaxError):
        return False
    return True
