"""Who may change a shared thing of the workspace right now: a lock file with an owner, a heartbeat and a time-to-live.

The file says who holds it and when they last confirmed it. A holder that died (its process is gone, or its heartbeat
is older than the time-to-live) is replaced; a live one is waited for, up to a limit. Every acquisition gets a higher
token than the one before, so that a replaced holder can notice. For folders that honour flock: local disks, most NFS.
"""

import fcntl
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from cluster.artifacts import disk_message, read_json, write_json_atomic
from cluster.errors import StorageError

POLL_S = 0.1
CLOCK_SLACK_S = 2.0


@dataclass(frozen=True)
class Lease:
    """What a lock file says about its holder; times are Unix seconds."""

    owner: str
    host: str
    pid: int
    pid_started: float
    nonce: str
    token: int
    since: float
    heartbeat: float
    ttl_s: float


@contextmanager
def hold_lease(
    path: Path, owner: str, ttl_s: float = 30.0, wait_s: float = 30.0, notify: Callable[[str], None] | None = None
) -> Iterator[Callable[[], Lease]]:
    """Hold the lock at `path` for the length of the block; yields a function that proves it is still held.

    The yielded function returns the current lease and raises StorageError when somebody replaced us: call it before
    every side effect. StorageError also when a live owner keeps the lock for longer than `wait_s` seconds.
    """
    lease = _acquire(path, owner, ttl_s, wait_s, notify)
    ended = threading.Event()

    def confirm() -> Lease:
        with _guard(path):
            return _renew(path, lease)

    def beat() -> None:
        while not ended.wait(ttl_s / 3):
            try:
                confirm()
            except (StorageError, OSError):
                return  # lost or unwritable: the holder learns it from its next `confirm`

    heart = threading.Thread(target=beat, name=f"heartbeat of {path.name}", daemon=True)
    heart.start()
    try:
        yield confirm
    finally:
        ended.set()
        heart.join()
        _release(path, lease)


def read_lease(path: Path) -> Lease | None:
    """Return the live holder of the lock at `path`, None when it is free or its holder is dead."""
    lease = _parse(path)
    return lease if lease is not None and is_alive(lease) else None


def is_alive(lease: Lease) -> bool:
    """Tell whether a holder still counts: its heartbeat is fresh and, on this host, its process is the same one."""
    if time.time() - lease.heartbeat > lease.ttl_s:
        return False
    return lease.host != socket.gethostname() or process_is(lease.pid, lease.pid_started)


def process_is(pid: int, started: float) -> bool:
    """Tell whether process `pid` runs and is the one that started at `started`: a number is given out again."""
    try:
        process = psutil.Process(pid)
        return abs(process.create_time() - started) < CLOCK_SLACK_S and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _acquire(path: Path, owner: str, ttl_s: float, wait_s: float, notify: Callable[[str], None] | None) -> Lease:
    deadline = time.monotonic() + wait_s
    told = False
    while True:
        with _guard(path):
            holder = _parse(path)
            if holder is None or not is_alive(holder):
                lease = _new_lease(owner, ttl_s, token=_last_token(path) + 1)
                write_json_atomic(_counter(path), lease.token)
                write_json_atomic(path, asdict(lease))
                return lease
        if time.monotonic() >= deadline:
            raise StorageError(
                f"{path} expected to be free, found held by {describe(holder)} after {wait_s:.0f} s of waiting; wait"
                " for it to end, or end that process: its lock is then taken over"
            )
        if notify is not None and not told:
            notify(f"waiting up to {wait_s:.0f} s for {path.name}, held by {describe(holder)}")
            told = True
        time.sleep(POLL_S)


def describe(lease: Lease) -> str:
    """Say who holds a lease, for people."""
    return f"{lease.owner} (process {lease.pid} on {lease.host}, since {time.time() - lease.since:.0f} s)"


def _new_lease(owner: str, ttl_s: float, token: int) -> Lease:
    now = time.time()
    pid = os.getpid()
    started = psutil.Process(pid).create_time()
    return Lease(owner, socket.gethostname(), pid, started, uuid.uuid4().hex, token, now, now, ttl_s)


def _renew(path: Path, lease: Lease) -> Lease:
    found = _parse(path)
    if found is None or found.nonce != lease.nonce:
        holder = "nobody" if found is None else describe(found)
        raise StorageError(
            f"{path} expected to be held by {lease.owner} (token {lease.token}), found {holder}: the lock was taken"
            " over while this process did not answer; nothing more was changed, run the command again"
        )
    renewed = Lease(**{**asdict(found), "heartbeat": time.time()})
    write_json_atomic(path, asdict(renewed))
    return renewed


def _release(path: Path, lease: Lease) -> None:
    with _guard(path):
        found = _parse(path)
        if found is not None and found.nonce == lease.nonce:
            path.unlink(missing_ok=True)


def _parse(path: Path) -> Lease | None:
    content = read_json(path)
    return None if content is None else Lease(**content)


def _counter(path: Path) -> Path:
    return path.with_name(path.name + ".token")


def _last_token(path: Path) -> int:
    return int(read_json(_counter(path)) or 0)


@contextmanager
def _guard(path: Path) -> Iterator[None]:
    """Serialise the few file operations of one look or change; the system frees it when its holder dies."""
    guard = path.with_name(path.name + ".guard")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(guard, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise StorageError(disk_message(guard, error)) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
