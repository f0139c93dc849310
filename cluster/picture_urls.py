"""Pictures handed out by address: kept for a while in a folder that all replicas share, then gone.

A name is its time of expiry and 192 random bits, so any replica can judge it without asking another, nobody can guess
it, and nothing but such a name is ever looked up: a path cannot be smuggled in. The folder holds at most so many bytes;
when there are more, those that expire first go first. Knowing the address is the permission, as with OpenAI's.
"""

import os
import re
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from cluster.api_description import errors
from cluster.api_errors import ApiError
from cluster.artifacts import write_bytes_atomic
from cluster.errors import StorageError
from cluster.placement import ServeSection

ROUTE = "/v1/pictures"
TOKEN_BYTES = 24
NAME = re.compile(r"([0-9a-f]{8,12})-[A-Za-z0-9_-]{32}\.(png|jpeg|webp)", re.ASCII)
ABANDONED_S = 3600.0
"""A temporary file so old belongs to a replica that was killed while it wrote."""


@dataclass(frozen=True)
class KeptPicture:
    content: bytes
    media_type: str
    remaining_s: int
    """Seconds until it expires."""


class PictureStore:
    """A folder of pictures by name; several processes and machines may use one folder."""

    def __init__(self, folder: Path, ttl_s: float, max_bytes: int, clock: Callable[[], float] = time.time) -> None:
        """`ttl_s`: seconds that a picture is kept; `max_bytes`: of all pictures together."""
        self.folder, self.ttl_s, self.max_bytes, self._clock = folder, ttl_s, max_bytes, clock

    def put(self, content: bytes, kind: str) -> str:
        """Keep a picture (png, jpeg or webp) and return its name; StorageError when it alone is above the bound."""
        if len(content) > self.max_bytes:
            raise StorageError(
                f"serve.url_max_bytes expected to hold a picture, found {len(content)} bytes for {self.max_bytes};"
                " raise it or ask for b64_json"
            )
        expires = int(self._clock() + self.ttl_s) + 1
        name = f"{expires:08x}-{secrets.token_urlsafe(TOKEN_BYTES)}.{kind}"
        if not NAME.fullmatch(name):
            raise ValueError(f"kind expected png, jpeg or webp, found {kind!r}")
        self.sweep(room_for=len(content))
        write_bytes_atomic(self.folder / name, content)
        return name

    def get(self, name: str) -> KeptPicture | None:
        """Return the picture of a name; None when there is none, no more, or the name is not one of ours."""
        match = NAME.fullmatch(name)
        if match is None:
            return None
        remaining_s = int(match.group(1), 16) - self._clock()
        if remaining_s <= 0:
            return None
        try:
            content = (self.folder / name).read_bytes()
        except OSError:
            return None
        return KeptPicture(content, f"image/{match.group(2)}", int(remaining_s))

    def sweep(self, room_for: int = 0) -> None:
        """Remove what expired and, oldest first, what is above the bound when `room_for` bytes are added."""
        now = self._clock()
        kept = []
        for name, size, changed in self._files():
            match = NAME.fullmatch(name)
            if match is not None and int(match.group(1), 16) > now:
                kept.append((name, size))
            elif match is not None or now - changed > ABANDONED_S:
                (self.folder / name).unlink(missing_ok=True)
        total = sum(size for _, size in kept) + room_for
        for name, size in sorted(kept):  # a name begins with its expiry, in digits of one width
            if total <= self.max_bytes:
                break
            (self.folder / name).unlink(missing_ok=True)
            total -= size

    def _files(self) -> Iterator[tuple[str, int, float]]:
        """Yield (name, bytes, time of the last change) of what is there; another replica may remove files meanwhile."""
        try:
            entries = list(os.scandir(self.folder))
        except FileNotFoundError:
            return
        for entry in entries:
            try:
                status = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            yield entry.name, status.st_size, status.st_mtime


def open_pictures(limits: ServeSection, folder: Path) -> PictureStore:
    return PictureStore(folder, limits.url_ttl_s, limits.url_max_bytes)


def add_route(app: FastAPI, store: PictureStore) -> None:
    """Let `app` hand out the pictures of `store`; without keys, for whoever knows the address."""

    kept: dict[int | str, Any] = {
        200: {"description": "the picture", "content": {f"image/{kind}": {} for kind in ("png", "jpeg", "webp")}}
    }

    @app.get(ROUTE + "/{name}", response_class=Response, responses={**kept, **errors(403, 404)})
    async def picture(name: str) -> Response:
        found = await run_in_threadpool(store.get, name)
        if found is None:
            message = f"{ROUTE}/NAME expected the address of a picture, found none there: it expired, or never was"
            raise ApiError(message, code="not_found", status=404)
        headers = {
            "Cache-Control": f"private, max-age={found.remaining_s}",
            # Old browsers guess at types, and a picture must never be read as a page.
            "X-Content-Type-Options": "nosniff",
            "Content-Security-Policy": "default-src 'none'",
        }
        return Response(found.content, media_type=found.media_type, headers=headers)


def address_of(request: Request, limits: ServeSection, name: str) -> str:
    """Return the full address of a name: below `serve.public_url`, else below the address that the client used."""
    return (limits.public_url or str(request.base_url)).rstrip("/") + f"{ROUTE}/{name}"
