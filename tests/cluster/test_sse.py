"""Streams of pictures as the unmodified OpenAI client reads them, over a real socket."""

import asyncio
import base64
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any

import openai
import pytest
import uvicorn
from fastapi import FastAPI
from openai.types import image_edit_completed_event as edit_event
from openai.types import image_gen_completed_event as completed_event
from openai.types import image_gen_partial_image_event as partial_event

from cluster import sse
from cluster.api_errors import ApiError, once
from cluster.sse import PictureEvents, stream, write_event

EVENTS = PictureEvents("image_generation", "16x24", "png", {"request_id": "req-1", "note": "emblème\n\ndata: x"})


@contextmanager
def served(make_events: Callable[[], AsyncIterator[bytes]]) -> Iterator[openai.OpenAI]:
    """A server on a free port whose image routes answer with the events, and a client of it."""
    app = FastAPI()

    @app.post("/v1/images/generations")
    @app.post("/v1/images/edits")
    async def route() -> Any:
        return stream(make_events(), {"x-request-id": "req-1"})

    with closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        try:
            with openai.OpenAI(base_url=url, api_key="k", max_retries=0, timeout=20) as client:
                yield client
        finally:
            server.should_exit = True
            thread.join(20)


def test_openai_client_reads_partial_and_finished_pictures() -> None:
    async def events() -> AsyncIterator[bytes]:
        yield EVENTS.partial(b"half", 0, image_index=0)
        yield EVENTS.completed(b"\x00whole\xff", seed=3)

    with served(events) as client:
        answer = client.images.generate(prompt="x", stream=True, partial_images=1)
        assert answer.response.headers["content-type"].startswith("text/event-stream")
        assert answer.response.headers["cache-control"] == "no-cache"
        partial, completed = list(answer)
    assert isinstance(partial, partial_event.ImageGenPartialImageEvent)
    assert isinstance(completed, completed_event.ImageGenCompletedEvent)
    # The client builds events without checking them; here each is checked against the published types.
    partial_event.ImageGenPartialImageEvent.model_validate(partial.to_dict(), strict=True)
    completed_event.ImageGenCompletedEvent.model_validate(completed.to_dict(), strict=True)
    assert base64.b64decode(partial.b64_json) == b"half" and partial.partial_image_index == 0
    assert base64.b64decode(completed.b64_json) == b"\x00whole\xff" and completed.size == "16x24"
    assert completed.to_dict()["seed"] == 3 and completed.to_dict()["note"] == "emblème\n\ndata: x"


def test_openai_client_reads_an_edit() -> None:
    async def events() -> AsyncIterator[bytes]:
        yield PictureEvents("image_edit", "8x8", "webp").completed(b"edited")

    with served(events) as client:
        (event,) = client.images.edit(image=b"x", prompt="x", stream=True)
    edit_event.ImageEditCompletedEvent.model_validate(event.to_dict(), strict=True)


def test_error_inside_a_stream_is_raised_by_the_openai_client() -> None:
    async def events() -> AsyncIterator[bytes]:
        yield EVENTS.partial(b"half", 0)
        raise once(504, "the deadline of 2 s passed", "deadline_exceeded")

    with served(events) as client:
        answer = client.images.generate(prompt="x", stream=True)
        assert next(answer).type == "image_generation.partial_image"
        with pytest.raises(openai.APIError, match="the deadline of 2 s passed") as caught:
            next(answer)
    assert caught.value.code == "deadline_exceeded"


def test_client_that_leaves_ends_the_source_of_events(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "HEARTBEAT_S", 0.05)
    closed = threading.Event()

    async def events() -> AsyncIterator[bytes]:
        try:
            yield EVENTS.partial(b"half", 0)
            await asyncio.sleep(60)
        finally:
            closed.set()

    with served(events) as client:
        answer = client.images.generate(prompt="x", stream=True)
        next(answer)
        answer.close()
        assert closed.wait(10)


def test_long_wait_is_bridged_by_heartbeats_that_the_client_skips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "HEARTBEAT_S", 0.02)

    async def events() -> AsyncIterator[bytes]:
        await asyncio.sleep(0.2)
        yield EVENTS.completed(b"whole")

    with served(events) as client:
        assert [event.type for event in client.images.generate(prompt="x", stream=True)] == [
            "image_generation.completed"
        ]

    async def parts() -> list[bytes]:
        return [part async for part in stream(events()).body_iterator]  # type: ignore[misc]

    sent = asyncio.run(parts())
    assert sent[0] == sse.HEARTBEAT and sent[-1].startswith(b"event: image_generation.completed\n")


def test_bug_in_the_source_is_told_and_not_hidden(caplog: pytest.LogCaptureFixture) -> None:
    sent: list[bytes] = []
    told: list[ApiError] = []

    async def events() -> AsyncIterator[bytes]:
        yield b"first"
        raise ZeroDivisionError("about a secret prompt")

    async def read() -> None:
        async for part in stream(events(), on_error=told.append, request_id="req-1").body_iterator:
            sent.append(part)  # type: ignore[arg-type]

    asyncio.run(read())
    assert "request req-1 failed: builtins.ZeroDivisionError" in caplog.text and "in events" in caplog.text
    assert "about a secret prompt" not in caplog.text.replace('raise ZeroDivisionError("about a secret prompt")', "")
    assert [(error.status, error.code) for error in told] == [(500, "internal_error")]
    assert len(sent) == 2 and b'"code":"internal_error"' in sent[1] and b"secret" not in sent[1]


def test_created_at_is_now_and_an_event_is_one_line_of_data() -> None:
    assert abs(int(time.time()) - int(EVENTS.completed(b"").split(b'"created_at":')[1].split(b"}")[0])) <= 2
    assert write_event("a", {"text": "x\ny\r\u2028é"}).count(b"\n") == 3
