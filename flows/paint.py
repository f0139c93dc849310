"""The model behind the endpoint: jobs in plain values become rows of the step-batching engine, its events become files.

The replica names `make_painter` as its factory. Prompts are judged and encoded in the thread that submits, pictures are
judged, retouched, encoded and signed in the thread that takes them. Files say what drew them and never what was asked.
"""

import logging
import math
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from cluster.api_errors import ApiError, later, once, refused_content
from cluster.artifacts import open_workspace
from cluster.painter_contract import Finished, Job, MakeEvent, PaintEvent, Partial, Receiver
from components.draw_requests import Cancelled, Done, DrawRequest, Event, Failed, PartialPicture, StartPicture
from components.engine_status import EngineLimits
from components.errors import DeadlineError, InputError, QueueFullError
from components.provenance import encode
from components.retouch import ENLARGES, RETOUCHES, retouch
from components.safety import Safety, open_safety
from components.sampler import PictureRequest, draw
from components.signing_key import Signer, open_signer
from components.start_pictures import make_start, paste_kept
from components.step_batch import StepBatchEngine
from components.threads import settle_threads
from flows.config import Config
from flows.loaded_model import LateEncoder, LoadedModel, load_model, model_arguments
from flows.models import ResolvedModel

LOG = logging.getLogger(__name__)
FACTORY = "flows.paint:make_painter"
WARM_UP = "warm up"
WARM_UP_LIMIT_S = 120.0
FACTS = ("model_version", "dataset", "run_id")
"""What every picture says of the weights that drew it."""
MOST_RETRY_AFTER_S = 60
"""The OpenAI client does not wait longer by itself."""
UNKNOWN_RETRY_AFTER_S = 2
CANCELLED_STATUS = 499


class EnginePainter:
    """An engine with the model that serves, its predecessors as long as they draw, and what makes a file of a picture.

    See `cluster.painter_contract.Painter` for what the routes may ask.
    """

    def __init__(
        self, model: LoadedModel, limits: EngineLimits, safety: Safety, signer: Signer, encoder: LateEncoder
    ) -> None:
        self.encoder = encoder
        self._safety, self._signer, self._num_models = safety, signer, 0
        self._facts: dict[str, Mapping[str, Any]] = {}
        """Of every version that still draws, by the engine's name for it."""
        self._swapping = threading.Lock()
        self._num_swaps, self._swap_s = 0, 0.0
        self._ending = False
        self.engine = StepBatchEngine(limits, on_dropped=self._forget)
        self._serve(model)
        self.engine.start()

    def info(self) -> dict[str, Any]:
        return {**self.model.info, "postprocess": list(RETOUCHES), "enlarges": dict(ENLARGES)}

    def warm_up(self) -> None:
        """Draw a picture through the engine; raises what the engine raised."""
        ended = threading.Event()
        last: list[Event] = []

        def receive(event: Event) -> None:
            last.append(event)
            ended.set()

        self.engine.submit(DrawRequest(WARM_UP, (_warm_up_row(self.model),)), receive)
        if not ended.wait(WARM_UP_LIMIT_S):
            raise TimeoutError(f"a first picture expected within {WARM_UP_LIMIT_S:.0f} s, found none")
        if isinstance(last[0], Failed):
            raise last[0].error

    def submit(self, job: Job, receive: Receiver) -> None:
        """Accept a job; ApiError for what the safety stage or the engine refuses."""
        self._judge(job)

        def put(event: Event) -> None:
            make = self._maker(job, event)
            if make is not None:
                receive(make)

        try:
            if job.upload is None:
                self.engine.submit(_request(job, None), put)
            else:
                self._submit_edit(job, put)
        except (InputError, QueueFullError, DeadlineError) as error:
            raise self._refusal(error) from error

    def cancel(self, request_id: str) -> bool:
        return self.engine.cancel(request_id)

    def numbers(self) -> dict[str, Any]:
        engine = {**asdict(self.engine.status()), **asdict(self.engine.counters)}
        return {**engine, "swaps": self._num_swaps, "swap_s": self._swap_s}

    def problem(self) -> str:
        broken = self.engine.broken
        return f"the denoising loop ended: {type(broken).__name__}: {broken}" if broken is not None else ""

    def swap(self, arguments: Mapping[str, Any]) -> None:
        """Load another model beside the one that serves; a model that cannot draw raises and changes nothing."""
        start = time.monotonic()
        model = load_model(**arguments["model"])
        draw(model.parts, [_warm_up_row(model)])
        self._serve(model)
        self._num_swaps, self._swap_s = self._num_swaps + 1, self._swap_s + time.monotonic() - start

    def close(self) -> None:
        self._ending = True
        self.engine.close()

    def _serve(self, model: LoadedModel) -> None:
        with self._swapping:
            self._num_models += 1
            # A version may come back after a rollback, while its rows of before are still drawn.
            name = f"{model.info.get('model_version')} ({self._num_models})"
            self._facts[name] = {key: model.info.get(key) for key in FACTS}
            self.engine.load(name, model.parts)
            self.model, self._name = model, name

    def _forget(self, name: str) -> None:
        self._facts.pop(name)

    def _submit_edit(self, job: Job, put: Any) -> None:
        """Encode the picture by the model that will draw it: the request is held to that version."""
        assert job.upload is not None
        while True:
            model, name = self.model, self._name
            size = (job.order.rows[0]["width_px"], job.order.rows[0]["height_px"])
            start = make_start(model.parts, job.upload.picture, job.upload.mask, size, job.order.strength)
            with self._swapping:
                if name == self._name:
                    self.engine.submit(_request(job, start), put, version=name)
                    return

    def _judge(self, job: Job) -> None:
        decision = self._safety.check_prompt(job.order.rows[0]["prompt"])
        if not decision.allowed:
            raise refused_content(decision.category)
        for decision in self._safety.check_pictures([job.upload.picture] if job.upload else []):
            if not decision.allowed:
                raise refused_content(decision.category, "image")

    def _maker(self, job: Job, event: Event) -> MakeEvent | None:
        """Return what makes an event of the routes of one of the engine; None where they have none."""
        if isinstance(event, Done):
            # Taken here and now: a version that has ended is forgotten.
            return partial(self._finish, job, event.pictures, self._facts[event.version])
        if isinstance(event, PartialPicture):
            return partial(self._show, job, event)
        if isinstance(event, Failed):
            return partial(_raise, self._failure(event.error))
        if isinstance(event, Cancelled):
            return partial(_raise, once(CANCELLED_STATUS, "the request was cancelled", "request_cancelled"))
        return None

    def _finish(self, job: Job, pictures: Sequence[Image.Image], facts: Mapping[str, Any]) -> PaintEvent:
        pictures = [_with_kept(job, picture) for picture in pictures]
        for decision in self._safety.check_pictures(pictures):
            if not decision.allowed:
                raise refused_content(decision.category)
        shown = [retouch(picture, job.order.postprocess) for picture in pictures]
        contents = tuple(self._file(job, row, picture, facts, retouched=True) for row, picture in enumerate(shown))
        return Finished(contents, f"{shown[0].width}x{shown[0].height}", facts, pictures)

    def _show(self, job: Job, event: PartialPicture) -> PaintEvent | None:
        picture = _with_kept(job, event.picture)
        if not self._safety.check_pictures([picture])[0].allowed:
            return None  # the finished picture is judged by itself
        return Partial(event.row, event.index, self._file(job, event.row, picture, {}))

    def _file(
        self, job: Job, index: int, picture: Image.Image, facts: Mapping[str, Any], retouched: bool = False
    ) -> bytes:
        order, row = job.order, job.order.rows[index]
        drawn_as = {key: row[key] for key in ("seed", "steps", "guidance_scale")}
        every = {**facts, "request_id": job.request_id, **drawn_as}
        if retouched and order.postprocess:
            every["postprocess"] = ", ".join(order.postprocess)
        return encode(picture, order.output_format, order.quality, every, self._signer)

    def _refusal(self, error: Exception) -> ApiError:
        if isinstance(error, QueueFullError):
            seconds = _retry_after_s(error.retry_after_s)
            return later(429, f"{error} (serve.max_queue), in {seconds} s", "queue_full", seconds)
        if isinstance(error, DeadlineError):
            return ApiError(str(error), "deadline_s", "deadline_too_short")
        if self.engine.broken is not None:
            return later(503, self.problem(), "model_failed", UNKNOWN_RETRY_AFTER_S)
        if self._ending:
            return _shutting_down()
        return ApiError(str(error), code="invalid_value")

    def _failure(self, error: Exception) -> ApiError:
        """What ends a request that was accepted; a client must not ask for the same work again by itself."""
        if isinstance(error, DeadlineError):
            return once(504, str(error), "deadline_exceeded")
        if isinstance(error, InterruptedError):
            return _shutting_down()
        LOG.error("a request failed", exc_info=error)
        return once(500, f"drawing failed: {type(error).__name__}; the endpoint's log says more", "drawing_failed")


def painter_arguments(config: Config, model: ResolvedModel, device: str) -> dict[str, Any]:
    """Return what `make_painter` needs, as plain values that travel to another process."""
    from components.models import embedded_clip

    serve = config.serve
    return {
        "model": model_arguments(config, model, device),
        "limits": {
            "max_batch_rows": serve.max_batch_rows,
            "max_waiting_rows": serve.max_queue,
            "max_cached_prompts": serve.max_cached_prompts,
            "strict": serve.strict,
        },
        "safety": {
            "blocklist_file": serve.blocklist_file,
            "classifier": serve.safety_classifier,
            "options": dict(serve.safety_options),
        },
        "threads": serve.threads,
        "keys": str(open_workspace(config.workspace).keys),
        "clip": str(Path(config.model.clip).expanduser().absolute() if config.model.clip else embedded_clip()),
    }


def make_painter(
    model: Mapping[str, Any],
    limits: Mapping[str, Any],
    safety: Mapping[str, Any],
    keys: str,
    clip: str,
    threads: int = 0,
) -> EnginePainter:
    """Load a model and start an engine for it; `keys` is the folder of the key that signs pictures.

    `threads` draw, on a CPU; 0 finds out how many are fastest.
    """
    judges = open_safety(**safety)
    signer = open_signer(Path(keys))
    loaded = load_model(**model)
    if threads:
        torch.set_num_threads(threads)
    elif loaded.parts.denoiser.device.type == "cpu":
        settle_threads(lambda: draw(loaded.parts, [_warm_up_row(loaded)]), torch.get_num_threads())
    return EnginePainter(loaded, EngineLimits(**limits), judges, signer, LateEncoder(clip))


def _warm_up_row(model: LoadedModel) -> PictureRequest:
    return PictureRequest(WARM_UP, steps=2, width_px=model.info["width_px"], height_px=model.info["height_px"])


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
        partial_images=order.partial_images if order.stream else 0,
    )


def _with_kept(job: Job, picture: Image.Image) -> Image.Image:
    """Put back what a mask keeps of an edited picture: decoding alone would blur it."""
    if job.upload is None or job.upload.mask is None:
        return picture
    return paste_kept(picture, job.upload.picture, job.upload.mask)


def _retry_after_s(seconds: float | None) -> int:
    return min(MOST_RETRY_AFTER_S, max(1, math.ceil(seconds))) if seconds is not None else UNKNOWN_RETRY_AFTER_S


def _shutting_down() -> ApiError:
    return later(503, "the endpoint is ending; ask again", "shutting_down", UNKNOWN_RETRY_AFTER_S)


def _raise(error: ApiError) -> PaintEvent:
    raise error
