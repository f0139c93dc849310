"""The endpoint as clients meet it: a real model on Ray Serve, asked over HTTP with the unmodified OpenAI client."""

import base64
import io
import socket
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from PIL import Image

from cluster.answers import PROVENANCE
from cluster.errors import EndpointError, PlacementError
from cluster.placement import PlacementSection, ServeSection
from cluster.serving import FREE_PORTS, ModelSource, endpoint, find_port, readiness, url_of, wait_until_ready
from components.models import make_tiny, save_parts
from components.provenance import verify
from components.signing_key import read_public_keys
from tests.endpoint import FACTS, painter_arguments

pytestmark = pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\.")
SETTINGS = ServeSection(default_steps=2, max_images=3, max_steps=900, max_side_px=64)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model") / "pipeline"
    save_parts(make_tiny("stable_diffusion", seed=0), directory)
    return directory


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("workspace")


@pytest.fixture(scope="module")
def source(pipeline: Path, workspace: Path) -> ModelSource:
    arguments = painter_arguments(pipeline, workspace / "keys", SETTINGS)
    return ModelSource("flows.paint:make_painter", arguments, "fresco", str(workspace))


@pytest.fixture(scope="module")
def url(source: ModelSource) -> Iterator[str]:
    with endpoint(source, SETTINGS, PlacementSection()) as url:
        yield url


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client:
        yield client


def picture(b64_json: str | None) -> Image.Image:
    image = Image.open(io.BytesIO(base64.b64decode(str(b64_json))))
    image.load()
    return image


def test_openai_client_gets_pictures_with_their_provenance(client: openai.OpenAI, workspace: Path) -> None:
    answer: Any = client.images.generate(
        prompt="a red circle",
        model="fresco",
        n=2,
        size="64x64",
        response_format="b64_json",
        user="somebody",
        extra_body={"seed": 7, "steps": 3, "guidance_scale": 2.5, "negative_prompt": "a square"},
    )
    assert (answer.model_version, answer.dataset, answer.run_id) == (4, "emblems@0123456789ab", "fresco-abc")
    assert answer.seeds == [7, 8] and answer.created > 0 and answer.data[0].revised_prompt is None
    content = base64.b64decode(answer.data[1].b64_json)
    second = picture(answer.data[1].b64_json)
    assert second.size == (64, 64) and second.format == "PNG"
    verdict = verify(content, read_public_keys(workspace / "keys"))
    assert verdict.status == "valid" and verdict.facts["request_id"] == answer._request_id
    made = {"model_version": 4, "dataset": "emblems@0123456789ab", "run_id": "fresco-abc", "seed": 8}
    assert {key: verdict.facts[key] for key in made} == made
    assert not {"prompt", "negative_prompt"} & set(verdict.facts)


def test_pictures_by_address_streams_and_edits_pass_through_serve(client: openai.OpenAI) -> None:
    by_url: Any = client.images.generate(prompt="x", response_format="url", extra_body={"seed": 1})
    got = httpx.get(by_url.data[0].url, trust_env=False)
    assert got.status_code == 200 and got.headers["content-type"] == "image/png"
    more = {"seed": 1, "steps": 8}
    events: list[Any] = list(client.images.generate(prompt="x", stream=True, partial_images=1, extra_body=more))
    kinds = [event.type for event in events]
    assert kinds == ["image_generation.partial_image", "image_generation.completed"]
    edited: Any = client.images.edit(image=got.content, prompt="x", extra_body={"strength": 0.5})
    assert picture(edited.data[0].b64_json).size == (32, 32)


@pytest.mark.parametrize("stream", [False, True])
def test_request_whose_client_goes_away_is_no_longer_at_work(url: str, stream: bool) -> None:
    name = {"x-request-id": f"left-behind-{stream}"}
    body = {"prompt": "x", "n": 3, "size": "64x64", "steps": 900, "stream": stream}
    with httpx.Client(trust_env=False) as http:
        request = http.build_request("POST", f"{url}/v1/images/generations", json=body, headers=name, timeout=1)
        if stream:
            http.send(request, stream=True).close()
        else:
            with pytest.raises(httpx.ReadTimeout):
                http.send(request)
        # A name at work is refused with 409, one that is free is accepted: the rows are gone then.
        short = {"prompt": "x", "steps": 1}
        deadline = time.monotonic() + 20
        while http.post(f"{url}/v1/images/generations", json=short, headers=name, timeout=30).status_code == 409:
            assert time.monotonic() < deadline


def test_same_seed_draws_the_same_picture_alone_or_in_company(client: openai.OpenAI) -> None:
    def draw(n: int, seed: int) -> list[Image.Image]:
        answer = client.images.generate(prompt="ein Kreis ☀", n=n, extra_body={"seed": seed})
        return [picture(entry.b64_json) for entry in answer.data or []]

    together, alone, again = draw(3, 10), draw(1, 11)[0], draw(1, 11)[0]
    assert alone.size == (32, 32)
    assert alone.tobytes() == again.tobytes()
    # A row moves by about 1e-6 with the batch size, which can turn one rounding of a pixel value.
    assert max(abs(a - b) for a, b in zip(alone.tobytes(), together[1].tobytes(), strict=True)) <= 1
    assert together[0].tobytes() != together[1].tobytes()


def test_headers_name_the_model_version_and_the_request(client: openai.OpenAI) -> None:
    raw = client.images.with_raw_response.generate(prompt="x")
    assert raw.headers["x-fresco-model-version"] == "4"
    assert raw.headers["x-fresco-dataset"] == "emblems@0123456789ab"
    assert raw.headers["x-fresco-run-id"] == "fresco-abc"
    assert raw.headers.get_list("x-request-id") == [raw.request_id]
    named = client.images.with_raw_response.generate(prompt="x", extra_headers={"x-request-id": "my-own-name"})
    assert named.headers.get_list("x-request-id") == ["my-own-name"]
    replaced = client.images.with_raw_response.generate(prompt="x", extra_headers={"x-request-id": "no good"})
    assert len(replaced.headers.get_list("x-request-id")) == 1 and replaced.request_id != "no good"


def test_refusals_become_the_clients_own_exceptions(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as wrong_size:
        client.images.generate(prompt="x", size="100x100")  # type: ignore[call-overload]
    assert (wrong_size.value.param, wrong_size.value.code) == ("size", "invalid_value")
    with pytest.raises(openai.BadRequestError, match="expected 1 to 3, found 4"):
        client.images.generate(prompt="x", n=4)
    with pytest.raises(openai.BadRequestError, match="response_format expected b64_json with stream=true"):
        client.images.generate(prompt="x", response_format="url", stream=True)
    with pytest.raises(openai.BadRequestError, match="nearest: 'seed'"):
        client.images.generate(prompt="x", extra_body={"sed": 1})
    with pytest.raises(openai.NotFoundError) as wrong_model:
        client.images.generate(prompt="x", model="dall-e-3")
    assert wrong_model.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="image expected a whole picture"):
        client.images.edit(image=b"x", prompt="x")


def test_bad_bodies_and_routes_are_answered_in_openai_shape_through_serve(url: str) -> None:
    route, headers = f"{url}/v1/images/generations", {"content-type": "application/json"}
    with httpx.Client(trust_env=False) as http:
        answers = [
            (http.post(route, content=b"{", headers=headers), 400),
            (http.post(route, content=b"x" * 1_000_001, headers=headers), 413),
            (http.get(route), 405),
            (http.get(f"{url}/v2"), 404),
        ]
    for answer, status in answers:
        assert answer.status_code == status
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_models_health_readiness_and_documentation(url: str, client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["fresco"]
    assert client.models.retrieve("fresco").owned_by == "fresco"
    assert httpx.get(f"{url}/healthz", trust_env=False).json() == {"status": "ok"}
    assert readiness(url) == {"status": "ready", "error": "", **{k: FACTS[k] for k in PROVENANCE}}
    assert "/v1/images/generations" in httpx.get(f"{url}/openapi.json", trust_env=False).json()["paths"]


def test_second_endpoint_on_a_taken_port_is_refused_before_anything_starts(url: str, source: ModelSource) -> None:
    taken = SETTINGS.model_copy(update={"port": int(url.rpartition(":")[2])})
    refused = pytest.raises(PlacementError, match=r"serve\.port expected to be free.*Address already in use")
    with refused, endpoint(source, taken, PlacementSection()):
        raise AssertionError("it must not start")
    assert (readiness(url) or {})["status"] == "ready"


def test_port_zero_is_free_and_a_foreign_host_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    free = find_port("127.0.0.1", 0)
    port = find_port("127.0.0.1", 0)
    assert port in FREE_PORTS, "one that no outgoing connection takes before Serve's proxy binds it"
    with closing(socket.socket()) as other:
        other.bind(("127.0.0.1", port))
        other.listen(1)
        monkeypatch.setattr("cluster.serving.random.sample", lambda ports, count: [free, port])
        assert find_port("127.0.0.1", 0) == free, "a taken one is passed over"
    with pytest.raises(PlacementError, match=r"203\.0\.113\.5"):
        find_port("203.0.113.5", 0)


def test_url_is_one_that_this_machine_can_reach() -> None:
    assert url_of("0.0.0.0", 80) == "http://127.0.0.1:80"
    assert url_of("::1", 80) == "http://[::1]:80"


def test_waiting_for_nothing_ends_at_the_limit() -> None:
    nowhere = url_of("127.0.0.1", find_port("127.0.0.1", 0))
    told: list[str] = []
    assert readiness(nowhere) is None
    with pytest.raises(EndpointError, match="within 0 s, found it not answering"):
        wait_until_ready(nowhere, limit_s=0.3, notify=told.append)
    assert "not answering" in told[0]
