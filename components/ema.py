"""The moving average of trained weights, kept on exactly the fp32 tensors a rank owns: 1/N memory, no communication.

Works on whatever list of tensors the engine calls its masters: whole parameters on one worker, flat shards under ZeRO.
The decay is warmed up, min(decay, (1 + step) / (10 + step)), so that short runs are not dominated by the start.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Ema:
    """Averages of `masters` (this rank's tensors, updated in place by the optimizer); decay 0 keeps nothing.

    What is exported may hold a `base_share` of the masters' values at the time of this call, the base's weights.
    """

    def __init__(self, masters: list[Tensor], decay: float, base_share: float = 0.0) -> None:
        self.decay, self.base_share = decay, base_share
        self.masters = masters
        self.averages = [master.detach().clone() for master in masters] if decay else []
        self.base = [master.detach().clone() for master in masters] if base_share else []

    @property
    def changes_export(self) -> bool:
        """Whether the exported weights are others than the masters."""
        return bool(self.averages or self.base)

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

    @contextmanager
    def exported(self) -> Iterator[None]:
        """Hold the exported weights in the masters' place: (1 - base_share) * average + base_share * base."""
        if not self.base:
            with self.swapped():
                yield
            return
        with torch.no_grad():
            kept = [master.detach().clone() for master in self.masters]
            torch._foreach_copy_([m.detach() for m in self.masters], self.averages or kept)
            torch._foreach_lerp_([m.detach() for m in self.masters], self.base, self.base_share)
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_([m.detach() for m in self.masters], kept)

    @torch.no_grad()
    def _swap(self) -> None:
        for average, master in zip(self.averages, self.masters, strict=True) if self.averages else ():
            kept = master.detach().clone()
            master.copy_(average)
            average.copy_(kept)
