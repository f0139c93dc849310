"""The bridge between the event loop of the routes and the threads of the painter: a job in, its events out.

The painter is named by an importable factory, so this folder never learns what a diffusion model is; it is loaded and
warmed up in a thread. Whoever stops listening to a drawing ends it. With `Follow` the same thread goes on to look which
model should serve and lets the painter load it beside the old one.
"""

import asyncio
import importlib
import logging
import threading
import traceback
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from cluster.api_errors import later, once
from cluster.painter_contract import Finished, Job, MakeEvent, Painter, PaintEvent

LOADING_RETRY_S = 2
IN_USE_RETRY_S = 1
GONE_STATUS = 499
HELPERS = 4
"""Threads that judge and encode what is asked, and as many that make files: neither kind of work holds up the other."""
LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Follow:
    """Where to look for the model that should serve: an importable `module:function` and its keyword arguments.

    It returns the factory's arguments for that model, or None when nothing can be said.
    """

    resolver: str
    arguments: Mapping[str, Any]
    every_s: float


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
        """Why the model that should serve does not; the one before goes on."""
        self.state: Literal["loading", "ready", "failed"] = "loading"
        self._painter: Painter | None = None
        self._keys: dict[str, str] = {}
        """Whose the requests at work are, by request id."""
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
        return {"state": self.state, **self.info, **known}

    @property
    def problem(self) -> str:
        """Why this replica should be replaced, empty while it need not be."""
        if self.state == "failed":
            return f"the model could not be loaded: {self.error}"
        return self._painter.problem() if self._painter is not None else ""

    async def submit(self, job: Job) -> Drawing:
        """Hand a job to the painter; ApiError says why it is refused, with Retry-After where time helps."""
        painter = self.painter
        if job.request_id in self._keys:
            message = f"x-request-id expected a new name, found {job.request_id} at work; wait, or cancel it"
            raise later(409, message, "request_id_in_use", IN_USE_RETRY_S)
        self._keys[job.request_id] = job.key
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[MakeEvent] = asyncio.Queue()

        def receive(make: MakeEvent) -> None:
            with suppress(RuntimeError):  # the event loop has ended with the server: nobody listens any more
                loop.call_soon_threadsafe(events.put_nowait, make)

        drawing = Drawing(events, self._makers, partial(self._leave, painter, job.request_id))
        with self._lock:
            self._accepting.add(job.request_id)
        accepted = self._helpers.submit(painter.submit, job, receive)
        try:
            await asyncio.wrap_future(accepted)
        except BaseException:
            # A caller that leaves now may leave a job that is being accepted: it is ended as soon as it is.
            accepted.add_done_callback(lambda _: drawing.close())
            raise
        if self._was_cancelled(job.request_id):
            drawing.close()
            raise once(GONE_STATUS, "the request was cancelled", "request_cancelled")
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
        self._thread.join()
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

    def _leave(self, painter: Painter, request_id: str) -> None:
        self._was_cancelled(request_id)
        painter.cancel(request_id)  # nothing happens to a request that has ended
        self._keys.pop(request_id, None)

    def _run(self, factory: str, arguments: dict[str, Any], follow: Follow | None) -> None:
        # A replica that starts late begins with the model that should serve by now; if that cannot draw, with the one
        # the endpoint was started with, as the replicas do that were there before it.
        wanted = _wanted(follow) or arguments
        painter = self._first_that_draws(factory, [wanted, arguments] if wanted != arguments else [arguments])
        if painter is not None:
            self._painter, self.error, self.swap_error = painter, "", self.error
        self.state = "ready" if painter is not None else "failed"
        self._loaded.set()
        if painter is not None and follow is not None:
            self._follow(painter, wanted, follow)

    def _first_that_draws(self, factory: str, choices: Sequence[Mapping[str, Any]]) -> Painter | None:
        """Return the painter of the first arguments with which a picture can be drawn; `error` is of those before."""
        for arguments in choices:
            try:
                painter: Painter = _import(factory)(**arguments)
                painter.warm_up()
                return painter
            except Exception as error:  # whatever a model's code raises: the endpoint must say it, not vanish
                traceback.print_exc()
                self.error = f"{type(error).__name__}: {error}"
        return None

    def _follow(self, painter: Painter, serving: Mapping[str, Any], follow: Follow) -> None:
        """Swap when the resolver names another model; one that cannot be loaded is tried again when it changes."""
        resolve, tried = _import(follow.resolver), dict(serving)
        while not self._closing.wait(follow.every_s):
            wanted: dict[str, Any] | None = None
            try:
                wanted = resolve(**follow.arguments)
                if wanted is not None and wanted != tried:
                    tried = wanted
                    painter.swap(wanted)
                    self.swap_error = ""
            except Exception as error:  # of a registry, a disk or a model: what serves goes on serving
                self.swap_error = f"{type(error).__name__}: {error}"
                LOG.exception("the model that should serve could not be loaded; the one before goes on")


def _wanted(follow: Follow | None) -> dict[str, Any] | None:
    """Return the arguments of the model that should serve, None when nothing can be said."""
    try:
        return None if follow is None else _import(follow.resolver)(**follow.arguments)
    except Exception:  # of a disk or a registry: the replica begins with what it was given
        LOG.exception("which model should serve could not be read")
        return None


def _import(name: str) -> Callable[..., Any]:
    module, _, function = name.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return found
