"""The one thread of a replica in which its model lives: load, warm up, then draw one request after another.

The model is named by an importable factory, so this folder never learns what a diffusion model is. The factory's object
has `.draw(rows) -> PNG bytes for each row` and `.info() -> dict`. Event loops stay free: they wait on futures. A caller
that leaves while it waits gives its place back; a drawing that has begun runs to its end.
"""

import asyncio
import importlib
import math
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal, Protocol

FIRST_GUESS_S = 2.0
MOST_RETRY_AFTER_S = 60


class Painter(Protocol):
    """What the factory returns: the model behind an endpoint."""

    def draw(self, rows: Sequence[Mapping[str, Any]]) -> list[bytes]: ...

    def info(self) -> dict[str, Any]: ...


class QueueFullError(RuntimeError):
    """As many requests wait as may wait."""


class PainterThread:
    """Owns a painter; `state` is loading until a first drawing has succeeded, then ready, or failed with `error`."""

    def __init__(self, factory: str, arguments: Mapping[str, Any], max_queue: int) -> None:
        self.max_queue = max_queue
        self.error = ""
        self.info: dict[str, Any] = {}
        self.state: Literal["loading", "ready", "failed"] = "loading"
        self._painter: Painter | None = None
        self._outstanding = 0
        self._lock = threading.Lock()
        self._draw_s = FIRST_GUESS_S
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="painter")
        self._executor.submit(self._load, factory, dict(arguments))

    @property
    def retry_after_s(self) -> int:
        """Seconds after which the requests that are here now should be done, from the drawings so far."""
        return min(MOST_RETRY_AFTER_S, max(1, math.ceil(self._outstanding * self._draw_s)))

    async def draw(self, rows: Sequence[Mapping[str, Any]]) -> list[bytes]:
        """Draw all rows together; QueueFullError when too many requests wait already."""
        with self._lock:
            if self._outstanding > self.max_queue:
                raise QueueFullError(f"{self.max_queue} requests are waiting already")
            self._outstanding += 1
        future = self._executor.submit(self._draw, rows)
        future.add_done_callback(self._left)
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """Drop what waits; the drawing at work ends by itself."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _load(self, factory: str, arguments: dict[str, Any]) -> None:
        try:
            module, _, function = factory.partition(":")
            painter: Painter = getattr(importlib.import_module(module), function)(**arguments)
            info = painter.info()
            painter.draw([info["warm_up"]])
        except Exception as error:  # whatever a model's code raises: the endpoint must say it, not vanish
            traceback.print_exc()
            self.error = f"{type(error).__name__}: {error}"
            self.state = "failed"
            return
        self._painter, self.info = painter, info
        self.state = "ready"

    def _draw(self, rows: Sequence[Mapping[str, Any]]) -> list[bytes]:
        if self._painter is None:
            raise RuntimeError(f"the model is not ready ({self.state}) {self.error}")
        start = time.monotonic()
        drawn = self._painter.draw(rows)
        self._draw_s += 0.3 * (time.monotonic() - start - self._draw_s)
        return drawn

    def _left(self, future: "Future[list[bytes]]") -> None:
        with self._lock:
            self._outstanding -= 1
