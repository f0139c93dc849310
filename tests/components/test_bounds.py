"""Limits of a mean: closed forms, simulated misses on skewed laws at small n, and power against simulation."""

import numpy as np
import pytest
from scipy import stats

from components.bounds import items_to_decide, mean_bounds, power_of, smallest_effect
from components.errors import InputError, NonFiniteError


def agrees(count: int, repeats: int, rate: float) -> bool:
    low, high = stats.binom.interval(0.999, repeats, rate)
    return bool(low <= count <= high)


def test_limits_of_symmetric_items_are_students():
    values = np.concatenate([np.arange(1.0, 21.0), -np.arange(1.0, 21.0)]) + 3
    found = mean_bounds(values, 0.05)
    half = stats.t.ppf(0.95, 39) * values.std(ddof=1) / np.sqrt(40)
    assert found.mean == pytest.approx(3) and found.n == 40
    assert (found.low, found.high) == (pytest.approx(3 - half), pytest.approx(3 + half))


def test_upper_limit_follows_a_long_right_tail_and_is_never_inside_students():
    values = np.random.default_rng(0).lognormal(0, 1, 40)
    found, half = mean_bounds(values, 0.05), stats.t.ppf(0.95, 39) * values.std(ddof=1) / np.sqrt(40)
    assert found.high - found.mean > 1.1 * half
    assert found.mean - found.low == pytest.approx(half)
    mirrored = mean_bounds(-values, 0.05)
    assert (mirrored.low, mirrored.high) == (pytest.approx(-found.high), pytest.approx(-found.low))


def test_extra_width_is_added_in_squares():
    values = np.random.default_rng(1).normal(0, 1, 50)
    narrow, wide = mean_bounds(values, 0.05), mean_bounds(values, 0.05, extra_width=0.3)
    assert wide.high - wide.mean == pytest.approx(np.hypot(narrow.high - narrow.mean, 0.3))


def law(name: str, generator: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Items of true mean 0."""
    if name == "normal":
        return generator.normal(0, 1, shape)
    if name == "heavy tails":  # two equal models on skewed pictures
        item = generator.gamma(2.0, 0.1, shape)
        return item * (generator.gamma(20, 1 / 20, shape) - generator.gamma(20, 1 / 20, shape))
    skewed = generator.gamma(4.0, 0.25, shape) - 1  # skewness 1
    return skewed if name == "skewed up" else -skewed


@pytest.mark.parametrize("name", ["normal", "heavy tails", "skewed up", "skewed down"])
@pytest.mark.parametrize("n", [30, 120, 500])
def test_truth_is_beyond_a_limit_at_most_as_often_as_stated(name, n):
    repeats = 2000
    draws = law(name, np.random.default_rng(n), (repeats, n))
    found = [mean_bounds(row, 0.05) for row in draws]
    above = sum(one.high < 0 for one in found)
    below = sum(one.low > 0 for one in found)
    most = stats.binom.ppf(0.999, repeats, 0.05)
    assert above <= most and below <= most
    # and not by being useless: at least a third of what is allowed, on the harder side
    assert max(above, below) >= 0.05 * repeats / 3


@pytest.mark.parametrize("extra_width", [0.0, 0.1])
@pytest.mark.parametrize("n", [30, 120])
def test_power_is_reached_as_predicted(n, extra_width):
    repeats, effect = 1500, -0.3
    predicted = power_of(effect, 1.0, n, 0.05, extra_width)
    draws = np.random.default_rng(n).normal(effect, 1.0, (repeats, n))
    found = sum(mean_bounds(row, 0.05, extra_width).high < 0 for row in draws)
    # the estimated spread, and the wider of two limits, cost up to 4 points of power on 30 items
    assert agrees(found, repeats, predicted) or 0 <= predicted - found / repeats <= 0.04
    assert 0.3 < predicted < 0.99


def test_items_to_decide_have_the_power_asked_for_and_one_less_has_not():
    n = items_to_decide(-0.2, 1.0, 0.05, 0.8)
    assert n is not None
    assert power_of(-0.2, 1.0, n, 0.05) >= 0.8 > power_of(-0.2, 1.0, n - 1, 0.05)
    assert n == items_to_decide(0.2, 1.0, 0.05, 0.8)
    assert n == pytest.approx((1.645 + 0.842) ** 2 / 0.04, abs=3)


def test_no_number_of_items_tells_a_difference_that_another_seed_could_make():
    assert items_to_decide(-0.09, 1.0, 0.05, 0.8, extra_width=0.1) is None
    assert items_to_decide(-0.2, 1.0, 0.05, 0.8, extra_width=0.1) is not None
    assert items_to_decide(0.0, 1.0, 0.05, 0.8) is None


def test_smallest_effect_is_what_the_power_function_says():
    effect = smallest_effect(1.0, 120, 0.05, 0.8, extra_width=0.05)
    assert power_of(-effect, 1.0, 120, 0.05, 0.05) == pytest.approx(0.8)


def test_items_without_spread_have_no_width():
    found = mean_bounds([0.5] * 10, 0.05)
    assert (found.low, found.mean, found.high) == (0.5, 0.5, 0.5)
    assert power_of(-1.0, 0.0, 10, 0.05) == 1.0 and power_of(0.0, 0.0, 10, 0.05) == 0.0


def test_what_has_no_limits_is_refused():
    with pytest.raises(InputError, match="at least 2"):
        mean_bounds([1.0], 0.05)
    with pytest.raises(NonFiniteError):
        mean_bounds([1.0, float("inf")], 0.05)
