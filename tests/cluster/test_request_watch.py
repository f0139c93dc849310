"""What is said of a request when it has ended: routes by template, statuses, bytes, clients that leave."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from pydantic import BaseModel
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.testclient import TestClient
from starlette.types import ASGIApp

from cluster.api_errors import ApiError, install_handlers, once
from cluster.body_limit import BodyLimit, Limit
from cluster.request_ids import RequestIds
from cluster.request_watch import GONE_STATUS, EndedRequest, RequestWatch, code_of, note, note_error

AFTER_S = 0.1


class Body(BaseModel):
    prompt: str


def make_app(ended: list[EndedRequest], began: list[int]) -> ASGIApp:
    """Routes that answer, refuse, stream and break, with the middlewares in the order the endpoint has them."""
    app = FastAPI()
    install_handlers(app, Body.model_fields)
    app.add_middleware(BodyLimit, usual=Limit(1000, "serve.max_body_bytes"))

    @app.post("/v1/draw")
    async def draw(body: Body, request: Request) -> dict[str, str]:
        note(request, rows=2, version=7, key="team")
        if body.prompt == "break":
            raise RuntimeError("a bug")
        if body.prompt == "refuse":
            raise ApiError("n expected 1", "n", "invalid_value")
        return {"drawn": body.prompt}

    @app.get("/v1/models/{model_id:path}")
    async def model(model_id: str) -> dict[str, str]:
        return {"id": model_id}

    @app.get("/broken-stream")
    async def broken(request: Request) -> StreamingResponse:
        async def parts() -> AsyncIterator[bytes]:
            yield b"12345"
            note_error(request, once(504, "too late", "deadline_exceeded"))

        return StreamingResponse(parts())

    @app.get("/stream")
    async def stream() -> StreamingResponse:
        async def parts() -> AsyncIterator[bytes]:
            for _ in range(3):
                yield b"12345"

        return StreamingResponse(parts(), background=BackgroundTask(work_after))

    return RequestIds(RequestWatch(app, began=lambda: began.append(1), ended=[ended.append]))


async def work_after() -> None:
    """What a route does when its client has everything, long enough to be seen."""
    await asyncio.sleep(AFTER_S)


def ask(method: str, path: str, **content: Any) -> EndedRequest:
    ended: list[EndedRequest] = []
    began: list[int] = []

    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app=make_app(ended, began), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, **content)

    answer = asyncio.run(send())
    (served,) = ended
    assert began == [1]
    assert served.request_id == answer.headers["x-request-id"]
    assert served.status == answer.status_code and served.seconds >= 0
    return served


def test_answer_is_told_with_what_the_route_noted() -> None:
    served = ask("POST", "/v1/draw", json={"prompt": "a star"}, headers={"x-request-id": "chosen-name"})
    assert (served.method, served.route, served.status) == ("POST", "/v1/draw", 200)
    assert (served.rows, served.version, served.key) == (2, "7", "team")
    assert served.request_id == "chosen-name" and served.code is None and not served.gone
    assert served.bytes_in == len(b'{"prompt":"a star"}') and served.bytes_out == len(b'{"drawn":"a star"}')


def test_routes_are_named_by_their_template() -> None:
    assert ask("GET", "/v1/models/some/long/name").route == "/v1/models/{model_id:path}"
    assert ask("GET", "/nowhere/at/all").route == "unknown"
    assert ask("DELETE", "/v1/draw").route == "/v1/draw"
    assert ask("BREW", "/v1/draw").method == "OTHER"


@pytest.mark.parametrize(
    ("content", "status", "code"),
    [
        ({"json": {"prompt": "refuse"}}, 400, "invalid_value"),
        ({"json": {}}, 400, "missing_required_parameter"),
        ({"content": b"{" * 2000}, 413, "request_too_large"),
        ({"json": {"prompt": "break"}}, 500, "internal_error"),
    ],
)
def test_refusals_are_told_with_their_code(content: dict[str, Any], status: int, code: str) -> None:
    served = ask("POST", "/v1/draw", **content)
    assert (served.status, served.code, served.route) == (status, code, "/v1/draw")


def test_stream_is_counted_and_timed_to_its_last_byte() -> None:
    start = time.monotonic()
    served = ask("GET", "/stream")
    assert served.bytes_out == 15 and served.seconds <= time.monotonic() - start - AFTER_S


def test_stream_that_ends_in_an_error_is_told_with_its_status_and_code() -> None:
    ended: list[EndedRequest] = []
    with TestClient(make_app(ended, [])) as client:
        assert client.get("/broken-stream").status_code == 200
    (served,) = ended
    assert (served.status, served.code, served.gone) == (504, "deadline_exceeded", False)


def test_trace_headers_are_told_and_no_others() -> None:
    headers = {"traceparent": "00-a-b-01", "tracestate": "x=1", "authorization": "Bearer secret"}
    assert ask("GET", "/stream", headers=headers).trace == {"traceparent": "00-a-b-01", "tracestate": "x=1"}


@pytest.mark.parametrize(
    ("status", "body", "code"),
    [
        (200, b"", None),
        (404, b'{"error": {"code": "model_not_found"}}', "model_not_found"),
        (404, b'{"error": {"code": "Not A Code"}}', "not_found"),
        (400, b'{"error": {"code": ["x"]}}', "bad_request"),
        (400, b'{"error": 3}', "bad_request"),
        (503, b"<html>", "server_error"),
        (GONE_STATUS, b"", "client_gone"),
    ],
)
def test_code_is_one_of_ours_or_named_after_the_status(status: int, body: bytes, code: str | None) -> None:
    assert code_of(status, body) == code


def leave(app: Any, after: str) -> tuple[list[EndedRequest], list[str]]:
    """Call an app as a server does whose client goes away after the answer's `start`, or before it."""
    ended: list[EndedRequest] = []
    sent: list[str] = []

    async def call() -> None:
        gone = asyncio.Event()

        async def receive() -> dict[str, Any]:
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message["type"])
            if after == "start":
                gone.set()

        watch = RequestWatch(app, began=lambda: None, ended=[ended.append])
        if after == "nothing":
            gone.set()
        scope = {"type": "http", "method": "POST", "path": "/v1/draw", "headers": [], "asgi": {"spec_version": "2.3"}}
        await watch(scope, receive, send)

    asyncio.run(call())
    return ended, sent


def test_client_that_leaves_in_mid_stream_is_told_as_gone() -> None:
    async def parts() -> AsyncIterator[bytes]:
        yield b"first"
        await asyncio.Event().wait()

    (served,), sent = leave(StreamingResponse(parts()), after="start")
    assert sent[0] == "http.response.start" and (served.status, served.gone) == (200, True)


def test_client_that_leaves_before_the_answer_is_499() -> None:
    async def waits(scope: Any, receive: Any, send: Any) -> None:
        assert (await receive())["type"] == "http.disconnect"

    (served,), sent = leave(waits, after="nothing")
    assert sent == [] and (served.status, served.gone, served.code) == (GONE_STATUS, True, "client_gone")


def test_cancelled_request_is_told_as_gone() -> None:
    async def cancelled() -> list[EndedRequest]:
        ended: list[EndedRequest] = []
        at_work = asyncio.Event()

        async def waits(scope: Any, receive: Any, send: Any) -> None:
            at_work.set()
            await asyncio.Event().wait()

        watch = RequestWatch(waits, began=lambda: None, ended=[ended.append])
        scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
        task = asyncio.ensure_future(watch(scope, None, None))  # type: ignore[arg-type]
        await at_work.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return ended

    (served,) = asyncio.run(cancelled())
    assert served.gone and served.status == GONE_STATUS
