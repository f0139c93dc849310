"""Server-sent events as the OpenAI client reads a stream of pictures: partial ones, the finished one, or an error.

Wire form: WHATWG HTML 9.2, one JSON object a `data` line. Event types and fields follow OpenAI's
ImageGenPartialImageEvent, ImageGenCompletedEvent and their `image_edit` twins; fields beyond them (index, seed, model
version) ride along. An error inside a stream cannot change the status any more, so it is an event with `error`, which
the client raises as APIError.
"""

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

from starlette.responses import StreamingResponse

from cluster.api_errors import ApiError, body_of, once
from cluster.failures import log_failure

HEARTBEAT = b": waiting\n\n"
"""A comment: clients skip it, proxies see that the connection lives, and a gone client is noticed."""
HEARTBEAT_S = 10.0
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
"""No cache, and no proxy that collects the answer before it passes it on."""
NO_TOKENS = {
    "input_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
    "output_tokens": 0,
    "total_tokens": 0,
}
"""The completed event must have a usage; nothing here is counted in tokens."""


@dataclass(frozen=True)
class PictureEvents:
    """Writes the events of one request; what is the same in all of them is kept here."""

    route: Literal["image_generation", "image_edit"]
    size: str
    """WIDTHxHEIGHT in px."""
    output_format: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Fields beyond OpenAI's, such as request id and model version."""

    def partial(self, picture: bytes, partial_image_index: int, **facts: Any) -> bytes:
        """An unfinished picture (encoded); the index counts from 0 within one picture of the request."""
        return self._event("partial_image", picture, {"partial_image_index": partial_image_index}, facts)

    def completed(self, picture: bytes, **facts: Any) -> bytes:
        """A finished picture (encoded); a request for several sends several."""
        return self._event("completed", picture, {"usage": NO_TOKENS}, facts)

    def _event(self, stage: str, picture: bytes, own: Mapping[str, Any], facts: Mapping[str, Any]) -> bytes:
        name = f"{self.route}.{stage}"
        shown = {"background": "opaque", "quality": "auto", "size": self.size, "output_format": self.output_format}
        content = {"type": name, "b64_json": base64.b64encode(picture).decode("ascii"), "created_at": int(time.time())}
        return write_event(name, {**self.facts, **facts, **shown, **own, **content})


def write_event(name: str, data: Mapping[str, Any]) -> bytes:
    """One event; ASCII JSON holds no line end, so a single `data` line is enough."""
    return f"event: {name}\ndata: {json.dumps(data, separators=(',', ':'))}\n\n".encode("ascii")


def write_error(error: ApiError) -> bytes:
    """The event that ends a stream which failed after it had begun."""
    return write_event("error", body_of(error))


def stream(
    events: AsyncIterator[bytes],
    headers: Mapping[str, str] | None = None,
    on_error: Callable[[ApiError], None] = lambda error: None,
    request_id: str = "unknown",
) -> StreamingResponse:
    """Answer with events; `events` is closed when the client goes, so its `finally` is where rows are freed.

    `on_error` hears of the error that ended the stream: its status, 200 since the first byte, cannot say it.
    """
    every = {**HEADERS, **(headers or {})}
    return StreamingResponse(
        _guarded(events, HEARTBEAT_S, on_error, request_id), media_type="text/event-stream", headers=every
    )


async def _guarded(
    events: AsyncIterator[bytes], heartbeat_s: float, on_error: Callable[[ApiError], None], request_id: str
) -> AsyncIterator[bytes]:
    """Pass events on, a heartbeat where none comes for so long, and an error as the event that ends the stream."""
    waiting: asyncio.Future[bytes] | None = None
    try:
        while True:
            waiting = waiting or asyncio.ensure_future(anext(events))
            done, _ = await asyncio.wait([waiting], timeout=heartbeat_s)
            if not done:
                yield HEARTBEAT
                continue
            finished, waiting = waiting, None
            try:
                yield finished.result()
            except StopAsyncIteration:
                return
            except ApiError as error:
                on_error(error)
                yield write_error(error)
                return
            except Exception as error:  # a bug; raised any further, the server would log its words
                log_failure(request_id, error)
                told = f"drawing failed; the endpoint's log says more of request {request_id}"
                bug = once(500, told, "internal_error")
                on_error(bug)
                yield write_error(bug)
                return
    finally:
        if waiting is not None:
            waiting.cancel()
            with suppress(asyncio.CancelledError, StopAsyncIteration, ApiError):
                await waiting
        close = getattr(events, "aclose", None)
        if close is not None:
            await close()
