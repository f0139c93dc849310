"""The domain classifier: second opinions by scipy, coverage by simulation, and no leak through near duplicates."""

import numpy as np
import pytest
from scipy import optimize, stats

from components.domain_classifier import (
    FOLDS,
    assign_folds,
    auroc_and_variance,
    domain_auroc,
    fit_logistic,
    score_auroc,
)
from components.errors import InputError
from components.near_duplicates import duplicate_groups


def test_auroc_is_mann_whitneys():
    generator = np.random.default_rng(0)
    lower, higher = generator.normal(size=30).round(1), generator.normal(0.5, size=20).round(1)
    expected = stats.mannwhitneyu(higher, lower).statistic / 600
    assert auroc_and_variance(lower, higher)[0] == pytest.approx(expected)


def test_weights_are_the_minimum_of_the_penalised_loss():
    generator = np.random.default_rng(1)
    rows, side = generator.normal(size=(60, 3)) * [1, 10, 0.1] + 4, (np.arange(60) % 2).astype(float)
    rows[side == 1, 0] += 1
    inputs = (rows - rows.mean(axis=0)) / rows.std(axis=0)

    def loss(weights: np.ndarray) -> float:
        scores = inputs @ weights[:3] + weights[3]
        return float((np.logaddexp(0, scores) - side * scores).sum() + 1.5 * (weights[:3] ** 2).sum())

    best = optimize.minimize(loss, np.zeros(4), tol=1e-10).x
    np.testing.assert_allclose(fit_logistic(rows, side)(rows), inputs @ best[:3] + best[3], atol=1e-4)


def test_feature_without_spread_is_left_out():
    rows = np.c_[np.random.default_rng(0).normal(size=20), np.full(20, 7.0)]
    side = (np.arange(20) % 2).astype(float)
    assert fit_logistic(rows, side)(rows) == pytest.approx(fit_logistic(rows[:, :1], side)(rows[:, :1]))


def test_interval_of_equal_samples_covers_one_half():
    repeats, covered, values = 120, 0, []
    for seed in range(repeats):
        rows = np.random.default_rng(seed).gamma(1, size=(120, 5))
        found = domain_auroc(rows[:60], rows[60:], np.arange(120), seed)
        assert found is not None
        covered += found.low <= 0.5 <= found.high
        values.append(found.value)
    # Folds share training items, which the interval leaves out: 95 % nominal, at least 90 % is what is claimed here
    assert covered >= stats.binom.ppf(0.001, repeats, 0.9)
    assert np.mean(values) == pytest.approx(0.5, abs=4 * np.std(values) / np.sqrt(repeats))


def test_shift_is_read_as_the_auroc_it_has():
    """Two normal distributions d apart have an AUROC of Phi(d / sqrt 2)."""
    rows = np.random.default_rng(0).normal(size=(1200, 3))
    rows[600:, 1] += 1
    found = domain_auroc(rows[:600], rows[600:], np.arange(1200), 0)
    assert found is not None and found.low <= stats.norm.cdf(1 / np.sqrt(2)) <= found.high
    assert found.high - found.low < 0.08


def test_near_duplicates_do_not_leak_across_folds():
    """Arrivals of 30 pictures four times each: a classifier that has seen one recognises the others."""
    generator = np.random.default_rng(0)
    reference = generator.normal(size=(120, 40))
    arrivals = np.repeat(generator.normal(size=(30, 40)), 4, axis=0) + 0.01 * generator.normal(size=(120, 40))
    groups = duplicate_groups(np.concatenate([reference, arrivals]))
    honest = domain_auroc(reference, arrivals, groups, 0)
    leaky = domain_auroc(reference, arrivals, np.arange(240), 0)
    assert honest is not None and leaky is not None
    assert leaky.low > 0.62 and honest.value < 0.62


def test_folds_keep_groups_together_and_both_sides_even():
    groups = np.r_[np.repeat(np.arange(10), 4), np.arange(10, 70)]
    side = (np.arange(100) % 2).astype(float)
    folds = assign_folds(groups, side, 0)
    assert all(len(set(folds[groups == group])) == 1 for group in set(groups))
    counts = np.array([[(folds[side == one] == fold).sum() for fold in range(FOLDS)] for one in (0, 1)])
    assert counts.min() >= 8 and counts.max() <= 12


def test_too_few_items_or_groups_have_no_auroc():
    rows = np.random.default_rng(0).normal(size=(200, 3))
    assert domain_auroc(rows[:12], rows[100:], np.arange(112), 0) is None
    assert domain_auroc(rows[:100], rows[100:], np.zeros(200, int), 0) is None
    with pytest.raises(InputError, match="a group for each of 200"):
        domain_auroc(rows[:100], rows[100:], np.zeros(199, int), 0)
    with pytest.raises(InputError, match="4 items a side"):
        score_auroc([1.0, 2.0], np.arange(9))


def test_interval_stays_inside_the_unit_interval_and_has_width_at_its_ends():
    found = score_auroc(np.arange(20), np.arange(20) + 100)
    assert found.value == 1 and found.high == 1 and 0.8 < found.low < 1
    assert score_auroc(np.arange(20) + 100, np.arange(20)).high < 0.2
