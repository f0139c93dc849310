"""How many threads should draw? As many as draw a small picture fastest, found by trying.

More threads are not always faster: those of a small model wait for each other more than they work, and in a process
where several threads each have helpers the waiting costs twice. With the embedded base on 2 cores a picture of 20 steps
takes 0.29 s with one thread and 0.88 s with two, inside the engine.
"""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

TRIES = 3
LONG_S = 1.0
"""A picture that takes so long with all threads has work for all of them, and nobody should wait for more tries."""
WORTH = 1.1
"""Twice the threads must be so much faster, or fewer are left for everything else for nothing."""


_settled: int | None = None
_at_once = 1
_lock = threading.Lock()


def settle_once(draw: Callable[[], object], most: int, asked: int = 0) -> int:
    """Settle the number of threads of this process, `asked` or by `settle_threads`; later calls change nothing.

    What was compiled holds for the number it was compiled under.
    """
    global _settled, _at_once
    with _lock:
        if _settled is None:
            _settled = asked or settle_threads(draw, most)
            _at_once = 1 if asked else max(1, most // _settled)
        torch.set_num_threads(_settled)
        return _settled


def calls_at_once() -> int:
    """Return how many calls of so many threads fit on the cores; 1 where the number was asked for or is not settled."""
    return _at_once


def settle_threads(draw: Callable[[], object], most: int) -> int:
    """Try `most` threads, half of them, and so on while that is faster; set and return the best number.

    It holds for threads that first compute afterwards; those that have computed keep the number they began with.
    """
    best, best_s = most, _seconds(draw, most)
    while best > 1 and best_s < LONG_S:
        fewer = best // 2
        seconds = _seconds(draw, fewer)
        if seconds > best_s * WORTH:
            break
        best, best_s = fewer, min(seconds, best_s)
    torch.set_num_threads(best)
    return best


def _seconds(draw: Callable[[], object], threads: int) -> float:
    """Shortest of some tries, in a thread of their own: its helpers end with it and stand in nobody's way later."""

    def measure() -> float:
        first_s = _timed(draw)
        return first_s if first_s > LONG_S else min(_timed(draw) for _ in range(TRIES))

    torch.set_num_threads(threads)
    with ThreadPoolExecutor(1, thread_name_prefix="threads-trial") as trial:
        return trial.submit(measure).result()


def _timed(draw: Callable[[], object]) -> float:
    start = time.perf_counter()
    draw()
    return time.perf_counter() - start
