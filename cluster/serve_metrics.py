"""What a replica does, in numbers, as Prometheus reads them: requests as they end, the engine when it is asked.

Requests come from `request_watch`, the engine's counters and status from one function that is called at each scrape and
returns a plain mapping; keys it leaves out, or whose value is None, have no series. Every series names the replica;
`metric_files` lets one scrape tell of all. Labels take values from short lists of ours, never a text of a client.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.params import Depends
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from starlette.responses import Response

from cluster.request_watch import EndedRequest
from cluster.role_metrics import BUCKETS_S, role_families

METRICS_ROUTE = "/metrics"
MOST_REASONS = 40
MOST_VERSIONS = 16
OTHER = "other"

Read = Callable[[], Mapping[str, Any]]

SUMS = {
    "steps": ("fresco_steps", "Denoiser steps made, each for all rows of one batch"),
    "row_steps": ("fresco_row_steps", "Pictures advanced by one step; divided by fresco_steps_total: rows per step"),
    "call_rows": ("fresco_call_rows", "Denoiser rows; a guided picture has two"),
    "stepping_s": ("fresco_denoise_seconds", "Seconds in denoiser steps; divided by fresco_steps_total: step time"),
    "encoding_s": ("fresco_encode_seconds", "Seconds in which prompts were encoded"),
    "decoding_s": ("fresco_decode_seconds", "Seconds in which latents became pictures"),
    "steps_saved": ("fresco_steps_saved", "Steps of cancelled and failed requests that were not made"),
    "swaps": ("fresco_swaps", "Times that another version began to serve"),
    "swap_s": ("fresco_swap_seconds", "Seconds from the start of loading a version until it served"),
    "swaps_drained": ("fresco_swaps_drained", "Of these, how many let go of the old weights first: memory was short"),
    "swap_failures": ("fresco_swap_failures", "Times that a version, champion or challenger, could not be loaded"),
}
"""Key of the mapping -> name and help of a counter."""
LABELLED_SUMS = {
    "done": ("fresco_engine_requests", "outcome", "done"),
    "failed": ("fresco_engine_requests", "outcome", "failed"),
    "cancelled": ("fresco_engine_requests", "outcome", "cancelled"),
    "refused": ("fresco_engine_requests", "outcome", "refused"),
    "text_hits": ("fresco_text_cache", "result", "hit"),
    "text_misses": ("fresco_text_cache", "result", "miss"),
    "capture_dropped": ("fresco_capture_requests", "outcome", "dropped"),
    "capture_written": ("fresco_capture_requests", "outcome", "written"),
    "capture_failed": ("fresco_capture_requests", "outcome", "failed"),
}
"""Key -> name of a counter, and the label that tells it from its siblings."""
LABELLED_HELP = {
    "fresco_engine_requests": "Requests by how the engine was done with them",
    "fresco_text_cache": "Prompts whose text states were at hand, or were not",
    "fresco_capture_requests": "Requests kept for the monitor, dropped for want of room, or not encoded or written",
}
LEVELS = {
    "live_rows": ("fresco_live_rows", "Pictures that are being denoised"),
    "waiting_rows": ("fresco_waiting_rows", "Pictures that wait for a place"),
    "backlog_pixel_steps": ("fresco_backlog_pixel_steps", "Pixels times denoiser evaluations still to be made"),
    "backlog_s": ("fresco_backlog_seconds", "The same at the measured speed, and what waits to be decoded"),
    "rate": ("fresco_pixel_steps_per_second", "Measured speed of the denoiser"),
    "decode_s": ("fresco_decode_picture_seconds", "Seconds to decode one picture, smoothed"),
    "compiled_shapes": ("fresco_compiled_shapes", "Denoiser call shapes with compiled code, of the newest version"),
    "swapping": ("fresco_swapping", "1 while new requests wait for a swap that drains first"),
    "held_requests": ("fresco_held_requests", "Requests that wait for such a swap"),
}
"""Key -> name and help of a gauge."""
MODEL_INFO, INFO = "fresco_model_info", ("model_version", "dataset", "run_id")
OTHER_KEYS = ("versions", "state", "roles", "role_versions")


class ServeMetrics:
    """The numbers of one replica; `read` returns the engine's, with the keys of the tables above."""

    def __init__(self, replica: str, read: Read) -> None:
        self.replica = replica
        self.registry = CollectorRegistry()
        self._reasons: set[str] = set()
        self._lock = threading.Lock()
        at = self.registry
        self._versions: list[str] = []
        self._requests = Counter("fresco_requests", "Requests that ended", ("replica", "route", "status"), registry=at)
        self._refused = Counter("fresco_refused", "Refusals by error.code", ("replica", "reason"), registry=at)
        self._gone = Counter("fresco_clients_gone", "Clients that left early", ("replica", "route"), registry=at)
        self._in_flight = Gauge("fresco_requests_in_flight", "Requests at work", ("replica",), registry=at)
        self._rows = Counter("fresco_pictures", "Pictures in answers", ("replica", "version"), registry=at)
        self._seconds = Histogram(
            "fresco_request_seconds",
            "From a request's arrival to its last byte",
            ("replica", "route"),
            buckets=BUCKETS_S,
            registry=at,
        )
        self._in_flight.labels(replica)
        self.registry.register(_Engine(replica, read))

    def began(self) -> None:
        """A request has arrived."""
        self._in_flight.labels(self.replica).inc()

    def ended(self, served: EndedRequest) -> None:
        """A request has ended."""
        self._in_flight.labels(self.replica).dec()
        self._requests.labels(self.replica, served.route, str(served.status)).inc()
        self._seconds.labels(self.replica, served.route).observe(served.seconds)
        if served.gone:
            self._gone.labels(self.replica, served.route).inc()
        elif served.code is not None:
            self._refused.labels(self.replica, self._reason(served.code)).inc()
        if served.rows and served.status < 400:
            self._rows.labels(self.replica, self._version(served.version or "")).inc(served.rows)

    def exposition(self) -> bytes:
        """Return everything in Prometheus' text form."""
        return generate_latest(self.registry)

    def _version(self, version: str) -> str:
        """Forget the oldest version when there are many: a replica outlives the models it has served."""
        with self._lock:
            if version not in self._versions:
                self._versions.append(version)
                if len(self._versions) > MOST_VERSIONS:
                    self._rows.remove(self.replica, self._versions.pop(0))
            return version

    def _reason(self, code: str) -> str:
        """Bound the reasons, whatever codes may come to exist."""
        with self._lock:
            if len(self._reasons) < MOST_REASONS:
                self._reasons.add(code)
            return code if code in self._reasons else OTHER


def add_metrics_route(app: FastAPI, exposition: Callable[[], bytes], dependencies: Sequence[Depends] = ()) -> None:
    """Answer GET /metrics with an exposition; `dependencies` may ask for a key, as they do on the other routes."""

    # Not a coroutine: reading waits for the engine's lock, and the event loop must not.
    @app.get(METRICS_ROUTE, include_in_schema=False, dependencies=list(dependencies))
    def scrape() -> Response:
        return Response(exposition(), media_type=CONTENT_TYPE_LATEST)


class _Engine(Collector):
    """Turns one reading of the engine into series, at the time of the scrape."""

    def __init__(self, replica: str, read: Read) -> None:
        self.replica, self.read = replica, read

    def collect(self) -> Iterator[Metric]:
        found = {key: value for key, value in self.read().items() if value is not None}
        for key, (name, text) in SUMS.items():
            if key in found:
                yield self._family(CounterMetricFamily, name, text, (), [((), found[key])])
        for name, text in LABELLED_HELP.items():
            mine = [(key, label, value) for key, (owner, label, value) in LABELLED_SUMS.items() if owner == name]
            samples = [((value,), found[key]) for key, _, value in mine if key in found]
            if samples:
                yield self._family(CounterMetricFamily, name, text, (mine[0][1],), samples)
        for key, (name, text) in LEVELS.items():
            if key in found:
                yield self._family(GaugeMetricFamily, name, text, (), [((), found[key])])
        yield from self._models(found)
        yield from role_families(self.replica, found.get("roles", {}), found.get("role_versions", {}))

    def _models(self, found: Mapping[str, Any]) -> Iterator[Metric]:
        if "state" in found:
            text = "1 when the model is loaded and warm"
            ready = float(found["state"] == "ready")
            yield self._family(GaugeMetricFamily, "fresco_ready", text, (), [((), ready)])
        if "model_version" in found:
            values = tuple(str(found.get(key, "")) for key in INFO)
            yield self._family(GaugeMetricFamily, MODEL_INFO, "What new requests get", INFO, [(values, 1.0)])
        if "versions" in found:
            loaded = sorted(found["versions"].items(), key=lambda item: -item[1])[:MOST_VERSIONS]
            samples = [((str(name),), float(count)) for name, count in loaded]
            text = "Requests of each loaded version"
            yield self._family(GaugeMetricFamily, "fresco_version_requests", text, ("version",), samples)

    def _family(
        self,
        kind: type[CounterMetricFamily] | type[GaugeMetricFamily],
        name: str,
        text: str,
        labels: Sequence[str],
        samples: Iterable[tuple[Sequence[str], float]],
    ) -> Metric:
        family = kind(name, text, labels=["replica", *labels])
        for values, number in samples:
            family.add_metric([self.replica, *values], number)
        return family
