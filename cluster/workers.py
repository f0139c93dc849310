"""Run one function on a group of workers through Ray Train, restart the group when one dies, tell errors apart.

A worker that dies (killed, out of memory, lost node) restarts the whole group, which continues from its own newest
checkpoint. An error that would come again (bad input, a non-finite loss, a full disk) is written to `failure.json`
before it is raised, and a restarted group that finds it stops at once: the driver raises it as it was.

A group works for a feed: `run_group`'s holds one task; `cluster/crew.py` has one that goes on to the next.
"""

import errno
import gc
import importlib
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

from cluster import stage
from cluster.artifacts import disk_message, read_json, write_json_atomic
from cluster.carry import Carry
from cluster.errors import StorageError, WorkerError
from cluster.placement import PlacementSection


@dataclass(frozen=True)
class WorkerContext:
    """Who this worker is."""

    rank: int
    world_size: int
    device: torch.device


def context() -> WorkerContext:
    """Return this worker's place in the group; to be called inside a worker function."""
    from ray import train
    from ray.train.torch import get_device

    here = train.get_context()
    return WorkerContext(here.get_world_rank(), here.get_world_size(), get_device())


def report(metrics: dict[str, float]) -> bool:
    """Report metrics; return whether to go on (a search may end a run). All workers must call it equally often."""
    from ray import train

    train.report(metrics)
    return _feed.go_on(metrics) if _feed is not None else True


@dataclass(frozen=True)
class Task:
    """A module-level function by name, what it is told, and the folder of what it makes.

    A job that reads a workspace on S3 has `fetch_inputs()`: a worker may be on another machine than the driver.
    """

    function: str
    job: Any
    directory: Path

    @staticmethod
    def of(function: Callable[[Any], None], job: Any, directory: Path) -> "Task":
        return Task(f"{function.__module__}:{function.__qualname__}", job, directory)

    def run(self) -> None:
        if hasattr(self.job, "fetch_inputs"):
            self.job.fetch_inputs()
        module, _, name = self.function.partition(":")
        getattr(importlib.import_module(module), name)(self.job)


class Feed(Protocol):
    """Where a group gets its work; every worker holds a copy, and all call each method together."""

    def take(self) -> Task | None:
        """Return the next task, None when there will be no more."""

    def go_on(self, metrics: dict[str, float]) -> bool:
        """Whether the task under way goes on after this report."""

    def done(self) -> None:
        """The task has returned."""

    def failed(self, task: Task, error: Exception) -> bool:
        """Tell of an error; return whether the group can take other work without a restart."""


_feed: Feed | None = None  # of the group that this process works in


@dataclass
class OneTask:
    """The feed of a group that runs one task. Its named errors go to `failure.json`; any other restarts the group."""

    task: Task
    taken: bool = False

    @property
    def failure(self) -> Path:
        return self.task.directory / "failure.json"

    def take(self) -> Task | None:
        if self.taken or stage.fetch(self.failure):
            return None
        self.taken = True
        return self.task

    def go_on(self, metrics: dict[str, float]) -> bool:
        return True

    def done(self) -> None:
        return None

    def failed(self, task: Task, error: Exception) -> bool:
        if hasattr(type(error), "exit_code"):
            with suppress(StorageError):  # the storage may be what failed: Ray tells of it then
                write_json_atomic(self.failure, named(error))
        return False


def run_group(worker: Callable[[Any], None], job: Any, placement: PlacementSection, directory: Path) -> None:
    """Run `worker(job)` on `placement.workers` workers until it returns on all of them.

    `worker` is a module-level function, `job` can be pickled. Raises the worker's own error when it is one of Fresco's,
    WorkerError when the restarts are used up.
    """
    feed = OneTask(Task.of(worker, job, directory))
    stage.remove(feed.failure)
    error = fit(feed, placement, directory, placement.max_failures)
    failure = read_json(feed.failure)
    if failure is not None:
        raise rebuild(failure)
    if error is not None and is_disk_full(error):
        # So full that not even the reason could be written.
        raise StorageError(disk_message(directory, OSError(errno.ENOSPC, "no space left on device"))) from error
    if error is not None and f"{StorageError.__module__}.{StorageError.__qualname__}" in str(error):
        # So far away that the reason could not be written there: to be told from a worker that cannot do its work.
        raise StorageError(f"{directory}: {str(error).strip()[-2000:]}") from error
    if error is not None:
        raise WorkerError(
            f"the worker group failed more than placement.max_failures={placement.max_failures} times; the last error"
            f" was: {str(error).strip()[-2000:]}\nthe same command continues from the newest checkpoint"
        ) from error


def fit(feed: Feed, placement: PlacementSection, directory: Path, max_failures: int) -> Exception | None:
    """Start a group, restart it when it dies, until its feed ends; return the error that was one too many."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    quiet_ray_train()
    resources = {"CPU": placement.cpus_per_worker}
    if placement.gpus_per_worker:
        resources["GPU"] = placement.gpus_per_worker
    trainer = TorchTrainer(
        _serve,
        train_loop_config={"feed": feed, "carry": Carry.of(keep=[directory])},
        torch_config=TorchConfig(backend="nccl" if placement.gpus_per_worker else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=placement.workers,
            use_gpu=placement.gpus_per_worker > 0,
            resources_per_worker=resources,
        ),
        run_config=RunConfig(
            # A fresh name for each attempt: the checkpoints to continue from are our own.
            name=f"attempt-{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}-{threading.get_ident()}",
            storage_path=str(directory / "ray"),
            failure_config=FailureConfig(max_failures=max_failures),
        ),
    )
    try:
        return trainer.fit().error
    except Exception as raised:  # Ray's own wrapper types; told apart by the caller
        return raised


def _serve(config: dict[str, Any]) -> None:
    """What every worker of a group does: one task after the other."""
    global _feed
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    config["carry"].before()
    feed: Feed = config["feed"]
    _feed = feed
    while (task := feed.take()) is not None:
        error = _attempt(task)
        if error is None:
            feed.done()
        elif not feed.failed(task, error):
            raise error
        # What the task held must be gone before the next one makes the same again.
        error = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _attempt(task: Task) -> Exception | None:
    try:
        task.run()
    except Exception as error:  # whatever a run raises is its own: the group goes on with the next
        if is_disk_full(error):
            return StorageError(disk_message(task.directory, OSError(errno.ENOSPC, "no space left on device")))
        return error
    return None


def named(error: Exception) -> dict[str, str]:
    """Turn an error into what another process can rebuild it from."""
    return {"module": type(error).__module__, "name": type(error).__name__, "message": str(error)}


def rebuild(failure: dict[str, Any]) -> Exception:
    """Return the error that `named` described."""
    kind = getattr(importlib.import_module(failure["module"]), failure["name"])
    error: Exception = kind(failure["message"])
    return error


def is_disk_full(error: BaseException) -> bool:
    """Whether an error of any library says that the disk is full."""
    text = str(error).lower()
    return "no space left" in text or "disk is full" in text


def quiet_ray_train() -> None:
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    logging.getLogger("ray.tune").setLevel(logging.ERROR)


def gather(value: Any) -> list[Any]:
    """Return every worker's `value`, by rank; works without a process group. Collective."""
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def total(values: torch.Tensor) -> torch.Tensor:
    """Return the sum of a tensor over all workers. Collective."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values


def host_memory_bytes() -> int:
    """Memory of this machine, or of the GPU this worker holds."""
    if torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def peak_memory_bytes() -> int:
    """Largest memory this worker has held: on the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    import resource

    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(kilobytes) * (1 if sys.platform == "darwin" else 1024)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the whole JSON lines of a file that may still be growing."""
    if not path.exists():
        return []
    text = path.read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
