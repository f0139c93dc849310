"""Every answer names its request, also a refusal and a crash; a client may choose the name."""

import re
from collections.abc import Iterator

import pytest
from fastapi import FastAPI, Request
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient
from starlette.types import Receive, Scope, Send

from cluster.api_errors import install_handlers, later
from cluster.proxy_face import around_proxy
from cluster.request_ids import RequestIds, request_id_of


@pytest.fixture
def client() -> Iterator[TestClient]:
    app = FastAPI()
    install_handlers(app, ())

    @app.get("/name")
    def name(request: Request, fail: str = "") -> str:
        if fail == "refused":
            raise later(429, "full", "queue_full", 1)
        if fail == "bug":
            raise ZeroDivisionError
        return request_id_of(request)

    with TestClient(RequestIds(app), raise_server_exceptions=False) as client:
        yield client


def test_name_is_new_for_each_request_and_in_the_answer(client: TestClient) -> None:
    answers = [client.get("/name") for _ in range(20)]
    assert len({answer.json() for answer in answers}) == 20
    assert all(answer.headers["x-request-id"] == answer.json() for answer in answers)
    assert re.fullmatch("req_[0-9a-f]{24}", answers[0].json())


def test_client_may_choose_the_name(client: TestClient) -> None:
    assert client.get("/name", headers={"x-request-id": "my-own_Name-01"}).json() == "my-own_Name-01"


@pytest.mark.parametrize("name", ["short", "x" * 65, "a b c d e f", "../../etc", "name\u00e9name", "12345678\t9", ""])
def test_name_of_another_form_is_replaced(client: TestClient, name: str) -> None:
    found = client.get("/name", headers={"x-request-id": name.encode()}).json()  # type: ignore[dict-item]
    assert re.fullmatch("req_[0-9a-f]{24}", found)


@pytest.mark.parametrize(("path", "status"), [("/name?fail=refused", 429), ("/name?fail=bug", 500), ("/nowhere", 404)])
def test_refusals_and_crashes_are_named_too(client: TestClient, path: str, status: int) -> None:
    answer = client.get(path)
    assert answer.status_code == status and answer.headers["x-request-id"].startswith("req_")


@pytest.mark.parametrize("ours", [True, False], ids=["our Serve", "a Serve that ran before"])
@pytest.mark.parametrize("asked", [None, "my-own_Name-01", "not a name!"])
def test_answer_is_named_once_behind_serves_proxy(ours: bool, asked: str | None) -> None:
    from ray.serve._private.http_util import _apply_middlewares

    async def replica(scope: Scope, receive: Receive, send: Send) -> None:
        await PlainTextResponse(request_id_of(Request(scope)))(scope, receive, send)

    proxy = _apply_middlewares(RequestIds(replica, within_serve=True), around_proxy() if ours else [])  # type: ignore[arg-type]
    headers = {} if asked is None else {"x-request-id": asked}
    answer = TestClient(proxy).get("/", headers=headers)
    (named,) = answer.headers.get_list("x-request-id")
    # A Serve that somebody else started repeats whatever a client sent; requests are never called that here.
    assert named == ("not a name!" if asked == "not a name!" and not ours else answer.text)
    assert asked != "my-own_Name-01" or named == asked
