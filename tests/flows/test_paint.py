"""The engine painter: plain jobs in, signed files out, errors in the words of the API, models swapped under load."""

import io
import pickle
import queue
import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from cluster.api_errors import ApiError
from cluster.images_schema import ImagesRequest, make_order
from cluster.painter_contract import Finished, Job, MakeEvent, Partial
from cluster.serve_metrics import ServeMetrics
from components.models import load_parts, make_tiny, save_parts
from components.sampler import PictureRequest, draw
from flows.config import Config, with_overrides
from flows.models import resolve_model
from flows.paint import EnginePainter, make_painter, painter_arguments


@pytest.fixture
def arguments(config: Config, make_run) -> dict[str, Any]:
    make_run("fresco-aaa", 0)
    return painter_arguments(config, resolve_model(config, "fresco-aaa"), "cpu")


@pytest.fixture
def painter(arguments: dict[str, Any]) -> Iterator[EnginePainter]:
    painter = make_painter(**arguments)
    yield painter
    painter.close()


class Desk:
    """Submits jobs and waits for their last events."""

    def __init__(self, painter: EnginePainter, config: Config) -> None:
        self.painter, self.config = painter, config
        self.number = 0

    def submit(self, **fields: Any) -> "queue.Queue[MakeEvent]":
        self.number += 1
        order = make_order(ImagesRequest(prompt="x", **fields), self.config.serve, self.painter.info())
        events: queue.Queue[MakeEvent] = queue.Queue()
        self.painter.submit(Job(f"request-{self.number}", order), events.put)
        return events

    def draw(self, **fields: Any) -> Finished:
        return last(self.submit(**fields))


def last(events: "queue.Queue[MakeEvent]") -> Finished:
    while True:
        event = events.get(timeout=60)()
        if isinstance(event, Finished):
            return event


def opened(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content))


def test_arguments_are_plain_values_that_travel(arguments: dict[str, Any]) -> None:
    assert pickle.loads(pickle.dumps(arguments)) == arguments


def test_info_says_what_the_routes_must_know(painter: EnginePainter) -> None:
    info = painter.info()
    assert (info["width_px"], info["height_px"], info["run_id"]) == (16, 16, "fresco-aaa")
    assert info["schedulers"] == ["ddim", "euler", "dpm++2m"] and "upscale_2x" in info["postprocess"]


def test_picture_is_the_samplers_and_says_what_drew_it(painter: EnginePainter, config: Config, tiny_pipelines) -> None:
    painter.warm_up()
    finished = Desk(painter, config).draw(seed=3, n=2, size="16x32")
    how = {"steps": config.serve.default_steps, "guidance_scale": config.serve.default_guidance_scale}
    rows = [PictureRequest("x", seed=3 + index, width_px=16, height_px=32, **how) for index in range(2)]
    alone = draw(load_parts(tiny_pipelines[0]), rows)
    for content, picture in zip(finished.contents, alone, strict=True):
        difference = np.asarray(opened(content), np.int16) - np.asarray(picture, np.int16)
        # A row moves by about 1e-6 with the batch size, which can turn one rounding of a pixel value.
        assert np.abs(difference).max() <= 1
    assert finished.size == "16x32" and finished.facts["run_id"] == "fresco-aaa"
    texts = opened(finished.contents[1]).text  # type: ignore[attr-defined]
    assert (texts["seed"], texts["request_id"], texts["dataset"]) == ("4", "request-1", "emblems@0123456789ab")
    assert "prompt" not in texts


def test_only_pictures_that_were_retouched_say_so(painter: EnginePainter, config: Config) -> None:
    events = Desk(painter, config).submit(postprocess=["upscale_2x"], stream=True, partial_images=1)
    early = events.get(timeout=60)()
    assert isinstance(early, Partial)
    shown, finished = opened(early.content), opened(last(events).contents[0])
    assert shown.size == (16, 16) and "postprocess" not in shown.text  # type: ignore[attr-defined]
    assert finished.size == (32, 32) and finished.text["postprocess"] == "upscale_2x"  # type: ignore[attr-defined]


def test_model_that_draws_nothing_finite_fails_its_warm_up(
    config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    parts = make_tiny("stable_diffusion", seed=0)
    parts.denoiser.conv_out.bias.data.fill_(float("nan"))
    save_parts(parts, tmp_path / "broken")
    broken = painter_arguments(config, resolve_model(config, str(tmp_path / "broken")), "cpu")
    broken["model"]["threads"] = 1  # nothing is drawn to find out how many
    painter = make_painter(**broken)
    with pytest.raises(RuntimeError, match="expected finite latents"):
        painter.warm_up()
    with pytest.raises(ApiError, match="drawing failed: NonFiniteError") as failed:
        Desk(painter, config).draw()
    assert failed.value.status == 500 and failed.value.headers == {"x-should-retry": "false"}
    assert "request request-1 failed: components.errors.NonFiniteError: expected finite" in caplog.text
    assert "request request-1" in failed.value.message
    painter.close()


def test_closed_painter_sends_clients_elsewhere(config: Config, arguments: dict[str, Any]) -> None:
    painter = make_painter(**arguments)
    painter.close()
    with pytest.raises(ApiError, match="ending") as refused:
        Desk(painter, config).submit()
    assert refused.value.status == 503 and refused.value.headers["Retry-After"]


def test_twenty_swaps_under_load_fail_no_request_and_each_says_what_drew_it(
    config: Config, make_run, arguments: dict[str, Any], painter: EnginePainter
) -> None:
    """Two sets of weights in turn, four clients all the while: every picture is the one its version draws alone."""
    make_run("fresco-bbb", 1)
    models = [arguments, painter_arguments(config, resolve_model(config, "fresco-bbb"), "cpu")]
    pictures = {}
    for run_id, model in zip(("fresco-aaa", "fresco-bbb"), models, strict=True):
        parts = load_parts(model["model"]["directory"])
        pictures[run_id] = draw(parts, [PictureRequest("x", 9, 8, 3.0, width_px=16, height_px=16)])[0].tobytes()
    swapped, problems, seen, held = threading.Event(), [], [], set()

    def client(number: int) -> None:
        desk = Desk(painter, config)
        desk.number = 1000 * number
        while not swapped.is_set():
            finished = desk.draw(seed=9, steps=8)
            run_id, found = finished.facts["run_id"], opened(finished.contents[0]).tobytes()
            seen.append(run_id)
            if max(abs(a - b) for a, b in zip(found, pictures[run_id], strict=True)) > 1:
                problems.append(run_id)

    def look() -> None:
        while not swapped.wait(0.001):
            held.add(painter.swapping())

    clients = [threading.Thread(target=client, args=(number,)) for number in range(1, 5)]
    looking = threading.Thread(target=look)
    for thread in (*clients, looking):
        thread.start()
    for number in range(20):
        before = len(seen)
        painter.swap(models[(number + 1) % 2])
        while len(seen) < before + 2:
            assert all(thread.is_alive() for thread in clients)
            threading.Event().wait(0.005)
    swapped.set()
    for thread in (*clients, looking):
        thread.join(60)
    assert problems == [] and set(seen) == {"fresco-aaa", "fresco-bbb"}
    assert painter.engine.counters.failed == painter.engine.counters.cancelled == 0
    assert list(painter.engine.status().versions) == [painter.lineup.champion.name] == list(painter.lineup._at_work)
    assert painter.numbers()["swaps"] == 20 and painter.numbers()["swap_failures"] == 0
    assert painter.numbers()["swaps_drained"] == 0 and held == {""}, "new requests had to wait for a swap"


def test_model_that_cannot_draw_is_not_swapped_in(config: Config, painter: EnginePainter, tmp_path: Path) -> None:
    parts = make_tiny("stable_diffusion", seed=0)
    parts.denoiser.conv_out.bias.data.fill_(float("nan"))
    save_parts(parts, tmp_path / "broken")
    with pytest.raises(RuntimeError, match="expected finite pixels"):
        painter.swap(painter_arguments(config, resolve_model(config, str(tmp_path / "broken")), "cpu"))
    assert Desk(painter, config).draw().facts["run_id"] == "fresco-aaa"


def engine_seconds(painter: EnginePainter) -> dict[str, float]:
    """The sums of seconds as Prometheus reads them."""
    families = text_string_to_metric_families(ServeMetrics("r", painter.numbers).exposition().decode())
    samples = {sample.name: sample.value for family in families for sample in family.samples}
    return {part: samples[f"fresco_{part}_seconds_total"] for part in ("encode", "denoise", "decode")}


def test_seconds_of_encoding_denoising_and_decoding_grow_and_outlive_the_version(
    config: Config, make_run, painter: EnginePainter
) -> None:
    assert engine_seconds(painter) == {"encode": 0, "denoise": 0, "decode": 0}
    desk = Desk(painter, config)
    readings = [engine_seconds(painter)]
    for number in range(2):
        desk.draw(negative_prompt=f"new {number}")
        readings.append(engine_seconds(painter))
    assert all(before[part] < after[part] for before, after in pairwise(readings) for part in before)
    desk.draw(negative_prompt="new 1")
    again = engine_seconds(painter)
    assert again["encode"] == readings[-1]["encode"] and again["decode"] > readings[-1]["decode"], "texts were at hand"
    make_run("fresco-bbb", 1)
    painter.swap(painter_arguments(config, resolve_model(config, "fresco-bbb"), "cpu"))
    assert list(painter.engine.status().versions) == [painter.lineup.champion.name], "the version that counted is gone"
    assert engine_seconds(painter) == again


def test_precision_buckets_and_compiling_come_from_the_config(config: Config, make_run) -> None:
    make_run("fresco-aaa", 0)
    model = resolve_model(config, "fresco-aaa")

    def arguments_of(**serve: Any) -> dict[str, Any]:
        return painter_arguments(
            with_overrides(config, {f"serve.{key}": value for key, value in serve.items()}), model, "cpu"
        )

    plain = arguments_of()
    assert (plain["model"]["precision"], plain["model"]["compile_rows"]) == ("auto", [])
    assert plain["limits"]["row_buckets"] == []
    compiled = arguments_of(compile=True, max_batch_rows=6, precision="bf16")
    assert compiled["model"]["compile_rows"] == compiled["limits"]["row_buckets"] == [1, 2, 4, 6]
    assert compiled["model"]["precision"] == "bf16"
    assert arguments_of(compile=True, strict=True, max_batch_rows=6)["model"]["compile_rows"] == [6]
    painter = make_painter(**arguments_of(row_buckets=[2, 8], precision="bf16"))
    assert painter.engine.limits.buckets == (2, 8) and painter.lineup.champion.parts.denoiser.dtype == torch.bfloat16
    assert Desk(painter, config).draw(seed=3).facts["run_id"] == "fresco-aaa"
    painter.close()


def test_limits_and_safety_come_from_the_config(config: Config, tmp_path: Path, make_run) -> None:
    make_run("fresco-aaa", 0)
    (tmp_path / "list.txt").write_text("cannon\n")
    more = {"serve.max_queue": 5, "serve.max_batch_rows": 4, "serve.strict": True, "serve.max_cached_prompts": 2}
    more |= {"serve.max_live_pixels": 2**20, "serve.max_cached_text_bytes": 3000}
    strict = with_overrides(config, {**more, "serve.blocklist_file": str(tmp_path / "list.txt")})
    painter = make_painter(**painter_arguments(strict, resolve_model(strict, "fresco-aaa"), "cpu"))
    limits = painter.engine.limits
    assert (limits.max_waiting_rows, limits.max_batch_rows, limits.max_cached_prompts) == (5, 4, 2) and limits.strict
    assert (limits.max_live_pixels, limits.max_cached_text_bytes) == (2**20, 3000)
    order = make_order(ImagesRequest(prompt="a cannon"), strict.serve, painter.info())
    with pytest.raises(ApiError, match="content policy") as refused:
        painter.submit(Job("request-1", order), lambda make: None)
    assert refused.value.code == "content_policy_violation"
    painter.close()
