"""What a request was, told once when it has ended: route, status, seconds, bytes, rows. Its content is not looked at.

Metrics and the request log both hear it from here. Routes are named by their template and methods by a short list, so a
client cannot make up new names. What only a route knows (rows, version, key name) it adds with `note`, which takes
nothing else: a prompt has no way in. Pure ASGI, so streams pass through; a client that leaves early is status 499, and
a stream that ends in an error has the error's status, though its client read 200.
"""

import asyncio
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.api_errors import STATUS_CODES, ApiError
from cluster.painter_contract import Phase

UNKNOWN_ROUTE = "unknown"
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
GONE_STATUS = 499
"""As nginx writes it: the client left before an answer began."""
CODE = re.compile(r"[a-z0-9_]{1,40}")
MOST_ERROR_BYTES = 8192
NOTES, ARRIVED = "served", "arrived"
TRACE_HEADERS = (b"traceparent", b"tracestate")
"""W3C Trace Context: which trace of the client's this request belongs to."""


@dataclass(frozen=True)
class EndedRequest:
    """A request that has ended."""

    request_id: str
    method: str
    route: str
    """The template, such as /v1/models/{model_id:path}; `unknown` where there is none."""
    status: int
    seconds: float
    """Until the last byte was handed over, or the client had gone."""
    code: str | None
    """`error.code` of a refusal."""
    gone: bool
    """The client left before the answer was complete."""
    bytes_in: int
    bytes_out: int
    rows: int | None = None
    version: str | None = None
    key: str | None = None
    """Name of the key, never the key."""
    began: float = 0.0
    """When it arrived, by time.monotonic."""
    phases: tuple[Phase, ...] = ()
    """What it was doing when, as far as the painter tells."""
    trace: Mapping[str, str] = field(default_factory=dict)
    """Its trace headers, by name."""


Listener = Callable[[EndedRequest], None]


def note(
    request: Request,
    rows: int | None = None,
    version: object = None,
    key: str | None = None,
    phases: tuple[Phase, ...] | None = None,
) -> None:
    """Add what only the route knows: pictures drawn, the version that drew them, the name of the caller's key.

    Rows are noted when they are finished, so that a request that was given up counts none.
    """
    told = {"rows": rows, "version": None if version is None else str(version), "key": key, "phases": phases}
    _notes(request).update({name: value for name, value in told.items() if value is not None})


def arrived_at(request: Request) -> float:
    """Return when the first of a request came here, by time.monotonic; now where nobody watched."""
    arrived: float = request.scope.get("state", {}).get(ARRIVED, time.monotonic())
    return arrived


def note_error(request: Request, error: ApiError) -> None:
    """Add the error that ends an answer whose status is sent already."""
    _notes(request).update(status=error.status, code=error.code)


def _notes(request: Request) -> dict[str, Any]:
    notes: dict[str, Any] = request.scope.setdefault("state", {}).setdefault(NOTES, {})
    return notes


@dataclass
class _Observed:
    """One request while it is at work."""

    start: float = field(default_factory=time.monotonic)
    end: float | None = None
    """When the last byte was handed over; work of the route after it is not the client's waiting."""
    status: int | None = None
    bytes_in: int = 0
    bytes_out: int = 0
    complete: bool = False
    gone: bool = False
    error: bytes = b""

    def hear(self, message: Message) -> None:
        self.bytes_in += len(message.get("body", b""))
        self.gone |= message["type"] == "http.disconnect" and not self.complete

    def tell(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        elif message["type"] == "http.response.body":
            body = message.get("body", b"")
            self.bytes_out += len(body)
            if not message.get("more_body", False):
                self.end, self.complete = time.monotonic(), True
            if (self.status or 0) >= 400 and len(self.error) < MOST_ERROR_BYTES:
                self.error += body

    def ended(self, scope: Scope) -> EndedRequest:
        notes = dict(scope["state"][NOTES])
        status = notes.pop("status", None) or self.status or (GONE_STATUS if self.gone else 500)
        code = notes.pop("code", None) or code_of(status, self.error)
        method = scope["method"] if scope["method"] in METHODS else "OTHER"
        name = str(scope["state"].get("request_id", ""))
        seconds = (self.end or time.monotonic()) - self.start
        told = (name, method, route_of(scope), status, seconds, code, self.gone)
        trace = {key.decode(): value.decode("latin-1") for key, value in scope["headers"] if key in TRACE_HEADERS}
        return EndedRequest(*told, self.bytes_in, self.bytes_out, began=self.start, trace=trace, **notes)


class RequestWatch:
    """Middleware: inside RequestIds, so that requests have names, and around the whole app, to hear of crashes.

    `began` is called when a request arrives, each of `ended` with what it was; both must be quick and must not raise.
    """

    def __init__(
        self, app: ASGIApp, began: Callable[[], None], ended: Sequence[Callable[[EndedRequest], None]]
    ) -> None:
        self.app, self.began, self.listeners = app, began, tuple(ended)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        observed = _Observed()
        scope.setdefault("state", {}).update({NOTES: {}, ARRIVED: observed.start})

        async def hear() -> Message:
            message = await receive()
            observed.hear(message)
            return message

        async def tell(message: Message) -> None:
            observed.tell(message)
            await send(message)

        self.began()
        try:
            await self.app(scope, hear, tell)
        except asyncio.CancelledError:
            observed.gone = not observed.complete
            raise
        finally:
            served = observed.ended(scope)
            for listener in self.listeners:
                listener(served)


def route_of(scope: Scope) -> str:
    """Return the template of the route; a request that was refused before routing is matched here."""
    route: Any = scope.get("route")
    if route is None and "app" in scope:
        matching = (one for one in scope["app"].routes if one.matches(scope)[0] != Match.NONE)
        route = next(matching, None)
    return str(getattr(route, "path", UNKNOWN_ROUTE))


def code_of(status: int, body: bytes) -> str | None:
    """Return `error.code` of a refusal, or what its status is called; None for an answer."""
    if status < 400:
        return None
    if status == GONE_STATUS and not body:
        return "client_gone"
    try:
        code = json.loads(body)["error"]["code"]
    except (ValueError, TypeError, KeyError):
        code = None
    if isinstance(code, str) and CODE.fullmatch(code):
        return code
    return STATUS_CODES.get(status, "bad_request" if status < 500 else "server_error")
