"""The model behind the endpoint: jobs in plain values become rows of the step-batching engine, its events become files.

The replica names `make_painter` as its factory. Which weights draw a job is `swap.Lineup`'s to say, what becomes of a
picture `finish.Finisher`'s. Prompts are judged and encoded in the thread that submits.
"""

import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from cluster import stage
from cluster.api_errors import ApiError, later, once
from cluster.artifacts import open_workspace
from cluster.painter_contract import Job, MakeEvent, PaintEvent, Receiver
from cluster.role_metrics import Role, RoleTallies
from components.draw_requests import Cancelled, Done, DrawRequest, Event, Failed, PartialPicture, StartPicture
from components.engine_status import EngineLimits
from components.errors import DeadlineError, InputError, QueueFullError
from components.retouch import ENLARGES, RETOUCHES
from components.safety import Safety, open_safety
from components.sampler import PictureRequest
from components.signing_key import PUBLIC_SUFFIX, Signer, open_signer
from components.start_pictures import make_start
from flows.config import Config
from flows.finish import Finisher
from flows.loaded_model import LateEncoder, model_arguments
from flows.models import ResolvedModel
from flows.phases import Stopwatch
from flows.refusals import UNKNOWN_RETRY_AFTER_S, failure, queue_full, shutting_down, unmet_deadline
from flows.shadow import Shadows
from flows.swap import WARM_UP, Lineup, Loaded, VersionSettings, can_draw, warm_up_row

FACTORY = "flows.paint:make_painter"
WARM_UP_LIMIT_S = 120.0
CANCELLED_STATUS = 499


class EnginePainter:
    """An engine with the models that serve, and what makes files of its pictures.

    See `cluster.painter_contract.Painter` for what the routes may ask.
    """

    def __init__(self, lineup: Lineup, safety: Safety, signer: Signer, encoder: LateEncoder) -> None:
        self.encoder, self.lineup, self.engine = encoder, lineup, lineup.engine
        self._tallies = RoleTallies()
        self._finisher = Finisher(safety, signer, self._tallies)
        self._shadows = Shadows(self.engine, self._tallies, lineup.settings.shadow_share)
        lineup.before_drain = self._shadows.cancel_all
        self._ending = False
        self.engine.start()

    def info(self, version: int | None = None) -> dict[str, Any]:
        loaded = self.lineup.champion if version is None else self.lineup.named(version)[0]
        return {**loaded.info, "postprocess": list(RETOUCHES), "enlarges": dict(ENLARGES)}

    def versions(self) -> list[int]:
        return self.lineup.versions()

    def warm_up(self) -> None:
        """Draw a picture through the engine; raises what the engine raised."""
        ended = threading.Event()
        last: list[Event] = []

        def receive(event: Event) -> None:
            last.append(event)
            ended.set()

        self.engine.submit(DrawRequest(WARM_UP, (warm_up_row(self.lineup.champion.info),)), receive)
        if not ended.wait(WARM_UP_LIMIT_S):
            raise TimeoutError(f"a first picture expected within {WARM_UP_LIMIT_S:.0f} s, found none")
        if isinstance(last[0], Failed):
            raise last[0].error

    def check(self, job: Job) -> None:
        """Refuse a job for which the queue has no room, before anybody decodes its picture."""
        try:
            self.engine.check_room(len(job.order.rows), job.key, job.order.weight)
        except QueueFullError as error:
            raise self._refusal(error) from error

    def submit(self, job: Job, receive: Receiver) -> None:
        """Accept a job; ApiError for what the safety stage or the engine refuses, SwappingError while it must wait."""
        self.lineup.choose(job)  # a job that must wait is judged when it comes again
        self.check(job)  # a full queue is known before anybody judges or encodes
        self._finisher.judge(job)
        while True:
            chosen, role = self.lineup.choose(job)
            try:
                self._hand_over(job, chosen, role, receive)
                break
            except InputError as error:
                if self.lineup.serves(chosen):
                    raise self._refusal(error) from error
                # It was let go meanwhile: the choice is made again.
            except (QueueFullError, DeadlineError) as error:
                raise self._refusal(error) from error
        if role == "champion" and job.upload is None and job.version is None:
            self._shadows.offer(_request(job, None), partial(self._shadow_of, job))

    def cancel(self, request_id: str) -> bool:
        cancelled = self.engine.cancel(request_id)
        if cancelled:
            self._shadows.cancel(request_id)
        return cancelled

    def numbers(self) -> dict[str, Any]:
        engine = {**asdict(self.engine.status()), **asdict(self.engine.counters)}
        return {**engine, **self.lineup.numbers(), "roles": self._tallies.read()}

    def problem(self) -> str:
        broken = self.engine.broken
        ended = f"the denoising loop ended: {type(broken).__name__}: {broken}" if broken is not None else ""
        return ended or self.lineup.lost

    def swapping(self) -> str:
        return self.lineup.waiting

    def swap(self, arguments: Mapping[str, Any]) -> None:
        """Load what is not loaded yet; a model that cannot draw raises, and what drew before goes on.

        The challenger's share of the requests is what is written from now on.
        """
        lineup, written = self.lineup, arguments.get("versions", {})
        share = written.get("challenger_share", lineup.settings.challenger_share)
        lineup.settings = replace(lineup.settings, challenger_share=share)
        lineup.follow(arguments["model"], arguments.get("challenger"))

    def close(self) -> None:
        self._ending = True
        self._shadows.close()
        self.engine.close()

    def _hand_over(self, job: Job, chosen: Loaded, role: Role, receive: Receiver) -> None:
        watch = Stopwatch() if job.timed else None

        def put(event: Event) -> None:
            if watch is not None:
                watch.hear(event)
            make = self._maker(job, role, event, watch)
            if make is not None:
                receive(make)

        start, parts = None, chosen.parts
        if job.upload is not None:
            if parts is None:
                raise InputError(f"version {chosen.version} expected to be loaded, found it let go; ask again")
            # Encoded by the model that will draw it.
            size = (job.order.rows[0]["width_px"], job.order.rows[0]["height_px"])
            start = make_start(parts, job.upload.picture, job.upload.mask, size, job.order.strength)
        held = start is not None or role != "champion" or job.version is not None
        # What is not held to a version moves to a new champion as long as it waits.
        self.engine.submit(_request(job, start), put, version=chosen.name if held else None)

    def _shadow_of(self, job: Job) -> str | None:
        challenger = self.lineup.challenger
        return challenger.name if challenger is not None and can_draw(challenger, job) else None

    def _maker(self, job: Job, role: Role, event: Event, watch: Stopwatch | None) -> MakeEvent | None:
        """Return what makes an event of the routes of one of the engine; None where they have none."""
        if isinstance(event, Done):
            self._tallies.done(role, event.waited_s + event.drawn_s, _step_s(job, event))
            # Taken here and now: a version that has ended is forgotten.
            info = self.lineup.facts(event.version)
            return partial(self._finisher.finish, job, event.pictures, info, role, watch)
        if isinstance(event, PartialPicture):
            info = self.lineup.facts(event.version)
            return partial(self._finisher.show, job, event.row, event.index, event.picture, info)
        if isinstance(event, Failed):
            self._tallies.ended(role, "failed")
            return partial(_raise, failure(event.error, job.request_id))
        if isinstance(event, Cancelled):
            self._tallies.ended(role, "cancelled")
            return partial(_raise, once(CANCELLED_STATUS, "the request was cancelled", "request_cancelled"))
        return None

    def _refusal(self, error: Exception) -> ApiError:
        if isinstance(error, QueueFullError):
            return queue_full(error)
        if isinstance(error, DeadlineError):
            return unmet_deadline(error)
        if self.engine.broken is not None:
            return later(503, self.problem(), "model_failed", UNKNOWN_RETRY_AFTER_S)
        if self._ending:
            return shutting_down()
        return ApiError(str(error), code="invalid_value")


def painter_arguments(
    config: Config, model: ResolvedModel, device: str, challenger: ResolvedModel | None = None
) -> dict[str, Any]:
    """Return what `make_painter` needs, as plain values that travel to another process."""
    from components.models import embedded_clip

    serve, workspace = config.serve, open_workspace(config.workspace)
    # Lists, not tuples: these arguments are compared with what was read from JSON.
    compile_rows = [serve.max_batch_rows] if serve.strict else list(serve.buckets)

    def told(one: ResolvedModel) -> dict[str, Any]:
        return {**model_arguments(config, one, device), "compile_rows": compile_rows if serve.compile else []}

    return {
        "model": told(model),
        "challenger": told(challenger) if challenger is not None else None,
        "limits": {
            "max_batch_rows": serve.max_batch_rows,
            "max_waiting_rows": serve.max_queue,
            "max_live_pixels": serve.max_live_pixels,
            "max_cached_prompts": serve.max_cached_prompts,
            "max_cached_text_bytes": serve.max_cached_text_bytes,
            "strict": serve.strict,
            "row_buckets": list(serve.buckets),
        },
        "versions": {
            "challenger_share": serve.challenger_share,
            "shadow_share": serve.shadow_share,
            "memory_headroom_bytes": serve.memory_headroom_bytes,
            "turns_folder": str(workspace.root / "serving"),
        },
        "safety": {
            "blocklist_file": serve.blocklist_file,
            "classifier": serve.safety_classifier,
            "options": dict(serve.safety_options),
        },
        "keys": str(workspace.keys),
        "clip": str(Path(config.model.clip).expanduser().absolute() if config.model.clip else embedded_clip()),
    }


def make_painter(
    model: Mapping[str, Any],
    limits: Mapping[str, Any],
    safety: Mapping[str, Any],
    keys: str,
    clip: str,
    versions: Mapping[str, Any] | None = None,
    challenger: Mapping[str, Any] | None = None,
) -> EnginePainter:
    """Load a model and start an engine for it; `keys` is the folder of the key that signs pictures.

    A challenger is not loaded here: `swap` does so once the champion answers, which must not wait for it.
    """
    judges = open_safety(**safety)
    signer = open_signer(Path(keys))
    for public in Path(keys).glob(f"*{PUBLIC_SUFFIX}"):
        stage.keep(public)
    lineup = Lineup(model, EngineLimits(**limits), VersionSettings(**(versions or {})))
    return EnginePainter(lineup, judges, signer, LateEncoder(clip))


def _request(job: Job, start: StartPicture | None) -> DrawRequest:
    order = job.order
    return DrawRequest(
        job.request_id,
        tuple(PictureRequest(**row) for row in order.rows),
        solver=order.scheduler,
        start=start,
        key=job.key,
        priority=order.weight,
        deadline_s=order.deadline_s,
        waited_s=time.monotonic() - job.arrived,
        partial_images=order.partial_images if order.stream else 0,
        progress=job.timed,
    )


def _step_s(job: Job, event: Done) -> float | None:
    """Seconds for each step; an edit makes fewer than it names."""
    return event.drawn_s / job.order.rows[0]["steps"] if job.upload is None else None


def _raise(error: ApiError) -> PaintEvent:
    raise error
