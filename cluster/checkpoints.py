"""Resumable checkpoints: sharded by parameter, written while training goes on, readable by any worker count and stage.

    checkpoints/step-00000100/rank-0-of-2.safetensors    tensors named `<parameter>|<kind>`, fp32
                              rank-1-of-2.safetensors
                              state-0.json               loop state (step, best loss, ...), one for each rank

Every rank writes its share by rename. A checkpoint is complete when all its shards and states are there: that is found
by looking, so no marker can lie and a crash at any point leaves the one before it. Kinds are master, ema and the
optimizer's state names. Tensors pass through a rank one parameter at a time.
"""

import json
import re
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from cluster import stage
from cluster.artifacts import write_bytes_atomic

_STEP = re.compile(r"step-(\d{8})$")
_SHARD = re.compile(r"rank-(\d+)-of-(\d+)\.safetensors$")


class CheckpointWriter:
    """Writes this rank's shards in a thread of its own; at most one checkpoint is in flight."""

    def __init__(self, directory: Path, rank: int, world_size: int, keep: int) -> None:
        self.directory = directory
        self.rank, self.world_size, self.keep = rank, world_size, keep
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(self, step: int, tensors: Iterator[tuple[str, Tensor]], state: dict[str, Any]) -> None:
        """Copy this rank's share of `tensors` (all ranks iterate all of them) and write it behind the loop's back.

        Raises what the previous write raised (StorageError when the disk is full).
        """
        self.wait()
        share: dict[str, Tensor] = {}
        parameter_at: dict[str, int] = {}
        for key, value in tensors:
            place = parameter_at.setdefault(key.partition("|")[0], len(parameter_at))
            if place % self.world_size == self.rank:
                share[key] = value.detach().cpu().clone()
        # As text now: the loop goes on changing what it gave us, and may be steps ahead when it is written.
        self._pending = self._pool.submit(self._write, step, share, json.dumps(state).encode())

    def wait(self) -> None:
        """Block until the write in flight is on disk; re-raise its error."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def close(self) -> None:
        self.wait()
        self._pool.shutdown()

    def _write(self, step: int, share: dict[str, Tensor], state: bytes) -> None:
        folder = self.directory / f"step-{step:08d}"
        log = self.directory.with_name("metrics.jsonl")
        if self.rank == 0 and log.exists():
            stage.keep(log)  # whoever continues from here on another machine has the lines before it
        write_bytes_atomic(folder / f"rank-{self.rank}-of-{self.world_size}.safetensors", save(share))
        write_bytes_atomic(folder / f"state-{self.rank}.json", state)
        if self.rank == 0:
            self._prune()

    def _prune(self) -> None:
        """Remove all but the newest `keep` complete checkpoints, and unfinished ones older than those."""
        folders = _folders(self.directory)
        complete = [path for path in folders if _is_complete(folders[path])]
        if len(complete) >= self.keep:
            oldest_kept = complete[-self.keep]
            for path in folders:
                if path.name < oldest_kept.name:
                    stage.remove_tree(path)


def newest_complete(directory: Path) -> Path | None:
    """Return the newest checkpoint whose every shard is there; of a workspace on S3, what is there, fetched."""
    complete = [path for path, names in _folders(directory).items() if _is_complete(names)]
    if complete:
        stage.fetch_tree(complete[-1])
    return complete[-1] if complete else None


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Return the loop state of a complete checkpoint."""
    state: dict[str, Any] = json.loads((checkpoint / "state-0.json").read_text())
    return state


class CheckpointReader:
    """Reads tensors by key from all shards of one checkpoint, one at a time."""

    def __init__(self, checkpoint: Path) -> None:
        self._files = [safe_open(path, framework="pt") for path in sorted(checkpoint.glob("rank-*.safetensors"))]
        self._file_of = {key: file for file in self._files for key in file.keys()}  # noqa: SIM118 (not a dict)

    def get(self, key: str) -> Tensor:
        tensor: Tensor = self._file_of[key].get_tensor(key)
        return tensor

    def __contains__(self, key: str) -> bool:
        return key in self._file_of


def tensors_of(
    names: list[str], kinds: tuple[str, ...], get: Callable[[str, str], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Yield (`name|kind`, tensor) for every parameter and kind."""
    for name in names:
        for kind in kinds:
            yield f"{name}|{kind}", get(name, kind)


def _folders(directory: Path) -> dict[Path, set[str]]:
    """Return the names of the files of every checkpoint, oldest first."""
    found: dict[Path, set[str]] = {}
    for path in stage.paths(directory):
        if _STEP.search(path.parent.name) and path.parent.parent == directory:
            found.setdefault(path.parent, set()).add(path.name)
    return dict(sorted(found.items()))


def _is_complete(names: set[str]) -> bool:
    worlds = {int(match.group(2)) for name in names if (match := _SHARD.search(name))}
    return any(
        all({f"rank-{rank}-of-{world}.safetensors", f"state-{rank}.json"} <= names for rank in range(world))
        for world in worlds
    )
