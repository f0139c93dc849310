"""What OpenAPI says of the routes: every status that they answer, the shape of every error, and the config's limits.

FastAPI derives the rest from the code. Its own 422 is taken out, because wrong fields are answered 400 here, in
OpenAI's shape. What depends on the config or on the model is filled in when the page is asked for.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any

from fastapi import FastAPI

from cluster.api_errors import ErrorBody
from cluster.images_schema import LARGEST_SEED, LEAST_STRENGTH, MOST_PRIORITY, ImagesResponse
from cluster.placement import ServeSection

ROUTES = ("image_generation", "image_edit")
STAGES = ("partial_image", "completed")
PICTURE_EVENT = {
    "type": "object",
    "required": ["type", "b64_json", "created_at", "size", "quality", "background", "output_format", "index", "seed"],
}
EVENT = {
    "type": "object",
    "required": ["event", "data"],
    "properties": {
        "event": {"enum": [f"{route}.{stage}" for route in ROUTES for stage in STAGES] + ["error"]},
        "data": {
            "type": "string",
            "contentMediaType": "application/json",
            "contentSchema": {"anyOf": [PICTURE_EVENT, {"$ref": "#/components/schemas/ErrorBody"}]},
        },
    },
}
"""What a stream is made of; `itemSchema` is OpenAPI 3.2's, and FastAPI writes it too."""
RETRY_AFTER = {"description": "seconds", "required": True, "schema": {"type": "integer", "minimum": 1}}
MEANINGS = {
    400: "a field, or the body, is not as described",
    401: "no key of this endpoint",
    403: "without keys: a page of another site, or a host that is not this machine's",
    404: "no such thing here",
    409: "another request of this name is at work",
    413: "the body is above its limit",
    415: "not the media type of this route",
    429: "the queue, the key's minute or the decoding of uploads is full, or a deadline is too near; see Retry-After",
    499: "the request was cancelled",
    500: "drawing failed",
    503: "the model, or another one, is being loaded, the replica was lost, or the endpoint is ending; see Retry-After",
    504: "the deadline passed while it was drawn",
}
PASSING = (409, 429, 503)
KEY_SCHEME = "key"
INTERNAL = ("HTTPValidationError", "ValidationError")


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Describe the errors of a route, all of one shape."""
    described: dict[int | str, dict[str, Any]] = {}
    for status in statuses:
        described[status] = {"model": ErrorBody, "description": MEANINGS[status]}
        if status in PASSING:
            described[status]["headers"] = {"Retry-After": RETRY_AFTER}
    return described


DRAWN: dict[int | str, dict[str, Any]] = {
    200: {
        "model": ImagesResponse,
        "description": "pictures, or with stream=true events as they take shape",
        "content": {"text/event-stream": {"itemSchema": EVENT}},
    },
    **errors(*MEANINGS),
}


def describe(
    app: FastAPI, limits: ServeSection, model: Callable[[], Mapping[str, Any]], forms: Mapping[str, str]
) -> None:
    """Let `/openapi.json` tell limits and errors as they are; `model` tells what is loaded, or {}.

    `forms` names, by path, the content type of request bodies that a route describes by itself.
    """
    derive = app.openapi

    def complete() -> dict[str, Any]:
        page = copy.deepcopy(derive())
        for name in INTERNAL:
            page["components"]["schemas"].pop(name, None)
        operations = [operation for path in page["paths"].values() for operation in path.values()]
        for operation in operations:
            operation["responses"].pop("422", None)
            if limits.api_keys_file and "401" in operation["responses"]:
                operation["security"] = [{KEY_SCHEME: []}]
        if limits.api_keys_file:
            page["components"]["securitySchemes"] = {KEY_SCHEME: {"type": "http", "scheme": "bearer"}}
        bodies = [page["components"]["schemas"]["ImagesRequest"]]
        for path, kind in forms.items():
            bodies.append(page["paths"][path]["post"]["requestBody"]["content"][kind]["schema"])
        told = bounds(limits, model())
        for body in bodies:
            _bound(body["properties"], told)
        return page

    app.openapi = complete  # type: ignore[method-assign]


def bounds(limits: ServeSection, info: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return, by field, what JSON Schema says of its values; what only a loaded model knows is left out before."""
    told: dict[str, dict[str, Any]] = {
        "prompt": {"minLength": 1, "maxLength": limits.max_prompt_chars},
        "negative_prompt": {"maxLength": limits.max_prompt_chars},
        "n": {"minimum": 1, "maximum": limits.max_images},
        "output_compression": {"minimum": 0, "maximum": 100},
        "partial_images": {"minimum": 0, "maximum": limits.max_partial_images},
        "seed": {"minimum": 0, "maximum": LARGEST_SEED},
        "steps": {"minimum": 1, "maximum": limits.max_steps},
        "guidance_scale": {"minimum": 0, "maximum": limits.max_guidance_scale},
        "deadline_s": {"minimum": 0.001, "maximum": limits.max_deadline_s},
        "priority": {"minimum": 0, "maximum": MOST_PRIORITY},
        "strength": {"minimum": LEAST_STRENGTH, "maximum": 1},
    }
    if info:
        told["size"] = _sizes(limits, info)
        told["scheduler"] = {"enum": list(info["schedulers"])}
        told["postprocess"] = {"enum": list(info["postprocess"])}
    return told


def _sizes(limits: ServeSection, info: Mapping[str, Any]) -> dict[str, Any]:
    multiple, least, most = info["size_multiple_px"], info["min_side_px"], limits.max_side_px
    sides = "|".join(str(side) for side in range(-(-least // multiple) * multiple, most + 1, multiple))
    rule = f"WIDTHxHEIGHT in pixels, both multiples of {multiple} from {least} to {most}, or auto"
    own = f"{info['width_px']}x{info['height_px']}"
    return {"pattern": f"^(auto|({sides})x({sides}))$", "description": rule, "examples": ["auto", own]}


def _bound(properties: dict[str, Any], told: Mapping[str, Mapping[str, Any]]) -> None:
    """Add what is told of fields to their schemas, in place: to texts and numbers, and to those within lists."""
    for name, more in told.items():
        if name not in properties:
            continue
        schema = properties[name]
        outside = {key: more[key] for key in ("description", "examples") if key in more}
        inside = {key: value for key, value in more.items() if key not in outside}
        schema |= outside
        for kind in schema.get("anyOf", [schema]):
            if kind.get("type") == "array":
                kind["items"] |= inside
                kind["uniqueItems"] = True
            elif kind.get("type") != "null":
                kind |= inside
