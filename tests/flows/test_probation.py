"""A new version on probation: real endpoint, registry and follower, real requests; the version is sound or is not."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.artifacts import read_journal
from cluster.champion import move_champion, set_challenger, settle, trying
from cluster.endpoint_numbers import Look
from cluster.lease import hold_lease
from cluster.registry import CHALLENGER, TAG_MODEL_FINGERPRINT
from components.models import load_parts, save_parts
from flows import probation
from flows.config import Config, with_overrides
from flows.models import resolve_model
from flows.serve import endpoint_of
from tests.endpoint import wait_for
from tests.flows.test_several_versions import Served

CLIENTS = 3
EACH_LOOK = 12
"""Requests that end between two looks, where a test does not watch by the clock."""


class Watched(Served):
    """An endpoint that follows, is asked all the time, and counts as running for the verbs."""

    @contextmanager
    def asked(self, prompt: str = "x") -> Iterator["Watched"]:
        """Ask from several clients until the block ends; failures are the endpoint's to count."""
        with self.running(), hold_lease(self.workspace.root / "locks" / "endpoint.lock", "test"):
            self.follower.write_record(self.url, os.getpid(), 1)
            ended = threading.Event()
            with ThreadPoolExecutor(CLIENTS + 1) as threads:
                for number in range(CLIENTS if prompt else 0):
                    threads.submit(self._ask, number, prompt, ended)
                following = threads.submit(self._follow, ended)
                try:
                    yield self
                finally:
                    ended.set()
            following.result()

    def _ask(self, client: int, prompt: str, ended: threading.Event) -> None:
        number = 0
        while not ended.is_set():
            number += 1
            try:
                self.draw(f"client-{client}-{number:05d}", prompt=prompt)
            except Exception:  # counted by the endpoint, which is what is watched
                ended.wait(0.01)

    def _follow(self, ended: threading.Event) -> None:
        while not ended.wait(0.05):
            self.look()

    def challenger(self) -> int | None:
        found = self.registry.by_alias("fresco", CHALLENGER)
        return found.number if found else None


@pytest.fixture
def make_watched(config: Config, make_run: Callable[[str, int], Path]) -> Callable[..., Watched]:
    def make(**overrides: Any) -> Watched:
        settings = {"serve.follow_s": 0.05, "serve.capture_share": 0, "retrain.watch_s": 5.0}
        return Watched(with_overrides(config, {**settings, "retrain.canary_share": 0.5, **overrides}), make_run)

    return make


@pytest.fixture
def paced(monkeypatch: pytest.MonkeyPatch) -> Callable[[Watched], None]:
    """Let a watch wait for requests instead of for time: machines differ, and how busy they are."""

    def pace(served: Watched) -> None:
        def ended() -> int:
            tallies = served.bridge.painter.numbers()["roles"].values()
            return sum(tally["outcomes"]["done"] + tally["outcomes"]["failed"] for tally in tallies)

        def wait(_: float) -> None:
            enough = ended() + EACH_LOOK
            wait_for(lambda: ended() >= enough)

        monkeypatch.setattr(probation, "_sleep_until", wait)

    return pace


def broken_for(served: Watched, word: str) -> int:
    """Register a version that draws, but not what holds `word`: the text encoder's row for it is not a number."""
    directory = served.workspace.run_dir("fresco-broken") / "pipeline"
    parts = load_parts(served.workspace.run_dir("fresco-bbb") / "pipeline")
    tokens = parts.tokenizer(word, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        parts.text_encoder.get_input_embeddings().weight[tokens] = float("nan")
    save_parts(parts, directory)
    found = resolve_model(served.config, str(directory))
    tags = {**found.lineage, TAG_MODEL_FINGERPRINT: found.fingerprint}
    return served.registry.register("fresco", directory, tags).number


def outcomes(found: dict[str, Any]) -> dict[str, str]:
    return {check["name"]: check["outcome"] for check in found["numbers"]["checks"]}


def before(served: Watched, num_requests: int = 30) -> dict[str, Any]:
    begin = probation.look(served.config)
    assert begin is not None
    wait_for(lambda: ((probation.since(served.config, begin) or {}).get("requests", 0)) >= num_requests)
    found = probation.since(served.config, Look(**asdict(begin)))
    assert found is not None and found["errors"] == 0
    return found


def test_version_that_fails_requests_is_rolled_back_and_says_why(make_watched: Callable[..., Watched], paced) -> None:
    served = make_watched()
    broken = broken_for(served, "red")
    with served.asked("a red circle"):
        paced(served)
        former = before(served)
        move_champion(served.registry, "fresco", broken)
        found = probation.watch(served.config, broken, former)
    assert found["decision"] == "roll_back" and outcomes(found)["errors"] == "fail"
    assert "requests failed" in found["reasons"][0] and found["numbers"]["after"]["errors"] > 0
    assert found["numbers"]["before"] == former


def test_sound_version_is_kept(make_watched: Callable[..., Watched], paced) -> None:
    with make_watched(**{"retrain.max_slowdown": 20.0}).asked() as served:
        paced(served)
        former = before(served)
        move_champion(served.registry, "fresco", 2)
        wait_for(lambda: (endpoint_of(served.workspace) or {}).get("model_version") == 2)
        found = probation.watch(served.config, 2, former)
        assert found["decision"] == "keep", found["reasons"]
        assert outcomes(found)["errors"] == "pass" == outcomes(found)["time_per_step"]
        assert found["numbers"]["after"]["requests"] >= 20


def test_too_few_requests_are_said_so_and_keep_nothing(make_watched: Callable[..., Watched]) -> None:
    with make_watched(**{"retrain.watch_s": 0.5}).asked(prompt="") as served:
        move_champion(served.registry, "fresco", 2)
        found = probation.watch(served.config, 2)
        assert found["decision"] == "not_enough_requests"
        assert found["reasons"] == ["0 requests were drawn by the new version, at least 20 are needed to judge it"]
        tried = probation.try_out(served.config, 1)
        assert tried["decision"] == "not_enough_requests" and "no request ended" in tried["reasons"][0]


def test_without_an_endpoint_or_a_time_nothing_is_watched_and_that_is_said(config: Config) -> None:
    for found in (probation.watch(config, 2), probation.try_out(config, 2)):
        assert found["decision"] == "keep" and found["reasons"][0].startswith("no endpoint runs: nothing was")
    off = with_overrides(config, {"retrain.watch_s": 0})
    assert probation.watch(off, 2)["reasons"] == ["retrain.watch_s is 0: nothing was watched"]
    assert "nothing was tried" in probation.try_out(off, 2)["reasons"][0]
    assert probation.since(config, None) is None and probation.look(config) is None


def test_version_that_cannot_be_loaded_is_rolled_back(make_watched: Callable[..., Watched]) -> None:
    served = make_watched()
    broken = broken_for(served, "warm up")  # what a model draws before any request depends on it
    with served.asked():
        move_champion(served.registry, "fresco", broken)
        found = probation.watch(served.config, broken)
    assert found["decision"] == "roll_back" and f"version {broken} could not be loaded" in found["reasons"][0]


def test_canary_is_compared_with_the_champion_at_the_same_time_and_ends(
    make_watched: Callable[..., Watched], paced
) -> None:
    served = make_watched(**{"retrain.max_slowdown": 20.0})
    broken = broken_for(served, "red")
    with served.asked("a red circle"):
        paced(served)
        for number, decision in ((broken, "roll_back"), (2, "keep")):
            found = probation.try_out(served.config, number)
            assert found["decision"] == decision, found["reasons"]
            assert found["numbers"]["before"]["requests"] and found["numbers"]["before"]["errors"] == 0
            assert served.challenger() is None
            wait_for(lambda: served.bridge.painter.numbers()["role_versions"] == {"champion": 1})
            assert served.bridge.painter.lineup.settings.challenger_share == 0
    lines = [line for line in read_journal(served.workspace) if line["event"] == "challenger"]
    assert [(line["version"], line.get("share")) for line in lines] == [
        (broken, 0.5),
        (None, None),
        (2, 0.5),
        (None, None),
    ]


def test_challenger_set_by_hand_is_left_alone(make_watched: Callable[..., Watched]) -> None:
    with make_watched().asked() as served:
        set_challenger(served.registry, "fresco", 2)
        broken = broken_for(served, "red")
        found = probation.try_out(served.config, broken)
        assert found["decision"] == "keep" and "version 2 is the challenger of fresco already" in found["reasons"][0]
        assert served.challenger() == 2


def try_and_die(config: Config, share: float, where: Any) -> None:
    from flows.models import open_registry

    with trying(open_registry(config), "fresco", 2, share):
        where.set()
        signal.pause()


def test_canary_whose_process_is_killed_draws_no_more_and_its_alias_goes(make_watched: Callable[..., Watched]) -> None:
    with make_watched().asked(prompt="") as served:
        context = multiprocessing.get_context("spawn")
        begun = context.Event()
        process = context.Process(target=try_and_die, args=(served.config, 1.0, begun))
        process.start()
        assert begun.wait(300)
        wait_for(lambda: served.bridge.painter.numbers()["role_versions"] == {"champion": 1, "challenger": 2})
        assert settle(served.registry, "fresco") == [] and served.challenger() == 2, "it lives"
        process.kill()
        process.join(60)
        wait_for(lambda: served.bridge.painter.numbers()["role_versions"] == {"champion": 1})
        assert served.challenger() == 2, "the endpoint reads, and repairs nothing"
        assert settle(served.registry, "fresco") == ["ended: the trial of version 2, whose process is gone"]
        assert served.challenger() is None and settle(served.registry, "fresco") == []
