"""Denoiser calls made at the same time, each by a thread of its own: how a small model uses more than one core.

Its operations are over before several threads have met, so one call is fastest on one thread (`threads.py`). But a call
of many rows can be cut, and its parts meet only at the end of the step: with the embedded base on 2 cores, 64 rows take
144 ms in one call and 87 ms in two side by side, 16 rows 43 and 36 ms, 8 rows 23 and 30 ms.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait

import torch
from torch import Tensor

SMALLEST_PART = 8
"""Rows of a part: what Python does for a call is done for each part, one after the other."""
MOST_PARTS = 4
"""For the same reason."""

MakeCalls = Callable[[Sequence[Callable[[], Tensor]]], list[Tensor]]


def in_turn(calls: Sequence[Callable[[], Tensor]]) -> list[Tensor]:
    """Make one call after the other."""
    return [call() for call in calls]


class SideBySide:
    """Up to `most` calls at a time: the first in the caller's thread, the others in helpers."""

    def __init__(self, most: int) -> None:
        self.most = max(1, min(most, MOST_PARTS))
        self._helpers = ThreadPoolExecutor(self.most, thread_name_prefix="denoise-part") if self.most > 1 else None

    def parts(self, num_rows: int) -> int:
        """Into how many parts a call of so many rows is cut."""
        return max(1, min(self.most, num_rows // SMALLEST_PART))

    def __call__(self, calls: Sequence[Callable[[], Tensor]]) -> list[Tensor]:
        """Return what the calls return, in their order; what one raises is raised once all have ended."""
        if self._helpers is None or len(calls) == 1:
            return in_turn(calls)
        others = [self._helpers.submit(_without_gradients, call) for call in calls[1:]]
        try:
            first = calls[0]()
        finally:
            wait(others)  # they read the same rows: nobody may change those before all have ended
        return [first, *(other.result() for other in others)]

    def close(self) -> None:
        """End the helpers."""
        if self._helpers is not None:
            self._helpers.shutdown()


def _without_gradients(call: Callable[[], Tensor]) -> Tensor:
    with torch.inference_mode():  # a mode of the thread, not of the process
        return call()
