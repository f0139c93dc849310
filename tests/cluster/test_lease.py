"""One holder at a time, dead holders replaced, replaced holders told and unable to do harm: on a disk and on S3."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import pytest

from cluster import lease as leases
from cluster import s3, storage
from cluster.errors import LeaseLostError, StorageError
from cluster.fencing import peek_fenced, read_fenced, write_fenced
from cluster.lease import Lease, hold_lease, is_alive, process_is, read_lease
from cluster.processes import start_ticks
from tests.faults import LOST_ANSWER, RESET, SLOW_DOWN, UNCONDITIONAL, Network, Rule

ROOT = Path(__file__).parents[2]
LIMIT_S = 120


@pytest.fixture(params=["disk", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where the lease lies."""
    if request.param == "disk":
        return str(tmp_path / "locks" / "retrain")
    return f"{request.getfixturevalue('bucket')}/locks/retrain"


@contextmanager
def contender(*arguments: object) -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, "-m", "tests.contenders", *map(str, arguments)]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def ask(process: "subprocess.Popen[str]", line: str) -> str:
    assert process.stdin is not None
    process.stdin.write(line + "\n")
    process.stdin.flush()
    return answer(process)


def answer(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def rest_of(process: "subprocess.Popen[str]") -> int:
    """Read to the end; the last line says how many rounds were lost."""
    assert process.stdout is not None
    word, lost = process.stdout.read().splitlines()[-1].split()
    assert word == "finished"
    return int(lost)


def write_epoch(place: str, lease: Lease) -> None:
    content = json.dumps(asdict(lease)).encode()
    storage.write_bytes_atomic(f"{place}.epochs/{lease.token:012}.json", content)


def far_away(place: str, **changes: object) -> Lease:
    """Leave a lease that a process of another machine seems to hold."""
    with hold_lease(place, "x") as confirm:
        here = confirm()
    values = {"owner": "far", "host": "elsewhere", "machine": "other/1", "nonce": "other", "token": here.token + 1}
    far = replace(here, **{**values, **changes})
    write_epoch(place, far)
    return far


def test_lease_held_is_visible_and_free_again_after_the_block(place: str) -> None:
    assert read_lease(place) is None
    with hold_lease(place, "promote of fresco-1") as confirm:
        seen = read_lease(place)
        assert seen is not None and seen.owner == "promote of fresco-1" and seen.pid == os.getpid()
        assert confirm().token == seen.token
    assert read_lease(place) is None


def test_lease_tokens_rise_with_every_acquisition_and_old_epochs_are_cleared_away(place: str) -> None:
    tokens = []
    for _ in range(3):
        with hold_lease(place, "x") as confirm:
            tokens.append(confirm().token)
    assert tokens == [1, 2, 3]
    assert [entry.uri for entry in storage.list_files(f"{place}.epochs")] == [f"{place}.epochs/000000000003.json"]


def test_lease_held_by_a_live_thread_is_waited_for_up_to_the_limit(place: str) -> None:
    told: list[str] = []
    late = hold_lease(place, "second", wait_s=0.3, notify=told.append)
    with hold_lease(place, "first"), pytest.raises(StorageError, match=r"held by first \(process \d+ on .*take"), late:
        pass
    assert len(told) == 1 and "held by first" in told[0]


def test_lease_of_a_killed_process_is_taken_over_at_once(place: str) -> None:
    with contender("hold", place, 3600) as other:
        assert answer(other) == "holds 1"
        holder = read_lease(place)
        assert holder is not None and holder.pid == other.pid
        os.kill(other.pid, signal.SIGKILL)
        other.wait()
        with hold_lease(place, "heir", wait_s=5) as confirm:
            assert confirm().token == 2


def test_holder_that_sleeps_through_its_replacement_wakes_up_harmless(place: str) -> None:
    record = f"{place}-state.json"
    with contender("hold", place, 1.5) as sleeper:
        assert answer(sleeper) == "holds 1"
        assert ask(sleeper, f"write {record} early") == "done write"
        os.kill(sleeper.pid, signal.SIGSTOP)
        with hold_lease(place, "heir", ttl_s=60, wait_s=LIMIT_S) as confirm:
            token = confirm().token
            assert token == 2
            assert read_fenced(record, token) == "early"
            # Sealed by the read alone: what the heir decides on cannot change behind its back.
            os.kill(sleeper.pid, signal.SIGCONT)
            assert ask(sleeper, f"write {record} late") == "lost write"
            assert ask(sleeper, "confirm") == "lost confirm"
            write_fenced(record, "of the heir", token)
            assert ask(sleeper, f"write {record} late") == "lost write"
            assert ask(sleeper, "end") == ""
            assert confirm().token == token, "the sleeper's end leaves the heir alone"
    assert peek_fenced(record) == "of the heir"


def test_a_write_that_slept_between_its_look_and_its_end_is_refused(bucket: str, s3_network: Network) -> None:
    record = f"{bucket}/state.json"
    write_fenced(record, "one", 1)

    def overtake(request: str) -> None:
        if request.startswith("PUT"):
            s3_network.before_passing_on = None
            assert read_fenced(record, 2) == "one"

    s3_network.before_passing_on = overtake
    with pytest.raises(LeaseLostError, match="token 2 or a newer one, found token 1"):
        write_fenced(record, "late", 1)
    assert peek_fenced(record) == "one"


def test_sealing_a_file_that_is_not_there_keeps_older_tokens_from_making_it(place: str) -> None:
    record = f"{place}-state.json"
    assert peek_fenced(record) is None
    assert read_fenced(record, 7) is None
    with pytest.raises(LeaseLostError, match="nothing was changed"):
        write_fenced(record, "late", 6)
    with pytest.raises(LeaseLostError):
        read_fenced(record, 6)
    write_fenced(record, {"stage": "train"}, 7)
    assert read_fenced(record, 8) == {"stage": "train"}


def test_a_fenced_file_that_is_something_else_is_refused(place: str) -> None:
    storage.write_bytes_atomic(f"{place}-state.json", b"[1, 2]")
    with pytest.raises(StorageError, match=r"expected to be .*found b'\[1, 2\]'; restore or remove it"):
        write_fenced(f"{place}-state.json", "x", 1)


def test_lease_of_another_machine_whose_heart_stands_still_is_taken_over_whatever_its_clock_says(place: str) -> None:
    for hours in (-1000, 1000):
        far = far_away(place, heartbeat=time.time() + 3600 * hours, ttl_s=0.5)
        begun = time.monotonic()
        # The time-to-live is watched out even past the limit: only so can anybody know.
        with hold_lease(place, "heir", wait_s=0.1) as confirm:
            assert confirm().token == far.token + 1
            assert time.monotonic() - begun > 0.5, "not before a whole time-to-live was watched"


def test_lease_of_another_machine_whose_heart_beats_is_not_taken_over_whatever_its_clock_says(place: str) -> None:
    far = far_away(place, heartbeat=time.time() - 3_600_000, ttl_s=20.0)
    ended = threading.Event()

    def beat() -> None:
        beats = 0
        while not ended.wait(0.2):
            beats += 1
            write_epoch(place, replace(far, beats=beats))

    heart = threading.Thread(target=beat)
    heart.start()
    try:
        with pytest.raises(StorageError, match=r"held by far .* on elsewhere"), hold_lease(place, "me", wait_s=0.5):
            pass
    finally:
        ended.set()
        heart.join()


def test_heart_is_watched_anew_after_storage_did_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(leases.time, "monotonic", lambda: now[0])
    lease = Lease("x", "h", "m", 1, 0.0, "n", 1, 0.0, 0.0, 0, ttl_s=10.0)
    watch = leases.Watch()
    assert not watch.stands_still_for(lease)
    now[0] = 9.0
    assert not watch.stands_still_for(lease)
    watch.forget()
    now[0] = 15.0
    assert not watch.stands_still_for(lease), "the holder could not beat either while storage was away"
    now[0] = 26.0
    assert watch.stands_still_for(lease)
    assert not watch.stands_still_for(replace(lease, beats=1)) and watch.moved


def test_lease_holder_that_was_replaced_is_told_and_leaves_the_heir_alone(place: str) -> None:
    with hold_lease(place, "slow") as confirm:
        heir = replace(confirm(), owner="heir", nonce="other", token=2)
        write_epoch(place, heir)
        with pytest.raises(LeaseLostError, match=r"held by slow \(token 1\), found token 2: .* taken over"):
            confirm()
    assert read_lease(place) == heir


def test_claim_of_a_number_that_had_come_and_gone_is_void(place: str) -> None:
    for _ in range(3):
        with hold_lease(place, "x"):
            pass
    assert leases._claim(f"{place}.epochs", "who looked long ago", 30.0, token=2) is None
    with hold_lease(place, "x") as confirm:
        assert confirm().token == 4


def test_lease_heartbeat_keeps_a_long_block_alive(place: str) -> None:
    with hold_lease(place, "long", ttl_s=0.6):
        first = read_lease(place)
        deadline = time.monotonic() + 30
        lease = first
        while (lease is None or first is None or lease.beats < first.beats + 3) and time.monotonic() < deadline:
            threading.Event().wait(0.05)
            lease = read_lease(place)
            first = first or lease
        assert lease is not None and first is not None and lease.beats >= first.beats + 3


def test_lease_survives_a_network_that_breaks_and_its_own_lost_answers(bucket: str, s3_network: Network) -> None:
    s3_network.plan(Rule(LOST_ANSWER, 1, "PUT .*epochs"), Rule(SLOW_DOWN, 1, "PUT .*epochs"), Rule(RESET, 1, "GET"))
    with hold_lease(f"{bucket}/retrain", "x") as confirm:
        assert confirm().token == 1
        s3_network.plan(Rule(LOST_ANSWER, 2, "PUT .*epochs"), Rule(RESET, 1, "GET"))
        assert confirm().token == 1
        write_fenced(f"{bucket}/state", "kept", 1)
        s3_network.plan(Rule(SLOW_DOWN, 1000, "epochs"))
        with pytest.raises(StorageError, match="SlowDown"):
            confirm()
        s3_network.plan()
        assert confirm().token == 1, "an outage ends no lease that nobody took"


def test_a_server_that_ignores_conditions_is_refused_before_a_lease_is_claimed(
    bucket: str, s3_network: Network
) -> None:
    s3_network.plan(Rule(UNCONDITIONAL, 1000, "PUT"))
    missing = (
        r"retrain\.epochs expected on a server that honours .* it ignores If-None-Match and If-Match: .*two processes"
    )
    for _ in range(2):
        with pytest.raises(StorageError, match=missing), hold_lease(f"{bucket}/retrain", "x"):
            pass
    s3_network.plan()
    everything = s3.client().list_objects_v2(Bucket=bucket.removeprefix("s3://"))
    assert everything["KeyCount"] == 0, "no lease, and nothing left of the trial"


def test_conditions_are_tried_once_for_a_bucket_and_through_a_network_that_breaks(
    bucket: str, s3_network: Network
) -> None:
    s3_network.plan(Rule(LOST_ANSWER, 2, "PUT .*conditional"), Rule(RESET, 1, "PUT .*conditional"))
    for name in ("retrain", "other"):
        with hold_lease(f"{bucket}/{name}", "x") as confirm:
            assert confirm().token == 1
    tried = [request for request in s3_network.seen if ".conditional-" in request]
    assert len(s3_network.struck) == 3 and len({request.split("?")[0].split(" ")[1] for request in tried}) == 1
    assert not [key for key in storage.list_files(bucket) if "conditional" in key.uri]


@pytest.mark.parametrize("chaos", [False, True], ids=["undisturbed", "killed and stopped"])
def test_of_many_contenders_one_at_a_time_has_its_effects(chaos: bool, place: str) -> None:
    log, number = f"{place}-log.json", 4 if storage.is_s3(place) else 8
    ttl_s = 1.0 if chaos else 3600.0
    draw = random.Random(3)
    begun = [contender("rounds", place, log, ttl_s, name, number) for name in ("a", "b", "c", "d")]
    processes = [one.__enter__() for one in begun]
    try:
        for process in processes:
            assert answer(process).startswith("round")
        if chaos:
            for process in draw.sample(processes[1:], 2):
                os.kill(process.pid, signal.SIGSTOP)
            os.kill(processes[0].pid, signal.SIGKILL)
            threading.Event().wait(3 * ttl_s)  # long enough for a stopped holder to be replaced
            for process in processes[1:]:
                os.kill(process.pid, signal.SIGCONT)
        survivors = processes[1:] if chaos else processes
        lost = [rest_of(process) for process in survivors]
    finally:
        for one in begun:
            one.__exit__(None, None, None)
    entries = peek_fenced(log)
    assert entries is not None
    tokens = [token for token, _, _ in entries]
    assert tokens == sorted(tokens), "an effect of an older token came after one of a newer"
    rounds = {token: [(name, event) for at, name, event in entries if at == token] for token in tokens}
    for steps in rounds.values():
        assert len({name for name, _ in steps}) == 1, "a token has one holder"
        assert [event for _, event in steps] in (["begin"], ["begin", "end"])
    if chaos:
        whole = sum(len(steps) == 2 for steps in rounds.values())
        assert whole >= number * len(survivors) - sum(lost)
    else:
        assert lost == [0] * 4
        assert len(entries) == 2 * number * 4


def test_process_number_given_out_again_does_not_count_as_the_old_process(tmp_path: Path) -> None:
    with hold_lease(tmp_path / "lock", "x") as confirm:
        lease = confirm()
    uri = str(tmp_path / "lock.epochs")
    assert lease.pid_ticks is not None and process_is(lease)
    later = replace(lease, pid_ticks=lease.pid_ticks + 1)
    assert not process_is(later) and not is_alive(later, uri)
    assert is_alive(replace(later, machine="other/1"), uri), "a number of another world"
    older = replace(lease, pid_ticks=None, uptime_s=None)
    assert is_alive(older, uri), "as versions before this one wrote it"
    assert not is_alive(replace(older, pid_started=lease.pid_started - 1000), uri)


@pytest.mark.parametrize("step_s", [3600.0, -3600.0])
def test_step_of_the_clock_leaves_every_holder_of_this_machine_alive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step_s: float
) -> None:
    """A step moves what the clock shows and, with it, the boot's time by the clock; both are stood for here."""
    clock, booted = time.time, psutil._pslinux.boot_time
    place = tmp_path / "lock"
    with contender("hold", place, 3600) as other:
        assert answer(other) == "holds 1"
        monkeypatch.setattr(time, "time", lambda: clock() + step_s)
        monkeypatch.setattr(psutil._pslinux, "boot_time", lambda: booted() + step_s)
        holder = read_lease(place)
        assert holder is not None and holder.pid == other.pid
        heir = hold_lease(place, "heir", wait_s=0.3)
        with pytest.raises(StorageError, match="expected to be free, found held by"), heir:
            pass


@pytest.mark.parametrize("ahead_s", [3600.0, -3600.0])
def test_clock_of_another_machine_decides_nothing_on_s3(bucket: str, ahead_s: float) -> None:
    place = f"{bucket}/locks/retrain"
    far = far_away(place, heartbeat=time.time() + ahead_s, ttl_s=30.0)
    assert read_lease(place) == far, "its heartbeat is a moment old, by the storage's clock"
    write_epoch(place, replace(far, ttl_s=0.5))
    assert wait_until(lambda: read_lease(place) is None), "it stood still for longer than its time-to-live"


def test_name_of_a_process_may_look_like_its_numbers(tmp_path: Path) -> None:
    """The kernel writes it between parentheses, as it is, before the numbers."""
    program = tmp_path / "a) Z 1 (2) 3 4"
    shutil.copy(str(shutil.which("sleep")), program)
    with hold_lease(tmp_path / "lock", "x") as confirm:
        lease = confirm()
    process = subprocess.Popen([str(program), "3600"])
    try:
        ticks = start_ticks(process.pid)
        assert ticks is not None and lease.pid_ticks is not None and ticks >= lease.pid_ticks
        process.kill()
        assert wait_until(lambda: start_ticks(process.pid) is None), "ended, and not yet waited for"
    finally:
        process.kill()
        process.wait()


def wait_until(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + LIMIT_S
    while not condition() and time.monotonic() < deadline:
        threading.Event().wait(0.01)
    return condition()


def test_an_epoch_that_cannot_be_read_is_named(place: str) -> None:
    storage.write_bytes_atomic(f"{place}.epochs/000000000005.json", b"{}")
    with pytest.raises(StorageError, match=r"000000000005\.json expected to describe a lease's holder.*remove it"):
        read_lease(place)
