"""A replica's metrics, read back with Prometheus' own parser."""

import asyncio
import threading
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from typing import Any

import httpx
import pytest
from fastapi import Depends, FastAPI, HTTPException
from prometheus_client.parser import text_string_to_metric_families
from starlette.requests import Request
from starlette.types import ASGIApp

from cluster.api_errors import install_handlers
from cluster.images_schema import ImagesRequest
from cluster.request_watch import EndedRequest, RequestWatch, note
from cluster.serve_metrics import (
    LABELLED_SUMS,
    LEVELS,
    MOST_REASONS,
    MOST_VERSIONS,
    OTHER_KEYS,
    SUMS,
    ServeMetrics,
    add_metrics_route,
)
from components.engine_status import EngineCounters, EngineStatus

SERVED = EndedRequest("req_1", "POST", "/v1/images/generations", 200, 0.4, None, False, 10, 20, 2, "7", "team")
STATUS = EngineStatus(5, 3, 4096, 2.5, 1638.4, {"7": 4, "8": 1}, 30, 10, 0.5, 0.75, 0.02, 4)
COUNTERS = EngineCounters(100, 600, 900, 12.5, 40, 2, 3, 1, 17)
MORE = {"state": "ready", "model_version": 8, "dataset": "emblems@0123", "run_id": "fresco-1"}
MORE |= {"swaps": 1, "swap_s": 3.5}
ENGINE: dict[str, Any] = {**asdict(STATUS), **asdict(COUNTERS), **MORE}


def series(exposition: bytes) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Parse an exposition: (name, labels without the replica) -> value; every series must name the replica."""
    found = {}
    for family in text_string_to_metric_families(exposition.decode()):
        assert family.documentation, family.name
        for sample in family.samples:
            labels = dict(sample.labels)
            assert labels.pop("replica") == "r-1", sample.name
            found[sample.name, tuple(sorted(labels.items()))] = sample.value
    return found


def read_engine(engine: Mapping[str, Any]) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return series(ServeMetrics("r-1", lambda: engine).exposition())


def test_requests_are_counted_by_route_status_and_reason() -> None:
    metrics = ServeMetrics("r-1", dict)
    refused = replace(SERVED, status=429, code="queue_full", rows=None)
    gone = replace(SERVED, gone=True, status=499, code="client_gone", route="/v1/images/edits")
    for served in (SERVED, SERVED, refused, gone):
        metrics.began()
        metrics.ended(served)
    metrics.began()
    found = series(metrics.exposition())
    drawn = ("route", "/v1/images/generations")
    assert found["fresco_requests_total", (drawn, ("status", "200"))] == 2
    assert found["fresco_requests_total", (drawn, ("status", "429"))] == 1
    refusals = {labels: value for (name, labels), value in found.items() if name == "fresco_refused_total"}
    assert refusals == {(("reason", "queue_full"),): 1}, "who left was not refused"
    assert found["fresco_clients_gone_total", (("route", "/v1/images/edits"),)] == 1
    assert found["fresco_requests_in_flight", ()] == 1
    assert found["fresco_pictures_total", (("version", "7"),)] == 4
    assert found["fresco_request_seconds_count", (drawn,)] == 3
    assert found["fresco_request_seconds_sum", (drawn,)] == pytest.approx(1.2)
    assert found["fresco_request_seconds_bucket", (("le", "0.25"), drawn)] == 0
    assert found["fresco_request_seconds_bucket", (("le", "0.5"), drawn)] == 3


def test_engine_is_read_at_the_scrape() -> None:
    found = read_engine(ENGINE)
    assert found["fresco_steps_total", ()] == 100 and found["fresco_row_steps_total", ()] == 600
    assert found["fresco_denoise_seconds_total", ()] == 12.5 and found["fresco_decode_seconds_total", ()] == 0.75
    assert found["fresco_engine_requests_total", (("outcome", "cancelled"),)] == 3
    assert found["fresco_text_cache_total", (("result", "hit"),)] == 30
    assert found["fresco_steps_saved_total", ()] == 17 and found["fresco_swap_seconds_total", ()] == 3.5
    assert found["fresco_compiled_shapes", ()] == 4 and found["fresco_encode_seconds_total", ()] == 0.5
    assert found["fresco_waiting_rows", ()] == 3 and found["fresco_backlog_seconds", ()] == 2.5
    assert found["fresco_version_requests", (("version", "7"),)] == 4 and found["fresco_ready", ()] == 1
    info = (("dataset", "emblems@0123"), ("model_version", "8"), ("run_id", "fresco-1"))
    assert found["fresco_model_info", info] == 1


def test_every_number_of_the_engine_has_a_series() -> None:
    known = {*SUMS, *LABELLED_SUMS, *LEVELS, *OTHER_KEYS}
    assert {field.name for kind in (EngineStatus, EngineCounters) for field in fields(kind)} <= known


def test_what_is_not_known_yet_has_no_series() -> None:
    names = {name for name, _ in read_engine({**ENGINE, "backlog_s": None, "rate": None})}
    assert not names & {"fresco_backlog_seconds", "fresco_pixel_steps_per_second"} and "fresco_steps_total" in names
    # Some requests have been made by none: a replica that is still loading has nothing but the number at work.
    assert {name for name, _ in read_engine({"state": "loading"})} <= {"fresco_ready", "fresco_requests_in_flight"}
    assert read_engine({"state": "loading"})["fresco_ready", ()] == 0


def test_two_replicas_in_one_process_do_not_meet() -> None:
    one, other = ServeMetrics("r-1", dict), ServeMetrics("r-2", dict)
    one.ended(SERVED)
    assert b"fresco_requests_total{" in one.exposition() and b"fresco_requests_total{" not in other.exposition()


def test_number_of_series_is_bounded_whatever_comes() -> None:
    metrics = ServeMetrics("r-1", lambda: {"versions": {f"v{number}": number for number in range(500)}})
    for number in range(500):
        metrics.ended(replace(SERVED, status=400, code=f"code_{number}"))
        metrics.ended(replace(SERVED, version=str(number)))
    found = series(metrics.exposition())
    reasons = {labels[0][1]: value for (name, labels), value in found.items() if name == "fresco_refused_total"}
    assert len(reasons) == MOST_REASONS + 1 and reasons["other"] == 500 - MOST_REASONS
    assert sum(name == "fresco_version_requests" for name, _ in found) == MOST_VERSIONS
    drawn = {labels[0][1] for name, labels in found if name == "fresco_pictures_total"}
    assert drawn == {str(number) for number in range(500 - MOST_VERSIONS, 500)}


def make_app(metrics: ServeMetrics, dependencies: Any = ()) -> FastAPI:
    app = FastAPI()
    install_handlers(app, ImagesRequest.model_fields)
    add_metrics_route(app, metrics.exposition, dependencies)

    @app.post("/v1/images/generations")
    async def generate(body: ImagesRequest) -> dict[str, str]:
        return {"drawn": body.prompt}

    @app.get("/v1/models/{model_id:path}")
    async def model(model_id: str) -> dict[str, str]:
        return {"id": model_id}

    return app


async def ask_often(app: ASGIApp, count: int) -> str:
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:

        async def one(number: int) -> None:
            await client.post("/v1/images/generations", json={"prompt": f"secret {number}"})
            await client.post("/v1/images/generations", json={"prompt": "x", "n": f"secret {number}"})
            await client.get(f"/v1/models/secret-{number}?prompt=secret")
            await client.get(f"/secret/{number}", headers={"authorization": f"Bearer secret-{number}"})
            await client.request(f"SECRET{number}", "/v1/images/generations")

        await asyncio.gather(*(one(number) for number in range(count)))
        answer = await client.get("/metrics")
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/plain; version=")
    return answer.text


def test_scrape_after_many_requests_at_once_counts_each_and_repeats_nothing_they_said() -> None:
    count = 60
    metrics = ServeMetrics("r-1", lambda: ENGINE)
    watched = RequestWatch(make_app(metrics), began=metrics.began, ended=[metrics.ended])
    text = asyncio.run(ask_often(watched, count))
    assert "secret" not in text.lower()
    found = series(text.encode())
    by_route = {labels: value for (name, labels), value in found.items() if name == "fresco_requests_total"}
    assert by_route == {
        (("route", "/v1/images/generations"), ("status", "200")): count,
        (("route", "/v1/images/generations"), ("status", "400")): count,
        (("route", "/v1/images/generations"), ("status", "405")): count,
        (("route", "/v1/models/{model_id:path}"), ("status", "200")): count,
        (("route", "unknown"), ("status", "404")): count,
    }
    assert found["fresco_requests_in_flight", ()] == 1, "the scrape itself"


def test_counts_are_right_when_threads_count_at_once() -> None:
    metrics = ServeMetrics("r-1", dict)

    def work() -> None:
        for _ in range(500):
            metrics.began()
            metrics.ended(SERVED)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = series(metrics.exposition())
    assert found["fresco_requests_total", (("route", SERVED.route), ("status", "200"))] == 4000
    assert found["fresco_requests_in_flight", ()] == 0


def test_metrics_ask_for_a_key_where_the_other_routes_do() -> None:
    def reader() -> None:
        raise HTTPException(401, "a key is expected")

    async def scrape() -> int:
        transport = httpx.ASGITransport(app=make_app(ServeMetrics("r-1", dict), [Depends(reader)]))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return (await client.get("/metrics")).status_code

    assert asyncio.run(scrape()) == 401


def test_note_of_a_route_reaches_the_metrics() -> None:
    metrics = ServeMetrics("r-1", dict)
    app = make_app(metrics)

    @app.get("/noted")
    async def noted(request: Request) -> None:
        note(request, rows=3, version=9)

    async def ask() -> None:
        watched = RequestWatch(app, began=metrics.began, ended=[metrics.ended])
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=watched), base_url="http://test") as client:
            assert (await client.get("/noted")).status_code == 200

    asyncio.run(ask())
    assert series(metrics.exposition())["fresco_pictures_total", (("version", "9"),)] == 3
