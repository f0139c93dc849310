"""fresco load against real servers on free ports: open loop, honest latency, errors by code, two servers compared."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from cluster.errors import EndpointError
from components.errors import InputError
from components.load_plan import Mix, draw_arrivals
from flows import load
from flows.config import Config
from tests.endpoint import listening

MIX = Mix(rate_per_s=40, duration_s=0.5, several_share=0.3, seed=1)
CONFIG = Config()
ANSWER: dict[str, Any] = {"created": 1, "model_version": 7}


@contextmanager
def served(respond: Callable[[dict[str, Any]], Any]) -> Iterator[str]:
    """An endpoint that answers a body with what `respond` says; yields its URL."""
    app = FastAPI()

    @app.post("/v1/images/generations")
    async def generate(request: Request) -> Any:
        return await respond({**await request.json(), "authorization": request.headers.get("authorization")})

    with listening(app) as url:
        yield url


async def draw(body: dict[str, Any]) -> Any:
    return ANSWER | {"data": [{"b64_json": "AAAA"}] * body["n"]}


async def draw_slowly(body: dict[str, Any]) -> Any:
    await asyncio.sleep(0.6)
    return await draw(body)


def test_load_is_sent_and_every_picture_counted() -> None:
    seen: list[dict[str, Any]] = []

    async def remember(body: dict[str, Any]) -> Any:
        seen.append(body)
        return await draw(body)

    with served(remember) as url:
        (found,) = load.run(CONFIG, [url + "/v1/"], MIX, api_key="secret")["results"]
    arrivals = draw_arrivals(MIX)
    assert sorted(body["seed"] for body in seen) == sorted(arrival.body["seed"] for arrival in arrivals)
    assert {body["authorization"] for body in seen} == {"Bearer secret"}
    assert found["succeeded"] == found["requests"] == len(arrivals) and found["errors"] == {}
    assert found["images"] == sum(arrival.body["n"] for arrival in arrivals)
    assert found["model_versions"] == {"7": len(arrivals)} and found["in_time_share"] == 1.0
    assert "secret" not in json.dumps(found)


def test_slow_server_does_not_slow_arrivals_and_its_latency_is_seen() -> None:
    waiting, most = 0, 0

    async def one_at_a_time(body: dict[str, Any]) -> Any:
        nonlocal waiting, most
        waiting += 1
        most = max(most, waiting)
        await asyncio.sleep(0.8)
        waiting -= 1
        return await draw(body)

    with served(one_at_a_time) as url:
        (found,) = load.run(CONFIG, [url], MIX, deadline_s=0.3)["results"]
    # All arrive within half a second and none is answered before 0.8 s: a closed loop would have had one at a time.
    assert most == found["requests"]
    assert found["latency_s"]["p50"] >= 0.8 and found["goodput_images_per_s"] == 0 and found["images_per_s"] > 0


def test_latency_counts_from_when_a_request_was_due() -> None:
    async def send() -> Any:
        async def hold_the_loop() -> None:
            await asyncio.sleep(0.05)
            time.sleep(0.5)  # the generator itself is held up, as by a busy machine

        task = asyncio.ensure_future(hold_the_loop())
        outcomes = await load.send_all(url + load.ROUTE, draw_arrivals(MIX), 20, {})
        await task
        return outcomes

    with served(draw) as url:
        outcomes = asyncio.run(send())
    held_up = [outcome for outcome in outcomes if outcome.late_s > 0.1]
    assert held_up and all(outcome.latency_s >= outcome.late_s for outcome in held_up)


def test_errors_are_counted_by_status_and_code() -> None:
    numbers = iter(range(10_000))

    async def fail_in_turn(body: dict[str, Any]) -> Any:
        error = {"error": {"message": "full", "type": "rate_limit_error", "param": None, "code": "queue_full"}}
        answers: list[Any] = [
            JSONResponse(error, 429),
            JSONResponse({"detail": "gone"}, 500),
            JSONResponse(ANSWER | {"data": []}),
            JSONResponse([1], 200),
        ]
        return answers[next(numbers) % 4]

    with served(fail_in_turn) as url:
        (found,) = load.run(CONFIG, [url], Mix(40, 0.5, several_share=0, seed=1))["results"]
    assert set(found["errors"]) == {"429 queue_full", "500 without a code", "200 with 0 of 1 pictures"}
    assert found["succeeded"] == 0 and found["latency_s"]["p99"] is None and found["images_per_s"] == 0


def test_answer_that_does_not_come_is_a_timeout() -> None:
    with served(draw_slowly) as url:
        (found,) = load.run(CONFIG, [url], Mix(20, 0.2, seed=1), timeout_s=0.2)["results"]
    assert found["errors"] == {"timeout": found["requests"]}


def test_two_servers_get_the_same_load_and_are_compared() -> None:
    with ExitStack() as stack:
        quick, slow = stack.enter_context(served(draw)), stack.enter_context(served(draw_slowly))
        found = load.run(CONFIG, [quick, slow], MIX, deadline_s=0.5)
    first, second = found["results"]
    assert (first["url"], second["url"]) == (quick, slow) and first["requests"] == second["requests"]
    assert found["second_over_first"]["p50"] > 2 and found["second_over_first"]["goodput_images_per_s"] == 0


def test_endpoint_that_is_not_there_is_an_error() -> None:
    with pytest.raises(EndpointError, match="found no connection"):
        load.run(CONFIG, ["http://127.0.0.1:9"], MIX)


@pytest.mark.parametrize(
    ("urls", "mix", "said"),
    [
        (["a", "b", "c"], {}, "found 3"),
        (["127.0.0.1:80"], {}, "expected URLs such as"),
        (["http://a"], {"rate_per_s": 0}, "--rate expected"),
        (["http://a"], {"duration_s": float("inf")}, "--seconds expected"),
        (["http://a"], {"rate_per_s": 1e9}, "lower --rate"),
        (["http://a"], {"rate_per_s": 1e-9}, "found none"),
        (["http://a"], {"steps": (9, 8)}, "found 9-8"),
    ],
)
def test_wrong_commands_are_refused(urls: list[str], mix: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        load.run(CONFIG, urls, Mix(**({"rate_per_s": 1.0, "duration_s": 1.0} | mix)))


@pytest.mark.parametrize(
    ("sizes", "steps", "said"), [(",", "8-40", "--sizes"), ("auto", "many", "--steps"), ("auto", "8-", "--steps")]
)
def test_options_that_cannot_be_read_are_refused(sizes: str, steps: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        load.make_mix(1, 1, sizes, steps, 0)


def test_command_prints_one_json_object() -> None:
    with served(draw) as url:
        options = ["--rate", "20", "--seconds", "0.5", "--steps", "9", "--sizes", "16x16,auto", "--json"]
        command = [sys.executable, "-m", "flows", "load", url, *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=Path(load.__file__).parents[1])
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["results"][0]["images_per_s"] > 0


def test_load_that_is_told_to_end_ends_and_says_so() -> None:
    arrived, over = threading.Event(), threading.Event()

    async def never(body: dict[str, Any]) -> Any:
        arrived.set()
        while not over.is_set():
            await asyncio.sleep(0.05)
        return await draw(body)

    with served(never) as url:
        command = [sys.executable, "-m", "flows", "load", url, "--rate", "20", "--seconds", "600"]
        here = Path(load.__file__).parents[1]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=here) as process:
            assert arrived.wait(120)
            os.kill(process.pid, signal.SIGTERM)
            told = process.communicate(timeout=60)[1]
        over.set()
    assert process.returncode == 1 and "interrupted" in told
