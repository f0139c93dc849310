"""Several versions behind one endpoint, as clients meet them: the real registry, follower, models and OpenAI client."""

import base64
import io
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from cluster.artifacts import open_workspace
from cluster.champion import move_champion, set_challenger
from cluster.drawing_routes import Desk
from cluster.images_api import make_app
from cluster.painter_bridge import PainterBridge
from cluster.registry import TAG_MODEL_FINGERPRINT, Registry
from cluster.request_shares import in_share
from cluster.serving import readiness
from flows.config import Config, with_overrides
from flows.follow import Follower, read_wanted
from flows.loaded_model import LoadedModel, load_model
from flows.models import resolve_model
from flows.paint import EnginePainter, make_painter
from flows.swap import SALT
from tests.endpoint import listening, wait_for

GATE = threading.Event()
"""Holds up every load after a painter's first, while it is clear."""
HUGE = str(2**50)


def make_gated_painter(**arguments: Any) -> EnginePainter:
    """The real painter, whose later loads wait for the gate."""
    painter = make_painter(**arguments)

    def load_at_the_gate(**model: Any) -> LoadedModel:
        assert GATE.wait(120)
        return load_model(**model)

    painter.lineup._load_model = load_at_the_gate
    return painter


class Served:
    """An endpoint over a workspace with two registered versions, the first of them champion."""

    def __init__(self, config: Config, make_run: Callable[[str, int], Path]) -> None:
        self.config, self.workspace = config, open_workspace(config.workspace)
        self.registry = Registry(self.workspace)
        for run_id, seed in (("fresco-aaa", 0), ("fresco-bbb", 1)):
            make_run(run_id, seed)
            found = resolve_model(config, run_id)
            tags = {**found.lineage, TAG_MODEL_FINGERPRINT: found.fingerprint}
            self.registry.register("fresco", found.directory, tags)
        move_champion(self.registry, "fresco", 1)
        self.follower = Follower(config, self.workspace, resolve_model(config, "models:/fresco@champion"))

    @contextmanager
    def running(self, factory: str = "flows.paint:make_painter") -> Iterator["Served"]:
        bridge = PainterBridge(factory, self.follower.arguments, self.follower.follow)
        desk = Desk(bridge, self.config.serve, "fresco", self.workspace.root)
        self.bridge = bridge
        try:
            wait_for(lambda: bridge.state != "loading")
            assert bridge.state == "ready", bridge.error
            with listening(make_app(desk)) as self.url:
                self.follower.write_record(self.url, 42, 1)
                with openai.OpenAI(base_url=f"{self.url}/v1", api_key="x", max_retries=0) as self.client:
                    yield self
        finally:
            GATE.set()
            bridge.close()
            desk.close()

    def look(self) -> dict[str, Any]:
        """What `fresco serve` does every few seconds."""
        status = readiness(self.url)
        assert status is not None
        self.follower.look(status)
        return status

    def challenge(self, number: int | None) -> None:
        set_challenger(self.registry, "fresco", number)
        self.look()

    def draw(self, name: str, **fields: Any) -> Any:
        asked = {"prompt": "x", "extra_body": {"seed": 3}, "extra_headers": {"x-request-id": name}, **fields}
        return self.client.images.generate(**asked)

    def models(self) -> list[tuple[str, int]]:
        listed = httpx.get(f"{self.url}/v1/models").json()["data"]
        return [(card["id"], card["model_version"]) for card in listed]

    def metrics(self) -> dict[str, float]:
        """Of one replica: name and labels without it, in order -> value."""
        found = {}
        for family in text_string_to_metric_families(httpx.get(f"{self.url}/metrics").text):
            for sample in family.samples:
                labels = [value for name, value in sorted(sample.labels.items()) if name != "replica"]
                found[" ".join([sample.name, *labels])] = sample.value
        return found


@pytest.fixture
def make_served(config: Config, make_run: Callable[[str, int], Path]) -> Callable[..., Served]:
    def make(**overrides: Any) -> Served:
        more = {f"serve.{name}": value for name, value in {"follow_s": 0.05, "capture_share": 0, **overrides}.items()}
        return Served(with_overrides(config, more), make_run)

    return make


CHAMPION, CHALLENGER = ("fresco", 1), ("models:/fresco/2", 2)


def test_challenger_answers_its_share_by_request_id_and_every_answer_says_who_drew_it(
    make_served: Callable[..., Served],
) -> None:
    with make_served(challenger_share=0.4).running() as served:
        served.challenge(2)
        wait_for(lambda: served.models() == [CHAMPION, CHALLENGER])
        assert httpx.get(f"{served.url}/v1/models/models:/fresco/2").json()["run_id"] == "fresco-bbb"
        versions = {}
        for name in [f"request-{number:04d}" for number in range(24)]:
            answer = served.client.images.with_raw_response.generate(
                prompt="x", extra_body={"seed": 3}, extra_headers={"x-request-id": name}
            )
            body: Any = answer.parse()
            versions[name] = body.model_version
            assert body.model_version == (2 if in_share(name, 0.4, SALT) else 1)
            assert answer.headers["x-fresco-model-version"] == str(body.model_version)
            content = base64.b64decode(body.data[0].b64_json)
            assert Image.open(io.BytesIO(content)).text["model_version"] == str(body.model_version)  # type: ignore[attr-defined]
        assert set(versions.values()) == {1, 2}
        assert all(served.draw(name).model_version == version for name, version in versions.items()), "sticky"
        metrics = served.metrics()
        drawn = {"champion": 1, "challenger": 2}
        for role, version in drawn.items():
            count = 2 * list(versions.values()).count(version)
            assert metrics[f"fresco_role_requests_total done {role}"] == count
            assert (
                metrics[f"fresco_role_seconds_count {role}"] == metrics[f"fresco_role_pictures_total {role}"] == count
            )
            assert 0 < metrics[f"fresco_role_brightness_total {role}"] < count
            assert metrics[f"fresco_role_version {role} {version}"] == 1


def test_client_names_a_loaded_version_and_one_that_is_gone_is_not_found(make_served: Callable[..., Served]) -> None:
    with make_served(challenger_share=1e-9).running() as served:
        served.challenge(2)
        wait_for(lambda: served.models() == [CHAMPION, CHALLENGER])
        other = served.draw("request-1", model="models:/fresco/2")
        assert other.model_version == 2
        for own in (served.draw("request-2", model="models:/fresco/1"), served.draw("request-3", model="fresco")):
            assert own.model_version == 1 and own.data[0].b64_json != other.data[0].b64_json
        served.challenge(None)
        wait_for(lambda: served.models() == [CHAMPION])
        with pytest.raises(openai.NotFoundError, match="fresco or models:/fresco/1"):
            served.draw("request-4", model="models:/fresco/2")


def test_challenger_that_wins_serves_without_being_loaded_again(make_served: Callable[..., Served]) -> None:
    with make_served(challenger_share=0.5).running() as served:
        served.challenge(2)
        wait_for(lambda: served.models() == [CHAMPION, CHALLENGER])
        loaded = list(served.bridge.painter.numbers()["versions"])
        move_champion(served.registry, "fresco", 2)
        served.look()
        wait_for(lambda: served.models() == [("fresco", 2)])
        served.challenge(None)
        assert served.draw("request-1").model_version == 2
        assert list(served.bridge.painter.numbers()["versions"]) == loaded[1:]
        wait_for(lambda: served.follower.record["model_version"] == 2 or served.look() is None)


def test_challenger_that_cannot_be_loaded_is_told_once_and_the_champion_answers(
    make_served: Callable[..., Served], capsys: pytest.CaptureFixture[str]
) -> None:
    with make_served(challenger_share=1.0).running() as served:
        weights = served.workspace.run_dir("fresco-bbb") / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors"
        weights.write_bytes(weights.read_bytes() + b"\0")
        for _ in range(3):
            served.challenge(2)  # the follower sees that these are not the registered weights
        assert served.models() == [CHAMPION] and served.draw("request-1").model_version == 1
        told = capsys.readouterr().err
        assert told.count("the files changed after they were registered") == 1


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_only_a_share_loads_a_challenger_and_a_champion_is_none(
    make_served: Callable[..., Served], share: float
) -> None:
    with make_served(challenger_share=share).running() as served:
        before = read_wanted(**served.follower.follow.arguments)
        served.challenge(2)
        if share:
            wait_for(lambda: served.models() == [CHAMPION, CHALLENGER])
        else:
            assert read_wanted(**served.follower.follow.arguments) == before
            assert list(served.bridge.painter.numbers()["versions"]) == ["1 (1)"]
        move_champion(served.registry, "fresco", 2)
        assert served.registry.by_alias("fresco", "challenger") is None
        served.look()
        wait_for(lambda: served.models() == [("fresco", 2)])
        assert list(served.bridge.painter.numbers()["versions"]) == ["2 (2)"]


def test_shadow_is_measured_and_answers_nobody(make_served: Callable[..., Served]) -> None:
    with make_served(shadow_share=1.0).running() as served:
        served.challenge(2)
        wait_for(lambda: served.bridge.painter.numbers()["role_versions"] == {"champion": 1, "shadow": 2})
        answers = [served.draw(f"request-{number}", n=2) for number in range(3)]
        assert {answer.model_version for answer in answers} == {1}
        wait_for(lambda: served.metrics().get("fresco_role_pictures_total shadow") == 6)
        metrics = served.metrics()
        assert metrics["fresco_role_requests_total done shadow"] == 3 == metrics["fresco_role_seconds_count shadow"]
        assert metrics["fresco_role_pictures_total champion"] == 6 == metrics["fresco_pictures_total 1"]
        assert metrics["fresco_role_brightness_total shadow"] != metrics["fresco_role_brightness_total champion"]
        assert "fresco_pictures_total 2" not in metrics


def test_requests_wait_while_memory_is_short_and_are_answered_by_the_new_version(
    make_served: Callable[..., Served], capsys: pytest.CaptureFixture[str]
) -> None:
    GATE.clear()
    with (
        make_served(memory_headroom_bytes=HUGE).running(f"{__name__}:make_gated_painter") as served,
        ThreadPoolExecutor(3) as clients,
    ):
        assert served.draw("request-0").model_version == 1
        move_champion(served.registry, "fresco", 2)
        served.look()
        wait_for(lambda: (readiness(served.url) or {})["status"] == "swapping")
        answer = httpx.get(f"{served.url}/readyz")
        assert answer.status_code == 200 and answer.json()["model_version"] == 1
        assert "serve.memory_headroom_bytes" in answer.json()["reason"]
        waiting = [clients.submit(served.draw, f"request-{number}") for number in range(1, 4)]
        wait_for(lambda: served.metrics()["fresco_held_requests"] == 3)
        assert served.metrics()["fresco_swapping"] == 1 and not any(one.done() for one in waiting)
        served.look()
        assert "new ones wait" in capsys.readouterr().err
        GATE.set()
        assert [one.result(60).model_version for one in waiting] == [2, 2, 2]
        assert served.look()["status"] == "ready"
        metrics = served.metrics()
        assert metrics["fresco_swaps_drained_total"] == 1 == metrics["fresco_swaps_total"]
        assert (
            metrics["fresco_swapping"] == metrics["fresco_held_requests"] == metrics["fresco_swap_failures_total"] == 0
        )
        assert metrics["fresco_engine_requests_total failed"] == 0


def test_request_that_waits_for_a_swap_too_long_is_told_when_to_come_again(make_served: Callable[..., Served]) -> None:
    GATE.clear()
    with make_served(memory_headroom_bytes=HUGE, swap_wait_s=0).running(f"{__name__}:make_gated_painter") as served:
        move_champion(served.registry, "fresco", 2)
        served.look()
        wait_for(lambda: (readiness(served.url) or {})["status"] == "swapping")
        with pytest.raises(openai.InternalServerError, match="longer than this request may wait") as refused:
            served.draw("request-1")
        assert refused.value.status_code == 503 and refused.value.response.headers["retry-after"]
        GATE.set()
        wait_for(lambda: served.models() == [("fresco", 2)])
        assert served.draw("request-1").model_version == 2
