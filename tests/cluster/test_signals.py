"""Signals: a process that is told to end ends what it started, however it is told, and with Ray at its side."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from cluster.signals import SIGNALS, ended_by_signals, handlers_kept

END_LIMIT_S = 90
STARTED = """
import signal, subprocess, sys, time
from cluster.signals import ended_by_signals

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored where the tests themselves run under nohup
with ended_by_signals():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    try:
        print(child.pid, flush=True)
        time.sleep(600)
    finally:
        time.sleep(0.5)  # a second signal comes here
        child.terminate()
        child.wait()
        print("ended", flush=True)
"""
WITH_RAY = """
import sys, time
import cluster.signals
cluster.signals.SAME_WISH_S = 60  # on a machine with other work the second one comes late
from cluster.placement import PlacementSection
from cluster.session import local_session
from cluster.signals import ended_by_signals

with ended_by_signals(), local_session(PlacementSection(workers=1, cpus_per_worker=1)):
    import ray
    try:
        print("ready", flush=True)
        time.sleep(600)
    finally:
        print("ending", flush=True)
        time.sleep(1)  # a second signal comes here
        print("ended", len([node for node in ray.nodes() if node["Alive"]]), flush=True)
"""


@contextmanager
def running(script: str) -> Iterator["subprocess.Popen[str]"]:
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", script]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True, env=env)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: signal.Signals(number).name)
def test_what_was_started_is_ended_by_a_signal_that_comes_twice(number: int) -> None:
    """`timeout` tells the process, and at once its group."""
    with running(STARTED) as process:
        child = psutil.Process(int(process.stdout.readline()))
        os.kill(process.pid, number)
        os.killpg(process.pid, number)
        assert process.communicate(timeout=END_LIMIT_S)[0] == "ended\n"
        assert not child.is_running()


@pytest.mark.slow
def test_what_cleans_up_on_ray_is_not_cut_short() -> None:
    """Ray sets a handler for SIGTERM, to which every signal is a new one."""
    with running(WITH_RAY) as process:
        assert process.stdout.readline() == "ready\n"
        started = psutil.Process(process.pid).children(recursive=True)
        os.kill(process.pid, signal.SIGTERM)
        assert process.stdout.readline() == "ending\n"
        os.kill(process.pid, signal.SIGTERM)
        assert process.communicate(timeout=END_LIMIT_S)[0] == "ended 1\n"
        assert psutil.wait_procs(started, END_LIMIT_S)[1] == [], "Ray's processes end with the session"


def test_handlers_of_before_come_back_and_only_a_main_thread_is_told() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with ended_by_signals():
        ours = signal.getsignal(signal.SIGTERM)
        assert ours not in before
        with handlers_kept() as listen:
            signal.signal(signal.SIGTERM, lambda *_: None)  # as a library does
            listen()
            assert signal.getsignal(signal.SIGTERM) == ours
            signal.signal(signal.SIGTERM, lambda *_: None)
        assert signal.getsignal(signal.SIGTERM) == ours
    assert [signal.getsignal(number) for number in SIGNALS] == before

    def elsewhere() -> None:
        with ended_by_signals(), handlers_kept() as listen:
            listen()

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_ignored_hang_up_stays_ignored() -> None:
    with handlers_kept():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with ended_by_signals():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
