"""Run one function on a group of workers through Ray Train, restart the group when one dies, tell errors apart.

A worker that dies (killed, out of memory, lost node) restarts the whole group, which continues from its own newest
checkpoint. An error that would come again (bad input, a non-finite loss, a full disk) is written to `failure.json`
before it is raised, and a restarted group that finds it stops at once: the driver raises it as it was.
"""

import errno
import importlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from cluster.artifacts import disk_message, read_json, write_json_atomic
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


def report(metrics: dict[str, float]) -> None:
    """Report metrics to Ray Train; a barrier: every worker must call it equally often."""
    from ray import train

    train.report(metrics)


def run_group(worker: Callable[[Any], None], job: Any, placement: PlacementSection, directory: Path) -> None:
    """Run `worker(job)` on `placement.workers` workers until it returns on all of them.

    `worker` is a module-level function, `job` can be pickled. Raises the worker's own error when it is one of Fresco's,
    WorkerError when the restarts are used up.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    _quiet_ray_train()
    failure = directory / "failure.json"
    failure.unlink(missing_ok=True)
    resources = {"CPU": placement.cpus_per_worker}
    if placement.gpus_per_worker:
        resources["GPU"] = placement.gpus_per_worker
    trainer = TorchTrainer(
        _guarded,
        train_loop_config={
            "worker": f"{worker.__module__}:{worker.__qualname__}",
            "job": job,
            "failure": str(failure),
        },
        torch_config=TorchConfig(backend="nccl" if placement.gpus_per_worker else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=placement.workers,
            use_gpu=placement.gpus_per_worker > 0,
            resources_per_worker=resources,
        ),
        run_config=RunConfig(
            # A fresh name for each attempt: the checkpoints to continue from are our own.
            name=f"attempt-{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}",
            storage_path=str(directory / "ray"),
            failure_config=FailureConfig(max_failures=placement.max_failures),
        ),
    )
    error: Exception | None = None
    try:
        error = trainer.fit().error
    except Exception as raised:  # Ray's own wrapper types; told apart below
        error = raised
    named = read_json(failure)
    if named is not None:
        raise _rebuild(named)
    if error is not None and is_disk_full(error):
        # So full that not even the reason could be written.
        raise StorageError(disk_message(directory, OSError(errno.ENOSPC, "no space left on device"))) from error
    if error is not None:
        raise WorkerError(
            f"the worker group failed more than placement.max_failures={placement.max_failures} times; the last error"
            f" was: {str(error).strip()[-2000:]}\nthe same command continues from the newest checkpoint"
        ) from error


def _guarded(config: dict[str, Any]) -> None:
    failure = Path(config["failure"])
    if failure.exists():
        return
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    module, _, name = config["worker"].partition(":")
    worker = getattr(importlib.import_module(module), name)
    try:
        worker(config["job"])
    except Exception as error:
        if is_disk_full(error):
            error = StorageError(disk_message(failure.parent, OSError(errno.ENOSPC, "no space left on device")))
        if hasattr(type(error), "exit_code"):
            write_json_atomic(
                failure,
                {"module": type(error).__module__, "name": type(error).__name__, "message": str(error)},
            )
        raise error


def is_disk_full(error: BaseException) -> bool:
    """Whether an error of any library says that the disk is full."""
    text = str(error).lower()
    return "no space left" in text or "disk is full" in text


def _rebuild(named: dict[str, str]) -> Exception:
    kind = getattr(importlib.import_module(named["module"]), named["name"])
    error: Exception = kind(named["message"])
    return error


def _quiet_ray_train() -> None:
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
