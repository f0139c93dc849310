"""Keep or roll back, as a table; and how often a version that is no worse is rolled back, by simulation."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from components.probation import (
    BLANK,
    DECAY,
    ERRORS,
    LARGEST_SHIFT,
    LEAST_REQUESTS,
    NUM_CHECKS,
    SAFETY,
    STATISTICS,
    TIMES,
    Decay,
    Limits,
    Numbers,
    judge,
    newcombe,
)

EDGES_S = tuple(0.001 * 2 ** (quarter / 4) for quarter in range(57))
LIMITS = Limits(max_error_share=0.01, max_slowdown=0.5, significance=0.05, max_forgetting=0.05)
USUAL = {"brightness": (0.5, 0.1), "contrast": (0.2, 0.05), "saturation": (0.4, 0.1)}


def numbers(
    requests: int = 200,
    errors: int = 0,
    step_s: float = 0.02,
    refused: int = 0,
    pictures: int | None = None,
    row_step_s: float | None = None,
    **statistics: tuple[float, float],
) -> Numbers:
    """Of a version whose steps all take `step_s`; statistics are (mean, standard deviation)."""
    drawn = requests - errors
    n = drawn if pictures is None else pictures
    times = [0] * (len(EDGES_S) + 1)
    times[int(np.searchsorted(EDGES_S, step_s))] = drawn
    told = {**USUAL, **statistics}
    sums = {name: (n * mean, n * mean**2 + max(0, n - 1) * spread**2) for name, (mean, spread) in told.items()}
    return Numbers(requests, errors, EDGES_S, tuple(times), row_step_s or step_s, n, refused, sums)


FORMER = numbers()
TABLE = [
    ("nothing changed", FORMER, numbers(), "keep", []),
    ("better", numbers(errors=20), numbers(step_s=0.01), "keep", []),
    ("one error of many", FORMER, numbers(errors=1), "keep", []),
    ("as many errors as before", numbers(errors=60), numbers(errors=55), "keep", []),
    ("a tenth fails", FORMER, numbers(errors=20), "roll_back", [ERRORS]),
    ("few requests, and all of them fail", FORMER, numbers(5, 5, pictures=0), "roll_back", [ERRORS]),
    ("few requests, one fails", FORMER, numbers(5, 1), "not_enough_requests", []),
    ("no request", FORMER, numbers(0), "not_enough_requests", []),
    ("one less than enough", FORMER, numbers(LEAST_REQUESTS - 1), "not_enough_requests", []),
    ("enough", FORMER, numbers(LEAST_REQUESTS), "keep", []),
    ("nothing known before, sound", None, numbers(), "keep", []),
    ("nothing known before, a tenth fails", None, numbers(errors=20), "roll_back", [ERRORS]),
    ("nobody asked before", numbers(0), numbers(errors=20), "roll_back", [ERRORS]),
    ("three times as slow", FORMER, numbers(step_s=0.06), "roll_back", [TIMES]),
    ("a third slower", FORMER, numbers(step_s=0.0266), "keep", []),
    ("slow because batches grew", numbers(row_step_s=0.02), numbers(step_s=0.06, row_step_s=0.012), "keep", []),
    ("slow, few of them", FORMER, numbers(2, step_s=0.06), "not_enough_requests", []),
    ("unsafe pictures", FORMER, numbers(refused=30), "roll_back", [SAFETY]),
    ("as unsafe as before", numbers(refused=30), numbers(refused=33), "keep", []),
    ("black", FORMER, numbers(contrast=(0.0, 0.0)), "roll_back", [BLANK]),
    ("nearly blank", FORMER, numbers(contrast=(0.03, 0.01)), "roll_back", [BLANK]),
    ("flatter", FORMER, numbers(contrast=(0.1, 0.03)), "keep", []),
    ("much brighter", FORMER, numbers(brightness=(0.85, 0.1)), "roll_back", ["brightness"]),
    ("much darker", FORMER, numbers(brightness=(0.15, 0.1)), "roll_back", ["brightness"]),
    ("a new palette", FORMER, numbers(saturation=(0.6, 0.2)), "keep", []),
    ("two black pictures", FORMER, numbers(40, pictures=2, contrast=(0.0, 0.0)), "keep", []),
]


@pytest.mark.parametrize(("former", "new", "decision", "failed"), [row[1:] for row in TABLE], ids=[r[0] for r in TABLE])
def test_decision_and_what_decided_it(former: Numbers | None, new: Numbers, decision: str, failed: list[str]) -> None:
    found = judge(former, new, LIMITS)
    assert (found.decision, [check.name for check in found.checks if check.outcome == "fail"]) == (decision, failed)
    assert found.reasons and all(check.sentence for check in found.checks) and len(found.checks) == NUM_CHECKS
    sentences = [check.sentence for check in found.checks if check.outcome == "fail"]
    assert list(found.reasons) == sentences or decision != "roll_back"


def test_reasons_and_numbers_can_be_read() -> None:
    found = judge(FORMER, numbers(errors=20), LIMITS)
    assert found.reasons[0].startswith("20 of 200 requests failed, 0 of 200 before: more than 1.0% above that (p = ")
    errors = found.checks[0].numbers
    assert (errors["hits"], errors["n"], errors["former_hits"], errors["allowed"]) == (20, 200, 0, 0.01)
    assert errors["low"] is not None and 0.01 < errors["low"] < 0.1 < (errors["high"] or 0)
    assert judge(FORMER, numbers(3), LIMITS).reasons == (
        "3 requests were drawn by the new version, at least 20 are needed to judge it",
    )


def test_limits_are_the_config_s() -> None:
    worse = numbers(errors=20, step_s=0.06)
    assert judge(FORMER, worse, replace(LIMITS, max_error_share=0.2, max_slowdown=4.0)).decision == "keep"
    twelve = numbers(errors=5)
    assert judge(FORMER, twelve, replace(LIMITS, max_error_share=0.0)).decision == "keep"
    assert judge(FORMER, twelve, replace(LIMITS, max_error_share=0.0, significance=0.4)).decision == "roll_back"


def test_decay_is_paired_and_may_be_as_large_as_the_gate_lets_forget() -> None:
    former = np.random.default_rng(0).gamma(4.0, 0.1, 60)
    for factor, decision in ((1.0, "keep"), (1.04, "keep"), (1.2, "roll_back")):
        found = judge(FORMER, numbers(), LIMITS, Decay(former, former * factor))
        assert found.decision == decision
        assert [c.name for c in found.checks if c.outcome == "fail"] == ([DECAY] if decision == "roll_back" else [])
    assert judge(FORMER, numbers(), LIMITS, Decay(former[:1], former[:1] * 9)).decision == "keep"


@pytest.mark.parametrize(
    ("ours", "theirs", "low", "high"),
    # Newcombe (1998), Statistics in Medicine 17, 873-890, table II, method 10, 95 % two-sided.
    [
        ((56, 70), (48, 80), 0.0524, 0.3339),
        ((9, 10), (3, 10), 0.1705, 0.8090),
        ((6, 7), (2, 7), 0.0582, 0.8062),
        ((5, 56), (0, 29), -0.0381, 0.1926),
        ((10, 10), (0, 10), 0.6075, 1.0),
    ],
)
def test_limits_of_a_difference_are_newcombes(ours, theirs, low: float, high: float) -> None:
    assert newcombe(ours, theirs, 0.025) == pytest.approx((low, high), abs=6e-5)


def drawn(random: np.random.Generator, requests: int, error_share: float, unsafe_share: float) -> Numbers:
    """Of one version: lognormal times, statistics of pictures as they come."""
    errors = int(random.binomial(requests, error_share))
    n = requests - errors
    times, _ = np.histogram(random.lognormal(math.log(0.02), 0.4, n), [0, *EDGES_S, np.inf])
    sums = {}
    for name, (mean, spread) in USUAL.items():
        values = np.clip(random.normal(mean, spread, n), 0, 1)
        sums[name] = (float(values.sum()), float((values**2).sum()))
    refused = int(random.binomial(n, unsafe_share))
    return Numbers(requests, errors, EDGES_S, tuple(int(count) for count in times), 0.02, n, refused, sums)


@pytest.mark.parametrize(
    ("requests", "error_share", "looks"), [(25, 0.02, 1), (300, 0.0, 1), (300, 0.3, 1), (60, 0.1, 10)]
)
def test_version_that_is_no_worse_is_rolled_back_at_most_at_the_stated_rate(
    requests: int, error_share: float, looks: int
) -> None:
    """No margin at all is the hardest case: every difference counts. The looks are of one growing sample."""
    strict = Limits(0.0, 0.0, significance=0.1, looks=looks)
    repeats, random, wrong = 400, np.random.default_rng(5), 0
    for _ in range(repeats):
        former = drawn(random, 400, error_share, 0.05)
        found, so_far = "keep", None
        for _ in range(looks):
            more = drawn(random, requests, error_share, 0.05)
            so_far = more if so_far is None else together(so_far, more)
            found = "roll_back" if judge(former, so_far, strict).decision == "roll_back" else found
        wrong += found == "roll_back"
    assert wrong <= stats.binom.ppf(0.999, repeats, strict.significance)


def together(one: Numbers, other: Numbers) -> Numbers:
    return Numbers(
        one.requests + other.requests,
        one.errors + other.errors,
        EDGES_S,
        tuple(a + b for a, b in zip(one.times, other.times, strict=True)),
        0.02,
        one.pictures + other.pictures,
        one.refused + other.refused,
        {name: tuple(a + b for a, b in zip(one.sums[name], other.sums[name], strict=True)) for name in STATISTICS},  # type: ignore[misc]
    )


@pytest.mark.parametrize("requests", [100])
def test_versions_that_are_clearly_worse_are_found_nine_times_in_ten(requests: int) -> None:
    """A tenth of the requests failing, or steps two and a half times as long: in 100 requests, over ten looks."""
    limits, random = replace(LIMITS, looks=10), np.random.default_rng(6)
    found = {"errors": 0, "slow": 0}
    for _ in range(100):
        former = drawn(random, 400, 0.0, 0.0)
        found["errors"] += judge(former, drawn(random, requests, 0.15, 0.0), limits).decision == "roll_back"
        sound = drawn(random, requests, 0.0, 0.0)
        slow = replace(sound, times=(*[0] * 5, *sound.times[:-5]), row_step_s=0.05)
        found["slow"] += judge(former, slow, limits).decision == "roll_back"
    assert min(found.values()) >= 90, found
    assert LARGEST_SHIFT < 1
