"""Draw a share of the champion's requests a second time, by the challenger, and tell nobody but the metrics.

Same rows, same seeds, after the champion's own job was accepted. A shadow stands back: its share of the engine is a
hundredth, few of them wait, one that finds no room is dropped and counted, and it ends with the request it repeats when
that is cancelled. Edits are left out: their pictures would have to be encoded twice, which is not free.
"""

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict

from cluster.request_shares import in_share
from cluster.role_metrics import RoleTallies
from components.draw_requests import Done, DrawRequest, Event, Failed
from components.errors import InputError, QueueFullError
from components.picture_statistics import picture_statistics
from components.step_batch import StepBatchEngine

SALT = "shadow"
SUFFIX = "~shadow"
"""No request id of a client may hold the sign."""
PRIORITY = 0.01
"""Of a usual request's: beside one, a shadow makes one step in a hundred."""
WAITING_SHARE = 0.25
"""Of the places in the engine's queue; the rest are the champion's own."""
LOWEST_PRIORITY = 19


class Shadows:
    """The shadows that are at work; offered, cancelled and ended from different threads."""

    def __init__(self, engine: StepBatchEngine, tallies: RoleTallies, share: float) -> None:
        self.share = share
        self._engine, self._tallies = engine, tallies
        self._most_rows = max(1, int(engine.limits.max_waiting_rows * WAITING_SHARE))
        self._rows: dict[str, int] = {}
        """Of each shadow that is wanted, from its offer to its last event."""
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="shadow", initializer=_stand_back)

    def offer(self, request: DrawRequest, version: Callable[[], str | None]) -> None:
        """Repeat an accepted request if it is in the share; `version` names the weights, None drops it. Never waits."""
        if not in_share(request.request_id, self.share, SALT):
            return
        with self._lock:
            fits = sum(self._rows.values()) + len(request.rows) <= self._most_rows
            if fits:
                self._rows[request.request_id] = len(request.rows)
        if fits:
            self._thread.submit(self._draw, request, version)
        else:
            self._tallies.ended("shadow", "dropped")

    def cancel(self, request_id: str) -> None:
        """End the shadow of a request, if it has one."""
        with self._lock:
            wanted = self._rows.pop(request_id, None)
        if wanted is not None:
            # Perhaps it has not reached the engine yet; then it will not stay there.
            self._engine.cancel(request_id + SUFFIX)
            self._tallies.ended("shadow", "cancelled")

    def cancel_all(self) -> None:
        """End all shadows: the engine is wanted for something else."""
        with self._lock:
            names = list(self._rows)
        for name in names:
            self.cancel(name)

    def close(self) -> None:
        self.cancel_all()
        self._thread.shutdown()

    def _draw(self, request: DrawRequest, version: Callable[[], str | None]) -> None:
        """Hand a shadow to the engine; encodes its prompts, so it runs in the thread of its own."""
        request_id, name = request.request_id, version()
        if not self._is_wanted(request_id):
            return
        repeated = DrawRequest(
            request_id + SUFFIX,
            request.rows,
            solver=request.solver,
            key=SUFFIX,
            priority=PRIORITY,
            background=True,
        )
        try:
            if name is None:
                raise InputError("challenger expected to be loaded, found none")
            self._engine.submit(repeated, lambda event: self._receive(request_id, event), version=name)
        except (InputError, QueueFullError):
            if self._ended(request_id):
                self._tallies.ended("shadow", "dropped")
            return
        if not self._is_wanted(request_id):
            self._engine.cancel(request_id + SUFFIX)  # it was cancelled while it was being accepted

    def _receive(self, request_id: str, event: Event) -> None:
        """Called by the engine's threads, which wait for nothing here."""
        if not isinstance(event, Done | Failed) or not self._ended(request_id):
            return  # whoever cancelled it has counted it
        if isinstance(event, Failed):
            self._tallies.ended("shadow", "failed")
            return
        self._tallies.done("shadow", event.waited_s + event.drawn_s)
        with suppress(RuntimeError):  # the endpoint is ending, and this thread has
            self._thread.submit(self._look, event)

    def _look(self, event: Done) -> None:
        for picture in event.pictures:
            self._tallies.picture("shadow", asdict(picture_statistics(picture)))

    def _is_wanted(self, request_id: str) -> bool:
        with self._lock:
            return request_id in self._rows

    def _ended(self, request_id: str) -> bool:
        with self._lock:
            return self._rows.pop(request_id, None) is not None


def _stand_back() -> None:
    if hasattr(os, "setpriority"):
        # On Linux a thread has a priority of its own: drawing comes first.
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOWEST_PRIORITY)
