"""The HTTP face of an endpoint: OpenAI's image generation as the unmodified client calls it, errors in OpenAI's shape.

The fields and their limits are in `images_schema`, the errors in `api_errors`. A wrong field is answered 400 with its
name and limit; nothing is silently ignored except the hints listed as without effect.
"""

import base64
import time
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

from fastapi import Depends, FastAPI
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.requests import Request

from cluster.api_errors import ApiError, ErrorBody, install_handlers, later
from cluster.api_keys import ApiKey, open_keys
from cluster.body_limit import BodyLimit, Limit
from cluster.images_schema import MOST_PRIORITY, ImagesRequest, ImagesResponse, Order, make_order
from cluster.painter_thread import PainterThread, QueueFullError
from cluster.placement import ServeSection

GENERATIONS_ROUTE = "/v1/images/generations"
EDITS_ROUTE = "/v1/images/edits"
LOADING_RETRY_S = 2
DESCRIPTION = "OpenAI-compatible image generation by the champion model"
TRY_PAGE = Path(__file__).parent / "assets" / "try.html"
PAGE_MAY_LOAD = "default-src 'self' 'unsafe-inline'; img-src data:"
ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {"model": ImagesResponse},
    "4XX": {"model": ErrorBody, "description": "the request is at fault"},
    "5XX": {"model": ErrorBody, "description": "the endpoint is at fault"},
}


def make_app(painter: PainterThread, limits: ServeSection, name: str) -> FastAPI:
    """Build the routes around one painter; `name` is what clients may call the model."""
    # FastAPI's own pages load their scripts from another host; the page below needs nothing but this endpoint.
    app = FastAPI(title="Fresco images", description=DESCRIPTION, docs_url=None, redoc_url=None)
    uploads = {EDITS_ROUTE: Limit(limits.max_upload_bytes, "serve.max_upload_bytes")}
    app.add_middleware(BodyLimit, usual=Limit(limits.max_body_bytes, "serve.max_body_bytes"), of_path=uploads)
    install_handlers(app, ImagesRequest.model_fields)
    keys = open_keys(limits)

    def caller(request: Request) -> ApiKey | None:
        return keys.admit(request.headers.get("authorization")) if keys else None

    def reader(request: Request) -> None:
        if keys:
            keys.admit(request.headers.get("authorization"), counted=False)

    @app.post(GENERATIONS_ROUTE, responses=ANSWERS)
    async def generate(body: ImagesRequest, key: Annotated[ApiKey | None, Depends(caller)]) -> JSONResponse:
        _require_ready(painter)
        _check_model(body.model, name, painter.info)
        _refuse_what_is_not_drawn(body)
        order = make_order(body, limits, painter.info, key.priority if key else MOST_PRIORITY)
        try:
            drawn = await painter.draw(order.rows)
        except QueueFullError as error:
            message = f"{error} (serve.max_queue={limits.max_queue}); try again in {painter.retry_after_s} s"
            raise later(429, message, "queue_full", painter.retry_after_s) from error
        return JSONResponse(_answer(order, drawn, painter.info), headers=_headers(painter.info))

    @app.get("/", include_in_schema=False)
    @app.get("/docs", include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(TRY_PAGE.read_text(), headers={"Content-Security-Policy": PAGE_MAY_LOAD})

    @app.get("/v1/models", dependencies=[Depends(reader)])
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model_card(name, painter.info)]}

    @app.get("/v1/models/{model_id:path}", dependencies=[Depends(reader)])
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


def _refuse_what_is_not_drawn(body: ImagesRequest) -> None:
    """The painter's thread draws whole PNG files at once: it cannot stream, and nothing is kept for download."""
    wanted = {
        "response_format": (body.response_format, "b64_json", "unsupported_value"),
        "output_format": (body.output_format, "png", "invalid_value"),
        "stream": (body.stream, False, "invalid_value"),
        "partial_images": (body.partial_images, 0, "invalid_value"),
        "deadline_s": (body.deadline_s, None, "unsupported_value"),
    }
    for param, (asked, can, code) in wanted.items():
        if asked not in (None, can):
            raise ApiError(f"{param} expected to be {can}, found {asked!r}: this endpoint has no other", param, code)


def _require_ready(painter: PainterThread) -> None:
    if painter.state != "ready":
        detail = f" ({painter.error})" if painter.error else ""
        raise later(
            503, f"the model is {painter.state}{detail}; see /readyz", f"model_{painter.state}", LOADING_RETRY_S
        )


def _check_model(asked: str | None, name: str, info: dict[str, Any]) -> None:
    served = (name, f"models:/{name}/{info.get('model_version')}")
    if asked is not None and asked not in served:
        message = f"model expected to be {' or '.join(served)}, found {asked!r}: this endpoint serves one model"
        raise ApiError(message, "model", "model_not_found", 404)


def _answer(order: Order, drawn: list[bytes], info: dict[str, Any]) -> dict[str, Any]:
    data = [
        {"b64_json": base64.b64encode(png).decode("ascii"), "revised_prompt": None, "seed": row["seed"]}
        for row, png in zip(order.rows, drawn, strict=True)
    ]
    seeds = [row["seed"] for row in order.rows]
    echo = {"output_format": order.output_format, "size": order.size, "seed": seeds[0], "seeds": seeds}
    return {"created": int(time.time()), "data": data, **echo, **_provenance(info)}


def _provenance(info: dict[str, Any]) -> dict[str, Any]:
    return {key: info.get(key) for key in ("model_version", "dataset", "run_id")}


def _headers(info: dict[str, Any]) -> dict[str, str]:
    named = {"x-fresco-" + key.replace("_", "-"): value for key, value in _provenance(info).items()}
    return {key: quote(str(value), safe="@:/ ") for key, value in named.items() if value is not None}


def _model_card(name: str, info: dict[str, Any]) -> dict[str, Any]:
    card = {"id": name, "object": "model", "created": info.get("created", 0), "owned_by": "fresco"}
    return {**card, **_provenance(info)}
