"""The page at an endpoint's address: draw, watch pictures take shape, use a seed again, see which version drew what.

One answer holds markup, style and script, so nothing else is loaded, from this host or another; the browser is told by
hash which style and script those are, and runs no other. The page keeps keys and pictures in its own tab. The limits
of its sliders come from the config, so it never offers what the routes would refuse.
"""

import base64
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.responses import HTMLResponse

from cluster.placement import ServeSection

ASSETS = Path(__file__).parent / "assets"
SETTINGS_ROUTE = "/playground.json"
LIMITS = (
    "max_images",
    "max_prompt_chars",
    "max_steps",
    "default_steps",
    "max_guidance_scale",
    "default_guidance_scale",
    "max_side_px",
    "max_partial_images",
)
SHAPE = ("width_px", "height_px", "size_multiple_px", "min_side_px")


def add_playground(app: FastAPI, limits: ServeSection, model: Callable[[], Mapping[str, Any]]) -> None:
    """Answer `/` and `/docs` with the page, and its settings beside it; `model` tells what is loaded, or {}."""
    page, policy = make_page()
    headers = {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}

    @app.get("/", include_in_schema=False)
    @app.get("/docs", include_in_schema=False)
    async def show() -> HTMLResponse:
        return HTMLResponse(page, headers=headers)

    @app.get(SETTINGS_ROUTE, include_in_schema=False)
    async def settings() -> dict[str, Any]:
        facts = model()
        shape = {key: facts[key] for key in SHAPE} if all(key in facts for key in SHAPE) else None
        return {**{key: getattr(limits, key) for key in LIMITS}, "model": shape}


def make_page() -> tuple[str, str]:
    """Return the page and the Content-Security-Policy that allows exactly it."""
    style, script = ((ASSETS / name).read_text("utf-8") for name in ("try.css", "try.js"))
    page = (ASSETS / "try.html").read_text("utf-8")
    page = page.replace("<!-- style -->", f"<style>{style}</style>")
    page = page.replace("<!-- script -->", f"<script>{script}</script>")
    allowed = [f"script-src {_hash(script)}", f"style-src {_hash(style)}", "img-src data:", "connect-src 'self'"]
    return page, "; ".join(["default-src 'self'", *allowed, "base-uri 'none'", "frame-ancestors 'self'"])


def _hash(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")
    return f"'sha256-{digest}'"
