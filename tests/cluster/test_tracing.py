"""Traces as a collector gets them: real requests, sent by OTLP/HTTP to a server that decodes the protobuf."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from cluster import tracing
from cluster.placement import ServeSection
from tests.endpoint import endpoint, wait_for
from tests.servers import free_port

LIMITS = ServeSection(default_steps=3, max_images=2, max_side_px=64, max_queue=4, capture_share=0)
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SECRET = "a secret prompt about a purple giraffe"


class Collector:
    """Keeps what it is sent; while `held` is set it answers nobody."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.paths: set[str] = set()
        self.asked, self.go_on = threading.Event(), threading.Event()
        self.go_on.set()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                collector.asked.set()
                collector.go_on.wait(60)
                collector.paths.add(f"{self.path} {self.headers['content-type']}")
                collector.bodies.append(body)
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def spans(self) -> list[Span]:
        read = [ExportTraceServiceRequest.FromString(body) for body in list(self.bodies)]
        scopes = [scope for one in read for resource in one.resource_spans for scope in resource.scope_spans]
        return [span for scope in scopes for span in scope.spans]


@contextmanager
def running() -> Iterator[Collector]:
    collector = Collector()
    thread = threading.Thread(target=collector.server.serve_forever)
    thread.start()
    try:
        yield collector
    finally:
        collector.go_on.set()
        collector.server.shutdown()
        thread.join(20)
        collector.server.server_close()


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "SEND_EVERY_MS", 50)


def facts(span: Span) -> dict[str, Any]:
    return {pair.key: getattr(pair.value, str(pair.value.WhichOneof("value"))) for pair in span.attributes}


def test_requests_become_traces_of_the_client_with_their_phases_and_no_prompt(tiny_base: Path, tmp_path: Path) -> None:
    with running() as collector:
        limits = LIMITS.model_copy(update={"otlp_endpoint": collector.url})
        with endpoint(tiny_base, tmp_path, limits) as served:
            with openai.OpenAI(base_url=f"{served.url}/v1", api_key="sk-secret", max_retries=0) as client:
                headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "x-request-id": "traced-request"}
                client.images.generate(prompt=SECRET, n=2, extra_headers=headers)
                list(client.images.generate(prompt=SECRET, stream=True))
                with pytest.raises(openai.BadRequestError):
                    client.images.generate(prompt=SECRET, size="7x7")
            httpx.get(f"{served.url}/healthz", trust_env=False)
        spans = collector.spans()
    assert collector.paths == {"/v1/traces application/x-protobuf"}
    roots = [span for span in spans if span.kind == Span.SPAN_KIND_SERVER]
    assert [span.name for span in roots] == ["POST /v1/images/generations"] * 3, "health checks are not traced"
    drawn, streamed, refused = roots
    told = facts(drawn)
    assert told["http.response.status_code"] == 200 and told["http.route"] == "/v1/images/generations"
    assert (told["fresco.request_id"], told["fresco.model_version"], told["fresco.pictures"]) == (
        *("traced-request", "4"),
        2,
    )
    assert (drawn.trace_id.hex(), drawn.parent_span_id.hex()) == (TRACE, PARENT)
    assert not streamed.parent_span_id and streamed.trace_id != drawn.trace_id
    assert facts(refused)["http.response.status_code"] == 400 and facts(refused)["error.type"] == "invalid_value"
    for root in (drawn, streamed):
        phases = [span for span in spans if span.parent_span_id == root.span_id]
        assert [span.name for span in phases] == ["waiting", "denoising", "decoding", "encoding"]
        times = [time for span in phases for time in (span.start_time_unix_nano, span.end_time_unix_nano)]
        inside = [root.start_time_unix_nano, *times, root.end_time_unix_nano]
        assert inside == sorted(inside) and phases[1].end_time_unix_nano > phases[1].start_time_unix_nano
    assert not any(span.parent_span_id == refused.span_id for span in spans)
    sent = b"".join(collector.bodies)
    assert b"giraffe" not in sent and b"sk-secret" not in sent and b"7x7" not in sent
    assert b"service.name" in sent and b"fresco" in sent


def test_failed_stream_is_a_failed_span(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise ValueError("a bad denoiser")

    with running() as collector:
        limits = LIMITS.model_copy(update={"otlp_endpoint": collector.url + "/v1/traces"})
        with endpoint(tiny_base, tmp_path, limits) as served:
            monkeypatch.setattr(served.engine._versions.newest, "predict", fail)
            client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="x", max_retries=0)
            with client, pytest.raises(openai.APIError, match="drawing failed: ValueError"):
                list(client.images.generate(prompt="x", stream=True))
        (span,) = collector.spans()
    assert span.status.code == Status.STATUS_CODE_ERROR and facts(span)["http.response.status_code"] == 500
    assert facts(span)["error.type"] == "drawing_failed"


@pytest.mark.parametrize("gone", [True, False])
def test_collector_that_is_gone_or_hangs_delays_no_request(tiny_base: Path, tmp_path: Path, gone: bool) -> None:
    with running() as collector:
        collector.go_on.clear()
        address = f"http://127.0.0.1:{free_port()}" if gone else collector.url
        limits = LIMITS.model_copy(update={"otlp_endpoint": address})
        with endpoint(tiny_base, tmp_path, limits) as served, httpx.Client(trust_env=False) as http:
            route = f"{served.url}/v1/images/generations"
            assert http.post(route, json={"prompt": "x"}).status_code == 200
            # The collector holds the first batch from here on, and answers nobody before the test has its pictures.
            assert gone or collector.asked.wait(20)
            assert [http.post(route, json={"prompt": "x"}).status_code for _ in range(3)] == [200] * 3
            collector.go_on.set()


def test_nothing_is_traced_or_loaded_without_an_address(tiny_base: Path, tmp_path: Path) -> None:
    with endpoint(tiny_base, tmp_path, LIMITS) as served:
        assert served.desk.traces is None
        finished: list[Any] = []
        take = served.engine._receive

        def see(accepted: Any, event: Any) -> None:
            finished.append(type(event).__name__)
            take(accepted, event)

        served.engine._receive = see
        httpx.post(f"{served.url}/v1/images/generations", json={"prompt": "x"}, trust_env=False)
        wait_for(lambda: finished)
    assert finished == ["Done"], "no progress is reported to anybody"


@pytest.mark.parametrize("address", ["collector:4317", "ftp://x", "http://"])
def test_address_of_another_form_is_refused_by_name(address: str) -> None:
    with pytest.raises(ValueError, match=r"http://HOST:4318"):
        ServeSection(otlp_endpoint=address)


def test_traces_go_below_an_address_unless_it_names_their_place() -> None:
    assert tracing.address_of("http://c:4318") == "http://c:4318/v1/traces"
    assert tracing.address_of("http://c/otel/v1/traces") == "http://c/otel/v1/traces"
