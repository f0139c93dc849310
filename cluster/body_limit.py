"""Refuse request bodies over a size before they are held in memory: by the announced length, else by counting.

Pure ASGI, so that a body is never buffered to be measured. Paths may have a limit of their own: uploads are larger.
"""

from collections.abc import Mapping
from typing import NamedTuple

from fastapi import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.api_errors import STATUS_CODES, error_response

MOST_DIGITS = 18


class Limit(NamedTuple):
    """So many bytes, by this config key."""

    max_bytes: int
    key: str


class BodyLimit:
    """Middleware; `of_path` names paths whose limit differs from `usual`."""

    def __init__(self, app: ASGIApp, usual: Limit, of_path: Mapping[str, Limit] | None = None) -> None:
        self.app, self.usual, self.of_path = app, usual, dict(of_path or {})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        limit = self.of_path.get(path, self.usual)
        message = f"request body expected at most {limit.max_bytes} bytes ({limit.key}), found more"
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        # A number of so many digits is above every limit, and int() would refuse to read it.
        too_long = announced.isdigit() and len(announced) > MOST_DIGITS
        if too_long or (announced.isdigit() and int(announced) > limit.max_bytes):
            # A body that nobody reads would be taken for the next request on this connection.
            headers = {"Connection": "close"}
            await error_response(413, message, code=STATUS_CODES[413], headers=headers)(scope, receive, send)
            return
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            part = await receive()
            seen += len(part.get("body", b""))
            if seen > limit.max_bytes:
                raise HTTPException(413, message)
            return part

        await self.app(scope, counted, send)
