"""Errors in OpenAI's shape, as its unmodified client reads them."""

import pickle
import traceback
from collections.abc import AsyncIterator
from typing import Any

import httpx
import httpx2
import openai
import pytest
from fastapi import FastAPI, HTTPException
from pydantic import BaseModel, ConfigDict
from starlette.responses import StreamingResponse
from starlette.testclient import TestClient

from cluster.api_errors import ApiError, error_body, install_handlers, later, once, refused_content
from cluster.request_ids import RequestIds
from components.errors import InputError

ROUTE = "/v1/images/generations"


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid")
    prompt: str
    n: int = 1


def app_that_raises(error: Exception | None = None) -> FastAPI:
    app = FastAPI()
    install_handlers(app, Body.model_fields)

    @app.post(ROUTE)
    def route(body: Body) -> dict[str, Any]:
        if error:
            raise error
        return {}

    return app


def ask(error: Exception | None = None, **content: Any) -> httpx.Response:
    with TestClient(app_that_raises(error), raise_server_exceptions=False) as client:
        return client.post(ROUTE, **(content or {"json": {"prompt": "x"}}))


def openai_client(error: Exception | None) -> openai.OpenAI:
    """The real client, its requests handed to the application in this process."""
    inside = TestClient(app_that_raises(error), base_url="http://test", raise_server_exceptions=False)

    def answer(request: httpx2.Request) -> httpx2.Response:
        given = inside.request(request.method, request.url.path, content=request.read(), headers=dict(request.headers))
        return httpx2.Response(given.status_code, headers=dict(given.headers), content=given.content)

    transport = httpx2.Client(transport=httpx2.MockTransport(answer))
    return openai.OpenAI(base_url="http://test/v1", api_key="k", max_retries=0, http_client=transport)


@pytest.mark.parametrize(
    ("error", "kind", "code"),
    [
        (ApiError("size expected", "size", "invalid_value"), openai.BadRequestError, "invalid_value"),
        (ApiError("no key", code="invalid_api_key", status=401), openai.AuthenticationError, "invalid_api_key"),
        (ApiError("no model", "model", "model_not_found", 404), openai.NotFoundError, "model_not_found"),
        (HTTPException(413, "too large"), openai.APIStatusError, "request_too_large"),
        (later(429, "full", "queue_full", 7), openai.RateLimitError, "queue_full"),
        (once(504, "too late", "deadline_exceeded"), openai.InternalServerError, "deadline_exceeded"),
        (refused_content("weapons"), openai.BadRequestError, "content_policy_violation"),
        (ZeroDivisionError("division by zero"), openai.InternalServerError, "internal_error"),
    ],
    ids=lambda value: getattr(value, "code", None) or str(value),
)
def test_openai_client_raises_the_class_of_the_status_with_our_code(error: Exception, kind: Any, code: str) -> None:
    client = openai_client(error)
    with pytest.raises(kind) as caught:
        client.images.generate(prompt="x")
    assert caught.value.code == code
    assert set(caught.value.body) == {"message", "type", "param", "code"}


def test_retry_after_and_should_retry_travel_as_headers() -> None:
    full, late, bug = ask(later(429, "full", "queue_full", 7)), ask(once(504, "late", "late")), ask(ValueError("bug"))
    assert full.headers["retry-after"] == "7" and "x-should-retry" not in full.headers
    assert late.headers["x-should-retry"] == bug.headers["x-should-retry"] == "false"
    kinds = [answer.json()["error"]["type"] for answer in (full, late, bug)]
    assert kinds == ["rate_limit_error", "server_error", "server_error"]


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "image/png"])
def test_body_of_another_content_type_is_415(kind: str) -> None:
    answer = ask(content=b'{"prompt": "x"}', headers={"content-type": kind})
    assert answer.status_code == 415
    error = answer.json()["error"]
    assert error["code"] == "unsupported_media_type" and kind in error["message"]


def test_values_of_private_fields_are_not_repeated_in_errors() -> None:
    answer = ask(json={"prompt": ["my secret wish"]})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "prompt"
    assert "secret" not in answer.text and "a value of type list" in answer.text
    assert "'many'" in ask(json={"prompt": "x", "n": "many"}).json()["error"]["message"]


def test_refused_content_tells_the_category_only() -> None:
    error = refused_content("weapons")
    assert (error.status, error.param, error.code) == (400, "prompt", "content_policy_violation")
    assert "weapons" in error.message


def test_log_says_more_of_the_request_that_the_client_was_told_of(caplog: pytest.LogCaptureFixture) -> None:
    def cannot(prompt: str) -> None:
        raise ValueError(f"cannot encode {prompt}")

    try:
        try:
            cannot("my secret wish")
        except ValueError as cause:
            raise ExceptionGroup(
                "my secret group", [InputError("steps expected 1"), KeyError("my secret key")]
            ) from cause
    except ExceptionGroup as error:
        bug = error
    inside = RequestIds(app_that_raises(bug), within_serve=False)
    with TestClient(inside) as client:  # raises what the server would log
        answer = client.post(ROUTE, json={"prompt": "x"}, headers={"x-request-id": "my-request-07"})
    assert answer.status_code == 500 and "says more of request my-request-07" in answer.json()["error"]["message"]
    assert "request my-request-07 failed: builtins.ExceptionGroup" in caplog.text
    assert "components.errors.InputError: steps expected 1" in caplog.text and "builtins.KeyError (its" in caplog.text
    assert "which came of:\nbuiltins.ValueError" in caplog.text and "in cannot\n" in caplog.text
    assert "secret wish" not in caplog.text.replace('cannot("my secret wish")', "")


def test_answer_that_breaks_off_is_no_place_for_the_words_of_a_bug_either() -> None:
    app = app_that_raises()

    async def parts() -> AsyncIterator[bytes]:
        yield b"1"
        raise ValueError("my secret wish")

    app.get("/broken")(lambda: StreamingResponse(parts()))
    with TestClient(app) as client, pytest.raises(RuntimeError, match="broke off") as told:
        client.get("/broken")
    assert "secret wish" not in "".join(traceback.format_exception(told.value)).replace(
        'ValueError("my secret wish")', ""
    )


def test_half_a_surrogate_pair_in_a_message_is_escaped() -> None:
    body = error_body("found '\ud800'", "invalid_request_error", "\udfff")
    assert body["error"]["message"] == "found '\\ud800'" and body["error"]["param"] == "\\udfff"


def test_api_error_survives_pickling_with_its_headers() -> None:
    error = pickle.loads(pickle.dumps(later(503, "loading", "model_loading", 2)))
    assert (str(error), error.status, error.headers) == ("loading", 503, {"Retry-After": "2"})
