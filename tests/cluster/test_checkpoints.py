"""Checkpoints: whole or not there, readable by any worker count, and never worse off after a crash."""

import json
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cluster import checkpoints
from cluster.artifacts import write_bytes_atomic
from cluster.checkpoints import CheckpointReader, CheckpointWriter, newest_complete, read_state, tensors_of
from cluster.errors import StorageError

ROOT = Path(__file__).parents[2]
NAMES = ["denoiser.a", "denoiser.b", "text_encoder.c"]
KINDS = ("master", "exp_avg")


def value(name: str, kind: str, step: int) -> Tensor:
    return torch.full((2, 3), float(step * 100 + NAMES.index(name) * 10 + KINDS.index(kind)))


def all_tensors(step: int) -> Iterator[tuple[str, Tensor]]:
    return tensors_of(NAMES, KINDS, lambda name, kind: value(name, kind, step))


def write(directory: Path, step: int, world: int = 2, ranks: list[int] | None = None, keep: int = 2) -> None:
    """Write one checkpoint as `world` ranks do, rank 0 last as the slowest of them (only `ranks`, when given)."""
    for rank in reversed(ranks if ranks is not None else list(range(world))):
        writer = CheckpointWriter(directory, rank, world, keep)
        writer.save(step, all_tensors(step), {"step": step, "best": 0.5})
        writer.close()


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_checkpoint_of_any_number_of_workers_is_read_back_whole(tmp_path: Path, world: int) -> None:
    write(tmp_path, 7, world)
    newest = newest_complete(tmp_path)
    assert newest is not None and newest.name == "step-00000007"
    assert read_state(newest) == {"step": 7, "best": 0.5}
    reader = CheckpointReader(newest)
    for name in NAMES:
        for kind in KINDS:
            assert torch.equal(reader.get(f"{name}|{kind}"), value(name, kind, 7))
    assert "denoiser.a|master" in reader and "denoiser.a|ema" not in reader


def test_state_is_what_it_was_when_the_tensors_were_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop_went_on = threading.Event()

    def write_late(path: Path, content: bytes) -> None:
        assert loop_went_on.wait(30)
        write_bytes_atomic(path, content)

    monkeypatch.setattr(checkpoints, "write_bytes_atomic", write_late)
    writer = CheckpointWriter(tmp_path, 0, 1, keep=1)
    state = {"step": 4}
    writer.save(4, all_tensors(4), state)
    state["step"] = 6
    loop_went_on.set()
    writer.close()
    newest = newest_complete(tmp_path)
    assert newest is not None and read_state(newest) == {"step": 4}


def test_ranks_share_the_parameters_and_keep_all_kinds_of_one_together(tmp_path: Path) -> None:
    write(tmp_path, 1, world=2)
    from safetensors import safe_open

    shares = []
    for rank in range(2):
        with safe_open(tmp_path / "step-00000001" / f"rank-{rank}-of-2.safetensors", framework="pt") as file:
            shares.append(set(file.keys()))
    assert shares[0] == {f"{name}|{kind}" for name in (NAMES[0], NAMES[2]) for kind in KINDS}
    assert shares[1] == {f"{NAMES[1]}|{kind}" for kind in KINDS}


def test_checkpoint_is_a_copy_of_the_moment_it_was_asked_for(tmp_path: Path) -> None:
    weight = torch.zeros(1000)
    writer = CheckpointWriter(tmp_path, 0, 1, keep=2)
    writer.save(1, iter([("w|master", weight)]), {})
    weight.fill_(9.0)
    writer.close()
    assert CheckpointReader(tmp_path / "step-00000001").get("w|master").abs().sum() == 0


@pytest.mark.parametrize(
    "missing", ["rank-0-of-2.safetensors", "rank-1-of-2.safetensors", "state-0.json", "state-1.json"]
)
def test_checkpoint_without_one_of_its_files_is_not_complete(tmp_path: Path, missing: str) -> None:
    write(tmp_path, 1)
    write(tmp_path, 2)
    (tmp_path / "step-00000002" / missing).unlink()
    newest = newest_complete(tmp_path)
    assert newest is not None and newest.name == "step-00000001"


def test_no_checkpoint_is_none_and_strange_folders_are_ignored(tmp_path: Path) -> None:
    assert newest_complete(tmp_path / "nowhere") is None
    (tmp_path / "step-oops").mkdir()
    (tmp_path / "step-00000009").mkdir()
    (tmp_path / "step-00000009" / ".rank-0-of-1.safetensors.tmp").write_text("half")
    assert newest_complete(tmp_path) is None


def test_folder_of_two_attempts_with_other_worker_counts_is_complete_by_one_of_them(tmp_path: Path) -> None:
    write(tmp_path, 4, world=2, ranks=[1])
    assert newest_complete(tmp_path) is None
    write(tmp_path, 4, world=1)
    newest = newest_complete(tmp_path)
    assert newest is not None
    reader = CheckpointReader(newest)
    assert torch.equal(reader.get("denoiser.b|master"), value("denoiser.b", "master", 4))


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_pruning_keeps_the_newest_complete_ones(tmp_path: Path, keep: int) -> None:
    for step in range(1, 6):
        write(tmp_path, step, keep=keep)
    kept = sorted(path.name for path in tmp_path.iterdir())
    assert kept == [f"step-{step:08d}" for step in range(6 - keep, 6)]


def test_pruning_counts_complete_ones_only_and_removes_older_unfinished_ones(tmp_path: Path) -> None:
    write(tmp_path, 1)
    write(tmp_path, 2, ranks=[1])  # its group died
    write(tmp_path, 3)
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000001", "step-00000002", "step-00000003"}
    write(tmp_path, 4)
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000003", "step-00000004"}


def test_pruning_leaves_a_newer_unfinished_one_alone(tmp_path: Path) -> None:
    write(tmp_path, 1, world=1, keep=1)
    write(tmp_path, 9, world=2, ranks=[1], keep=1)
    write(tmp_path, 2, world=1, keep=1)
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000002", "step-00000009"}


def test_error_of_a_write_is_raised_at_the_next_save(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    writer = CheckpointWriter(tmp_path / "checkpoints", 0, 1, keep=1)
    writer.save(1, all_tensors(1), {})
    with pytest.raises(StorageError, match="could not write"):
        writer.save(2, all_tensors(2), {})
    writer.close()


def _limit_file_size() -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))


WRITE_LARGE = """
import sys
import threading
from pathlib import Path
import torch
from cluster import checkpoints
from cluster.artifacts import write_bytes_atomic
from cluster.checkpoints import CheckpointWriter
from cluster.errors import StorageError
writer = CheckpointWriter(Path(sys.argv[1]), 0, 1, keep=1)
writer.save(2, iter([("w|master", torch.zeros(100_000))]), {"step": 2})
try:
    writer.close()
except StorageError as error:
    print(error)
"""


def test_full_disk_while_writing_is_a_named_error_and_leaves_the_one_before(tmp_path: Path) -> None:
    write(tmp_path, 1, world=1)
    done = subprocess.run(
        [sys.executable, "-c", WRITE_LARGE, str(tmp_path)],
        cwd=ROOT,
        preexec_fn=_limit_file_size,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "could not write" in done.stdout and "step-00000002" in done.stdout
    newest = newest_complete(tmp_path)
    assert newest is not None and newest.name == "step-00000001"
    assert list((tmp_path / "step-00000002").iterdir()) == []


WRITE_AND_DIE = """
import os, signal, sys
from pathlib import Path
import torch
from cluster import artifacts, checkpoints
kill_at = int(sys.argv[2])
calls = 0
replace = os.replace
def counted(source, target):
    # The rename is where a file becomes visible: die just before the chosen one.
    global calls
    if calls == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)
    calls += 1
    replace(source, target)
os.replace = counted
writer = checkpoints.CheckpointWriter(Path(sys.argv[1]), 0, 1, keep=1)
writer.save(2, iter([("w|master", torch.ones(10))]), {"step": 2})
writer.close()
"""


@pytest.mark.parametrize("kill_at", [0, 1])
def test_kill_while_writing_leaves_the_one_before(tmp_path: Path, kill_at: int) -> None:
    write(tmp_path, 1, world=1)
    done = subprocess.run(
        [sys.executable, "-c", WRITE_AND_DIE, str(tmp_path), str(kill_at)], cwd=ROOT, timeout=120, env=dict(os.environ)
    )
    assert done.returncode == -signal.SIGKILL
    newest = newest_complete(tmp_path)
    assert newest is not None and newest.name == "step-00000001"
    # The same steps again, as the resumed run writes them.
    write(tmp_path, 2, world=1, keep=1)
    newest = newest_complete(tmp_path)
    assert newest is not None and newest.name == "step-00000002"
    assert json.loads((newest / "state-0.json").read_text())["step"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]
