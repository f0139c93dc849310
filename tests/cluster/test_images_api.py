"""The HTTP face without Ray or a socket: every refusal with its status and OpenAI's error shape, every limit named."""

import asyncio
import base64
import io
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from cluster.api_errors import ApiError
from cluster.drawing_routes import Desk
from cluster.images_api import make_app
from cluster.placement import ServeSection
from tests.endpoint import open_desk

LIMITS = ServeSection(
    max_images=4, max_prompt_chars=50, max_steps=30, max_side_px=64, max_body_bytes=2048, default_steps=2
)
ROUTE = "/v1/images/generations"


@pytest.fixture(scope="module")
def desk(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    more = {"resolution_px": 16, "model_version": 7, "dataset": "emblèmes@0123", "run_id": "fresco-1"}
    with open_desk(tiny_base, tmp_path_factory.mktemp("workspace"), LIMITS, **more) as desk:
        yield desk


def ask(desk: Desk, method: str, path: str, **content: Any) -> httpx.Response:
    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app=make_app(desk), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.request(method, path, **content)

    return asyncio.run(send())


def refusal(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return dict(error)


def test_request_with_only_a_prompt_takes_every_default(desk: Desk) -> None:
    body = {"prompt": "ein roter Kreis ☀", "size": None, "n": None, "user": "me"}
    answer = ask(desk, "POST", ROUTE, json=body).json()
    assert 0 <= answer["seed"] < 2**32 and answer["size"] == "16x16" and len(answer["data"]) == 1
    usual = {"steps": LIMITS.default_steps, "guidance_scale": LIMITS.default_guidance_scale, "negative_prompt": ""}
    told = ask(desk, "POST", ROUTE, json={**body, **usual, "seed": answer["seed"], "scheduler": "ddim"}).json()
    assert picture(told).tobytes() == picture(answer).tobytes()


def picture(answer: dict[str, Any]) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"])))


def test_answer_carries_pictures_seeds_and_provenance(desk: Desk) -> None:
    asked = {"prompt": "x", "n": 3, "seed": 40, "steps": 5, "guidance_scale": 0, "size": "32x48"}
    answer = ask(desk, "POST", ROUTE, json=asked | {"response_format": "b64_json", "model": "fresco"})
    body = answer.json()
    assert [entry["seed"] for entry in body["data"]] == body["seeds"] == [40, 41, 42]
    assert body["data"][0]["revised_prompt"] is None and body["created"] > 0
    assert (body["seed"], body["size"], body["output_format"]) == (40, "32x48", "png")
    assert picture(body).size == (32, 48)
    assert (body["model_version"], body["dataset"], body["run_id"]) == (7, "emblèmes@0123", "fresco-1")
    assert answer.headers["x-fresco-model-version"] == "7"
    assert answer.headers["x-fresco-dataset"] == "embl%C3%A8mes@0123"


def test_seeds_differ_between_requests_that_name_none(desk: Desk) -> None:
    seeds = {ask(desk, "POST", ROUTE, json={"prompt": "x"}).json()["seed"] for _ in range(5)}
    assert len(seeds) == 5


@pytest.mark.parametrize(
    ("fields", "param", "code", "said"),
    [
        ({"prompt": ""}, "prompt", "empty_string", "1 to 50 characters"),
        ({"prompt": "x" * 51}, "prompt", "string_above_max_length", "found 51"),
        ({"prompt": "a\x00b"}, "prompt", "invalid_value", "NUL"),
        ({"prompt": 5}, "prompt", "invalid_value", "string"),
        ({"prompt": None}, "prompt", "invalid_value", "string"),
        ({"negative_prompt": "x" * 51}, "negative_prompt", "string_above_max_length", "serve.max_prompt_chars"),
        ({"n": 0}, "n", "invalid_value", "expected 1 to 4, found 0"),
        ({"n": 5}, "n", "invalid_value", "expected 1 to 4, found 5"),
        ({"n": "2"}, "n", "invalid_value", "integer"),
        ({"n": True}, "n", "invalid_value", "integer"),
        ({"seed": -1}, "seed", "invalid_value", "found -1"),
        ({"seed": 2**53}, "seed", "invalid_value", "9007199254740991"),
        ({"steps": 31}, "steps", "invalid_value", "expected 1 to 30"),
        ({"steps": 2.5}, "steps", "invalid_value", "integer"),
        ({"guidance_scale": 31}, "guidance_scale", "invalid_value", "expected 0 to 30"),
        ({"size": "100x100"}, "size", "invalid_value", "multiples of 8 from 16 to 64"),
        ({"size": "65x64"}, "size", "invalid_value", "the model's own size is 16x16"),
        ({"size": "8x16"}, "size", "invalid_value", "from 16"),
        ({"size": "big"}, "size", "invalid_value", "'big'"),
        ({"size": "16x16x16"}, "size", "invalid_value", "WIDTHxHEIGHT"),
        ({"response_format": "url", "stream": True}, "response_format", "unsupported_value", "b64_json"),
        ({"output_format": "gif"}, "output_format", "invalid_value", "png"),
        ({"partial_images": 4}, "partial_images", "invalid_value", "serve.max_partial_images"),
        ({"scheduler": "magic"}, "scheduler", "invalid_value", "ddim, euler"),
        ({"postprocess": "magic"}, "postprocess", "invalid_value", "upscale_2x"),
        ({"sed": 1}, "sed", "unknown_parameter", "nearest: 'seed'"),
    ],
)
def test_wrong_field_is_named_with_its_limit(
    desk: Desk, fields: dict[str, Any], param: str, code: str, said: str
) -> None:
    before = desk.bridge.painter.engine.counters.done  # type: ignore[attr-defined]
    error = refusal(ask(desk, "POST", ROUTE, json={"prompt": "x"} | fields), 400)
    assert (error["param"], error["code"], error["type"]) == (param, code, "invalid_request_error")
    assert said in error["message"]
    assert desk.bridge.painter.engine.counters.done == before  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("content", "code", "param"),
    [
        (b"{", "invalid_json", None),
        (b"", "invalid_json", None),
        (b"[1]", "invalid_json", None),
        (b"\xff\xfe", "invalid_json", None),
        (b"{}", "missing_required_parameter", "prompt"),
        (b'{"prompt": "\\ud800"}', "invalid_value", "prompt"),
        (b'{"prompt": "x", "\\ud800": 1}', "invalid_json", None),
        (b'{"prompt": "x", "guidance_scale": NaN}', "invalid_value", "guidance_scale"),
    ],
)
def test_wrong_body_is_refused_in_openai_shape(desk: Desk, content: bytes, code: str, param: str | None) -> None:
    answer = ask(desk, "POST", ROUTE, content=content, headers={"content-type": "application/json"})
    error = refusal(answer, 400)
    assert (error["code"], error["param"]) == (code, param)


def test_body_over_the_limit_is_refused_announced_or_not(desk: Desk) -> None:
    async def parts() -> Any:
        for _ in range(10):
            yield b'{"prompt":' + b" " * 500

    headers = {"content-type": "application/json"}
    for content in (b" " * 2049, parts()):
        error = refusal(ask(desk, "POST", ROUTE, content=content, headers=headers), 413)
        assert "at most 2048 bytes (serve.max_body_bytes)" in error["message"]
        assert error["code"] == "request_too_large"


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/no", 404), ("GET", ROUTE, 405), ("POST", "/v", 404)])
def test_unknown_route_or_method_is_refused_in_openai_shape(desk: Desk, method: str, path: str, status: int) -> None:
    error = refusal(ask(desk, method, path), status)
    assert path in error["message"] and error["code"] in ("not_found", "method_not_allowed")


def test_model_of_another_name_is_not_found(desk: Desk) -> None:
    error = refusal(ask(desk, "POST", ROUTE, json={"prompt": "x", "model": "dall-e-3"}), 404)
    assert (error["param"], error["code"]) == ("model", "model_not_found")
    assert "fresco or models:/fresco/7" in error["message"]
    assert ask(desk, "POST", ROUTE, json={"prompt": "x", "model": "models:/fresco/7"}).status_code == 200
    assert refusal(ask(desk, "GET", "/v1/models/other"), 404)["code"] == "model_not_found"


def test_drawing_that_fails_is_500_once(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise ValueError("the disk is full")

    monkeypatch.setattr(desk.pictures, "put", fail)
    answer = ask(desk, "POST", ROUTE, json={"prompt": "x", "response_format": "url"})
    error = refusal(answer, 500)
    assert error["type"] == "server_error" and "drawing failed: ValueError;" in error["message"]
    assert "the disk is full" not in answer.text and answer.headers["x-request-id"] in error["message"]
    assert answer.headers["x-should-retry"] == "false" and answer.headers["x-request-id"]


def test_endpoint_that_still_loads_is_alive_but_not_ready(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(desk.bridge, "state", "loading")
    assert ask(desk, "GET", "/healthz").status_code == 200
    assert ask(desk, "GET", "/readyz").status_code == 503
    answer = ask(desk, "POST", ROUTE, json={"prompt": "x"})
    assert refusal(answer, 503)["code"] == "model_loading" and answer.headers["retry-after"]


def test_endpoint_whose_loop_has_ended_says_so(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(desk.bridge.painter.engine, "broken", ZeroDivisionError("of the loop"))  # type: ignore[attr-defined]
    answer = ask(desk, "GET", "/healthz")
    assert answer.status_code == 503 and "of the loop" in answer.json()["status"]
    assert ask(desk, "GET", "/readyz").json()["status"] == "failed"


def test_models_ready_and_documentation_answer(desk: Desk) -> None:
    models = ask(desk, "GET", "/v1/models").json()
    assert models["object"] == "list" and models["data"][0]["id"] == "fresco"
    assert models["data"][0]["model_version"] == 7
    assert ask(desk, "GET", "/v1/models/fresco").json()["owned_by"] == "fresco"
    assert ask(desk, "GET", "/readyz").json()["status"] == "ready"
    described = ask(desk, "GET", "/openapi.json").json()
    assert "guidance_scale" in described["components"]["schemas"]["ImagesRequest"]["properties"]


@pytest.mark.parametrize("route", ["/", "/docs"])
def test_page_to_try_it_loads_nothing_from_other_hosts(desk: Desk, route: str) -> None:
    answer = ask(desk, "GET", route)
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/html")
    assert "v1/images/generations" in answer.text
    assert not re.search(r"""(src|href|url)\s*[=(:]\s*["'`]?(https?:)?//""", answer.text)
    assert "default-src 'self'" in answer.headers["content-security-policy"]


def test_api_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(ApiError("message", "size", "invalid_value", 404)))
    assert (str(error), error.param, error.status) == ("message", "size", 404)
