"""The bridge between the event loop of the routes and the threads of the painter: a job in, its events out.

The painter is named by an importable factory, so this folder never learns what a diffusion model is; it is loaded and
warmed up in a thread. Whoever stops listening to a drawing ends it. With `Follow` the same thread goes on to look which
models should serve and lets the painter load them. Where that leaves no room for requests, they are held here, for a
while, in place of being refused.
"""

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any, Literal

from cluster.api_errors import ApiError, later, once
from cluster.painter_contract import Finished, Job, MakeEvent, Painter, PaintEvent, SwappingError
from cluster.painter_loading import NOTHING_TO_FOLLOW, Follow, choices, first_that_draws, keep_following

LOADING_RETRY_S = 2
IN_USE_RETRY_S = 1
SWAPPING_RETRY_S = 10
CANCELLED_STATUS = 499
HOLD_POLL_S = 0.05
HELPERS = 4
"""Threads that judge and encode what is asked, and as many that make files: neither kind of work holds up the other."""
END_LIMIT_S = 10.0
"""A thread that waits for its turn to load is left behind after so long: it ends with the process."""
LOG = logging.getLogger(__name__)


class Drawing:
    """An accepted request: iterate over its events, then `close` it; closing before the last event frees its rows."""

    def __init__(self, events: "asyncio.Queue[MakeEvent]", makers: Executor, leave: Callable[[], None]) -> None:
        self._events, self._makers, self._leave = events, makers, leave
        self._closed = self._ended = False

    async def __aiter__(self) -> AsyncIterator[PaintEvent]:
        """Yield events up to Finished; ApiError when the request ends without."""
        loop = asyncio.get_running_loop()
        while not self._ended:
            event = await loop.run_in_executor(self._makers, await self._events.get())
            self._ended = isinstance(event, Finished)
            if event is not None:
                yield event

    async def finished(self) -> Finished:
        """Wait for the last event; ApiError when the request ends without pictures."""
        async for event in self:
            if isinstance(event, Finished):
                return event
        raise AssertionError("a drawing ends with Finished or an error")

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._leave()

    def __del__(self) -> None:
        # A stream whose client is gone before it began is dropped without ever having been entered.
        self.close()


class PainterBridge:
    """Owns a painter; `state` is loading until a first picture was drawn, then ready, or failed with `error`."""

    def __init__(self, factory: str, arguments: Mapping[str, Any], follow: Follow | None = None) -> None:
        self.error = ""
        self.swap_error = ""
        """Why a model that should be loaded is not; what drew before goes on."""
        self.state: Literal["loading", "ready", "failed"] = "loading"
        self._painter: Painter | None = None
        self._keys: dict[str, str] = {}
        """Whose the requests at work are, by request id."""
        self._limits = follow or NOTHING_TO_FOLLOW
        self._held: set[str] = set()
        """Requests that wait for a swap."""
        self._accepting: set[str] = set()
        """Requests that the painter does not know yet."""
        self._cancelled: set[str] = set()
        """Of those, the ones to end as soon as it does."""
        self._lock = threading.Lock()
        self._helpers = ThreadPoolExecutor(HELPERS, thread_name_prefix="paint-helper")
        self._makers = ThreadPoolExecutor(HELPERS, thread_name_prefix="picture-file")
        self._loaded, self._closing = threading.Event(), threading.Event()
        self._thread = threading.Thread(
            target=self._run, args=(factory, dict(arguments), follow), name="painter", daemon=True
        )
        self._thread.start()

    def wait_until_loaded(self, limit_s: float) -> None:
        """Wait for the first picture or for the reason that there is none; `state` says what came of it."""
        self._loaded.wait(limit_s)

    @property
    def painter(self) -> Painter:
        """The painter; ApiError 503 with Retry-After while there is none."""
        if self._painter is None or self.state != "ready":
            detail = f" ({self.error})" if self.error else ""
            message = f"the model is {self.state}{detail}; see /readyz"
            raise later(503, message, f"model_{self.state}", LOADING_RETRY_S)
        return self._painter

    @property
    def info(self) -> dict[str, Any]:
        """What is known of the model that serves, nothing before it is ready."""
        return self._painter.info() if self._painter is not None and self.state == "ready" else {}

    def numbers(self) -> dict[str, Any]:
        """What `serve_metrics` reads at a scrape; before the model is ready, its state alone."""
        known = self._painter.numbers() if self._painter is not None and self.state == "ready" else {}
        return {"state": self.state, **self.info, **known, "held_requests": len(self._held)}

    @property
    def versions(self) -> Sequence[int]:
        """The versions that requests may name, the champion first; none before it is ready."""
        return self._painter.versions() if self._painter is not None and self.state == "ready" else ()

    @property
    def swapping(self) -> str:
        """Why new requests wait just now, empty while they do not."""
        return self._painter.swapping() if self._painter is not None and self.state == "ready" else ""

    @property
    def problem(self) -> str:
        """Why this replica should be replaced, empty while it need not be."""
        if self.state == "failed":
            return f"the model could not be loaded: {self.error}"
        return self._painter.problem() if self._painter is not None else ""

    async def check(self, job: Job) -> None:
        """ApiError when the job would be refused now, whatever its picture: asked before work is spent on that."""
        self._check_name(job)
        await asyncio.wrap_future(self._helpers.submit(self.painter.check, job))

    async def submit(self, job: Job) -> Drawing:
        """Hand a job to the painter; ApiError says why it is refused, with Retry-After where time helps."""
        painter = self.painter
        self._check_name(job)
        self._keys[job.request_id] = job.key
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[MakeEvent] = asyncio.Queue()

        def receive(make: MakeEvent) -> None:
            with suppress(RuntimeError):  # the event loop has ended with the server: nobody listens any more
                loop.call_soon_threadsafe(events.put_nowait, make)

        drawing = Drawing(events, self._makers, partial(self._leave, painter, job.request_id))
        with self._lock:
            self._accepting.add(job.request_id)
        until = time.monotonic() + self._limits.wait_s
        if job.order.deadline_s is not None:
            until = min(until, job.arrived + job.order.deadline_s)
        while True:
            accepted = self._helpers.submit(painter.submit, job, receive)
            try:
                await asyncio.wrap_future(accepted)
                break
            except SwappingError as error:
                try:
                    await self._hold(painter, job.request_id, until, str(error))
                except BaseException:  # a caller that leaves while it is held, too
                    drawing.close()
                    raise
            except BaseException:
                # A caller that leaves now may leave a job that is being accepted: it is ended as soon as it is.
                accepted.add_done_callback(lambda _: drawing.close())
                raise
        if self._was_cancelled(job.request_id):
            drawing.close()
            raise _cancelled()
        return drawing

    def cancel(self, request_id: str, key: str) -> bool:
        """End a request of the same key; False when none of that name is at work."""
        if self._painter is None or self._keys.get(request_id) != key:
            return False
        with self._lock:
            if request_id in self._accepting:
                self._cancelled.add(request_id)
                return True
        return self._painter.cancel(request_id)

    def close(self) -> None:
        """Finish what was accepted, then end the painter and its threads."""
        self._closing.set()
        self._thread.join(END_LIMIT_S)
        if self._painter is not None:
            self._painter.close()
        self._helpers.shutdown()
        self._makers.shutdown()

    def _was_cancelled(self, request_id: str) -> bool:
        """Whether a request that the painter knows from now on was cancelled before."""
        with self._lock:
            self._accepting.discard(request_id)
            cancelled = request_id in self._cancelled
            self._cancelled.discard(request_id)
            return cancelled

    async def _hold(self, painter: Painter, request_id: str, until: float, reason: str) -> None:
        """Return when the painter takes requests again; ApiError when that takes too long, or too many wait."""
        limits = self._limits
        if len(self._held) >= limits.most_waiting:
            message = f"another model is being loaded, and {len(self._held)} requests wait for it ({reason})"
            raise later(503, message, "swapping", SWAPPING_RETRY_S)
        self._held.add(request_id)
        try:
            while painter.swapping():
                if request_id in self._cancelled:
                    raise _cancelled()
                if time.monotonic() >= until:
                    message = f"another model is being loaded, which takes longer than this request may wait ({reason})"
                    raise later(503, message, "swapping", SWAPPING_RETRY_S)
                await asyncio.sleep(HOLD_POLL_S)
        finally:
            self._held.discard(request_id)

    def _check_name(self, job: Job) -> None:
        if job.request_id in self._keys:
            message = f"x-request-id expected a new name, found {job.request_id} at work; wait, or cancel it"
            raise later(409, message, "request_id_in_use", IN_USE_RETRY_S)

    def _leave(self, painter: Painter, request_id: str) -> None:
        self._was_cancelled(request_id)
        painter.cancel(request_id)  # nothing happens to a request that has ended
        self._keys.pop(request_id, None)

    def _run(self, factory: str, arguments: dict[str, Any], follow: Follow | None) -> None:
        painter, problem = first_that_draws(factory, choices(arguments, follow))
        if painter is None:
            self.error, self.state = problem, "failed"
        else:
            self._painter, self.swap_error, self.state = painter, problem, "ready"
        self._loaded.set()
        if painter is not None and follow is not None:
            keep_following(painter, follow, self._closing, self._tell)

    def _tell(self, swap_error: str) -> None:
        self.swap_error = swap_error


def _cancelled() -> ApiError:
    return once(CANCELLED_STATUS, "the request was cancelled", "request_cancelled")
