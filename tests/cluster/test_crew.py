"""A crew: the same processes take run after run, an error of all ranks costs no restart, a dead worker costs one."""

import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from cluster import workers
from cluster.crew import Crew, is_out_of_memory
from cluster.errors import StorageError, WorkerError
from cluster.placement import PlacementSection

pytestmark = pytest.mark.slow  # worker groups that live through several runs


class TogetherError(RuntimeError):
    """Raised by every rank at the same place."""

    exit_code = 1
    on_all_ranks = True


@dataclass(frozen=True)
class Job:
    """What the worker function of this file is told."""

    directory: Path
    action: str = ""


def work(job: Job) -> None:
    """Report twice, fail as told, and leave the processes' ids."""
    here = workers.context()
    pids = workers.gather(os.getpid())
    tries = len(list(job.directory.glob(f"try-{here.rank}-*")))
    (job.directory / f"try-{here.rank}-{tries}").touch()
    workers.report({"step": 0.0, "over": 0.0})
    assert workers.total(torch.ones(1)).item() == here.world_size
    if job.action == "together":
        raise TogetherError("expected a finite loss, found nan")
    if job.action == "memory" and here.rank == 1:
        raise MemoryError("no more")
    if job.action == "disk" and here.rank == 1:
        raise OSError(28, "No space left on device")
    if job.action == "killed once" and here.rank == 1 and tries == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    if job.action == "always killed" and here.rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    workers.report({"step": 1.0, "over": 1.0})
    if here.rank == 0:
        (job.directory / "pids.json").write_text(json.dumps(pids))


def test_crew_takes_run_after_run_whatever_becomes_of_them(ray_session: None, tmp_path: Path) -> None:
    placement = PlacementSection(workers=2, max_failures=1)

    def execute(name: str, action: str = "") -> list[int]:
        directory = tmp_path / name
        directory.mkdir()
        crew.execute(work, Job(directory, action), placement, directory)
        return list(json.loads((directory / "pids.json").read_text()))

    with Crew(placement, 1, tmp_path / "groups", max_restarts=20) as crew:
        first = execute("first")
        assert len(set(first)) == 2 and execute("second") == first
        with pytest.raises(TogetherError, match=r"^expected a finite loss, found nan$"):
            execute("together", "together")
        assert execute("third") == first, "no restart"
        after_death = execute("killed", "killed once")
        assert not set(after_death) & set(first)
        assert len(list((tmp_path / "killed").glob("try-0-*"))) == 2
        with pytest.raises(WorkerError, match="out of memory"):
            execute("memory", "memory")
        with pytest.raises(StorageError, match="could not write"):
            execute("disk", "disk")
        with pytest.raises(WorkerError, match="max_failures=1"):
            execute("always", "always killed")
        assert len(execute("last")) == 2


def test_out_of_memory_is_recognized_in_pythons_torchs_and_cudas_words() -> None:
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"))
    assert not is_out_of_memory(RuntimeError("connection closed by peer"))
