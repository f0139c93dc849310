"""Decay: the ratio of two mean losses with a bound that holds as often as it says."""

import numpy as np
import pytest

from flows.decay import compare


def test_means_and_ratio_of_known_losses() -> None:
    found = compare(np.array([1.0, 1.0, 1.0]), np.array([1.5, 1.5]))
    assert (found.own, found.arrivals, found.pictures, found.skipped) == (1.0, 1.5, 2, "")
    assert found.low == pytest.approx(0.5), "without spread the bound is the ratio itself"


def test_bound_lies_below_the_true_ratio_in_about_95_of_100_samples() -> None:
    dice = np.random.default_rng(0)
    below = 0
    for _ in range(2000):
        own, arrived = dice.gamma(16, 1 / 16, 64), 1.3 * dice.gamma(16, 1 / 16, 40)
        below += compare(own, arrived).low < 0.3
    assert 0.93 <= below / 2000 <= 0.97  # binomial: 0.95 +- 0.01 at two standard deviations, and the normal's own error
