"""The drawing routes as clients meet them: a real engine and model, asked over a socket with the unmodified client."""

import base64
import io
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from PIL import Image

from cluster.api_keys import new_key
from cluster.capture import read_captured
from cluster.placement import ServeSection
from components.provenance import verify
from components.signing_key import read_public_keys
from components.step_times import StepTimes
from tests.endpoint import Endpoint, endpoint, wait_for

LIMITS = ServeSection(
    default_steps=2, max_images=4, max_steps=2000, max_side_px=64, max_queue=16, capture_share=1.0, max_deadline_s=60
)
LONG = 900
"""Steps that nobody waits for: what asks for so many is cancelled."""


@pytest.fixture(scope="module")
def served(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    with endpoint(tiny_base, tmp_path_factory.mktemp("workspace"), LIMITS) as served:
        yield served


@pytest.fixture
def client(served: Endpoint) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="x", max_retries=0) as client:
        yield client


def opened(content: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(content))
    image.load()
    return image


def decoded(b64_json: Any) -> Image.Image:
    return opened(base64.b64decode(b64_json))


def difference(one: Image.Image, other: Image.Image) -> int:
    return max(abs(a - b) for a, b in zip(one.tobytes(), other.tobytes(), strict=True))


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def test_client_gets_pictures_that_say_what_drew_them_and_never_what_was_asked(
    served: Endpoint, client: openai.OpenAI
) -> None:
    more = {"seed": 7, "steps": 3, "guidance_scale": 2.5, "negative_prompt": "a square", "priority": 6}
    answer: Any = client.images.generate(prompt="a red circle", n=2, size="64x64", user="me", extra_body=more)
    assert (answer.model_version, answer.dataset, answer.run_id) == (4, "emblems@0123456789ab", "fresco-abc")
    assert answer.seeds == [7, 8] and answer.size == "64x64" and answer.data[1].revised_prompt is None
    content = base64.b64decode(answer.data[1].b64_json)
    assert opened(content).size == (64, 64) and b"circle" not in content and b"square" not in content
    verdict = verify(content, read_public_keys(served.desk.folder / "keys"))
    assert verdict.status == "valid"
    assert dict(verdict.facts) == {
        "model_version": 4,
        "dataset": "emblems@0123456789ab",
        "run_id": "fresco-abc",
        "request_id": answer._request_id,
        "seed": 8,
        "steps": 3,
        "guidance_scale": 2.5,
    }


@pytest.mark.parametrize(("kind", "quality"), [("jpeg", 40), ("webp", 90), ("png", None)])
def test_pictures_come_in_the_format_that_was_asked(
    served: Endpoint, client: openai.OpenAI, kind: Any, quality: int | None
) -> None:
    more = {} if quality is None else {"output_compression": quality}
    answer: Any = client.images.generate(prompt="x", output_format=kind, **more)
    content = base64.b64decode(answer.data[0].b64_json)
    assert opened(content).format == kind.upper() and answer.output_format == kind
    assert verify(content, read_public_keys(served.desk.folder / "keys")).status == "valid"


def test_url_leads_to_the_picture(client: openai.OpenAI) -> None:
    by_url: Any = client.images.generate(prompt="x", response_format="url", n=2, extra_body={"seed": 1})
    inside: Any = client.images.generate(prompt="x", n=2, extra_body={"seed": 1})
    for one, other in zip(by_url.data, inside.data, strict=True):
        assert one.b64_json is None
        got = httpx.get(one.url, trust_env=False)
        assert got.headers["content-type"] == "image/png"
        # The files differ: each names its own request.
        assert difference(opened(got.content), decoded(other.b64_json)) == 0


def test_stream_shows_partial_pictures_then_the_finished_ones(served: Endpoint, client: openai.OpenAI) -> None:
    more = {"seed": 3, "steps": 12}
    plain: Any = client.images.generate(prompt="x", n=2, extra_body=more)
    events: list[Any] = list(client.images.generate(prompt="x", n=2, stream=True, partial_images=2, extra_body=more))
    partial = [event for event in events if event.type == "image_generation.partial_image"]
    done = [event for event in events if event.type == "image_generation.completed"]
    assert sorted((event.index, event.partial_image_index) for event in partial) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [event.index for event in done] == [0, 1] and events[-2:] == done
    assert [event.seed for event in done] == [3, 4] and {event.model_version for event in done} == {4}
    for event, picture in zip(done, plain.data, strict=True):
        assert difference(decoded(event.b64_json), decoded(picture.b64_json)) <= 1
    assert all(decoded(event.b64_json).size == (32, 32) for event in partial)
    keys = read_public_keys(served.desk.folder / "keys")
    for event in partial:
        verdict = verify(base64.b64decode(event.b64_json), keys)
        assert verdict.status == "valid"
        found = dict(verdict.facts)
        assert (found["model_version"], found["run_id"], found["seed"]) == (4, "fresco-abc", 3 + event.index)


def test_edit_keeps_what_the_mask_keeps_to_the_pixel(client: openai.OpenAI) -> None:
    picture = Image.radial_gradient("L").resize((32, 32)).convert("RGB")
    hole = Image.new("RGBA", (32, 32), (0, 0, 0, 255))
    hole.paste((0, 0, 0, 0), (0, 0, 16, 32))
    more = {"seed": 2, "strength": 1.0, "steps": 4}
    answer: Any = client.images.edit(image=png(picture), mask=png(hole), prompt="x", extra_body=more)
    edited = decoded(answer.data[0].b64_json)
    assert edited.size == (32, 32)
    right, left = (16, 0, 32, 32), (0, 0, 16, 32)
    assert edited.crop(right).tobytes() == picture.crop(right).tobytes()
    assert difference(edited.crop(left), picture.crop(left)) > 8
    whole: Any = client.images.edit(image=png(picture), prompt="x", extra_body={**more, "strength": 0.25})
    far: Any = client.images.edit(image=png(picture), prompt="x", extra_body={**more, "strength": 1.0})
    assert difference(decoded(whole.data[0].b64_json), decoded(far.data[0].b64_json)) > 0
    streamed: list[Any] = list(client.images.edit(image=png(picture), prompt="x", stream=True, extra_body=more))
    assert streamed[-1].type == "image_edit.completed"


def test_solver_and_retouching_are_taken_by_name(client: openai.OpenAI) -> None:
    def draw(**more: Any) -> Any:
        return client.images.generate(prompt="x", extra_body={"seed": 5, "steps": 6, **more})

    usual = decoded(draw().data[0].b64_json)
    assert difference(usual, decoded(draw(scheduler="dpm++2m").data[0].b64_json)) > 0
    larger = draw(postprocess=["upscale_2x", "vivid"])
    assert larger.size == "64x64" and decoded(larger.data[0].b64_json).size == (64, 64)
    with pytest.raises(openai.BadRequestError, match=r"ddim, euler, dpm\+\+2m"):
        draw(scheduler="magic")


def test_many_requests_at_once_draw_what_each_draws_alone(client: openai.OpenAI, served: Endpoint) -> None:
    asks = [
        {"seed": 100 + i, "steps": 2 + 3 * (i % 5), "guidance_scale": (1.0, 3.0, 6.0)[i % 3]}
        | {"scheduler": ("ddim", "euler", "dpm++2m")[i % 3]}
        for i in range(12)
    ]

    def draw(index: int) -> list[Image.Image]:
        size: Any = ("32x32", "16x64")[index % 2]
        answer = client.images.generate(prompt=f"emblem {index % 4}", n=1, size=size, extra_body=asks[index])
        return [decoded(picture.b64_json) for picture in answer.data or []]

    alone = [draw(index) for index in range(len(asks))]
    before = served.engine.counters.steps
    with ThreadPoolExecutor(len(asks)) as pool:
        together = list(pool.map(draw, range(len(asks))))
    for one, other in zip(alone, together, strict=True):
        # A row moves by about 1e-6 with the batch size, which can turn one rounding of a pixel value.
        assert difference(one[0], other[0]) <= 1
    assert served.engine.counters.steps - before < sum(int(str(ask["steps"])) for ask in asks)


@pytest.mark.parametrize("stream", [False, True])
def test_client_that_goes_away_frees_its_rows(served: Endpoint, stream: bool) -> None:
    engine = served.engine
    before = (engine.counters.cancelled, engine.counters.steps_saved)
    body = {"prompt": "x", "n": 2, "steps": LONG, "stream": stream}
    with httpx.Client(trust_env=False) as http:
        request = http.build_request("POST", f"{served.url}/v1/images/generations", json=body, timeout=0.5)
        if stream:
            http.send(request, stream=True).close()
        else:
            with pytest.raises(httpx.ReadTimeout):
                http.send(request)
    wait_for(lambda: engine.counters.cancelled == before[0] + 1)
    wait_for(lambda: engine.status().live_rows == 0)
    assert engine.counters.steps_saved > before[1] and not served.desk.bridge._keys


def test_cancel_ends_a_request_by_its_name(client: openai.OpenAI, served: Endpoint) -> None:
    name, found = "my-request-01", []

    def draw() -> None:
        with pytest.raises(openai.APIStatusError) as ended:
            client.images.generate(prompt="x", extra_headers={"x-request-id": name}, extra_body={"steps": LONG})
        found.append(ended.value)

    thread = threading.Thread(target=draw)
    thread.start()
    wait_for(lambda: name in served.engine._requests)
    twice = pytest.raises(openai.ConflictError, match="at work")
    with twice:
        client.images.generate(prompt="x", extra_headers={"x-request-id": name})
    done = httpx.delete(f"{served.url}/v1/requests/{name}", trust_env=False)
    thread.join(30)
    assert done.json() == {"id": name, "object": "request", "cancelled": True}
    assert (found[0].status_code, found[0].code, found[0].request_id) == (499, "request_cancelled", name)
    assert found[0].response.headers["x-should-retry"] == "false"
    again = httpx.delete(f"{served.url}/v1/requests/{name}", trust_env=False)
    assert again.status_code == 404 and again.json()["error"]["code"] == "not_found"


@contextmanager
def held_step(engine: Any) -> Iterator[threading.Event]:
    """Hold the next call of the denoiser; yields what is set once it is entered."""
    entered, released = threading.Event(), threading.Event()

    def wait(module: Any, args: Any) -> None:
        entered.set()
        assert released.wait(60)

    hook = engine._versions.newest.parts.denoiser.register_forward_pre_hook(wait)
    try:
        yield entered
    finally:
        hook.remove()
        released.set()


def test_deadline_counts_from_the_arrival_of_a_request_not_from_its_last_byte(served: Endpoint) -> None:
    with httpx.Client(trust_env=False) as http:
        route, body = f"{served.url}/v1/images/generations", {"prompt": "x", "steps": 1, "deadline_s": 0.5}

        def slowly() -> Iterator[bytes]:
            written = json.dumps(body).encode()
            yield written[:5]
            time.sleep(0.6)  # a slow upload
            yield written[5:]

        headers = {"content-type": "application/json"}
        answer = http.post(route, content=slowly(), headers=headers)
        told = answer.json()["error"]
        assert (answer.status_code, told["param"]) in ((429, "deadline_s"), (504, None)), answer.text
        assert answer.status_code == 504 or "held up" in told["message"]
        body["deadline_s"] = 30.0
        assert http.post(route, content=slowly(), headers=headers).status_code == 200


def test_full_queue_is_429_with_the_measured_backlog(client: openai.OpenAI, tiny_base: Path, tmp_path: Path) -> None:
    limits = LIMITS.model_copy(update={"max_queue": 4, "max_batch_rows": 2, "capture_share": 0.0})
    with endpoint(tiny_base, tmp_path, limits) as full, httpx.Client(trust_env=False) as http:
        route = f"{full.url}/v1/images/generations"
        edits = f"{full.url}/v1/images/edits"
        file = {"image": ("a.png", b"no picture")}
        with held_step(full.engine) as entered:
            body = {"prompt": "x", "n": 4, "size": "32x32", "steps": LONG, "stream": True}
            with http.stream("POST", route, json=body) as busy:
                assert entered.wait(60)
                # One guided row fits the batch, three wait, and none has made a step.
                backlog = 4 * LONG * 2 * 32 * 32
                full.engine._loop.times = StepTimes()
                for pixels in (backlog, backlog, backlog // 2):  # the first one is not counted
                    full.engine._loop.times.observe("measured", pixels, 29.5 * pixels / backlog)
                refused = http.post(route, json={"prompt": "x", "n": 4})
                late = http.post(route, json={"prompt": "x", "deadline_s": 0.001})
                busy_late = http.post(route, json={"prompt": "x", "deadline_s": 2.0})
                unread = http.post(edits, data={"prompt": "x", "n": "4"}, files=file)
                too_many = http.post(edits, data={"prompt": "x", "n": "5"}, files=file)
                assert busy.status_code == 200
        wait_for(lambda: not full.engine.status().live_rows)
        broken = http.post(edits, data={"prompt": "x", "n": "4"}, files=file)
    error = refused.json()["error"]
    assert (refused.status_code, error["code"], error["type"]) == (429, "queue_full", "rate_limit_error")
    assert refused.headers["retry-after"] == "30" and "serve.max_queue" in error["message"]
    assert f"({backlog} pixel-steps, about 29.5 s)" in error["message"]
    assert late.status_code == 400 and "s waiting" in late.json()["error"]["message"]
    assert (late.json()["error"]["param"], late.json()["error"]["code"]) == ("deadline_s", "deadline_too_short")
    # A picture of two steps takes milliseconds alone, and seconds behind thousands of steps.
    error = busy_late.json()["error"]
    assert (busy_late.status_code, error["code"], error["param"]) == (429, "queue_too_long", "deadline_s")
    assert 1 <= int(busy_late.headers["retry-after"]) <= 60 and "others are at work" in error["message"]
    assert busy_late.headers["x-should-retry"] == "false", "a repetition comes after the time that the user named"
    assert unread.status_code == 429, "no room is said before anybody looks at the picture"
    assert too_many.status_code == 400 and too_many.json()["error"]["param"] == "n"
    assert broken.status_code == 400 and broken.json()["error"]["code"] == "invalid_image"


def test_deadline_that_passes_is_504_and_not_asked_again(
    client: openai.OpenAI, served: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[openai.APIStatusError] = []

    def ask() -> None:
        with pytest.raises(openai.APIStatusError) as raised:
            client.images.generate(prompt="x", extra_body={"steps": 3, "deadline_s": 50})
        ended.append(raised.value)

    asking = threading.Thread(target=ask)
    with held_step(served.engine) as entered:
        asking.start()
        assert entered.wait(60)
        monkeypatch.setattr(served.engine, "_clock", lambda: time.monotonic() + 51)
    asking.join(60)
    assert (ended[0].status_code, ended[0].code) == (504, "deadline_exceeded")
    assert ended[0].response.headers["x-should-retry"] == "false"


def test_client_whose_read_timeout_comes_near_is_told_before_it_asks_again(
    served: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted, ended = served.engine.counters, []
    timeout_s = 20.0  # long enough for this answer on any machine; the engine's clock goes on by itself

    def ask(stream: bool) -> None:
        with openai.OpenAI(base_url=f"{served.url}/v1", api_key="x", max_retries=2, timeout=timeout_s) as client:
            try:
                list(client.images.generate(prompt="x", stream=stream, extra_body={"steps": 3}))  # type: ignore[call-overload]
                ended.append(None)
            except openai.APIStatusError as error:
                ended.append(error)

    for stream in (False, True):
        wait_for(lambda: not served.engine.status().live_rows)  # of the test before: it would be held instead
        before = counted.done + counted.failed + counted.cancelled
        asking = threading.Thread(target=ask, args=(stream,))
        with monkeypatch.context() as patch:
            with held_step(served.engine) as entered:
                asking.start()
                assert entered.wait(60)
                patch.setattr(served.engine, "_clock", lambda: time.monotonic() + 0.9 * timeout_s)
                asked = served.engine.status().live_rows
            asking.join(60)
        assert asked == 1 and counted.done + counted.failed + counted.cancelled == before + 1, "work was repeated"
    late, streamed = ended
    assert (late.status_code, late.code) == (504, "deadline_exceeded")
    assert late.response.headers["x-should-retry"] == "false"
    assert streamed is None, "a stream is read bit by bit: its client's timeout says nothing of the whole"


@pytest.mark.parametrize(
    ("header", "deadline_s"),
    [
        ("2.0", 1.8),
        ("600", 60.0),
        ("None", None),
        ("nan", None),
        ("inf", None),
        ("-3", None),
        ("0", None),
        (None, None),
    ],
)
def test_deadline_is_that_of_the_client_where_it_tells_one(
    served: Endpoint, monkeypatch: pytest.MonkeyPatch, header: str | None, deadline_s: float | None
) -> None:
    asked: list[Any] = []
    submit = served.engine.submit

    def listen(request: Any, *more: Any, **named: Any) -> None:
        asked.append(request.deadline_s)
        submit(request, *more, **named)

    monkeypatch.setattr(served.engine, "submit", listen)
    with httpx.Client(trust_env=False, headers={"x-stainless-read-timeout": header} if header else {}) as http:
        for more in ({}, {"deadline_s": 30.0}, {"stream": True}):
            answer = http.post(f"{served.url}/v1/images/generations", json={"prompt": "x", "steps": 1, **more})
            assert answer.status_code == 200, answer.text
    assert asked == [deadline_s, 30.0, None]


def told_of(served: Endpoint, name: str) -> dict[str, Any]:
    """The request log's line of a request, and its status among the metrics."""
    path = served.desk.folder / "serving" / "fresco" / "requests-local.jsonl"
    found: list[dict[str, Any]] = []

    def logged() -> bool:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        found[:] = [line for line in lines if line["request_id"] == name]
        return bool(found)

    wait_for(logged)
    return found[0]


def count_of(served: Endpoint, series: str) -> float:
    lines = served.desk.metrics.exposition().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(series))


@pytest.mark.parametrize(("ending", "status"), [("drawing_failed", 500), ("request_cancelled", 499)])
def test_error_in_the_middle_of_a_stream_reaches_client_log_and_metrics(
    served: Endpoint, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch, ending: str, status: int
) -> None:
    version: Any = served.engine._versions.newest
    predict, name = version.predict, f"stream-{ending}"
    series = f'fresco_requests_total{{replica="local",route="/v1/images/generations",status="{status}"}}'
    before = (count_of(served, series), count_of(served, f'fresco_refused_total{{reason="{ending}"'))
    begun = threading.Event()

    def fail(*arguments: Any) -> Any:
        if begun.is_set():
            raise ValueError("a bad denoiser")
        return predict(*arguments)

    if status == 500:
        monkeypatch.setattr(version, "predict", fail)
    more: Any = {"extra_headers": {"x-request-id": name}, "extra_body": {"steps": 300}}
    events = client.images.generate(prompt="x", stream=True, partial_images=3, **more)
    assert next(events).type == "image_generation.partial_image"
    begun.set()
    if status == 499:
        httpx.delete(f"{served.url}/v1/requests/{name}", trust_env=False)
    with pytest.raises(openai.APIError) as caught:
        list(events)
    assert caught.value.code == ending and events.response.status_code == 200
    assert caught.value.body and "message" in caught.value.body  # type: ignore[operator]
    line = told_of(served, name)
    assert (line["status"], line["code"]) == (status, ending) and "rows" not in line and "gone" not in line
    after = (count_of(served, series), count_of(served, f'fresco_refused_total{{reason="{ending}"'))
    assert [now - then for now, then in zip(after, before, strict=True)] == [1, 1]


def test_refused_prompts_and_pictures_are_policy_violations(tiny_base: Path, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("[weapons]\ncannon\n")
    refusing = {
        "blocklist_file": str(tmp_path / "list.txt"),
        "safety_classifier": "components.safety:clip_classifier",
        "safety_options": {"refuse": {"circles": "a red circle"}, "allow": ["a blue square"], "threshold": 0.99},
    }
    with endpoint(tiny_base, tmp_path, LIMITS.model_copy(update=refusing)) as safe:
        with openai.OpenAI(base_url=f"{safe.url}/v1", api_key="x", max_retries=0) as client:
            with pytest.raises(openai.BadRequestError, match="weapons") as refused:
                client.images.generate(prompt="a small C4NNON")
            assert refused.value.code == "content_policy_violation" and "cannon" not in str(refused.value).lower()
            with pytest.raises(openai.BadRequestError, match="circles"):
                client.images.generate(prompt="a red circle")
        assert safe.engine.counters.done == 1, "the warm-up, and nothing that was refused"


def test_prompts_and_keys_reach_no_log(
    tiny_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """In every way in which a request ends; libraries raise with the prompt in their words, and that is made here."""
    caplog.set_level("DEBUG")
    secret, keys = "zebraquartz", tmp_path / "keys.yaml"
    key = new_key(keys, "studio")
    (tmp_path / "list.txt").write_text("[weapons]\ncannon\n")
    limits = {"api_keys_file": str(keys), "blocklist_file": str(tmp_path / "list.txt")}
    body, workspace = {"prompt": f"a {secret}", "negative_prompt": secret}, tmp_path / "workspace"
    with (
        endpoint(tiny_base, workspace, LIMITS.model_copy(update=limits)) as safe,
        httpx.Client(base_url=safe.url, trust_env=False, headers={"authorization": f"Bearer {key}"}) as http,
    ):

        def ask(name: str, **more: Any) -> tuple[int, str]:
            answer = http.post("/v1/images/generations", json=body | more, headers={"x-request-id": f"leak-{name}"})
            return answer.status_code, answer.text if answer.status_code >= 400 else ""

        def ask_and_cancel() -> tuple[int, str]:
            with ThreadPoolExecutor(1) as pool:
                asked = pool.submit(ask, "cancelled", steps=LONG)
                wait_for(lambda: "leak-cancelled" in safe.engine._requests)
                assert http.delete("/v1/requests/leak-cancelled").status_code == 200
                return asked.result(60)

        def quote(parts: Any, prompts: list[str]) -> Any:
            raise RuntimeError(f"cannot encode {prompts}")

        def quote_later(*of_finish: Any, **named: Any) -> Any:
            raise ValueError(f"cannot write {of_finish[1].order}")

        answers = [ask("drawn"), ask("wrong", n=99), ask("refused", prompt=f"{secret} cannon"), ask_and_cancel()]
        answers.append(ask("long", prompt=secret * 1000))
        with monkeypatch.context() as patch:
            patch.setattr("components.versions.encode_text", quote)
            answers += [
                ask("broken", prompt=f"another {secret}"),
                ask("stream", prompt=f"one more {secret}", stream=True),
            ]
        with monkeypatch.context() as patch:
            patch.setattr("flows.finish.Finisher.finish", quote_later)
            answers += [ask("unwritten"), ask("unstreamed", stream=True)]
        unknown = http.get("/v1/models", headers={"authorization": f"Bearer {key}x"})
        wait_for(lambda: safe.desk.log.path.read_text().count("leak-") == len(answers))
    assert [status for status, _ in answers] == [
        200,
        400,
        400,
        499,
        400,
        500,
        500,
        500,
        200,
    ] and unknown.status_code == 401
    for name in ("broken", "stream", "unwritten", "unstreamed"):
        assert f"request leak-{name} failed: builtins." in caplog.text
    out, err = capfd.readouterr()
    places = {"log": caplog.text, "out": out, "err": err, "answers": str(answers) + unknown.text}
    files = [path for path in (workspace / "serving").rglob("*") if path.is_file()]
    places |= {path.name: path.read_bytes().decode("latin-1") for path in files}
    assert any(name.startswith("requests-") for name in places)
    assert [name for name, text in places.items() if secret in text or key in text] == []


def test_what_was_answered_is_captured_after_the_answer(tiny_base: Path, tmp_path: Path) -> None:
    limits = LIMITS.model_copy(update={"capture_prompts": True})
    with endpoint(tiny_base, tmp_path, limits) as seen:
        with openai.OpenAI(base_url=f"{seen.url}/v1", api_key="x", max_retries=0) as client:
            answer: Any = client.images.generate(prompt="a red circle", n=2)
            list(client.images.generate(prompt="a blue square", stream=True))
        wait_for(lambda: seen.desk._capture is not None and seen.desk._capture.counts["offered"] == 2)
    rows = read_captured(tmp_path / "captured").to_pylist()
    assert [row["prompt"] for row in rows] == ["a red circle", "a red circle", "a blue square"]
    assert rows[0]["request_id"] == answer._request_id and rows[0]["model_version"] == "4"
    assert all(len(row["image_features"]) == len(row["prompt_features"]) > 0 for row in rows)


def test_refusals_become_the_clients_own_exceptions(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="expected 1 to 4, found 5"):
        client.images.generate(prompt="x", n=5)
    with pytest.raises(openai.BadRequestError, match="nearest: 'seed'"):
        client.images.generate(prompt="x", extra_body={"sed": 1})
    with pytest.raises(openai.NotFoundError) as wrong:
        client.images.generate(prompt="x", model="dall-e-3")
    assert wrong.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="steps expected at most 999"):
        client.images.generate(prompt="x", extra_body={"steps": 1500})
    with pytest.raises(openai.BadRequestError, match="image expected a whole picture"):
        client.images.edit(image=b"no picture", prompt="x")
