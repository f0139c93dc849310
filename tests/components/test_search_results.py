"""Importance and the common scale of trials that stopped at different steps."""

import math

import numpy as np
import pytest

from components.search_results import Trial, at_equal_steps, common_step, importance, losses_at

PLANS = ("all", "denoiser", "lora:8")


def trials_of(count: int, noise: float = 0.0) -> list[Trial]:
    """Losses: a bowl over log10(rate), plans alike; every third trial was stopped early."""
    generator = np.random.default_rng(3)
    made = []
    for number in range(count):
        rate = float(10 ** generator.uniform(-5, -1))
        loss = (math.log10(rate) + 3) ** 2 + noise * generator.normal()
        curve = [(0, 9.0), (10, loss), (30, loss)] if number % 3 else [(0, 9.0), (10, loss)]
        made.append(Trial(number, f"run-{number}", {"rate": rate, "plan": PLANS[number % 3]}, "complete", curve))
    return made


def test_a_bowl_explains_its_ranks_and_an_idle_key_explains_none() -> None:
    shares = importance(trials_of(40))
    assert next(iter(shares)) == "rate"
    assert shares["rate"] > 0.8
    assert shares["plan"] < 0.15


def test_a_category_that_decides_everything_explains_almost_everything() -> None:
    losses = {"all": 1.0, "denoiser": 2.0, "lora:8": 3.0}
    trials = [
        Trial(i, "", {"plan": PLANS[i % 3], "idle": True}, "complete", [(0, losses[PLANS[i % 3]])]) for i in range(9)
    ]
    assert importance(trials) == {"plan": pytest.approx(1.0), "idle": 0.0}


def test_curves_are_compared_at_the_last_step_that_both_have() -> None:
    assert at_equal_steps([(0, 3.0), (10, 2.0), (20, 1.5)], [(0, 3.0), (10, 1.0), (30, 0.5)]) == (10, 2.0, 1.0)
    assert at_equal_steps([(0, 3.0)], []) is None


def test_noise_explains_little_on_average() -> None:
    generator = np.random.default_rng(0)
    found = []
    for _ in range(20):
        pairs = generator.uniform(1, 2, (12, 2))
        trials = [Trial(i, "", {"x": float(x)}, "complete", [(0, float(loss))]) for i, (x, loss) in enumerate(pairs)]
        found.append(importance(trials)["x"])
    assert np.mean(found) < 0.15


def test_failed_trials_count_as_the_worst_and_do_not_move_the_common_step() -> None:
    trials = [*trials_of(6), Trial(6, "", {"rate": 0.5, "plan": "all"}, "failed", [(0, 9.0)], "NonFiniteError")]
    assert common_step(trials) == 10
    assert losses_at(trials, 10)[-1] == math.inf
    assert math.isfinite(importance(trials)["rate"])


def test_nothing_is_said_of_few_trials_or_none() -> None:
    assert importance(trials_of(4)) == {}
    assert importance([]) == {} and common_step([]) == 0
