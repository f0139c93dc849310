"""What was served, kept for the monitor: features of prompts and pictures, never slowing the request they come from.

A request is offered to a bounded queue and forgotten: when the queue is full it is dropped and counted. One background
thread encodes and writes Parquet shards, each whole or absent; the oldest go when the folder exceeds its bound. Prompts
are kept as text only when the config allows it, else as features alone. Which requests are kept is drawn by lot here:
by what a client chooses, it could choose what the monitor sees. Shape letters: N items, D feature width.
"""

import io
import logging
import os
import queue
import random
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from cluster import stage
from cluster.artifacts import write_bytes_atomic
from cluster.placement import ServeSection

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image

LOG = logging.getLogger(__name__)
LOT = random.SystemRandom().random
MOST_WAITING_BYTES = 64 * 2**20
"""Of pictures that wait or are being encoded, whatever their size; a single larger request is taken when none waits."""
SHARD_ROWS = 512
FLUSH_S = 60.0
LOWEST_PRIORITY = 19
SUFFIX = ".parquet"
SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("request_id", "model_version", "encoder", "prompt")),
        ("image_index", pa.int32()),
        *((name, pa.float64()) for name in ("time_s", "latency_s")),
        *((name, pa.list_(pa.float32())) for name in ("prompt_features", "image_features")),
    ]
)
"""One row a picture; `prompt` is null unless the config allows text; `time_s` counts from 1970."""


class Encoder(Protocol):
    """Pictures and texts as rows of unit length; `identity` changes when they stop being comparable."""

    identity: str

    def images(self, pictures: "list[Image]") -> "NDArray[np.float32]": ...

    def texts(self, texts: list[str]) -> "NDArray[np.float32]": ...


@dataclass(frozen=True)
class Served:
    """One answered request."""

    request_id: str
    model_version: str
    prompt: str
    pictures: "Sequence[Image]"
    latency_s: float
    time_s: float


class Capture:
    """Takes what was served from any thread; `close` writes what is still waiting."""

    def __init__(
        self,
        folder: Path,
        encoder: Encoder,
        share: float,
        keep_prompts: bool,
        max_bytes: int,
        flush_s: float = FLUSH_S,
        chance: Callable[[], float] = LOT,
    ) -> None:
        """`chance` draws from [0, 1): below `share`, a request is kept."""
        self.folder, self.share, self.keep_prompts, self.max_bytes = folder, share, keep_prompts, max_bytes
        self.counts = {"offered": 0, "dropped": 0, "written": 0, "failed": 0}
        """Requests that were in the share, found no room, are in shards, could not be encoded or written."""
        self._encoder, self._flush_s, self._chance = encoder, flush_s, chance
        self._queue: queue.SimpleQueue[Served | None] = queue.SimpleQueue()
        self._waiting_bytes = 0
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._work, name="capture", daemon=True)
        self._thread.start()

    def offer(self, served: Served) -> bool:
        """Keep a request if it is in the share and there is room; returns at once, True when it is kept."""
        if self._chance() >= self.share:
            return False
        size = bytes_of(served)
        with self._lock:
            self.counts["offered"] += 1
            if self._waiting_bytes and self._waiting_bytes + size > MOST_WAITING_BYTES:
                self.counts["dropped"] += 1
                return False
            self._waiting_bytes += size
        self._queue.put(served)
        return True

    def close(self, limit_s: float = 30.0) -> None:
        """Write what waits and end the thread; nothing may be offered afterwards."""
        self._queue.put(None)
        self._thread.join(limit_s)

    def _work(self) -> None:
        if hasattr(os, "setpriority"):
            # On Linux a thread has a priority of its own: drawing comes first.
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOWEST_PRIORITY)
        rows: list[dict[str, Any]] = []
        flush_at = time.monotonic() + self._flush_s
        ended = False
        while not ended:
            waiting, ended = self._take(max(0.0, flush_at - time.monotonic()))
            rows += self._encode(waiting)
            with self._lock:
                self._waiting_bytes -= sum(bytes_of(served) for served in waiting)
            if rows and (ended or len(rows) >= SHARD_ROWS or time.monotonic() >= flush_at):
                self._write(rows)
                rows = []
            if time.monotonic() >= flush_at:
                flush_at = time.monotonic() + self._flush_s

    def _take(self, limit_s: float) -> tuple[list[Served], bool]:
        """Wait for a request and take what else is there: one batch is cheaper to encode than many."""
        waiting: list[Served] = []
        try:
            taken = self._queue.get(timeout=limit_s)
            while taken is not None:
                waiting.append(taken)
                taken = self._queue.get_nowait()
        except queue.Empty:
            return waiting, False
        return waiting, True

    def _encode(self, waiting: list[Served]) -> list[dict[str, Any]]:
        if not waiting:
            return []
        try:
            prompts_ND = self._encoder.texts([served.prompt for served in waiting])
            images_ND = self._encoder.images([picture for served in waiting for picture in served.pictures])
        except Exception as error:  # an encoder is foreign code, and capture must go on with the next batch
            # The message may hold a prompt; its kind says enough.
            self._failed(len(waiting), f"could not be encoded: {type(error).__name__}")
            return []
        features = iter(images_ND)
        return [
            {
                "request_id": served.request_id,
                "model_version": served.model_version,
                "encoder": self._encoder.identity,
                "prompt": served.prompt if self.keep_prompts else None,
                "image_index": index,
                "time_s": served.time_s,
                "latency_s": served.latency_s,
                "prompt_features": prompt_D,
                "image_features": next(features),
            }
            for served, prompt_D in zip(waiting, prompts_ND, strict=True)
            for index in range(len(served.pictures))
        ]

    def _write(self, rows: list[dict[str, Any]]) -> None:
        requests = sum(row["image_index"] == 0 for row in rows)
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), buffer, compression="zstd")
        # Names sort by time, and two replicas never choose the same.
        seconds, nanoseconds = divmod(time.time_ns(), 10**9)
        stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime(seconds))
        name = f"{stamp}-{nanoseconds:09d}-{secrets.token_hex(4)}{SUFFIX}"
        try:
            write_bytes_atomic(self.folder / name, buffer.getvalue())
            remove_oldest(self.folder, self.max_bytes)
        except (OSError, RuntimeError) as error:
            self._failed(requests, f"could not be written: {error}")
            return
        self.counts["written"] += requests

    def _failed(self, requests: int, how: str) -> None:
        self.counts["failed"] += requests
        LOG.warning("%d captured requests %s", requests, how)


def open_capture(limits: ServeSection, folder: Path, encoder: Encoder) -> Capture | None:
    """Return the capture that the config asks for, None when it asks for none."""
    if limits.capture_share == 0:
        return None
    return Capture(folder, encoder, limits.capture_share, limits.capture_prompts, limits.capture_max_bytes)


def bytes_of(served: Served) -> int:
    """Return the memory of a request's pictures, RGB of 8 bits, and a little for the rest."""
    return 1024 + sum(3 * picture.width * picture.height for picture in served.pictures)


def remove_oldest(folder: Path, max_bytes: int) -> None:
    """Remove shards, oldest first, until the folder holds at most `max_bytes` of them; the newest always stays."""
    sizes = {path: size for path, size in stage.files(folder, SUFFIX).items() if path.name[:1].isdigit()}
    total = sum(sizes.values())
    for shard in list(sizes)[:-1]:
        if total <= max_bytes:
            return
        stage.remove(shard)
        total -= sizes[shard]


def read_captured(folder: Path, since_s: float = 0.0) -> pa.Table:
    """Return the rows served from `since_s` (seconds from 1970) on, oldest shard first; shards may vanish meanwhile."""
    tables = list(iter_captured(folder, since_s, SCHEMA.names))
    return pa.concat_tables(tables) if tables else SCHEMA.empty_table()


def iter_captured(folder: Path, since_s: float, columns: Sequence[str]) -> Iterator[pa.Table]:
    """Yield the same rows shard by shard, of them `columns` alone: all shards together may be large."""
    stage.fetch_tree(folder)
    for shard in stage.files(folder, SUFFIX):
        if not shard.name[:1].isdigit():
            continue
        try:
            yield pq.read_table(shard, schema=SCHEMA, columns=list(columns), filters=[("time_s", ">=", since_s)])
        except FileNotFoundError:
            continue
