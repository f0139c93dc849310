"""The tables of `benchmarks/serve.py`, as Markdown, and the verdict on each target."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

FRESCO, GROUPED, ALONE = "fresco", "grouped", "one-by-one"
OVER_ALONE, OVER_GROUPED = 2.5, 1.5
CAPACITY_SHARE = 0.7
"""Of grouped's images/s: the rate at which latencies are compared."""
P95_SAVED = 0.3
MOST_COST_MS = 20.0
MOST_GROWTH_MIB = 1.0
"""Per 1,000 requests: a kilobyte kept of each. What a process gives and takes back anyway is of this order."""
MOST_DIFFERENCE = 1
"""Levels of 255: batches of other sizes move values by about 1e-6, which can turn one rounding."""


@dataclass(frozen=True)
class MemoryCourse:
    """Resident memory of a replica while it answers."""

    counts: Sequence[int]
    mib: Sequence[float]
    mib_per_1000: float
    requests_per_s: float


@dataclass(frozen=True)
class Saturation:
    """What each server reached in every round."""

    images_per_s: Mapping[str, Sequence[float]]
    cpu_s: Mapping[str, Sequence[float]]
    """Of the replica, for each picture."""


@dataclass(frozen=True)
class Results:
    """Everything that was measured, by server."""

    differences: Mapping[str, int]
    drawn: Saturation
    """Any steps and guidance."""
    presets: Saturation
    """The same with few presets."""
    images_per_s: float
    """Rate at which the latencies were measured."""
    latencies: Mapping[str, Mapping[str, Any]]
    idle: Mapping[str, float]
    memory: MemoryCourse


@dataclass(frozen=True)
class Verdict:
    """One target with what was found."""

    target: str
    found: str
    met: bool


def judge(results: Results) -> list[Verdict]:
    """Hold the numbers against the targets."""
    over_alone, over_grouped = (ratio(results.drawn.images_per_s, peer) for peer in (ALONE, GROUPED))
    saved = 1 - results.latencies[FRESCO]["p95"] / results.latencies[GROUPED]["p95"]
    cost_ms, growth = 1000 * results.idle["cost"], results.memory.mib_per_1000
    far = max(results.differences.values())
    faster, earlier = "images/s at saturation at least", "of grouped's capacity at least"
    table: list[tuple[str, str, bool]] = [
        (f"every server draws diffusers' pictures, within {MOST_DIFFERENCE} of 255", f"{far}", far <= MOST_DIFFERENCE),
        (f"{faster} {OVER_ALONE:g}x {ALONE}", f"{over_alone:.2f}x", over_alone >= OVER_ALONE),
        (f"{faster} {OVER_GROUPED:g}x {GROUPED}", f"{over_grouped:.2f}x", over_grouped >= OVER_GROUPED),
        (f"p95 at {CAPACITY_SHARE:.0%} {earlier} {P95_SAVED:.0%} under its", f"{saved:.0%} under", saved >= P95_SAVED),
        (
            f"one idle request at most {MOST_COST_MS:g} ms over the sampler",
            f"{cost_ms:.1f} ms",
            cost_ms <= MOST_COST_MS,
        ),
        (f"at most {MOST_GROWTH_MIB:g} MiB more in 1,000 requests", f"{growth:+.2f} MiB", growth <= MOST_GROWTH_MIB),
    ]
    return [Verdict(*row) for row in table]


def ratio(rates: Mapping[str, Sequence[float]], peer: str) -> float:
    """Median over rounds of Fresco's images/s divided by the peer's in the same round."""
    return statistics.median(mine / other for mine, other in zip(rates[FRESCO], rates[peer], strict=True))


def show(results: Results) -> bool:
    """Print the tables; whether every target is met."""
    for title, found in (("any steps and guidance", results.drawn), ("two of each", results.presets)):
        print(f"\n| saturation, {title} | images/s | fresco beside it (min to max) | CPU s for a picture |")
        print("|---|---|---|---|")
        for name, rates in found.images_per_s.items():
            middle, cpu_s = statistics.median(rates), statistics.median(found.cpu_s[name])
            print(f"| {name} | {middle:.2f} | {_spread(found.images_per_s, name)} | {cpu_s:.3f} |")
    names = ("p50", "p90", "p95", "p99", "max")
    print(f"\n| latency in s at {results.images_per_s:.2f} images/s | requests | {' | '.join(names)} |")
    print(f"|---|---|{'---|' * len(names)}")
    for name, waits in results.latencies.items():
        print(f"| {name} | {waits['requests']} | {' | '.join(f'{waits[key]:.2f}' for key in names)} |")
    late_s = max(waits["late"] for waits in results.latencies.values())
    print(f"\nRequests were sent at most {1000 * late_s:.0f} ms after they were due; the latencies hold that too.")
    idle, memory = results.idle, results.memory
    print("\n| one idle request, 20 steps | ms (median) |\n|---|---|")
    names_of = {"sampler": "the bare sampler", "request": "through the endpoint", "cost": "difference in pairs"}
    for key, name in {**names_of, "fastest": "difference of the fastest tenths"}.items():
        print(f"| {name} | {1000 * idle[key]:.1f} |")
    show_memory(memory, every=max(1, len(memory.counts) // 4))
    verdicts = judge(results)
    print("\n| target | found | |\n|---|---|---|")
    for verdict in verdicts:
        print(f"| {verdict.target} | {verdict.found} | {'met' if verdict.met else 'missed'} |")
    return all(verdict.met for verdict in verdicts)


def show_memory(memory: MemoryCourse, every: int) -> None:
    """Print every so many points of the course, and the last one."""
    print("\n| requests answered | replica's memory, MiB |\n|---|---|")
    for index in sorted({*range(0, len(memory.counts), every), len(memory.counts) - 1}):
        print(f"| {memory.counts[index]} | {memory.mib[index]:.1f} |")


def _spread(rates: Mapping[str, Sequence[float]], peer: str) -> str:
    ratios = [mine / other for mine, other in zip(rates[FRESCO], rates[peer], strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
