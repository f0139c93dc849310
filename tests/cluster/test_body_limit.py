"""Bodies over their limit are refused, announced or not, and each path has its own limit."""

from collections.abc import Iterator

import pytest
from fastapi import FastAPI, Request
from starlette.testclient import TestClient

from cluster.api_errors import install_handlers
from cluster.body_limit import BodyLimit, Limit

LIMITS = {"/json": 100, "/upload": 1000}


@pytest.fixture
def client() -> Iterator[TestClient]:
    app = FastAPI()
    install_handlers(app, ())
    app.add_middleware(BodyLimit, usual=Limit(100, "serve.a"), of_path={"/upload": Limit(1000, "serve.b")})

    @app.post("/json")
    @app.post("/upload")
    async def count(request: Request) -> int:
        return len(await request.body())

    with TestClient(app) as client:
        yield client


@pytest.mark.parametrize("path", LIMITS)
@pytest.mark.parametrize("announced", [True, False])
def test_body_passes_up_to_the_limit_of_its_path_and_not_a_byte_more(
    client: TestClient, path: str, announced: bool
) -> None:
    for size, status in ((LIMITS[path], 200), (LIMITS[path] + 1, 413)):
        content = b"x" * size
        answer = client.post(path, content=content if announced else iter([content[:7], content[7:]]))
        assert answer.status_code == status
        if status == 413:
            error = answer.json()["error"]
            assert error["code"] == "request_too_large" and str(LIMITS[path]) in error["message"]
            assert ("serve.a" if path == "/json" else "serve.b") in error["message"]


@pytest.mark.parametrize("announced", ["-5", "many", "", "9" * 5000])
def test_announced_length_that_is_no_number_is_not_trusted(client: TestClient, announced: str) -> None:
    answer = client.post("/json", content=b"x" * 200, headers={"content-length": announced})
    assert answer.status_code == 413
