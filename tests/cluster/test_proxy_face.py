"""Whatever happens behind the proxy, a client gets one answer that it can read."""

from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import openai
import pytest
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.types import Message, Receive, Scope, Send

from cluster import proxy_face
from cluster.proxy_face import ASLEEP, STARTING, state_of
from tests.endpoint import listening

App = Callable[[Scope, Receive, Send], Awaitable[None]]
START: Message = {"type": "http.response.start", "status": 200}
EVENTS: Message = {**START, "headers": [(b"content-type", b"text/event-stream; charset=utf-8")]}
EVENT = (
    b'event: image_generation.partial_image\ndata: {"type": "image_generation.partial_image", "b64_json": "",'
    b' "partial_image_index": 0, "created_at": 0, "size": "1x1", "quality": "high", "background": "auto",'
    b' "output_format": "png"}\n\n'
)


def around(app: App) -> Any:
    """The app as it stands behind Serve's proxy."""
    wrapped: Any = app
    for middleware in proxy_face.around_proxy():
        wrapped = middleware.cls(wrapped)
    return wrapped


@pytest.fixture(autouse=True)
def awake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy_face, "_look", lambda: None)


def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=url, api_key="x", max_retries=0, http_client=httpx.Client(trust_env=False))


def test_replica_that_ends_before_it_answers_is_one_error_that_may_be_repeated() -> None:
    async def dies(scope: Scope, receive: Receive, send: Send) -> None: ...

    with listening(around(dies)) as url, client(url) as asking, pytest.raises(openai.InternalServerError) as lost:
        asking.images.generate(prompt="x")
    assert (lost.value.status_code, lost.value.code) == (503, "replica_lost")
    assert lost.value.response.headers["retry-after"] == "1"
    assert len(lost.value.response.headers.get_list("x-request-id")) == 1


def test_stream_that_breaks_off_ends_with_an_error_event() -> None:
    async def dies(scope: Scope, receive: Receive, send: Send) -> None:
        await send(EVENTS)
        await send({"type": "http.response.body", "body": EVENT, "more_body": True})

    seen = []
    with listening(around(dies)) as url, client(url) as asking, pytest.raises(openai.APIError) as lost:
        for event in asking.images.generate(prompt="x", stream=True, partial_images=1):
            seen.append(event.type)
    assert seen == ["image_generation.partial_image"] and lost.value.code == "replica_lost"


@pytest.mark.parametrize(
    ("status", "shown", "code"),
    [(404, 404, "not_found"), (503, 503, "no_replica"), (408, 408, "timeout"), (500, 503, "replica_lost")],
)
def test_texts_of_the_proxy_are_put_into_the_shape_of_errors(status: int, shown: int, code: str) -> None:
    app = PlainTextResponse("a text of Serve's own\nTraceback ...", status)
    with listening(around(app)) as url:
        answer = httpx.get(f"{url}/v1/models", trust_env=False)
    assert (answer.status_code, answer.json()["error"]["code"]) == (shown, code)
    assert "Traceback" not in answer.text


def test_answers_of_a_replica_pass_untouched() -> None:
    async def answers(scope: Scope, receive: Receive, send: Send) -> None:
        body = {"error": {"message": "m", "type": "t", "param": None, "code": "queue_full"}}
        app = JSONResponse(body, 429, {"Retry-After": "7"}) if scope["path"] == "/full" else PlainTextResponse("fine")
        await app(scope, receive, send)

    with listening(around(answers)) as url:
        full, fine = (httpx.get(url + path, trust_env=False) for path in ("/full", "/fine"))
    assert (full.status_code, full.headers["retry-after"], full.json()["error"]["code"]) == (429, "7", "queue_full")
    assert (fine.status_code, fine.text) == (200, "fine")


@pytest.mark.parametrize(("state", "status"), [(ASLEEP, 200), (STARTING, 503)])
def test_questions_after_the_state_of_a_sleeping_endpoint_reach_no_replica(
    monkeypatch: pytest.MonkeyPatch, state: str, status: int
) -> None:
    asked = []

    async def wakes(scope: Scope, receive: Receive, send: Send) -> None:
        asked.append(scope["path"])
        await PlainTextResponse("awake")(scope, receive, send)

    monkeypatch.setattr(proxy_face, "_look", lambda: state)
    with listening(around(wakes)) as url:
        ready, healthy = (httpx.get(f"{url}/{path}", trust_env=False) for path in ("readyz", "healthz"))
        assert (ready.status_code, ready.json()["status"]) == (status, state)
        assert (healthy.status_code, healthy.json()["status"]) == (200, "ok")
        assert httpx.get(f"{url}/metrics", trust_env=False).text == ""
        assert asked == []
        assert httpx.get(f"{url}/v1/models", trust_env=False).text == "awake"
    assert asked == ["/v1/models"]


@pytest.mark.parametrize(
    ("status", "replicas", "state"),
    [
        ("HEALTHY", {"RUNNING": 1}, None),
        ("HEALTHY", {}, ASLEEP),
        ("HEALTHY", {"RUNNING": 0}, ASLEEP),
        ("UPSCALING", {"STARTING": 1}, STARTING),
        ("DOWNSCALING", {"STOPPING": 1}, STARTING),
        ("UNHEALTHY", {}, STARTING),
        ("UPDATING", {"STARTING": 1, "RUNNING": 1}, None),
    ],
)
def test_state_follows_from_what_serve_knows_of_the_replicas(
    status: str, replicas: dict[str, int], state: str | None
) -> None:
    assert state_of(status, replicas) == state
