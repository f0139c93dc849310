"""Who may change a shared thing right now: a lease with an owner, a heartbeat, a time-to-live and a fencing token.

On a disk and on S3 alike: the holder of token N is whoever created the file N below `<lease>.epochs/`, which exactly
one can, and the newest file counts. Only its holder writes to it, so nobody ever waits for a process that stopped. A
holder that is dead (its process is gone from this very machine, or its heartbeat did not change while we watched for
its time-to-live on our own clock) is replaced by token N + 1. No two machines' clocks are compared for that. A replaced
holder learns it from `confirm`; what it may still do between `confirm` and its effect, `fencing` refuses.
"""

import json
import os
import posixpath
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil

from cluster import storage
from cluster.conditional_writes import check_conditional_writes
from cluster.errors import LeaseLostError, StorageError
from cluster.processes import start_ticks, this_machine
from cluster.stage_names import shared
from cluster.storage_clock import age_s

POLL_S = 0.1
CLOCK_SLACK_S = 2.0
TOKEN_DIGITS = 12


@dataclass(frozen=True)
class Lease:
    """What an epoch file says about its holder; times are Unix seconds by the holder's clock, for people to read."""

    owner: str
    host: str
    machine: str
    """Boot and process namespace: only where it equals ours does `pid` mean anything to us."""
    pid: int
    pid_started: float
    nonce: str
    token: int
    since: float
    heartbeat: float
    beats: int
    ttl_s: float
    released: bool = False
    pid_ticks: int | None = None
    """When `pid` started, in clock ticks since boot: no change of the clock moves it. None where the system has no
    /proc, and in what older versions wrote; `pid_started` counts then."""
    uptime_s: float | None = None
    """When the heartbeat was, by this boot's monotonic clock; None in what older versions wrote."""


class Watch:
    """Notices that a holder's heartbeat stands still, by this process's own monotonic clock."""

    def __init__(self) -> None:
        self._seen: tuple[int, str, int] | None = None
        self._since = 0.0
        self.moved = False
        """The heartbeat changed since the watch began: its holder is alive."""

    def stands_still_for(self, lease: Lease) -> bool:
        """Look once more; True when nothing changed over looks that span the holder's whole time-to-live."""
        now, seen = time.monotonic(), (lease.token, lease.nonce, lease.beats)
        if seen != self._seen:
            self.moved = self._seen is not None
            self._seen, self._since = seen, now
        return now - self._since > lease.ttl_s

    def forget(self) -> None:
        """Begin anew after a failed look: while storage did not answer us, it did not answer the holder either."""
        self._seen = None


@contextmanager
def hold_lease(
    place: str | Path,
    owner: str,
    ttl_s: float = 30.0,
    wait_s: float = 30.0,
    notify: Callable[[str], None] | None = None,
) -> Iterator[Callable[[], Lease]]:
    """Hold the lease at `place` (a path or s3:// address) for the block; yields a function that proves it is held.

    The yielded function renews and returns the lease, and raises LeaseLostError when somebody replaced us: call it
    before every side effect, and give its token to `fencing`. StorageError when another owner keeps the lease for
    longer than `wait_s` seconds; where only waiting can tell whether it lives, after its time-to-live at the latest.
    """
    uri = f"{shared(place)}.epochs"
    held = _Held(uri, _acquire(uri, owner, ttl_s, wait_s, notify))
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(ttl_s / 3):
            try:
                held.confirm()
            except LeaseLostError:
                return  # the holder learns it from its next `confirm`
            except StorageError:
                continue  # perhaps only for a moment; if not, `confirm` says so where it matters

    heart = threading.Thread(target=beat, name=f"heartbeat of {posixpath.basename(uri)}", daemon=True)
    heart.start()
    try:
        yield held.confirm
    finally:
        ended.set()
        heart.join()
        held.release()


def read_lease(place: str | Path) -> Lease | None:
    """Return the holder of the lease at `place`, None when it is free or its holder is known or likely to be dead."""
    uri = f"{shared(place)}.epochs"
    while True:
        lease = _newest(uri)
        if lease is None or lease.released:
            return None
        try:
            return lease if is_alive(lease, uri) else None
        except FileNotFoundError:
            continue  # replaced since the look, and cleared away


def is_alive(lease: Lease, uri: str) -> bool:
    """Tell at once whether a holder seems alive, without watching its heartbeat as `hold_lease` does.

    No clock that may be wrong decides: on this machine the boot's own, on S3 the storage's. Of another machine's lease
    on a shared disk the two machines' clocks are compared. FileNotFoundError when the lease was replaced meanwhile.
    """
    if lease.machine != this_machine():
        age = age_s(_epoch(uri, lease.token))
    else:
        age = None if lease.uptime_s is None else time.monotonic() - lease.uptime_s
    if age is None:
        age = time.time() - lease.heartbeat
    return age <= lease.ttl_s and (lease.machine != this_machine() or process_is(lease))


def process_is(holder: Lease) -> bool:
    """Tell whether the process of a holder on this machine runs still: its number may be another's by now."""
    if holder.pid_ticks is not None:
        return start_ticks(holder.pid) == holder.pid_ticks
    try:
        process = psutil.Process(holder.pid)
        same = abs(process.create_time() - holder.pid_started) < CLOCK_SLACK_S
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def describe(lease: Lease) -> str:
    """Say who holds a lease, for people."""
    return f"{lease.owner} (process {lease.pid} on {lease.host}, since {time.time() - lease.since:.0f} s)"


class _Held:
    """A lease of this process; used by its heartbeat and by its owner, so every step is under a lock."""

    def __init__(self, uri: str, lease: Lease) -> None:
        self._uri, self._lease = uri, lease
        self._lock = threading.Lock()

    def confirm(self) -> Lease:
        with self._lock:
            beats, uptime_s = self._lease.beats + 1, time.monotonic()
            renewed = replace(self._lease, heartbeat=time.time(), uptime_s=uptime_s, beats=beats)
            # Written before the look: a network file system then shows us its folder as it is, not from memory.
            _write(self._uri, renewed)
            self._lease = renewed
            newest = _newest_token(self._uri)
            if newest != renewed.token:
                raise LeaseLostError(
                    f"{self._uri} expected to be held by {renewed.owner} (token {renewed.token}), found token {newest}:"
                    " the lease was taken over while this process did not answer; nothing more was changed, run the"
                    " command again"
                )
            return renewed

    def release(self) -> None:
        """Free the lease for the next; one that was lost is left alone, one that cannot be reached dies by itself."""
        with self._lock, suppress(StorageError):
            if _newest_token(self._uri) == self._lease.token:
                _write(self._uri, replace(self._lease, released=True, beats=self._lease.beats + 1))


def _acquire(uri: str, owner: str, ttl_s: float, wait_s: float, notify: Callable[[str], None] | None) -> Lease:
    deadline = time.monotonic() + wait_s
    watch, told = Watch(), False
    while True:
        try:
            holder = _newest(uri)
        except StorageError:
            watch.forget()
            if time.monotonic() >= deadline:
                raise
            time.sleep(POLL_S)
            continue
        if holder is None or _is_over(holder, watch):
            lease = _claim(uri, owner, ttl_s, token=1 if holder is None else holder.token + 1)
            if lease is not None:
                return lease
            continue
        if notify is not None and not told:
            notify(f"waiting up to {wait_s:.0f} s for {posixpath.basename(uri)}, held by {describe(holder)}")
            told = True
        watching = holder.machine != this_machine() and not watch.moved
        if time.monotonic() >= deadline and not watching:
            raise StorageError(
                f"{uri} expected to be free, found held by {describe(holder)} after {wait_s:.0f} s of waiting; wait"
                " for it to end, or end that process: its lease is then taken over"
            )
        time.sleep(POLL_S if not storage.is_s3(uri) else max(POLL_S, min(1.0, holder.ttl_s / 10)))


def _is_over(holder: Lease, watch: Watch) -> bool:
    if holder.released:
        return True
    if holder.machine == this_machine() and not process_is(holder):
        return True
    return watch.stands_still_for(holder)


def _claim(uri: str, owner: str, ttl_s: float, token: int) -> Lease | None:
    """Create the epoch; None when another was faster."""
    check_conditional_writes(uri)
    now, pid = time.time(), os.getpid()
    started = psutil.Process(pid).create_time()
    nonce = uuid.uuid4().hex
    host, ticks, uptime_s = socket.gethostname(), start_ticks(pid), time.monotonic()
    lease = Lease(
        owner, host, this_machine(), pid, started, nonce, token, now, now, 0, ttl_s, pid_ticks=ticks, uptime_s=uptime_s
    )
    if not storage.put_if_absent(_epoch(uri, token), _content(lease)):
        return None
    older = [other for other in _tokens(uri) if other != token]
    if older and max(older) > token:
        return None  # the look was so long ago that this number had come, gone and been cleared away
    for other in older:
        with suppress(StorageError):  # who may not delete keeps a few small files more
            storage.delete(_epoch(uri, other))
    return lease


def _newest(uri: str) -> Lease | None:
    """Return what the newest epoch says; None when there is none."""
    while True:
        token = _newest_token(uri)
        if token == 0:
            return None
        try:
            return Lease(**json.loads(storage.read_bytes(_epoch(uri, token))))
        except FileNotFoundError:
            continue  # replaced since the look, and cleared away
        except (ValueError, TypeError) as error:
            raise StorageError(
                f"{_epoch(uri, token)} expected to describe a lease's holder, found: {error}; another version"
                " of Fresco wrote it: when nothing runs here, remove it"
            ) from error


def _newest_token(uri: str) -> int:
    return max(_tokens(uri), default=0)


def _tokens(uri: str) -> list[int]:
    names = [posixpath.basename(entry.uri).removesuffix(".json") for entry in storage.iter_files(uri)]
    return [int(name) for name in names if name.isdecimal()]


def _write(uri: str, lease: Lease) -> None:
    storage.write_bytes_atomic(_epoch(uri, lease.token), _content(lease))


def _epoch(uri: str, token: int) -> str:
    return storage.join(uri, f"{token:0{TOKEN_DIGITS}}.json")


def _content(lease: Lease) -> bytes:
    return json.dumps(asdict(lease), sort_keys=True).encode()
