"""More than one replica, none at all, and one that is killed: real ones on Ray Serve, asked over HTTP."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from cluster.placement import PlacementSection, ServeSection
from cluster.serving import APPLICATION, DEPLOYMENT, ModelSource, endpoint, readiness
from tests.endpoint import painter_arguments

pytestmark = pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\.")
SETTINGS = ServeSection(
    min_replicas=0,
    max_replicas=2,
    target_backlog_s=1.0,
    upscale_delay_s=0.5,
    downscale_delay_s=4.0,
    max_steps=900,
    max_side_px=64,
    max_queue=256,
)
ENOUGH_S = 120.0


@pytest.fixture(scope="module")
def url(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    workspace = tmp_path_factory.mktemp("workspace")
    arguments = painter_arguments(tiny_base, workspace / "keys", SETTINGS)
    source = ModelSource("flows.paint:make_painter", arguments, "fresco", str(workspace))
    with endpoint(source, SETTINGS, PlacementSection()) as url:
        yield url


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0, timeout=ENOUGH_S) as client:
        yield client


def running() -> int:
    from ray import serve

    states = serve.status().applications[APPLICATION].deployments[DEPLOYMENT].replica_states
    return int(states.get("RUNNING", 0))


def come_true(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + ENOUGH_S
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.2)


def drawing_at(process: psutil.Process) -> float:
    return float(process.cpu_times().user)


def replica_processes() -> list[psutil.Process]:
    """Replicas of this test session, whose Ray is a descendant of this process."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if f"ServeReplica:{APPLICATION}:" in " ".join(process.cmdline()):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return found


def long_request(url: str, name: str, stream: bool = False) -> httpx.Response:
    body = {"prompt": "x", "n": 8, "size": "64x64", "steps": SETTINGS.max_steps, "stream": stream}
    more = {"partial_images": 3} if stream else {}
    route, headers = f"{url}/v1/images/generations", {"x-request-id": name}
    return httpx.post(route, json=body | more, headers=headers, timeout=ENOUGH_S, trust_env=False)


@pytest.mark.slow  # Ray Serve looks twice before it starts a replica, and that loads a model
def test_work_that_waits_brings_a_second_replica_whose_requests_any_other_cancels(url: str) -> None:
    names = [f"long-request-{number}" for number in range(6)]
    with ThreadPoolExecutor(len(names)) as threads:
        first = [threads.submit(long_request, url, name) for name in names[:3]]
        come_true(lambda: running() == 2)
        # Serve deals new requests to both.
        answers = first + [threads.submit(long_request, url, name) for name in names[3:]]

        def cancelled(name: str) -> bool:
            answer = httpx.delete(f"{url}/v1/requests/{name}", timeout=ENOUGH_S, trust_env=False)
            assert answer.status_code in (200, 404), answer.text
            return answer.status_code == 200

        for name in names:
            come_true(lambda name=name: cancelled(name))
        ended = [answer.result(ENOUGH_S) for answer in answers]
    assert {answer.json()["error"]["code"] for answer in ended} == {"request_cancelled"}


def test_killed_replica_costs_its_own_requests_one_clear_error_each(url: str, client: openai.OpenAI) -> None:
    client.images.generate(prompt="x", extra_body={"steps": 1})
    outcomes: dict[str, httpx.Response] = {}
    threads = []
    for name, stream in (("killed-plainly", False), ("killed-in-stream", True)):

        def ask(name: str = name, stream: bool = stream) -> None:
            outcomes[name] = long_request(url, name, stream)

        threads.append(threading.Thread(target=ask))
    victims = replica_processes()
    before = {process.pid: drawing_at(process) for process in victims}
    for thread in threads:
        thread.start()
    # Both are at work when the replicas that serve are killed: their processor time says so.
    come_true(lambda: sum(drawing_at(process) - before[process.pid] for process in victims) > 2.0)
    for process in victims:
        os.kill(process.pid, signal.SIGKILL)
    for thread in threads:
        thread.join(ENOUGH_S)
    plain, stream = outcomes["killed-plainly"], outcomes["killed-in-stream"]
    assert (plain.status_code, plain.json()["error"]["code"]) == (503, "replica_lost")
    assert int(plain.headers["retry-after"]) >= 1
    if stream.status_code == 200:  # its first events had been sent
        assert stream.text.rstrip().split("\n\n")[-1].startswith("event: error\n")
        assert '"code": "replica_lost"' in stream.text
    else:
        assert (stream.status_code, stream.json()["error"]["code"]) == (503, "replica_lost")
    # The next request waits for the replacement, and is drawn.
    assert client.images.generate(prompt="x", extra_body={"steps": 1}).data


@pytest.mark.slow
def test_endpoint_that_nobody_asks_falls_asleep_and_the_next_request_wakes_it(url: str, client: openai.OpenAI) -> None:
    come_true(lambda: (readiness(url) or {}).get("status") == "asleep")
    assert replica_processes() == []
    # Asking after its state did not wake it.
    assert (readiness(url) or {})["status"] == "asleep" and running() == 0
    states: list[str] = []
    done = threading.Event()

    def look() -> None:
        while not done.wait(0.1):
            states.append((readiness(url) or {}).get("status", "not answering"))

    looking = threading.Thread(target=look)
    looking.start()
    try:
        assert client.images.generate(prompt="x", extra_body={"steps": 1}).data
    finally:
        done.set()
        looking.join()
    assert "starting" in states
