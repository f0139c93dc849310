"""The load is a Poisson process drawn from a seed, and its summary is arithmetic on outcomes."""

import math
from itertools import pairwise

import pytest

from components.load_plan import Mix, Outcome, draw_arrivals, latency_percentiles, summarise


def test_same_seed_draws_the_same_load_and_another_seed_another() -> None:
    mix = Mix(rate_per_s=5, duration_s=20, seed=3)
    assert draw_arrivals(mix) == draw_arrivals(mix)
    other = draw_arrivals(Mix(rate_per_s=5, duration_s=20, seed=4))
    assert [arrival.due_s for arrival in other] != [arrival.due_s for arrival in draw_arrivals(mix)]


def test_gaps_between_arrivals_are_exponential_with_the_asked_rate() -> None:
    arrivals = draw_arrivals(Mix(rate_per_s=50, duration_s=100))
    dues = [arrival.due_s for arrival in arrivals]
    assert dues == sorted(dues) and dues[-1] < 100
    # Poisson count: mean 5000, standard deviation 70.7; five of those.
    assert abs(len(dues) - 5000) < 354
    gaps = sorted(later - earlier for earlier, later in pairwise(dues))
    distances = [abs((i + 0.5) / len(gaps) - (1 - math.exp(-50 * gap))) for i, gap in enumerate(gaps)]
    # Kolmogorov-Smirnov at the 0.1 % level.
    assert max(distances) < 1.95 / math.sqrt(len(gaps))


def test_requests_are_mixed_as_asked() -> None:
    mix = Mix(rate_per_s=50, duration_s=40, sizes=("auto", "64x64"), steps=(8, 10), several_share=0.25, several=3)
    bodies = [arrival.body for arrival in draw_arrivals(mix)]
    assert {body["size"] for body in bodies} == {"auto", "64x64"} and {body["steps"] for body in bodies} == {8, 9, 10}
    assert all(1 <= body["guidance_scale"] <= 7 and body["prompt"] for body in bodies)
    assert {body["n"] for body in bodies} == {1, 3}
    assert 0.2 < sum(body["n"] == 3 for body in bodies) / len(bodies) < 0.3
    assert len({body["seed"] for body in bodies}) > len(bodies) * 0.99


def test_percentiles_are_latencies_that_requests_had() -> None:
    assert latency_percentiles([float(i) for i in range(1, 101)]) == {
        **{"p50": 50, "p90": 90, "p95": 95, "p99": 99},
        "max": 100,
    }
    assert latency_percentiles([7.0]) == dict.fromkeys(("p50", "p90", "p95", "p99", "max"), 7.0)
    assert latency_percentiles([])["p50"] is None


def test_summary_counts_pictures_errors_and_what_came_in_time() -> None:
    outcomes = [
        Outcome(1.0, 0.0, 4, model_version="3"),
        Outcome(3.0, 0.01, 1, model_version="4"),
        Outcome(0.1, 0.2, 0, error="429 queue_full"),
        Outcome(9.0, 0.0, 0, error="timeout"),
    ]
    summary = summarise(outcomes, elapsed_s=10.0, deadline_s=2.0)
    assert (summary["requests"], summary["succeeded"], summary["images"]) == (4, 2, 5)
    assert summary["images_per_s"] == pytest.approx(0.5) and summary["goodput_images_per_s"] == pytest.approx(0.4)
    assert summary["in_time_share"] == 0.25 and summary["most_late_s"] == 0.2
    assert summary["errors"] == {"429 queue_full": 1, "timeout": 1}
    assert summary["latency_s"]["max"] == 3.0 and summary["model_versions"] == {"3": 1, "4": 1}
