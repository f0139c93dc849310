"""Champion, challenger and shadow side by side: how long each draws, how often it fails, what its pictures look like.

`RoleTallies` counts where drawing happens, in plain numbers; `role_families` turns a reading into Prometheus' series at
a scrape. Seconds run from a request's acceptance by the engine to its last picture, for all roles alike: encoding and
sending, which a shadow has not, are left out.
"""

import threading
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric

Role = Literal["champion", "challenger", "shadow"]
Outcome = Literal["done", "failed", "cancelled", "dropped"]
BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1, 2, 3, 5, 7.5, 10, 15, 20, 30, 45, 60, 120, 300)
"""Close together where pictures take their time, 1 to 60 s; the last, without end, follows them."""
STATISTICS = ("brightness", "contrast", "saturation")


@dataclass
class Tally:
    """What one role has done since the start."""

    outcomes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("done", "failed", "cancelled"), 0))
    seconds: float = 0.0
    buckets: list[int] = field(default_factory=lambda: [0] * (len(BUCKETS_S) + 1))
    """Requests that were done, by their seconds; each in one bucket."""
    pictures: int = 0
    statistics: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STATISTICS, 0.0))
    """Sums over the pictures."""


class RoleTallies:
    """Counts from any thread; a role is there once something was told of it."""

    def __init__(self) -> None:
        self._tallies: dict[str, Tally] = {}
        self._lock = threading.Lock()

    def done(self, role: Role, seconds: float) -> None:
        """A request was drawn."""
        with self._lock:
            tally = self._of(role)
            tally.outcomes["done"] += 1
            tally.seconds += seconds
            tally.buckets[bisect_left(BUCKETS_S, seconds)] += 1

    def ended(self, role: Role, outcome: Outcome) -> None:
        """A request ended in another way; `dropped` is a shadow that found no room."""
        with self._lock:
            outcomes = self._of(role).outcomes
            outcomes[outcome] = outcomes.get(outcome, 0) + 1

    def picture(self, role: Role, statistics: Mapping[str, float]) -> None:
        """A picture was drawn; `statistics` has a number for each of STATISTICS."""
        with self._lock:
            tally = self._of(role)
            tally.pictures += 1
            for name in STATISTICS:
                tally.statistics[name] += statistics[name]

    def read(self) -> dict[str, dict[str, Any]]:
        """Return what `role_families` reads: a copy, by role."""
        with self._lock:
            return {role: asdict(tally) for role, tally in self._tallies.items()}

    def _of(self, role: Role) -> Tally:
        return self._tallies.setdefault(role, Tally())


def role_families(
    replica: str, tallies: Mapping[str, Mapping[str, Any]], versions: Mapping[str, Any]
) -> Iterator[Metric]:
    """Yield the series of `RoleTallies.read`, and which version has which role now."""
    if tallies:
        yield _outcomes(replica, tallies)
        yield _seconds(replica, tallies)
        yield from _pictures(replica, tallies)
    if versions:
        text = "1 for the version that has the role now"
        family = GaugeMetricFamily("fresco_role_version", text, labels=["replica", "role", "version"])
        for role, version in versions.items():
            family.add_metric([replica, role, str(version)], 1.0)
        yield family


def _outcomes(replica: str, tallies: Mapping[str, Mapping[str, Any]]) -> Metric:
    text = "Requests of each role by how they ended; failed are deadlines that passed too"
    family = CounterMetricFamily("fresco_role_requests", text, labels=["replica", "role", "outcome"])
    for role, tally in tallies.items():
        for outcome, count in tally["outcomes"].items():
            family.add_metric([replica, role, outcome], count)
    return family


def _seconds(replica: str, tallies: Mapping[str, Mapping[str, Any]]) -> Metric:
    text = "From the engine's acceptance of a request to its last picture"
    family = HistogramMetricFamily("fresco_role_seconds", text, labels=["replica", "role"])
    for role, tally in tallies.items():
        bounds = [*(str(float(bound)) for bound in BUCKETS_S), "+Inf"]
        counts = [float(sum(tally["buckets"][: index + 1])) for index in range(len(bounds))]
        family.add_metric([replica, role], list(zip(bounds, counts, strict=True)), tally["seconds"])
    return family


def _pictures(replica: str, tallies: Mapping[str, Mapping[str, Any]]) -> Iterator[Metric]:
    text = "Pictures drawn by each role; what the sums below are divided by"
    family = CounterMetricFamily("fresco_role_pictures", text, labels=["replica", "role"])
    for role, tally in tallies.items():
        family.add_metric([replica, role], tally["pictures"])
    yield family
    for name in STATISTICS:
        text = f"Sum over pictures of their {name} in [0, 1]; divided by fresco_role_pictures_total: the mean"
        family = CounterMetricFamily(f"fresco_role_{name}", text, labels=["replica", "role"])
        for role, tally in tallies.items():
            family.add_metric([replica, role], tally["statistics"][name])
        yield family
