"""The workspace lock: one holder at a time, dead holders replaced, replaced holders told."""

import multiprocessing
import os
import signal
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from cluster.artifacts import write_json_atomic
from cluster.errors import StorageError
from cluster.lease import Lease, hold_lease, is_alive, process_is, read_lease


def _hold_for_ever(path: str, ready) -> None:  # type: ignore[no-untyped-def]
    with hold_lease(Path(path), "the other process", ttl_s=60):
        ready.set()
        signal.pause()


def _count_up(path: str, counter: str, times: int) -> None:
    for _ in range(times):
        with hold_lease(Path(path), "counter", wait_s=60):
            value = int(Path(counter).read_text())
            Path(counter).write_text(str(value + 1))


def test_lease_held_is_visible_and_free_again_after_the_block(tmp_path: Path) -> None:
    path = tmp_path / "locks" / "aliases"
    with hold_lease(path, "promote of fresco-1") as confirm:
        seen = read_lease(path)
        assert seen is not None and seen.owner == "promote of fresco-1" and seen.pid == os.getpid()
        assert confirm().token == seen.token
    assert read_lease(path) is None


def test_lease_tokens_rise_with_every_acquisition(tmp_path: Path) -> None:
    tokens = []
    for _ in range(3):
        with hold_lease(tmp_path / "lock", "x") as confirm:
            tokens.append(confirm().token)
    assert tokens == [1, 2, 3]


def test_lease_held_by_a_live_thread_is_waited_for_up_to_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    told: list[str] = []
    late = hold_lease(path, "second", wait_s=0.3, notify=told.append)
    with hold_lease(path, "first"), pytest.raises(StorageError, match=r"held by first \(process \d+ on .*take"), late:
        pass
    assert len(told) == 1 and "held by first" in told[0]


def test_lease_of_a_killed_process_is_taken_over_at_once(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    other = context.Process(target=_hold_for_ever, args=(str(path), ready))
    other.start()
    assert ready.wait(30)
    holder = read_lease(path)
    assert holder is not None and holder.pid == other.pid
    other.kill()
    other.join()
    start = time.monotonic()
    with hold_lease(path, "heir", wait_s=5) as confirm:
        assert confirm().token == holder.token + 1
    assert time.monotonic() - start < 2


def test_lease_of_another_host_is_taken_over_only_after_its_time_to_live(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with hold_lease(path, "x") as confirm:
        here = confirm()
    far = replace(here, host="elsewhere", nonce="other", heartbeat=time.time(), ttl_s=60.0)
    write_json_atomic(path, asdict(far))
    with pytest.raises(StorageError, match="on elsewhere"), hold_lease(path, "me", wait_s=0.2):
        pass
    write_json_atomic(path, asdict(replace(far, heartbeat=time.time() - 61)))
    with hold_lease(path, "me", wait_s=0.2):
        pass


def test_lease_holder_that_was_replaced_is_told_and_leaves_the_heir_alone(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with hold_lease(path, "slow") as confirm:
        heir = replace(confirm(), owner="heir", nonce="other")
        write_json_atomic(path, asdict(heir))
        with pytest.raises(StorageError, match="taken over"):
            confirm()
    assert read_lease(path) == heir


def test_lease_heartbeat_keeps_a_long_block_alive(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with hold_lease(path, "long", ttl_s=0.6):
        first = read_lease(path)
        assert first is not None
        deadline = time.monotonic() + 10
        lease: Lease | None = first
        while lease is not None and lease.heartbeat < first.heartbeat + 0.7 and time.monotonic() < deadline:
            threading.Event().wait(0.05)
            lease = read_lease(path)
        assert lease is not None and lease.heartbeat >= first.heartbeat + 0.7


def test_lease_lets_one_writer_at_a_time_through(tmp_path: Path) -> None:
    counter = tmp_path / "counter"
    counter.write_text("0")
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_count_up, args=(str(tmp_path / "lock"), str(counter), 10)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert counter.read_text() == "30"


def test_process_number_given_out_again_does_not_count_as_the_old_process(tmp_path: Path) -> None:
    with hold_lease(tmp_path / "lock", "x") as confirm:
        lease = confirm()
    assert process_is(lease.pid, lease.pid_started)
    assert not process_is(lease.pid, lease.pid_started - 1000)
    assert not is_alive(replace(lease, pid_started=lease.pid_started - 1000))
