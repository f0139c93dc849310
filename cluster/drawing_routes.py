"""The routes that draw: generations, edits, and the cancelling of either.

A request is checked against every limit before the painter hears of it. Its rows are freed as soon as its client is
gone, streamed or not. What was drawn is offered to capture after the answer has been sent.
"""

import asyncio
import math
import time
from collections.abc import Callable, Coroutine
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from fastapi import Depends, FastAPI
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.background import BackgroundTask
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from cluster.answers import answer, headers_of, write_events
from cluster.api_description import DRAWN, errors
from cluster.api_errors import MOST_NAME_CHARS, ApiError, once
from cluster.api_keys import ApiKey
from cluster.artifacts import Workspace
from cluster.cancel_files import CancelFiles
from cluster.capture import Capture, Served, open_capture
from cluster.images_schema import ImageOptions, ImagesRequest, make_order
from cluster.metric_files import MetricFiles, metrics_folder
from cluster.painter_bridge import PainterBridge
from cluster.painter_contract import Finished, Job
from cluster.picture_urls import PictureStore, address_of, open_pictures
from cluster.placement import ServeSection
from cluster.request_ids import request_id_of
from cluster.request_log import RequestLog
from cluster.request_watch import arrived_at, note, note_error
from cluster.serve_metrics import ServeMetrics
from cluster.sse import stream
from cluster.tracing import open_traces
from cluster.uploads import Files, describe_body, read_edit, scaled

GENERATIONS_ROUTE = "/v1/images/generations"
EDITS_ROUTE = "/v1/images/edits"
REQUESTS_ROUTE = "/v1/requests"
LOCAL = "local"
GONE_STATUS = 499
"""As nginx and Ray Serve call it: the client closed the request."""
READ_TIMEOUT = "x-stainless-read-timeout"
"""Header of the OpenAI client, in seconds: what it has not read by then it gives up and asks for twice more."""
PART_OF_READ_TIMEOUT = 0.9
"""Of it a request may take; the rest is for the way of the answer that says not to ask again."""

T = TypeVar("T")
Caller = Callable[[Request], ApiKey | None]


class CancelledRequest(BaseModel):
    id: str
    object: Literal["request"] = "request"
    cancelled: Literal[True] = True


@dataclass
class Desk:
    """What the drawing routes share: the painter, the limits, and where pictures and captured features go."""

    bridge: PainterBridge
    limits: ServeSection
    name: str
    """What clients may call the model."""
    folder: Path
    """The workspace's."""
    replica: str = LOCAL
    """Name of this replica in metrics and log; LOCAL when Ray Serve does not run it."""
    application: str = "fresco"
    """Of Ray Serve: one that is tried beside the one that serves (`fresco promote`) keeps its files apart."""
    pictures: PictureStore = field(init=False)
    _capture: Capture | None = None

    def __post_init__(self) -> None:
        self.pictures = open_pictures(self.limits, Workspace(self.folder).pictures)
        serving = self.folder / "serving" / self.application
        self.metrics = ServeMetrics(self.replica, self.numbers)
        self.metric_files = MetricFiles(metrics_folder(self.folder, self.application), self.metrics)
        self.metric_files.start()
        self.log = RequestLog(serving / f"requests-{self.replica}.jsonl")
        self._others = CancelFiles(serving / "cancel", self.bridge.cancel) if self.limits.max_replicas > 1 else None
        if self._others is not None:
            self._others.start()
        self.traces = open_traces(self.limits, self.replica)

    def numbers(self) -> dict[str, Any]:
        """What `serve_metrics` reads at a scrape."""
        counts = self._capture.counts if self._capture is not None else {}
        return {**self.bridge.numbers(), **{f"capture_{outcome}": count for outcome, count in counts.items()}}

    def name_of(self, version: object) -> str:
        """Return how clients name one version."""
        return f"models:/{self.name}/{version}"

    def check_model(self, asked: str | None) -> int | None:
        """Return the version that is asked for by number, None for whichever serves; ApiError 404 for any other."""
        named = {self.name_of(version): version for version in self.bridge.versions}
        if asked is None or asked == self.name:
            return None
        if asked not in named:
            served = " or ".join((self.name, *named))
            message = f"model expected to be {served}, found {asked[:MOST_NAME_CHARS]!r}: no other is loaded here"
            raise ApiError(message, "model", "model_not_found", 404)
        return named[asked]

    async def cancel(self, request_id: str, key: str) -> bool:
        """End a request of that key, whichever replica draws it; False when none does."""
        if self.bridge.cancel(request_id, key):
            return True
        return self._others is not None and await run_in_threadpool(self._others.ask, request_id, key)

    async def capture(self, job: Job, finished: Finished, began: float) -> None:
        """Offer an answered request to the monitor's capture, which returns at once."""
        if self._capture is None:
            self._capture = open_capture(self.limits, Workspace(self.folder).captured, self.bridge.painter.encoder)
        if self._capture is not None:
            version, prompt = str(finished.facts.get("model_version")), job.order.rows[0]["prompt"]
            latency_s = time.monotonic() - began
            self._capture.offer(Served(job.request_id, version, prompt, finished.drawn, latency_s, time.time()))

    def close(self) -> None:
        """Write what was captured and still waits."""
        if self._capture is not None:
            self._capture.close()
        if self._others is not None:
            self._others.close()
        self.metric_files.close()
        self.log.close()
        if self.traces is not None:
            self.traces.close()


def add_drawing_routes(app: FastAPI, desk: Desk, caller: Caller, reader: Caller) -> None:
    """Let `app` draw; `caller` admits a request and says whose it is, `reader` does so without counting it."""
    Asked = Annotated[ApiKey | None, Depends(caller)]

    @app.post(GENERATIONS_ROUTE, responses=DRAWN, response_model=None)
    async def generate(request: Request, body: ImagesRequest, key: Asked) -> Response:
        return await _draw(desk, request, body, key, None, "image_generation")

    @app.post(EDITS_ROUTE, responses=DRAWN, response_model=None, openapi_extra=describe_body())
    async def edit(request: Request, key: Asked) -> Response:
        body, files = await read_edit(request, desk.limits)
        return await _draw(desk, request, body, key, files, "image_edit")

    @app.delete(REQUESTS_ROUTE + "/{request_id}", responses=errors(401, 403, 404))
    async def cancel(request_id: str, key: Annotated[ApiKey | None, Depends(reader)]) -> CancelledRequest:
        if not await desk.cancel(request_id, key.name if key else ""):
            message = f"{REQUESTS_ROUTE}/ID expected the x-request-id of a request of yours at work, found none"
            raise ApiError(message, code="not_found", status=404)
        return CancelledRequest(id=request_id)


async def _draw(
    desk: Desk,
    request: Request,
    body: ImageOptions,
    key: ApiKey | None,
    files: Files | None,
    route: Literal["image_generation", "image_edit"],
) -> Response:
    """Check, hand over, answer: the way of every picture."""
    began = time.monotonic()
    job = _make_job(desk, request, body, key)
    note(request, key=job.key or None)
    if files is not None:
        await desk.bridge.check(job)
        upload = await files.decode(desk.limits.max_upload_pixels)
        job = _make_job(desk, request, body, key, upload.picture.size)
        # What waits is kept at the size that is drawn: at its own, a few hundred large pictures fill the memory.
        size = (job.order.rows[0]["width_px"], job.order.rows[0]["height_px"])
        job = replace(job, upload=await run_in_threadpool(scaled, upload, size))
    order = job.order
    drawing = await desk.bridge.submit(job)

    def tell(finished: Finished) -> None:
        version = finished.facts.get("model_version")
        note(request, rows=len(order.rows), version=version, phases=finished.phases)

    if order.stream:
        offered: list[Finished] = []

        def told(finished: Finished) -> None:
            offered.append(finished)
            tell(finished)

        streamed = stream(write_events(drawing, job, route, told), None, partial(note_error, request), job.request_id)
        streamed.background = BackgroundTask(_capture_streamed, desk, job, offered, began)
        return streamed
    with closing(drawing):
        finished = await while_connected(request, drawing.finished())
    tell(finished)

    def keep(content: bytes) -> str:
        return address_of(request, desk.limits, desk.pictures.put(content, order.output_format))

    def respond() -> Response:
        content = answer(order, finished, keep if order.as_url else None)
        after = BackgroundTask(desk.capture, job, finished, began)
        return JSONResponse(content, headers=headers_of(finished.facts), background=after)

    # It holds pictures: encoding a large one as JSON would hold up every stream.
    return await run_in_threadpool(respond)


def _make_job(
    desk: Desk, request: Request, body: ImageOptions, key: ApiKey | None, own_size: tuple[int, int] | None = None
) -> Job:
    """Hold a request to every limit; ApiError names the field."""
    painter = desk.bridge.painter
    version = desk.check_model(body.model)
    order = make_order(body, desk.limits, painter.info(version), key.priority if key else None, own_size)
    if order.deadline_s is None and not order.stream:
        order = replace(order, deadline_s=_patience_s(request, desk.limits.max_deadline_s))
    name = key.name if key else ""
    timed, arrived = desk.traces is not None, arrived_at(request)
    return Job(request_id_of(request), order, name, version=version, timed=timed, arrived=arrived)


def _patience_s(request: Request, most_s: float) -> float | None:
    """Return after how many seconds the client would give up and send the same again, None where it does not say."""
    try:
        timeout_s = float(request.headers.get(READ_TIMEOUT, ""))
    except ValueError:
        return None
    return min(PART_OF_READ_TIMEOUT * timeout_s, most_s) if math.isfinite(timeout_s) and timeout_s > 0 else None


async def _capture_streamed(desk: Desk, job: Job, offered: list[Finished], began: float) -> None:
    for finished in offered:
        await desk.capture(job, finished, began)


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Do the work for as long as the client is there; ApiError 499, which nobody reads, ends it when it is gone."""
    working, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise once(GONE_STATUS, "the client has gone", "client_disconnected")
    finally:
        working.cancel()
        gone.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
