"""Every answer that is not a picture, in OpenAI's shape: error.message, error.type, error.param and error.code.

The client classes follow from the status (400 BadRequestError, 401 AuthenticationError, 429 RateLimitError, 5xx
InternalServerError), and the client repeats 408, 409, 429 and 5xx by itself unless the header `x-should-retry: false`
forbids it: what would cost the same work again says so. Values of texts that people wrote are never echoed.
"""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.failures import log_failure

INVALID = "invalid_request_error"
KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
STATUS_CODES = {
    404: "not_found",
    405: "method_not_allowed",
    413: "request_too_large",
    415: "unsupported_media_type",
}
PRIVATE_FIELDS = ("prompt", "negative_prompt", "user", "safety_identifier")
"""Fields whose value is never repeated in an error, which may be logged on its way."""
MOST_ECHO_CHARS = 500
MOST_NAME_CHARS = 80
"""Of a name that a client made up: longer ones are neither repeated nor compared, which takes time by their square."""
ONCE = {"x-should-retry": "false"}


class ErrorDetail(BaseModel):
    model_config = ConfigDict(extra="forbid")

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """What every answer from 400 on holds."""

    model_config = ConfigDict(extra="forbid")

    error: ErrorDetail


class ApiError(Exception):
    """An answer that is not a picture: status, message, and which field is to blame."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.message, self.param, self.code, self.status = message, param, code, status
        self.headers: dict[str, str] = {}


def later(status: int, message: str, code: str, seconds: int) -> ApiError:
    """An error that passes by itself: the client may ask again after `seconds` (Retry-After)."""
    error = ApiError(message, code=code, status=status)
    error.headers = {"Retry-After": str(seconds)}
    return error


def once(status: int, message: str, code: str) -> ApiError:
    """An error after work was done or given up: the client must not send the request again by itself."""
    error = ApiError(message, code=code, status=status)
    error.headers = dict(ONCE)
    return error


def refused_content(category: str, param: str = "prompt") -> ApiError:
    """The safety stage refused a prompt or a picture; the reason's category is told, never the words."""
    message = f"{param} expected to pass this endpoint's content policy, found: {category}; change it and ask again"
    return ApiError(message, param, "content_policy_violation")


def error_body(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """Return the JSON of an error; halves of surrogate pairs, which UTF-8 cannot carry, are escaped."""
    message, param = _writable(message), param and _writable(param)
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def body_of(error: ApiError) -> dict[str, Any]:
    return error_body(error.message, kind_of(error.status), error.param, error.code)


def kind_of(status: int) -> str:
    return KINDS.get(status, INVALID if status < 500 else "server_error")


def error_response(
    status: int,
    message: str,
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    return JSONResponse(error_body(message, kind_of(status), param, code), status, dict(headers or {}))


def answer_error(error: ApiError) -> JSONResponse:
    return error_response(error.status, error.message, error.param, error.code, error.headers)


def invalid_value(problem: Mapping[str, Any], fields: Iterable[str]) -> ApiError:
    """Turn one of pydantic's problems (its `loc` begins at the field) into an error that names field and limit."""
    param = ".".join(str(part)[:MOST_NAME_CHARS] for part in problem["loc"])[:MOST_NAME_CHARS] or None
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(param), list(fields), n=1, cutoff=0.0)
        return ApiError(f"unknown parameter {param!r}; nearest: {near[0]!r}", param, "unknown_parameter")
    if param is None:
        return ApiError("body expected to be a JSON object with Content-Type application/json", code="invalid_json")
    if problem["type"] == "missing":
        return ApiError(f"{param} expected, found nothing", param, "missing_required_parameter")
    found = repr(problem["input"])
    if problem["loc"][0] in PRIVATE_FIELDS:
        found = f"a value of type {type(problem['input']).__name__}"
    message = problem["msg"].removeprefix("Value error, ")
    return ApiError(f"{param}: {message}, found {found}"[:MOST_ECHO_CHARS], param, "invalid_value")


def install_handlers(app: FastAPI, fields: Iterable[str]) -> None:
    """Give every error of `app` OpenAI's shape; `fields` are the parameters an unknown one is compared with."""
    names = tuple(fields)

    async def on_invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return answer_error(_read_problem(request, error.errors()[0], names))

    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(RequestValidationError, on_invalid)
    app.add_exception_handler(StarletteHTTPException, _on_http_error)
    app.add_middleware(Bugs)


def _read_problem(request: Request, problem: Mapping[str, Any], fields: Iterable[str]) -> ApiError:
    if problem["type"] == "json_invalid":
        found = problem["ctx"]["error"]
        return ApiError(f"body expected to be JSON, found: {found}", code="invalid_json")
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if len(problem["loc"]) == 1 and kind and "json" not in kind:
        message = f"Content-Type expected to be application/json, found {kind[:MOST_NAME_CHARS]!r}"
        return ApiError(message, code=STATUS_CODES[415], status=415)
    return invalid_value({**problem, "loc": problem["loc"][1:]}, fields)


async def _on_api_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    return answer_error(error)


async def _on_http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, StarletteHTTPException)
    message = str(error.detail)
    if error.status_code in (404, 405):
        asked = f"{request.method} {request.url.path[:MOST_NAME_CHARS]}"
        message = f"{asked} expected to be a route of this endpoint; see /openapi.json for the routes"
    code = STATUS_CODES.get(error.status_code, "bad_request" if error.status_code < 500 else "server_error")
    return error_response(error.status_code, message, code=code, headers=error.headers)


class Bugs:
    """Middleware: answers what nobody foresaw; its frames are in the log, and a client must not draw it thrice.

    The client gets the kind and the request's id: the words of an error may hold paths of this machine, or a prompt. An
    exception handler would not do: what it answers is raised once more, and the server logs it with its words.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def tell(message: Message) -> None:
            nonlocal begun
            begun = begun or message["type"] == "http.response.start"
            await send(message)

        try:
            await self.app(scope, receive, tell)
        except Exception as error:
            name = scope.get("state", {}).get("request_id", "unknown")
            log_failure(name, error)
            if begun:  # the server ends the connection when it hears of it
                raise RuntimeError(f"the answer to request {name} broke off; the log says more") from None
            message = f"drawing failed: {type(error).__name__}; the endpoint's log says more of request {name}"
            await error_response(500, message, code="internal_error", headers=ONCE)(scope, receive, send)


def _writable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()
