"""The HTTP face of an endpoint: OpenAI's Images API as the unmodified client calls it, errors in OpenAI's shape.

Here the routes are put together, with those that do not draw: models, health, the page to draw with, pictures by
address. The fields and their limits are in `images_schema`, the errors in `api_errors`. A wrong field is answered 400
with its name and limit; nothing is silently ignored except the hints listed as without effect.
"""

from typing import Any

from fastapi import Depends, FastAPI
from fastapi.responses import JSONResponse
from starlette.requests import Request
from starlette.types import ASGIApp

from cluster.answers import provenance_of
from cluster.api_errors import install_handlers
from cluster.api_keys import ApiKey, open_keys
from cluster.body_limit import BodyLimit, Limit
from cluster.drawing_routes import EDITS_ROUTE, Desk, add_drawing_routes
from cluster.images_schema import ImagesRequest
from cluster.picture_urls import add_route
from cluster.playground import add_playground
from cluster.request_ids import RequestIds
from cluster.request_watch import RequestWatch
from cluster.same_site import SameSite
from cluster.serve_metrics import add_metrics_route

DESCRIPTION = "OpenAI-compatible image generation by the champion model"


def make_app(desk: Desk) -> ASGIApp:
    """Build the routes around one desk; every answer, crashes included, carries its request's id."""
    # FastAPI's own pages load their scripts from another host; the page below needs nothing but this endpoint.
    app = FastAPI(title="Fresco images", description=DESCRIPTION, docs_url=None, redoc_url=None)
    limits = desk.limits
    uploads = {EDITS_ROUTE: Limit(limits.max_upload_bytes, "serve.max_upload_bytes")}
    app.add_middleware(BodyLimit, usual=Limit(limits.max_body_bytes, "serve.max_body_bytes"), of_path=uploads)
    install_handlers(app, ImagesRequest.model_fields)
    keys = open_keys(limits)
    if keys is None:
        app.add_middleware(SameSite, limits=limits)

    def caller(request: Request) -> ApiKey | None:
        return keys.admit(request.headers.get("authorization")) if keys else None

    def reader(request: Request) -> ApiKey | None:
        return keys.admit(request.headers.get("authorization"), counted=False) if keys else None

    add_drawing_routes(app, desk, caller, reader)
    add_route(app, desk.pictures)
    add_playground(app, limits, lambda: desk.bridge.info)
    add_metrics_route(app, desk.metric_files.exposition, [Depends(reader)])
    _add_models(app, desk, Depends(reader))
    _add_health(app, desk)
    return RequestIds(RequestWatch(app, began=desk.metrics.began, ended=[desk.metrics.ended, desk.log.ended]))


def _add_models(app: FastAPI, desk: Desk, admitted: Any) -> None:
    def card() -> dict[str, Any]:
        info = desk.bridge.info
        named = {"id": desk.name, "object": "model", "created": info.get("created", 0), "owned_by": "fresco"}
        return {**named, **provenance_of(info)}

    @app.get("/v1/models", dependencies=[admitted])
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card()]}

    @app.get("/v1/models/{model_id:path}", dependencies=[admitted])
    async def model(model_id: str) -> dict[str, Any]:
        desk.check_model(model_id)
        return card()


def _add_health(app: FastAPI, desk: Desk) -> None:
    @app.get("/healthz")
    async def healthy() -> JSONResponse:
        problem = desk.bridge.problem
        return JSONResponse({"status": problem or "ok"}, 503 if problem else 200)

    @app.get("/readyz")
    async def ready() -> JSONResponse:
        bridge = desk.bridge
        state = "failed" if bridge.problem else bridge.state
        error = bridge.error or bridge.problem or bridge.swap_error
        status = {"status": state, "error": error, **provenance_of(bridge.info)}
        return JSONResponse(status, status_code=200 if state == "ready" else 503)
