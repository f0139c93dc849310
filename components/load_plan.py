"""Which requests arrive when, and what their answers say about a server: open-loop load, drawn and judged as values.

Arrivals are a Poisson process drawn in advance, so a slow server does not slow them (a closed loop would hide its
queue: "coordinated omission"). Latency counts from the moment a request was due, not from when it could be sent.
"""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from components.emblems import caption_of, emblem_at, rng_at

PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True)
class Mix:
    """What is asked for; each request draws from these with equal chances."""

    rate_per_s: float
    duration_s: float
    sizes: tuple[str, ...] = ("auto",)
    steps: tuple[int, int] = (8, 40)
    """Lowest and highest number of denoising steps."""
    guidance_scale: tuple[float, float] = (1.0, 7.0)
    several_share: float = 0.05
    """Share of requests for `several` pictures at once; the others ask for one."""
    several: int = 4
    seed: int = 0


@dataclass(frozen=True)
class Arrival:
    """One request: when it is due (seconds from the start) and its JSON body."""

    due_s: float
    body: dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """What became of one request."""

    latency_s: float
    """From the moment it was due to the last byte of its answer."""
    late_s: float
    """By how much the generator itself sent it too late."""
    num_images: int
    error: str = ""
    """Empty, or status and code."""
    model_version: str = ""


def draw_arrivals(mix: Mix) -> list[Arrival]:
    """Draw the whole load from the seed: exponential gaps, and what each request asks for."""
    random_of = random.Random(mix.seed)
    arrivals: list[Arrival] = []
    due_s = random_of.expovariate(mix.rate_per_s)
    while due_s < mix.duration_s:
        number = len(arrivals)
        body = {
            "prompt": caption_of(emblem_at("base", mix.seed, number), rng_at(mix.seed, number)),
            "size": random_of.choice(mix.sizes),
            "steps": random_of.randint(*mix.steps),
            "guidance_scale": round(random_of.uniform(*mix.guidance_scale), 2),
            "n": mix.several if random_of.random() < mix.several_share else 1,
            "seed": random_of.randrange(2**31),
        }
        arrivals.append(Arrival(due_s, body))
        due_s += random_of.expovariate(mix.rate_per_s)
    return arrivals


def summarise(outcomes: Sequence[Outcome], elapsed_s: float, deadline_s: float) -> dict[str, Any]:
    """Throughput over the whole time, latency of what succeeded, errors by code, and goodput: pictures in time."""
    drawn = [outcome for outcome in outcomes if not outcome.error]
    in_time = [outcome for outcome in drawn if outcome.latency_s <= deadline_s]
    return {
        "requests": len(outcomes),
        "succeeded": len(drawn),
        "images": sum(outcome.num_images for outcome in drawn),
        "elapsed_s": elapsed_s,
        "requests_per_s": len(drawn) / elapsed_s,
        "images_per_s": sum(outcome.num_images for outcome in drawn) / elapsed_s,
        "latency_s": latency_percentiles([outcome.latency_s for outcome in drawn]),
        "errors": dict(sorted(Counter(outcome.error for outcome in outcomes if outcome.error).items())),
        "deadline_s": deadline_s,
        "goodput_images_per_s": sum(outcome.num_images for outcome in in_time) / elapsed_s,
        "in_time_share": len(in_time) / len(outcomes) if outcomes else None,
        "most_late_s": max((outcome.late_s for outcome in outcomes), default=0.0),
        "model_versions": dict(sorted(Counter(outcome.model_version for outcome in drawn).items())),
    }


def latency_percentiles(latencies_s: Sequence[float]) -> dict[str, float | None]:
    """Nearest-rank percentiles: each is a latency that a request had; None where nothing succeeded."""
    ordered = sorted(latencies_s)
    ranks = {f"p{percent}": -(-len(ordered) * percent // 100) for percent in PERCENTILES}
    found: dict[str, float | None] = {name: ordered[rank - 1] if ordered else None for name, rank in ranks.items()}
    return {**found, "max": ordered[-1] if ordered else None}
