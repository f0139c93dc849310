"""Planning: the formula's pieces against numbers drawn at random, and the planned power against the real test's."""

import numpy as np
import pytest
from scipy import stats

from components.drift_kernels import agreement, gaussian_kernels, number_kernel, pair_kernel
from components.sample_sizes import (
    MOST_ITEMS,
    concept_distance,
    concept_power,
    mismatch_power,
    null_quantile,
    shift_power,
    smallest_size,
)
from components.two_sample import permutation_test


def test_quantile_is_that_of_a_standardised_gamma():
    shape = 4 / 1.5**2
    expected = (stats.gamma.ppf(0.999, shape) - shape) / np.sqrt(shape)
    assert null_quantile(1.5, 0.001) == pytest.approx(expected)
    assert null_quantile(0.0, 0.001) == pytest.approx(stats.norm.isf(0.001), rel=0.02)


def test_smallest_size_is_where_power_is_reached():
    assert smallest_size(lambda n: n / 1000, 0.8) == 800
    assert smallest_size(lambda n: 0.5 + 0 * n, 0.8) is None
    assert smallest_size(lambda n: float(n >= MOST_ITEMS), 0.8) == MOST_ITEMS


def test_shift_power_is_that_of_a_z_test_at_half_the_level():
    z = stats.norm.isf(0.05 / 2 / 2)
    assert shift_power(0.5, 0.05)(100) == pytest.approx(stats.norm.cdf(0.5 * np.sqrt(50) - z))
    assert smallest_size(shift_power(0.0, 0.05), 0.8) is None


def test_concept_is_as_far_as_the_most_distinct_neighbours():
    """Ten rows far from all others: with them as the concept nothing is shared, so MMD^2 = k(Q, Q) + k(P, P)."""
    generator = np.random.default_rng(0)
    rows = np.concatenate([generator.normal(size=(80, 2)), 1000 + generator.normal(size=(10, 2))])
    kernel = np.exp(-((rows[:, None] - rows[None]) ** 2).sum(axis=2) / 2)
    inner = [kernel[np.ix_(part, part)] for part in (np.arange(80), np.arange(80, 90))]
    means = [(block.sum() - len(block)) / (len(block) * (len(block) - 1)) for block in inner]
    assert concept_distance(kernel) == pytest.approx(sum(means), rel=0.01)
    assert concept_distance(kernel[:15, :15]) == 0  # too few to make a concept of


def test_planned_items_find_the_planned_concept_about_as_often_as_planned():
    generator = np.random.default_rng(0)
    scale = np.arange(1, 17) ** -0.5

    def draw(n: int) -> np.ndarray:
        """A broad cloud, and a tight concept of a twelfth far out."""
        rows = generator.normal(size=(n, 16)) * scale
        rows[: n // 12] = 0.25 * rows[: n // 12] + 2.5 * np.eye(16)[0]
        return generator.permutation(rows)

    level, share = 0.002, 0.15
    kernel = gaussian_kernels(draw(300))[0.5]
    planned = smallest_size(concept_power(kernel, share, level), 0.8)
    assert planned is not None and 40 < planned < 1000
    hits = 0
    for seed in range(30):
        rows = np.concatenate([draw(planned), draw(planned)])
        count = generator.binomial(planned, share)
        rows[planned : planned + count] = 0.25 * generator.normal(size=(count, 16)) * scale + 2.5 * np.eye(16)[1]
        hits += permutation_test({"one": gaussian_kernels(rows)[0.5]}, planned, seed, level).p_value <= level
    assert hits >= 18  # planned 80 %; the plan errs on the side of more items


def test_planned_pairs_find_wrong_captions_about_as_often_as_planned():
    generator = np.random.default_rng(1)

    def draw(n: int, wrong: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Two views of the same thing; those of the first `wrong` are of other things."""
        shared = generator.normal(size=(n, 3))
        texts = shared + generator.normal(size=(n, 3))
        texts[:wrong] = generator.permutation(texts)[:wrong]
        return shared + generator.normal(size=(n, 3)), texts

    def pairs(pictures: np.ndarray, texts: np.ndarray) -> np.ndarray:
        return pair_kernel(gaussian_kernels(pictures)[0.5], gaussian_kernels(texts)[0.5])

    level, share = 0.002, 0.6
    planned = smallest_size(mismatch_power(pairs(*draw(400)), share, level), 0.8)
    assert planned is not None and 20 < planned < 1000
    hits = 0
    for seed in range(30):
        sides = draw(planned), draw(planned, wrong=round(share * planned))
        values = agreement(pairs(*(np.concatenate(views) for views in zip(*sides, strict=True))))
        hits += permutation_test({"one": number_kernel(values)}, planned, seed, level).p_value <= level
    assert hits >= 18


def test_reference_without_agreement_plans_no_number_of_pairs():
    kernel = -np.ones((30, 30))
    assert smallest_size(mismatch_power(kernel, 0.5, 0.01), 0.8) is None
    assert smallest_size(concept_power(np.ones((30, 30)), 0.1, 0.01), 0.8) is None
