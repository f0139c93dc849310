"""How is a process told to end? SIGINT, SIGTERM and SIGHUP alike become one KeyboardInterrupt, so that every `finally`
runs and what was started is ended by whoever started it.

`timeout` tells a process twice within a moment, itself and its group: that is one wish, and must not cut the ending
short. A wish that is repeated later does. Libraries set handlers of their own (Ray for SIGTERM, Ray Train for SIGINT):
`handlers_kept` sets those of before again.
"""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SAME_WISH_S = 2.0


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Raise KeyboardInterrupt in the block for each of SIGNALS; does nothing outside of the main thread.

    What runs under `nohup` goes on after SIGHUP.
    """
    last_s = float("-inf")

    def end(number: int, frame: FrameType | None) -> None:
        nonlocal last_s
        before_s, last_s = last_s, time.monotonic()
        if last_s - before_s > SAME_WISH_S:
            raise KeyboardInterrupt

    with handlers_kept():
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                    signal.signal(number, end)
        yield


@contextmanager
def handlers_kept() -> Iterator[Callable[[], None]]:
    """Set the handlers of SIGNALS after the block as they were before; yields a function that sets them again within.

    Where nothing was handled that function changes nothing: a library's handler is better than none.
    """
    before = {number: signal.getsignal(number) for number in SIGNALS}
    changeable = threading.current_thread() is threading.main_thread()  # only there can they be changed at all

    def set_again(unhandled_too: bool = False) -> None:
        for number, handler in before.items():
            if changeable and handler is not None and (unhandled_too or handler != signal.SIG_DFL):
                signal.signal(number, handler)

    try:
        yield set_again
    finally:
        set_again(unhandled_too=True)
