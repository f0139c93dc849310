"""How much memory may this process still take? The machine's and its control group's, or the GPU's.

A container sees the machine's memory and is ended at its own limit, so the smaller of the two counts. Pages of files
that the kernel would give back are free. Read from Linux's files (control groups of version 2 and 1); elsewhere the
machine's memory alone.

What looks and then takes must not do so at the same time as its neighbours on this machine: `memory_turn`.
"""

import fcntl
import gc
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

LOG = logging.getLogger(__name__)
TURN_POLL_S = 0.05

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUP = Path("/proc/self/cgroup")
VERSIONS = (
    ("memory.max", "memory.current", "inactive_file", ""),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file", "memory"),
)
"""Files with limit and usage, the line of memory.stat that can be given back, the folder under the root: v2, v1."""


class NoTurnError(TimeoutError):
    """Others loaded for so long that it says nothing about what was to be loaded."""


def free_bytes(device: str) -> int:
    """Return what can still be taken on `cpu`, or on the current GPU for `cuda`, torch's own reserve included."""
    if device == "cpu":
        return free_host_bytes()
    import torch

    free, _ = torch.cuda.mem_get_info()
    return int(free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated())


@contextmanager
def memory_turn(folder: Path | None, device: str, limit_s: float, alone: bool = True) -> Iterator[None]:
    """Wait for a turn to look at a device's free memory and take of it.

    All that name the same folder take turns on one machine, or on one GPU; whoever ends or dies gives up its own. Who
    is not `alone` shares a turn with its like, and goes on without one after `limit_s`; NoTurnError for who is.
    Without a folder, or where it cannot be written, nobody waits.
    """
    with _opened(folder, device) as file:
        deadline = time.monotonic() + limit_s
        while file is not None:
            try:
                fcntl.flock(file, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() >= deadline and not alone:
                    break
                if time.monotonic() >= deadline:
                    message = f"another replica loads a model on this machine, for longer than {limit_s:.0f} s"
                    raise NoTurnError(f"{message}; this one is tried again") from error
                time.sleep(TURN_POLL_S)
            except OSError as error:  # a file system without locks
                LOG.warning("replicas of this machine load without taking turns: %s: %s", folder, error)
                break
        yield


@contextmanager
def _opened(folder: Path | None, device: str) -> Iterator[int | None]:
    if folder is None:
        yield None
        return
    gpu = "" if device == "cpu" else "-" + os.environ.get("CUDA_VISIBLE_DEVICES", "").replace(",", "-")
    path = folder / f"memory-{socket.gethostname()}-{device}{gpu}.lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        LOG.warning("replicas of this machine load without waiting for each other: %s: %s", path, error)
        yield None
        return
    try:
        yield file
    finally:
        os.close(file)


def collect_memory(device: str) -> None:
    """Give memory of dropped weights back, also to the GPU."""
    gc.collect()
    if device != "cpu":
        import torch

        torch.cuda.empty_cache()


def free_host_bytes(cgroups: Path = CGROUPS, own: Path = OWN_CGROUP) -> int:
    """Return the smallest of the machine's available memory and what each control group above this process leaves."""
    return min([int(psutil.virtual_memory().available), *_left_in_groups(cgroups, own)])


def _left_in_groups(cgroups: Path, own: Path) -> Iterator[int]:
    for limit, usage, reclaimable, root in VERSIONS:
        for folder in _folders(cgroups / root, own, root):
            try:
                most, used = (folder / limit).read_text().strip(), int((folder / usage).read_text())
                given_back = _line(folder / "memory.stat", reclaimable)
            except (OSError, ValueError):  # no such group, or another version of them
                continue
            if most != "max":
                yield max(0, int(most) - used + given_back)


def _folders(root: Path, own: Path, controller: str) -> Iterator[Path]:
    """Yield the folders of this process's group and of those around it; in a container its own group is the root."""
    try:
        lines = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:
        lines = []
    names = [line[2] for line in lines if len(line) == 3 and controller in line[1].split(",")]
    folder = root / (names[0].strip("/") if names else "")
    while folder != root and root in folder.parents:
        yield folder
        folder = folder.parent
    yield root


def _line(stat: Path, name: str) -> int:
    for line in stat.read_text().splitlines():
        if line.startswith(f"{name} "):
            return int(line.split()[1])
    return 0
