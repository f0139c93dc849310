"""The HTTP face of an endpoint: OpenAI's image generation as the unmodified client calls it, errors in OpenAI's shape.

Fields beyond OpenAI's (seed, steps, guidance_scale, negative_prompt) come through the client's `extra_body`. A wrong
field is answered 400 with its name and limit; nothing is silently ignored except the hints listed as without effect.
Specification followed: CreateImageRequest, ImagesResponse and Error of OpenAI's published schema.
"""

import base64
import difflib
import secrets
import time
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import quote

from fastapi import FastAPI, HTTPException
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.painter_thread import PainterThread, QueueFullError
from cluster.placement import ServeSection

LARGEST_SEED = 2**53 - 1
"""The largest whole number that every JSON reader keeps exactly."""
RANDOM_SEEDS = 2**32
INVALID = "invalid_request_error"
LOADING_RETRY_S = 2
DESCRIPTION = "OpenAI-compatible image generation by the champion model"
TRY_PAGE = Path(__file__).parent / "assets" / "try.html"
PAGE_MAY_LOAD = "default-src 'self' 'unsafe-inline'; img-src data:"
STATUS_CODES = {404: "not_found", 405: "method_not_allowed", 413: "request_too_large"}


class ApiError(Exception):
    """An answer that is not a picture: status, message, and which field is to blame."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.message, self.param, self.code, self.status = message, param, code, status
        self.headers: dict[str, str] = {}


class ImagesRequest(BaseModel):
    """Body of POST /v1/images/generations; null means the default, as in OpenAI's schema."""

    model_config = ConfigDict(extra="forbid")

    prompt: str = Field(description="what to draw")
    model: str | None = Field(None, description="as /v1/models names it; there is one")
    n: Annotated[int, Field(strict=True)] | None = Field(None, description="number of pictures")
    size: str | None = Field(None, description="WIDTHxHEIGHT in pixels, or auto: the model's own size")
    response_format: str | None = Field(None, description="b64_json")
    user: str | None = Field(None, description="accepted, without effect")
    seed: Annotated[int, Field(strict=True)] | None = Field(None, description="picture i is drawn from seed + i")
    steps: Annotated[int, Field(strict=True)] | None = Field(None, description="denoising steps")
    guidance_scale: Annotated[float, Field(allow_inf_nan=False)] | None = Field(
        None, description="how strongly the prompt is followed; up to 1 turns guidance off"
    )
    negative_prompt: str | None = Field(None, description="what not to draw")
    output_format: Literal["png"] | None = Field(None, description="png")
    stream: Literal[False] | None = Field(None, description="false: pictures are not streamed")
    background: Literal["auto", "opaque"] | None = Field(None, description="accepted, without effect")
    quality: str | None = Field(None, description="accepted, without effect")
    style: str | None = Field(None, description="accepted, without effect")
    moderation: str | None = Field(None, description="accepted, without effect")
    output_compression: int | None = Field(None, description="accepted, without effect: PNG keeps every pixel")
    partial_images: Literal[0] | None = None
    safety_identifier: str | None = Field(None, description="accepted, without effect")


def make_app(painter: PainterThread, limits: ServeSection, name: str) -> FastAPI:
    """Build the routes around one painter; `name` is what clients may call the model."""
    # FastAPI's own pages load their scripts from another host; the page below needs nothing but this endpoint.
    app = FastAPI(title="Fresco images", description=DESCRIPTION, docs_url=None, redoc_url=None)
    app.add_middleware(BodyLimit, max_bytes=limits.max_body_bytes)
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(StarletteHTTPException, _on_http_error)
    app.add_exception_handler(Exception, _on_bug)

    @app.post("/v1/images/generations")
    async def generate(body: ImagesRequest) -> JSONResponse:
        _require_ready(painter)
        _check_model(body.model, name, painter.info)
        rows = make_rows(body, limits, painter.info)
        try:
            drawn = await painter.draw(rows)
        except QueueFullError as error:
            message = f"{error} (serve.max_queue={limits.max_queue}); try again in {painter.retry_after_s} s"
            raise _later(429, message, "queue_full", painter.retry_after_s) from error
        return JSONResponse(_answer(rows, drawn, painter.info), headers=_headers(painter.info))

    @app.get("/", include_in_schema=False)
    @app.get("/docs", include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(TRY_PAGE.read_text(), headers={"Content-Security-Policy": PAGE_MAY_LOAD})

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model_card(name, painter.info)]}

    @app.get("/v1/models/{model_id:path}")
    async def model(model_id: str) -> dict[str, Any]:
        _check_model(model_id, name, painter.info)
        return _model_card(name, painter.info)

    @app.get("/healthz")
    async def healthy() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/readyz")
    async def ready() -> JSONResponse:
        status = {"status": painter.state, "error": painter.error, **_provenance(painter.info)}
        return JSONResponse(status, status_code=200 if painter.state == "ready" else 503)

    return app


def make_rows(body: ImagesRequest, limits: ServeSection, info: dict[str, Any]) -> list[dict[str, Any]]:
    """Turn a request into one row a picture, every limit checked; ApiError names the field and the limit."""
    _check_text("prompt", body.prompt, 1, limits.max_prompt_chars)
    _check_text("negative_prompt", body.negative_prompt or "", 0, limits.max_prompt_chars)
    num_images = _within("n", body.n, 1, limits.max_images, default=1)
    seed = _within("seed", body.seed, 0, LARGEST_SEED, default=secrets.randbelow(RANDOM_SEEDS))
    steps = _within("steps", body.steps, 1, limits.max_steps, default=limits.default_steps)
    scale = limits.default_guidance_scale
    scale = _within("guidance_scale", body.guidance_scale, 0, limits.max_guidance_scale, default=scale)
    if body.response_format not in (None, "b64_json"):
        message = f"response_format expected to be b64_json, found {body.response_format!r}: pictures are sent in the"
        raise ApiError(f"{message} answer, not kept for download", "response_format", "unsupported_value")
    width_px, height_px = _size(body.size, limits, info)
    shared = {"prompt": body.prompt, "negative_prompt": body.negative_prompt or "", "steps": steps}
    shape = {"guidance_scale": scale, "width_px": width_px, "height_px": height_px}
    return [{**shared, **shape, "seed": seed + index} for index in range(num_images)]


class BodyLimit:
    """Refuse request bodies over a size, by the announced length or else by counting what arrives."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app, self.max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        message = f"request body expected at most {self.max_bytes} bytes (serve.max_body_bytes), found more"
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        if announced.isdigit() and int(announced) > self.max_bytes:
            await _error_response(413, message, code=STATUS_CODES[413])(scope, receive, send)
            return
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            part = await receive()
            seen += len(part.get("body", b""))
            if seen > self.max_bytes:
                raise HTTPException(413, message)
            return part

        await self.app(scope, counted, send)


def _require_ready(painter: PainterThread) -> None:
    if painter.state != "ready":
        detail = f" ({painter.error})" if painter.error else ""
        raise _later(
            503, f"the model is {painter.state}{detail}; see /readyz", f"model_{painter.state}", LOADING_RETRY_S
        )


def _check_model(asked: str | None, name: str, info: dict[str, Any]) -> None:
    served = (name, f"models:/{name}/{info.get('model_version')}")
    if asked is not None and asked not in served:
        message = f"model expected to be {' or '.join(served)}, found {asked!r}: this endpoint serves one model"
        raise ApiError(message, "model", "model_not_found", 404)


def _check_text(param: str, text: str, least: int, most: int) -> None:
    if not least <= len(text) <= most:
        message = f"{param} expected {least} to {most} characters (serve.max_prompt_chars), found {len(text)}"
        raise ApiError(message, param, "string_above_max_length" if len(text) > most else "empty_string")
    if "\x00" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ApiError(f"{param} expected Unicode text, found a NUL or half a surrogate pair", param, "invalid_value")


def _within(param: str, value: Any, least: float, most: float, default: Any) -> Any:
    if value is None:
        return default
    if not least <= value <= most:
        raise ApiError(f"{param} expected {least} to {most}, found {value}", param, "invalid_value")
    return value


def _size(size: str | None, limits: ServeSection, info: dict[str, Any]) -> tuple[int, int]:
    if size in (None, "auto"):
        return info["width_px"], info["height_px"]
    multiple, least = info["size_multiple_px"], info["min_side_px"]
    width, _, height = str(size).partition("x")
    sides = [int(side) for side in (width, height) if side.isascii() and side.isdigit() and len(side) < 6]
    if len(sides) == 2 and all(least <= s <= limits.max_side_px and s % multiple == 0 for s in sides):
        return sides[0], sides[1]
    message = (
        f"size expected to be auto or WIDTHxHEIGHT, both multiples of {multiple} from {least} to {limits.max_side_px}"
        f" (serve.max_side_px), found {size!r}; the model's own size is {info['width_px']}x{info['height_px']}"
    )
    raise ApiError(message, "size", "invalid_value")


def _answer(rows: list[dict[str, Any]], drawn: list[bytes], info: dict[str, Any]) -> dict[str, Any]:
    data = [
        {"b64_json": base64.b64encode(png).decode("ascii"), "revised_prompt": None, "seed": row["seed"]}
        for row, png in zip(rows, drawn, strict=True)
    ]
    size = f"{rows[0]['width_px']}x{rows[0]['height_px']}"
    echo = {"output_format": "png", "size": size, "seed": rows[0]["seed"], "seeds": [row["seed"] for row in rows]}
    return {"created": int(time.time()), "data": data, **echo, **_provenance(info)}


def _provenance(info: dict[str, Any]) -> dict[str, Any]:
    return {key: info.get(key) for key in ("model_version", "dataset", "run_id")}


def _headers(info: dict[str, Any]) -> dict[str, str]:
    named = {"x-fresco-" + key.replace("_", "-"): value for key, value in _provenance(info).items()}
    return {key: quote(str(value), safe="@:/ ") for key, value in named.items() if value is not None}


def _model_card(name: str, info: dict[str, Any]) -> dict[str, Any]:
    card = {"id": name, "object": "model", "created": info.get("created", 0), "owned_by": "fresco"}
    return {**card, **_provenance(info)}


def _later(status: int, message: str, code: str, seconds: int) -> ApiError:
    error = ApiError(message, code=code, status=status)
    error.headers = {"Retry-After": str(seconds)}
    return error


def _error_response(status: int, message: str, param: str | None = None, code: str | None = None) -> JSONResponse:
    kind = {429: "rate_limit_error"}.get(status, INVALID if status < 500 else "server_error")
    whole = {
        key: text and text.encode("utf-8", "backslashreplace").decode()
        for key, text in {"message": message, "param": param}.items()
    }
    return JSONResponse({"error": {**whole, "type": kind, "code": code}}, status_code=status)


async def _on_api_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    response = _error_response(error.status, error.message, error.param, error.code)
    response.headers.update(error.headers)
    return response


async def _on_invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    problem = error.errors()[0]
    param = ".".join(str(part) for part in problem["loc"][1:]) or None
    if problem["type"] == "json_invalid":
        return _error_response(400, f"body expected to be JSON, found: {problem['ctx']['error']}", code="invalid_json")
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(param), ImagesRequest.model_fields, n=1, cutoff=0.0)
        return _error_response(400, f"unknown parameter {param!r}; nearest: {near[0]!r}", param, "unknown_parameter")
    if param is None:
        message = "body expected to be a JSON object with Content-Type application/json"
        return _error_response(400, message, code="invalid_json")
    if problem["type"] == "missing":
        return _error_response(400, f"{param} expected, found nothing", param, "missing_required_parameter")
    return _error_response(400, f"{param}: {problem['msg']}, found {problem['input']!r}"[:500], param, "invalid_value")


async def _on_http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, StarletteHTTPException)
    message = str(error.detail)
    if error.status_code in (404, 405):
        message = f"{request.method} {request.url.path} expected to be a route of this endpoint; see /docs"
    response = _error_response(error.status_code, message, code=STATUS_CODES.get(error.status_code, "bad_request"))
    response.headers.update(error.headers or {})
    return response


async def _on_bug(request: Request, error: Exception) -> JSONResponse:
    """Answer what nobody foresaw; the traceback is in the replica's log, and a client must not draw it thrice."""
    response = _error_response(500, f"drawing failed: {type(error).__name__}: {error}", code="internal_error")
    response.headers["x-should-retry"] = "false"
    return response
