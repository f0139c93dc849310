"""The HTTP face of an endpoint: OpenAI's Images API as the unmodified client calls it, errors in OpenAI's shape.

Here the routes are put together, with those that do not draw: models, health, the page to draw with, pictures by
address. The fields and their limits are in `images_schema`, the errors in `api_errors`. A wrong field is answered 400
with its name and limit; nothing is silently ignored except the hints listed as without effect.
"""

from typing import Any, Literal

from fastapi import Depends, FastAPI
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.requests import Request
from starlette.types import ASGIApp

from cluster.answers import provenance_of
from cluster.api_description import describe, errors
from cluster.api_errors import install_handlers
from cluster.api_keys import ApiKey, open_keys
from cluster.body_limit import BodyLimit, Limit
from cluster.drawing_routes import EDITS_ROUTE, LOCAL, Desk, add_drawing_routes
from cluster.images_schema import ImagesRequest
from cluster.picture_urls import add_route
from cluster.playground import add_playground
from cluster.request_ids import RequestIds
from cluster.request_watch import RequestWatch
from cluster.same_site import SameSite
from cluster.serve_metrics import add_metrics_route
from cluster.uploads import FORM

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
    describe(app, limits, lambda: desk.bridge.info, {EDITS_ROUTE: FORM})
    ended = [desk.metrics.ended, desk.log.ended, *([desk.traces.ended] if desk.traces else [])]
    watch = RequestWatch(app, began=desk.metrics.began, ended=ended)
    return RequestIds(watch, within_serve=desk.replica != LOCAL)


class Provenance(BaseModel):
    """Which weights; null before they are loaded."""

    model_version: int | None
    dataset: str | None
    run_id: str | None


class ModelCard(Provenance):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["fresco"] = "fresco"


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(BaseModel):
    status: str


class Readiness(Provenance):
    status: str
    error: str
    reason: str | None = None
    """Why new requests wait, while another model is loaded."""


def _add_models(app: FastAPI, desk: Desk, admitted: Any) -> None:
    def card(name: str, version: int | None = None) -> ModelCard:
        info = desk.bridge.info if version is None else desk.bridge.painter.info(version)
        return ModelCard(id=name, created=info.get("created", 0), **provenance_of(info))

    @app.get("/v1/models", dependencies=[admitted], responses=errors(401, 403))
    async def models() -> ModelList:
        beside = [(desk.name_of(version), version) for version in desk.bridge.versions[1:]]
        return ModelList(data=[card(desk.name), *(card(*one) for one in beside)])

    @app.get("/v1/models/{model_id:path}", dependencies=[admitted], responses=errors(401, 403, 404))
    async def model(model_id: str) -> ModelCard:
        version = desk.check_model(model_id)
        return card(desk.name if version is None else model_id, version)


def _add_health(app: FastAPI, desk: Desk) -> None:
    broken: dict[int | str, dict[str, Any]] = {503: {"model": Health, "description": "draws no more"}, **errors(403)}

    @app.get("/healthz", response_model=Health, responses=broken)
    async def healthy() -> JSONResponse:
        problem = desk.bridge.problem
        return JSONResponse({"status": problem or "ok"}, 503 if problem else 200)

    unready: dict[int | str, dict[str, Any]] = {
        503: {"model": Readiness, "description": "no model is loaded"},
        **errors(403),
    }

    @app.get("/readyz", response_model=Readiness, responses=unready)
    async def ready() -> JSONResponse:
        bridge = desk.bridge
        state = "failed" if bridge.problem else bridge.state
        error = bridge.error or bridge.problem or bridge.swap_error
        status = {"status": state, "error": error, **provenance_of(bridge.info)}
        if state == "ready" and (reason := bridge.swapping):
            # Requests wait and are answered, so a balancer must not take the replica out.
            status |= {"status": "swapping", "reason": reason}
        return JSONResponse(status, status_code=200 if state == "ready" else 503)
