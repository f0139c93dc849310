"""Each request as a trace, sent to an OpenTelemetry collector by OTLP/HTTP where `serve.otlp_endpoint` names one.

A span is made when its request has ended, from what `request_watch` tells of it, so nothing is traced on a request's
way and nothing at all without an address. Children are the phases that the painter tells. Names and attributes follow
OpenTelemetry's semantic conventions for HTTP servers; a prompt or a key has no way in. Sending is a thread's work with
a bounded queue: a collector that is slow or gone loses spans and delays nobody.
"""

import threading
import time
from typing import TYPE_CHECKING, Any

from cluster.errors import EndpointError
from cluster.placement import ServeSection
from cluster.request_log import QUIET_ROUTES
from cluster.request_watch import EndedRequest

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

SERVICE = "fresco"
PATH = "/v1/traces"
"""Below an address without a path, as OTLP says of OTEL_EXPORTER_OTLP_ENDPOINT."""
QUEUE_SPANS = 2048
BATCH_SPANS = 256
SEND_EVERY_MS = 2000
SEND_LIMIT_S = 5
"""Of one batch, its repetitions included, and of what waits at the end."""
NS = 1_000_000_000


class Traces:
    """A listener of ended requests; `close` sends what waits, within SEND_LIMIT_S."""

    def __init__(self, exporter: "SpanExporter", replica: str) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        resource = Resource.create({"service.name": SERVICE, "service.instance.id": replica})
        sender = BatchSpanProcessor(exporter, QUEUE_SPANS, SEND_EVERY_MS, BATCH_SPANS)
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(sender)
        self._tracer = self._provider.get_tracer(SERVICE)

    def ended(self, served: EndedRequest) -> None:
        """Make the spans of a request that has ended: part of the client's trace where it named one."""
        from opentelemetry.trace import SpanKind, StatusCode, set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        if served.route in QUIET_ROUTES and served.status < 400:
            return
        # Spans want the time of day, and a request was timed by a clock that nobody sets.
        offset = time.time_ns() - int(time.monotonic() * NS)
        span = self._tracer.start_span(
            f"{served.method} {served.route}",
            context=TraceContextTextMapPropagator().extract(served.trace),
            kind=SpanKind.SERVER,
            attributes=attributes_of(served),
            start_time=offset + int(served.began * NS),
        )
        if served.status >= 500:
            span.set_status(StatusCode.ERROR)
        inside = set_span_in_context(span)
        for phase in served.phases:
            child = self._tracer.start_span(phase.name, context=inside, start_time=offset + int(phase.began * NS))
            child.end(offset + int(phase.ended * NS))
        span.end(offset + int((served.began + served.seconds) * NS))

    def close(self) -> None:
        # The SDK itself would wait for half a minute where the collector is gone.
        closing = threading.Thread(target=self._provider.shutdown, name="send-traces", daemon=True)
        closing.start()
        closing.join(SEND_LIMIT_S)


def attributes_of(served: EndedRequest) -> dict[str, Any]:
    """What a span says of its request; what is not known is left out."""
    told = {
        "http.request.method": served.method,
        "http.route": served.route,
        "http.response.status_code": served.status,
        "http.request.body.size": served.bytes_in,
        "http.response.body.size": served.bytes_out,
        "error.type": served.code,
        "fresco.request_id": served.request_id,
        "fresco.model_version": served.version,
        "fresco.pictures": served.rows,
        "fresco.client_gone": served.gone or None,
    }
    return {name: value for name, value in told.items() if value is not None}


def open_traces(limits: ServeSection, replica: str) -> Traces | None:
    """Return where traces go, None without `serve.otlp_endpoint`; EndpointError without the exporter's package."""
    if not limits.otlp_endpoint:
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise EndpointError(
            "serve.otlp_endpoint expected the package opentelemetry-exporter-otlp-proto-http, found none; install it,"
            " or leave serve.otlp_endpoint empty"
        ) from error
    return Traces(OTLPSpanExporter(endpoint=address_of(limits.otlp_endpoint), timeout=SEND_LIMIT_S), replica)


def address_of(endpoint: str) -> str:
    """Return where traces are sent: below an address, or at it where it ends so already."""
    return endpoint if endpoint.endswith(PATH) else endpoint + PATH
