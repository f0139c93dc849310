"""The engine: a loop in which every denoising step is one batch of whatever rows are alive.

Rows join and leave between steps, each at its own step of its own table, with its own guidance, prompt and seed; the
picture of a seed does not depend on who else is drawn. Final latents go to a decoding thread beside the loop. Several
sets of weights may be loaded: rows finish on those they began with. The loop touches tensors only through the groups
and never reads their values; everything shared with other threads is behind one lock, never held during a step.
"""

import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from PIL import Image
from torch import Tensor

from components.decode_stage import DecodeJob, DecodeStage
from components.draw_requests import Cancelled, Done, DrawRequest, Event, Failed, PartialPicture, Progress, Receiver
from components.engine_status import EngineCounters, EngineLimits, EngineStatus
from components.errors import DeadlineError, InputError, QueueFullError
from components.live_rows import AcceptedRequest, LiveRow
from components.loaded_versions import LoadedVersions
from components.models import Parts
from components.step_loop import StepLoop
from components.versions import TextCounts, Version

logger = logging.getLogger(__name__)
CLOSING = "engine expected to be open, found it closing; send the request to another replica"
LATE = (
    "deadline_s expected to leave time for all steps, found {:.3g} s too short; ask for fewer steps or a later deadline"
)


class StepBatchEngine:
    """Accepts requests from any thread; `start` runs the loop in its own, or a test calls `step` itself."""

    def __init__(
        self,
        limits: EngineLimits | None = None,
        on_dropped: Callable[[str], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`on_dropped` is told the name of every version that was let go, from whatever thread let it go."""
        self.limits = limits or EngineLimits()
        self.limits.check()
        self.counters = EngineCounters()
        self.broken: Exception | None = None
        """What ended the loop's thread, if something did: such an engine draws nothing more."""
        self._clock = clock
        self._lock = threading.Condition()
        self._versions = LoadedVersions(self._lock, on_dropped)
        self._text_counts = TextCounts()
        self._requests: dict[str, AcceptedRequest] = {}
        self._decode = DecodeStage(self.limits.strict, self._wake, self._break)
        self._loop = StepLoop(self.limits, self._lock, self._decode)
        self._closing = False
        self._thread: threading.Thread | None = None

    # Weights

    def load(self, name: str, parts: Parts, serve: bool = True) -> None:
        """Add a model, and `serve` with it, or let only requests use it that name it (`submit(..., version=name)`)."""
        limits = self.limits
        self._versions.add(
            Version(name, parts, limits.max_cached_prompts, self._text_counts, limits.max_cached_text_bytes)
        )
        if serve:
            self.serve(name)

    def serve(self, name: str) -> None:
        """Start rows from now on with a loaded version; the one before ends with its last row.

        Requests that wait without a started row move to it, unless they asked for another by name.
        """
        with self._lock:
            version, before = self._versions[name], self._versions.succeed(name)
            moving = [r for r in self._requests.values() if r.version is before and self._can_move(r)]
        for accepted in moving:
            self._move(accepted, version)
        if before is not None:
            self._versions.drop_if_idle(before)

    def retire(self, name: str) -> None:
        """Start no more rows on a version; it is dropped with its last request."""
        self._versions.retire(name)

    def _can_move(self, accepted: AcceptedRequest) -> bool:
        return accepted.started_at is None and not accepted.ended and not accepted.pinned

    def _move(self, accepted: AcceptedRequest, version: Version) -> None:
        with suppress(InputError):  # a size or start picture that the new model cannot take: drawn by the old one
            prepared = version.prepare(accepted.request)
            with self._lock:
                if self._can_move(accepted):
                    accepted.version.num_requests -= 1
                    version.num_requests += 1
                    accepted.version, accepted.prepared = version, prepared

    # Requests

    def submit(self, request: DrawRequest, receive: Receiver, version: str | None = None) -> None:
        """Accept a request, or raise at once: InputError, QueueFullError (with `retry_after_s`) or DeadlineError.

        Encodes its prompts in the caller's thread. Every event, the last one included, goes to `receive`.
        """
        request.check()
        while True:
            chosen = self._hold(version)
            try:
                accepted = AcceptedRequest(
                    request, chosen, receive, self._clock(), version is not None, chosen.prepare(request)
                )
                with self._lock:
                    if not (chosen.retired and self._versions.newest is not None and version is None):
                        self._accept(accepted)
                        return
            except BaseException:  # also of who is interrupted: a version that is held for ever is never let go
                self._versions.release(chosen)
                raise
            self._versions.release(chosen)

    def check_room(self, num_rows: int, key: str, priority: float) -> None:
        """QueueFullError when `submit` would raise it now for so many pictures of a key."""
        with self._lock:
            self._loop.check_room(num_rows, key, priority)

    def cancel(self, request_id: str) -> bool:
        """End a request with Cancelled; its rows are gone at the next step. False when it has ended already."""
        with self._lock:
            accepted = self._requests.get(request_id)
        return accepted is not None and self._end(accepted, Cancelled(request_id, accepted.steps_left))

    def status(self) -> EngineStatus:
        with self._lock:
            backlog, rate = self._loop.backlog_pixel_steps, self._loop.times.rate
            newest = self._versions.newest
            compiled = newest.parts.compiled if newest is not None else None
            return EngineStatus(
                live_rows=self._loop.num_rows,
                waiting_rows=len(self._loop.queue),
                backlog_pixel_steps=backlog,
                backlog_s=self._loop.backlog_s,
                rate=rate,
                versions={version.name: version.num_requests for version in self._versions},
                text_hits=self._text_counts.hits,
                text_misses=self._text_counts.misses,
                encoding_s=self._text_counts.encoding_s,
                decoding_s=self._decode.decoding_s,
                decode_s=self._decode.picture_s,
                compiled_shapes=len(compiled.shapes) if compiled is not None else 0,
            )

    def _hold(self, name: str | None) -> Version:
        with self._lock:
            if self._closing:
                raise InputError(CLOSING)
            return self._versions.hold(name)

    def _accept(self, accepted: AcceptedRequest) -> None:
        """Under the lock: refuse what can never be drawn or not in time, let the rest wait."""
        request = accepted.request
        if self._closing:  # since it was held: preparing takes a while
            raise InputError(CLOSING)
        if request.request_id in self._requests:
            raise InputError(f"request_id expected a new one, found {request.request_id!r} at work; choose another")
        try:
            self._loop.accept(accepted)
        except (DeadlineError, QueueFullError):
            self.counters.refused += 1
            raise
        self._requests[request.request_id] = accepted
        self._lock.notify_all()

    # The loop

    def start(self) -> None:
        """Run the loop in a thread of its own until `close`."""
        self._thread = threading.Thread(target=self._run, name="denoise", daemon=True)
        self._thread.start()

    def close(self, drain: bool = True) -> None:
        """Accept nothing more, finish what was accepted (or fail it, without `drain`), and end the threads."""
        with self._lock:
            self._closing = True
            left = [] if drain else list(self._requests.values())
            self._lock.notify_all()
        for accepted in left:
            self._end(accepted, Failed(accepted.request.request_id, InterruptedError("the engine was closed")))
        if self._thread is not None:
            self._thread.join()
        self._loop.close()
        self._decode.close()

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                self.step()
        except Exception as error:  # a fault of the loop itself: nobody may wait for ever, and health must show it
            logger.exception("the denoising loop ended")
            self._break(error)

    def _break(self, error: Exception) -> None:
        with self._lock:
            self.broken, self._closing = self.broken or error, True
            left = list(self._requests.values())
            self._lock.notify_all()
        for accepted in left:
            self._fail(accepted, error)

    def _wake(self) -> None:
        with self._lock:
            self._lock.notify_all()

    def _wait_for_work(self) -> bool:
        """Wait until rows can step or a deadline passes; False when the engine closes and no row is left."""
        with self._lock:
            while not self._loop.can_step:
                if self._closing and not self._loop.busy:
                    return False
                deadline = min((r.deadline for r in self._requests.values() if r.deadline is not None), default=None)
                left_s = None if deadline is None else deadline - self._clock()
                if left_s is not None and left_s < 0:
                    return True
                self._lock.wait(left_s)
            return True

    def step(self) -> bool:
        """Let rows leave and join, make one step, hand over what is finished; False when there is nothing to do."""
        late = self._loop.change_rows(self._clock(), self._requests.values())
        for accepted in late:
            self._fail(accepted, DeadlineError(LATE.format(accepted.request.deadline_s)))
        outcome = self._loop.step(self.counters)
        for accepted, error in outcome.failed.items():
            self._fail(accepted, error)
        for row in outcome.moved:
            if row.owner.request.progress:
                self._send(row.owner, Progress(row.owner.request.request_id, row.index, row.step, row.steps))
        for row, latents_CHW in outcome.partial:
            self._put(row, latents_CHW, row.partial_steps.index(row.step))
        for row, latents_CHW in outcome.final:
            self._put(row, latents_CHW, None)
        return bool(late or outcome.moved or outcome.failed)

    def _put(self, row: LiveRow, latents_CHW: Tensor, early: int | None) -> None:
        owner, deliver = row.owner, partial(self._decoded, row, early)
        job = DecodeJob(
            owner.version.parts.vae, latents_CHW, deliver, early is None, lambda: not owner.ended, row.pixels
        )
        self._decode.put(job)

    # Events

    def _decoded(self, row: LiveRow, early: int | None, result: Image.Image | Exception) -> None:
        accepted, request_id = row.owner, row.owner.request.request_id
        if isinstance(result, Exception):
            self._fail(accepted, result)
        elif early is not None:
            self._send(accepted, PartialPicture(request_id, row.index, early, result, accepted.version.name))
        else:
            accepted.pictures[row.index] = result
            pictures = tuple(picture for picture in accepted.pictures if picture is not None)
            if accepted.is_late(self._clock()):
                self._fail(accepted, DeadlineError(LATE.format(accepted.request.deadline_s)))
            elif len(pictures) == len(accepted.pictures):
                started_at = accepted.started_at or accepted.accepted_at
                waited_s, drawn_s = started_at - accepted.accepted_at, self._clock() - started_at
                self._end(accepted, Done(request_id, pictures, accepted.version.name, waited_s, drawn_s))

    def _fail(self, accepted: AcceptedRequest, error: Exception) -> None:
        self._end(accepted, Failed(accepted.request.request_id, error))

    def _end(self, accepted: AcceptedRequest, event: Done | Failed | Cancelled) -> bool:
        """Send a request's last event, once; its rows are free from here on."""
        with accepted.send_lock:
            with self._lock:
                if accepted.ended:
                    return False
                accepted.ended = True
                self._requests.pop(accepted.request.request_id, None)
                self._loop.queue.remove(lambda row: row.owner is accepted)
                self.counters.ended(event, accepted.steps_left)
                self._lock.notify_all()
            self._receive(accepted, event)
        self._versions.release(accepted.version)
        return True

    def _send(self, accepted: AcceptedRequest, event: Event) -> None:
        with accepted.send_lock:
            if not accepted.ended:
                self._receive(accepted, event)

    def _receive(self, accepted: AcceptedRequest, event: Event) -> None:
        try:
            accepted.receive(event)
        except Exception:  # a receiver's fault must not stop the others' pictures
            logger.exception("the receiver of request %s raised", accepted.request.request_id)
