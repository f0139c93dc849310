"""May the web page that sends this request do so? Without keys, any page that a browser shows could draw here.

A page elsewhere can post a form to an address of this machine (CSRF), and a name of its own that it lets point to this
machine makes it look like our page (DNS rebinding). So the host that is asked for must be one of ours, and what changes
something must come from our own page, or from a program: those send no Origin. With keys there is nothing to guard, for
a page cannot know one. Rules: Fetch standard, section 3.2 (Origin); W3C Fetch Metadata; OWASP's cheat sheet on CSRF.
"""

import ipaddress
from collections.abc import Mapping
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

from cluster.api_errors import MOST_NAME_CHARS, ApiError, answer_error
from cluster.placement import ServeSection

READING = frozenset({"GET", "HEAD", "OPTIONS"})
OWN_SITE = ("", "same-origin", "none")
"""What browsers say of requests from the page itself, or from the address bar; programs say nothing."""
PORTS = {"http": 80, "https": 443}


class SameSite:
    """Middleware: refuses, with 403, what a page of another site sends; programs pass."""

    def __init__(self, app: ASGIApp, limits: ServeSection) -> None:
        self.app = app
        self._names = {"localhost", limits.host.lower()}
        self._public = _place(limits.public_url)
        if self._public is not None:
            self._names.add(self._public[0])

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        problem = self._problem(scope) if scope["type"] == "http" else None
        if problem is None:
            await self.app(scope, receive, send)
        else:
            await answer_error(problem)(scope, receive, send)

    def _problem(self, scope: Scope) -> ApiError | None:
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        host, origin = headers.get(b"host", ""), headers.get(b"origin", "")
        asked = _place(f"{scope.get('scheme', 'http')}://{host}")
        if asked is None or not self._is_ours(asked[0]):
            message = (
                f"Host expected to be a name of this machine, serve.host or the host of serve.public_url, found"
                f" {host[:MOST_NAME_CHARS]!r}: without keys an endpoint answers to no other name; name it in"
                " serve.public_url, or make keys (fresco serve --new-key)"
            )
            return ApiError(message, code="host_not_allowed", status=403)
        if scope["method"] in READING or self._from_here(headers, origin, asked):
            return None
        message = (
            "a request that draws or cancels expected from this endpoint's own page or from a program, found one from"
            f" the page {origin[:MOST_NAME_CHARS]!r}: without keys pages of other sites are refused"
        )
        return ApiError(message, code="cross_site_request", status=403)

    def _is_ours(self, name: str) -> bool:
        try:
            return name in self._names or ipaddress.ip_address(name).is_loopback
        except ValueError:
            return False

    def _from_here(self, headers: Mapping[bytes, str], origin: str, asked: tuple[str, int]) -> bool:
        if not origin:
            return headers.get(b"sec-fetch-site", "") in OWN_SITE
        # A proxy in front may ask for another name and port than the browser did: then public_url says which.
        page = _place(origin)
        return page is not None and page in (asked, self._public)


def _place(url: str) -> tuple[str, int] | None:
    """Return (host name, port) of an address; None when it has none, such as the Origin `null` of a hidden page."""
    try:
        parts = urlsplit(url)
        port = parts.port or PORTS.get(parts.scheme)
    except ValueError:
        return None
    return (parts.hostname.rstrip("."), port) if parts.hostname and port else None
