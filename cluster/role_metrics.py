"""Champion, challenger and shadow side by side: how long each draws, how often it fails, what its pictures look like.

`RoleTallies` counts where drawing happens, in plain numbers; `role_families` turns a reading into Prometheus' series at
a scrape. Seconds run from a request's acceptance by the engine to its last picture, for all roles alike: encoding and
sending, which a shadow has not, are left out.
"""

import threading
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from typing import Any, Literal

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric

Role = Literal["champion", "challenger", "shadow"]
Outcome = Literal["done", "failed", "cancelled", "dropped"]
BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1, 2, 3, 5, 7.5, 10, 15, 20, 30, 45, 60, 120, 300)
"""Close together where pictures take their time, 1 to 60 s; the last, without end, follows them."""
STEP_BUCKETS_S = tuple(round(0.001 * 2 ** (quarter / 4), 6) for quarter in range(57))
"""Of the seconds a step takes: quarters of an octave from 1 ms to 16 s, so that "half as long again" can be seen."""
STATISTICS = ("brightness", "contrast", "saturation")


@dataclass
class Tally:
    """What one role has done since the start."""

    outcomes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("done", "failed", "cancelled"), 0))
    seconds: float = 0.0
    buckets: list[int] = field(default_factory=lambda: [0] * (len(BUCKETS_S) + 1))
    """Requests that were done, by their seconds; each in one bucket."""
    step_s: float = 0.0
    step_buckets: list[int] = field(default_factory=lambda: [0] * (len(STEP_BUCKETS_S) + 1))
    """Of these requests, those whose steps are known, by seconds for each step."""
    pictures: int = 0
    refused: int = 0
    """Pictures that the safety stage kept back."""
    statistics: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STATISTICS, 0.0))
    """Sums over the pictures."""
    squares: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STATISTICS, 0.0))
    """Sums of the same, squared."""


class RoleTallies:
    """Counts from any thread; a role is there once something was told of it."""

    def __init__(self) -> None:
        self._tallies: dict[str, Tally] = {}
        self._lock = threading.Lock()

    def done(self, role: Role, seconds: float, step_s: float | None = None) -> None:
        """A request was drawn; `step_s` is what one of its steps took, None where that would compare with nothing."""
        with self._lock:
            tally = self._of(role)
            tally.outcomes["done"] += 1
            tally.seconds += seconds
            tally.buckets[bisect_left(BUCKETS_S, seconds)] += 1
            if step_s is not None:
                tally.step_s += step_s
                tally.step_buckets[bisect_left(STEP_BUCKETS_S, step_s)] += 1

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
                tally.squares[name] += statistics[name] ** 2

    def refused(self, role: Role, pictures: int) -> None:
        """The safety stage kept pictures back."""
        with self._lock:
            self._of(role).refused += pictures

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
        text = "From the engine's acceptance of a request to its last picture"
        yield _histogram(replica, tallies, "fresco_role_seconds", text, BUCKETS_S, ("buckets", "seconds"))
        text = "Of a request, from its start to its last picture, for each denoising step; edits and shadows left out"
        keys = ("step_buckets", "step_s")
        yield _histogram(replica, tallies, "fresco_role_step_seconds", text, STEP_BUCKETS_S, keys)
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


def _histogram(
    replica: str,
    tallies: Mapping[str, Mapping[str, Any]],
    name: str,
    text: str,
    bounds_s: tuple[float, ...],
    keys: tuple[str, str],
) -> Metric:
    """Requests of each role by seconds; `keys` name the counts by bucket and the sum in a tally."""
    family = HistogramMetricFamily(name, text, labels=["replica", "role"])
    bounds = [*(str(float(bound)) for bound in bounds_s), "+Inf"]
    for role, tally in tallies.items():
        reached = [float(count) for count in accumulate(tally[keys[0]])]
        family.add_metric([replica, role], list(zip(bounds, reached, strict=True)), tally[keys[1]])
    return family


def _pictures(replica: str, tallies: Mapping[str, Mapping[str, Any]]) -> Iterator[Metric]:
    told = [
        ("pictures", "Pictures drawn by each role; what the sums below are divided by", "pictures", ""),
        ("refused_pictures", "Of these, pictures that the safety stage kept back", "refused", ""),
    ]
    for name in STATISTICS:
        mean = f"Sum over pictures of their {name} in [0, 1]; divided by fresco_role_pictures_total: the mean"
        square = f"Sum over pictures of their {name}, squared: with the sum above, the variance"
        told += [(name, mean, "statistics", name), (f"{name}_squared", square, "squares", name)]
    for series, text, key, statistic in told:
        family = CounterMetricFamily(f"fresco_role_{series}", text, labels=["replica", "role"])
        for role, tally in tallies.items():
            family.add_metric([replica, role], tally[key][statistic] if statistic else tally[key])
        yield family
