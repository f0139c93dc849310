"""Every request has a name: in the answer's `x-request-id` (the OpenAI client's `request_id`), in logs and pictures.

A client that wants to cancel before the answer begins names its request itself, in the header `x-request-id`; a name of
another form is replaced, not refused, because proxies add such headers too. Pure ASGI, so streams pass through.
"""

import re
import secrets

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER = "x-request-id"
NAME = re.compile(rb"[A-Za-z0-9_-]{8,64}")
"""What a client may choose: nothing that a log line, a file name or a header could misread."""
NAME_BYTES = 12


class RequestIds:
    """Middleware; must be the outermost, so that refusals have names too."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        asked = dict(scope["headers"]).get(HEADER.encode(), b"")
        name = asked.decode("ascii") if NAME.fullmatch(asked) else f"req_{secrets.token_hex(NAME_BYTES)}"
        scope.setdefault("state", {})["request_id"] = name
        # Whoever comes next and names requests too, as Ray Serve's proxy does, must take the same name.
        MutableHeaders(scope=scope)[HEADER] = name

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[HEADER] = name
            await send(message)

        await self.app(scope, receive, named)


def request_id_of(request: Request) -> str:
    """Return the name of a request that came through the middleware."""
    return str(request.state.request_id)
