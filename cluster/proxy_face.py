"""What clients meet when no replica answers: Ray Serve's proxy speaks for the endpoint, here in OpenAI's shape.

A replica that dies leaves its requests without an answer, or its streams without an end; the proxy would send a bare
500 and cut the connection. Here each becomes one clear error that may be repeated. While an endpoint sleeps
(`serve.min_replicas` 0), questions after its state are answered here and do not wake it; a request for a picture does,
and waits. Named by `session.QUIET_ENVIRONMENT`; a Serve that somebody else started does not have it.
"""

import asyncio
import json
import time
from collections.abc import Mapping
from typing import Any

from starlette.middleware import Middleware
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.api_errors import ApiError, answer_error, body_of, later, once
from cluster.request_ids import RequestIds

STATE_ROUTES = ("/healthz", "/readyz", "/metrics")
"""What is asked every few seconds by machines, and must not wake what sleeps."""
ASLEEP, STARTING = "asleep", "starting"
LOOK_EVERY_S = 0.5
RETRY_S = 1
START_RETRY_S = 5


def around_proxy() -> list[Middleware]:
    """What stands around Serve's proxy, the innermost first."""
    return [Middleware(ProxyFace), Middleware(RequestIds)]


class ProxyFace:
    """Middleware of the proxy; answers of replicas pass through untouched."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self._replicas = Replicas()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if scope["method"] == "GET" and scope["path"] in STATE_ROUTES:
            state = await self._replicas.state()
            if state is not None:
                await _answer_state(scope, receive, send, state)
                return
        answer = _Answer(send)
        await self.app(scope, receive, answer.send)
        await answer.end(scope, receive)


class _Answer:
    """One answer on its way out: told apart is what a replica says and what the proxy says for want of one."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._begun = self._ended = self._stream = False
        self._instead: ApiError | None = None

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = {name.lower(): value for name, value in message.get("headers", [])}
            kind = headers.get(b"content-type", b"")
            # Whatever a replica refuses, it refuses in JSON.
            if message["status"] >= 400 and not kind.startswith(b"application/json"):
                self._instead = _error_of_proxy(message["status"])
                return
            self._begun, self._stream = True, kind.startswith(b"text/event-stream")
        if self._instead is not None:
            return
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self._ended = True
        await self._send(message)

    async def end(self, scope: Scope, receive: Receive) -> None:
        """Finish what nobody finished."""
        if self._ended:
            return
        if not self._begun:
            await answer_error(self._instead or _lost())(scope, receive, self._send)
        elif self._stream:
            # As the OpenAI client reads it: an event whose data has `error` raises APIError.
            event = f"event: error\ndata: {json.dumps(body_of(_lost()))}\n\n"
            await self._send({"type": "http.response.body", "body": event.encode(), "more_body": False})


class Replicas:
    """What Serve's controller knows of the endpoint at the root path; asked at most every LOOK_EVERY_S."""

    def __init__(self) -> None:
        self._known: str | None = None
        self._looked = float("-inf")
        self._lock = asyncio.Lock()

    async def state(self) -> str | None:
        """Return asleep or starting while no replica runs, None while one does, or when nothing is known."""
        async with self._lock:
            if time.monotonic() - self._looked > LOOK_EVERY_S:
                self._known = await asyncio.to_thread(_look)
                self._looked = time.monotonic()
            return self._known


def _look() -> str | None:
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    from cluster.serving import APPLICATION, DEPLOYMENT

    try:
        application = serve.status().applications.get(APPLICATION)
    except (RayError, RayServeException):  # the controller is being restarted
        return None
    deployment = application.deployments.get(DEPLOYMENT) if application is not None else None
    if deployment is None:
        return None
    return state_of(deployment.status.value, deployment.replica_states)


def state_of(status: str, replicas: Mapping[Any, int]) -> str | None:
    """Tell what a deployment does from Serve's status of it and the number of replicas in each of Serve's states."""
    if replicas.get("RUNNING", 0):
        return None
    # Without a replica and content: it was told to have none. A replica that died leaves it unhealthy.
    return ASLEEP if status == "HEALTHY" and not any(replicas.values()) else STARTING


async def _answer_state(scope: Scope, receive: Receive, send: Send, state: str) -> None:
    answer: Response
    if scope["path"] == "/metrics":
        answer = PlainTextResponse("")  # no replica, no series
    elif scope["path"] == "/healthz":
        answer = JSONResponse({"status": "ok"})
    else:
        told = {"status": state, "error": "", "model_version": None, "dataset": None, "run_id": None}
        # What sleeps can be asked; what starts was asked already, and others may take the next request.
        asleep = state == ASLEEP
        answer = JSONResponse(told, 200 if asleep else 503, {} if asleep else {"Retry-After": str(START_RETRY_S)})
    await answer(scope, receive, send)


def _lost() -> ApiError:
    message = "the replica that drew this request has ended; nothing of it was kept, so it is safe to ask again"
    return later(503, message, "replica_lost", RETRY_S)


def _error_of_proxy(status: int) -> ApiError:
    """What Serve's proxy says in a text of its own, in OpenAI's shape."""
    if status == 404:
        return ApiError("no endpoint at this path; see /openapi.json for the routes", code="not_found", status=404)
    if status in (408, 499):
        return once(status, "the request took longer than the proxy waits", "timeout")
    if status in (429, 503):
        return later(status, "no replica can take the request now", "no_replica", RETRY_S)
    return _lost() if status >= 500 else ApiError("the request could not be read", code="bad_request", status=status)
