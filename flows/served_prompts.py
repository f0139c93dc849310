"""Which prompts did people send since the champion serves? A uniform sample of the captured ones, as rows.

Rows of another encoder than the reference's are never compared: where the text was kept it is encoded anew, else the
prompt is left out and counted. Shards are read one by one, so memory is bounded by the sample.
"""

import hashlib
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.artifacts import Workspace
from cluster.capture import iter_captured
from components.drift_features import read_texts_seen
from components.drift_streams import Texts
from components.reservoir import Reservoir, add, key_of, priorities
from flows.config import Config
from flows.features import Eye, ensure_features

COLUMNS = ("request_id", "encoder", "prompt", "image_index", "time_s", "prompt_features")


@dataclass(frozen=True)
class Served:
    """The sample; `refused` counts captured prompts, by encoder, whose rows could not be used."""

    texts: Texts | None
    refused: dict[str, int]
    keys: tuple[int, ...] = ()


def take_prompts(config: Config, workspace: Workspace, eye: Eye, seed: int, since_s: float) -> Served:
    """Sample what was captured from `since_s` (Unix seconds) on, at most `monitor.window` prompts."""
    seen = told = Reservoir(config.monitor.window, seed)
    refused: Counter[str] = Counter()
    for table in iter_captured(workspace.captured, since_s, COLUMNS):
        table = table.filter(pc.equal(table["image_index"], 0))  # there is a row for each picture of a request
        ours = pc.equal(table["encoder"], eye.identity)
        seen = _added(seen, table.filter(ours), with_rows=True)
        others = table.filter(pc.invert(ours))
        told = _added(told, others.filter(pc.is_valid(others["prompt"])), with_rows=False)
        refused.update(others.filter(pc.is_null(others["prompt"]))["encoder"].to_pylist())
    return _joined(config, workspace, eye, seen, told, dict(refused))


def _added(reservoir: Reservoir, table: pa.Table, with_rows: bool) -> Reservoir:
    if not table.num_rows:
        return reservoir
    # The time is ours: by the request's name alone, which a client may choose, it could choose what is sampled.
    names = zip(table["request_id"].to_pylist(), table["time_s"].to_pylist(), strict=True)
    keys = [key_of(hashlib.sha256(f"{request} {time_s!r}".encode()).hexdigest()) for request, time_s in names]
    columns: dict[str, Any] = {"text": np.array([text or "" for text in table["prompt"].to_pylist()], object)}
    if with_rows:
        columns["row"] = np.stack([np.asarray(row, np.float32) for row in table["prompt_features"].to_pylist()])
    return add(reservoir, keys, columns)


def _joined(
    config: Config, workspace: Workspace, eye: Eye, seen: Reservoir, told: Reservoir, refused: dict[str, int]
) -> Served:
    """Sample both together; what only has its text is encoded, once for all looks."""
    keys = np.concatenate([seen.keys, told.keys])
    if not len(keys):
        return Served(None, refused)
    order = np.argsort(priorities(keys, seen.seed))[: seen.size]
    texts = [str(text) for part in (seen, told) if len(part.keys) for text in part.columns["text"]]
    rows = [*(seen.columns["row"] if len(seen.keys) else ()), *([None] * len(told.keys))]
    unread = sorted({texts[place] for place in order if rows[place] is None})
    if unread:
        job = ensure_features(config, workspace, eye, (), unread)
        row_of = dict(zip(unread, read_texts_seen(job.texts, unread), strict=True))
        rows = [row_of.get(texts[place]) if row is None else row for place, row in enumerate(rows)]
    chosen = [texts[place] for place in order]
    if not all(chosen):  # words of some alone would look like drift of the words
        chosen = [""] * len(chosen)
    sample = Texts(tuple(chosen), np.stack([np.asarray(rows[place], np.float32) for place in order]))
    return Served(sample, refused, tuple(int(keys[place]) for place in order))
