"""The worker group: errors keep their names across processes, a dead worker restarts all, progress lines stay whole."""

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from cluster import workers
from cluster.artifacts import read_json, write_json_atomic
from cluster.errors import StorageError, WorkerError
from cluster.placement import PlacementSection
from cluster.workers import read_lines


@dataclass(frozen=True)
class Job:
    """What the worker functions of this file are told."""

    directory: Path
    action: str


def work(job: Job) -> None:
    """Count the attempts of this rank, meet the others, then do what the job says."""
    here = workers.context()
    marks = len(list(job.directory.glob(f"attempt-{here.rank}-*")))
    (job.directory / f"attempt-{here.rank}-{marks}").write_text(str(os.getpid()))
    summed = workers.total(torch.tensor([float(here.rank + 1)]))
    gathered = workers.gather({"rank": here.rank})
    if job.action == "storage error" and here.rank == 1:
        raise StorageError("could not write x: no space; free some")
    if job.action == "always fails":
        raise KeyError("not one of ours")
    if job.action == "killed once" and here.rank == 1 and marks == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    workers.report({"step": 1.0})
    if here.rank == 0:
        write_json_atomic(job.directory / "result.json", {"sum": summed.item(), "gathered": gathered})


Run = Callable[[str, int], None]


@pytest.fixture
def run(ray_session: None, tmp_path: Path) -> Run:
    def start(action: str, max_failures: int) -> None:
        placement = PlacementSection(workers=2, max_failures=max_failures)
        workers.run_group(work, Job(tmp_path, action), placement, tmp_path)

    return start


def attempts(directory: Path, rank: int) -> int:
    return len(list(directory.glob(f"attempt-{rank}-*")))


def test_group_survives_a_killed_worker_and_adds_up_over_its_ranks(run: Run, tmp_path: Path) -> None:
    run("killed once", 2)
    assert read_json(tmp_path / "result.json") == {"sum": 3.0, "gathered": [{"rank": 0}, {"rank": 1}]}
    assert attempts(tmp_path, 0) == attempts(tmp_path, 1) == 2


@pytest.mark.slow
def test_named_error_of_one_worker_is_raised_as_it_was_and_not_tried_again(run: Run, tmp_path: Path) -> None:
    (tmp_path / "failure.json").write_text('{"module": "stale", "name": "x", "message": "of an earlier command"}')
    with pytest.raises(StorageError, match=r"^could not write x: no space; free some$"):
        run("storage error", 2)
    assert attempts(tmp_path, 1) == 1


@pytest.mark.slow
def test_other_errors_end_in_a_worker_error_with_the_last_one(run: Run, tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match=r"(?s)max_failures=0 times.*not one of ours.*continues from the newest"):
        run("always fails", 0)


def test_gather_and_total_work_without_a_group() -> None:
    assert workers.gather([1, 2]) == [[1, 2]]
    assert workers.total(torch.tensor([2.0])).item() == 2.0


def test_memory_is_measured_in_bytes() -> None:
    assert 2**28 < workers.host_memory_bytes() < 2**44
    assert 2**20 < workers.peak_memory_bytes() < workers.host_memory_bytes()


def test_read_lines_leaves_a_growing_last_line_for_later(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_lines(path) == []
    path.write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert [line["step"] for line in read_lines(path)] == [1, 2]


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(28, "No space left on device"), True),
        (RuntimeError("(sqlite3.OperationalError) database or disk is full"), True),
        (RuntimeError("Connection refused"), False),
    ],
)
def test_full_disk_is_recognized_in_any_librarys_words(error: Exception, full: bool) -> None:
    assert workers.is_disk_full(error) is full
