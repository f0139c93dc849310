"""Every operation of the OpenAPI page, asked with what it allows and with what it does not: never a fault of ours.

Schemathesis makes the requests from the page that the real endpoint hands out. What the page allows is drawn, but for
the few rules that JSON Schema cannot say; whatever is answered has a status, a type and a shape that the page names.
"""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance

from cluster.placement import ServeSection
from tests.endpoint import Endpoint, endpoint

LIMITS = ServeSection(
    max_images=2,
    max_steps=4,
    default_steps=2,
    max_side_px=32,
    max_prompt_chars=60,
    max_upload_pixels=4096,
    url_max_bytes=2_000_000,
    capture_share=0,
)
OPERATIONS = {
    "POST /v1/images/generations": 60,
    "POST /v1/images/edits": 60,
    "DELETE /v1/requests/{request_id}": 20,
    "GET /v1/pictures/{name}": 20,
    "GET /v1/models": 2,
    "GET /v1/models/{model_id}": 20,
    "GET /healthz": 2,
    "GET /readyz": 2,
}
"""Every operation, and how many requests of each kind it gets."""
WITH_BODY = ("POST /v1/images/generations", "POST /v1/images/edits")
"""Elsewhere a client gives a name at most, and any name is allowed."""
RULES = {"output_compression", "response_format", "deadline_s"}
"""Fields that others may forbid (png keeps every pixel, a stream has no address), and a time that cannot be met."""


def picture() -> bytes:
    file = io.BytesIO()
    Image.new("RGBA", (16, 24), (200, 30, 30, 0)).save(file, "PNG")
    return file.getvalue()


# One picture for image and mask: that both have one size is a rule that JSON Schema cannot say.
schemathesis.openapi.format("binary", st.just(picture()))


@pytest.fixture(scope="module")
def served(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    with endpoint(tiny_base, tmp_path_factory.mktemp("workspace"), LIMITS, resolution_px=16) as served:
        yield served


@pytest.fixture(scope="module")
def page(served: Endpoint) -> Any:
    page = schemathesis.openapi.from_url(f"{served.url}/openapi.json")
    page.config.generation.update(allow_x00=False)
    return page


def test_every_operation_is_asked(page: Any) -> None:
    assert {operation.ok().label for operation in page.get_all_operations()} == set(OPERATIONS)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_what_the_page_allows_is_answered_as_it_says(page: Any, operation: str) -> None:
    statuses = ask(page, operation, GenerationMode.POSITIVE)
    assert operation not in WITH_BODY or statuses.count(200) > len(statuses) / 3, "most of what is allowed is drawn"


@pytest.mark.parametrize("operation", WITH_BODY)
def test_what_the_page_does_not_allow_is_refused_as_it_says(page: Any, operation: str) -> None:
    statuses = ask(page, operation, GenerationMode.NEGATIVE)
    assert statuses.count(400) > len(statuses) / 2


@pytest.mark.parametrize("operation", OPERATIONS)
def test_what_a_host_of_another_name_is_told_is_on_the_page(served: Endpoint, operation: str) -> None:
    method, path = operation.split(" ")
    described = httpx.get(f"{served.url}/openapi.json").json()["paths"][path][method.lower()]["responses"]
    address = f"{served.url}{path}".replace("{", "").replace("}", "")
    answer = httpx.request(method, address, headers={"host": "evil.example"})
    assert answer.status_code == 403 and answer.json()["error"]["code"] == "host_not_allowed"
    assert described["403"]["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/ErrorBody"}


def ask(page: Any, name: str, mode: GenerationMode) -> list[int]:
    """Send requests of one kind to an operation, hold each answer to the page, and return their statuses."""
    method, path = name.split(" ")
    statuses: list[int] = []

    @settings(
        max_examples=OPERATIONS[name],
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=page[path][method].as_strategy(generation_mode=mode))
    def send(case: Any) -> None:
        answer = case.call()
        hold(case, answer, mode)
        statuses.append(answer.status_code)

    send()
    return statuses


def hold(case: Any, answer: Any, mode: GenerationMode) -> None:
    assert len(answer.headers["x-request-id"]) == 1
    if answer.status_code >= 400:
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["message"] and error["code"], error
    if answer.status_code == 503:
        assert answer.headers["retry-after"]
    else:
        assert answer.status_code < 500, answer.text
    if answer.headers["content-type"][0].startswith("text/event-stream"):
        events = [json.loads(line.removeprefix("data: ")) for line in answer.text.splitlines() if line[:6] == "data: "]
        assert events and all(event.get("b64_json") for event in events), answer.text[:500]
    by_rule = answer.status_code == 400 and answer.json()["error"]["param"] in RULES
    excluded = [positive_data_acceptance] if by_rule else []
    # What is wrong in Python may be right as a form sends it: a flag is a text there, and an empty list is nothing.
    excluded += [negative_data_rejection] if case.media_type == "multipart/form-data" else []
    case.validate_response(answer, excluded_checks=excluded)
