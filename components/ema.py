"""The moving average of trained weights, kept on exactly the fp32 tensors a rank owns: 1/N memory, no communication.

Works on whatever list of tensors the engine calls its masters: whole parameters on one worker, flat shards under ZeRO.
The decay is warmed up, min(decay, (1 + step) / (10 + step)), so that short runs are not dominated by the start.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Ema:
    """Averages of `masters` (this rank's tensors, updated in place by the optimizer); decay 0 keeps nothing."""

    def __init__(self, masters: list[Tensor], decay: float) -> None:
        self.decay = decay
        self.masters = masters
        self.averages = [master.detach().clone() for master in masters] if decay else []

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the averages towards the masters after optimizer step `step` (0-based)."""
        if self.averages:
            decay = min(self.decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(self.averages, [master.detach() for master in self.masters], 1 - decay)

    @torch.no_grad()
    def restart(self) -> None:
        """Set the averages to the masters' present values."""
        for average, master in zip(self.averages, self.masters, strict=True):
            average.copy_(master)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Hold the averages in the masters' place; the caller refreshes what was derived from them."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for average, master in zip(self.averages, self.masters, strict=True) if self.averages else ():
            kept = master.detach().clone()
            master.copy_(average)
            average.copy_(kept)
