"""The permutation test: closed forms, enumeration by scipy, level and power by simulation, what must not matter."""

import math

import numpy as np
import pytest
from scipy import stats

from components.drift_kernels import gaussian_kernels, number_kernel
from components.errors import InputError, NonFiniteError
from components.two_sample import draws_for, items_for_level, mmd2_of_labels, permutation_test, random_labels


def rows(seed: int, n: int, width: int = 4) -> np.ndarray:
    """Skewed features that hang together, as an encoder's do."""
    generator = np.random.default_rng(seed)
    return generator.gamma(1.0, 1.0, (n, width)) @ np.triu(np.ones((width, width)))


def bank(rows_ND: np.ndarray) -> dict[str, np.ndarray]:
    return {str(width): kernel for width, kernel in gaussian_kernels(rows_ND).items()}


def within(count: int, repeats: int, rate: float) -> bool:
    """Whether a count agrees with a rate: inside the central 99.9 % of the binomial."""
    low, high = stats.binom.interval(0.999, repeats, rate)
    return low <= count <= high


def direct_mmd2(kernel: np.ndarray, first: set[int]) -> float:
    """The definition, pair by pair."""
    second = set(range(len(kernel))) - first

    def mean(pairs: list[tuple[int, int]]) -> float:
        return sum(float(kernel[i, j]) for i, j in pairs) / len(pairs)

    inner = [mean([(i, j) for i in side for j in side if i != j]) for side in (first, second)]
    return inner[0] + inner[1] - 2 * mean([(i, j) for i in first for j in second])


def test_statistic_is_the_mean_over_pairs_for_every_row_of_labels():
    kernel = gaussian_kernels(rows(1, 11))[1.0]
    labels = random_labels(np.random.default_rng(0), 20, 4, 11)
    expected = [direct_mmd2(kernel, set(np.flatnonzero(row).tolist())) for row in labels]
    np.testing.assert_allclose(mmd2_of_labels(kernel, labels), expected, atol=1e-6)  # float32 sums


def test_statistic_does_not_see_the_diagonal_and_what_is_added_to_rows_and_columns():
    kernel = gaussian_kernels(rows(2, 12))[1.0].astype(np.float64)
    labels = random_labels(np.random.default_rng(0), 5, 5, 12)
    added = np.random.default_rng(1).normal(size=12)
    moved = kernel + added[:, None] + added[None] + np.diag(np.arange(12.0))
    np.testing.assert_allclose(mmd2_of_labels(moved, labels), mmd2_of_labels(kernel, labels), atol=1e-5)


@pytest.mark.parametrize(("seed", "n", "m"), [(0, 4, 4), (1, 4, 4), (2, 3, 6)])
def test_p_value_is_that_of_all_splits_enumerated_by_scipy(seed, n, m):
    sample = rows(seed, n + m)
    sample[n:] += 0.8 * seed
    kernel = gaussian_kernels(sample)[1.0]

    def statistic(first: np.ndarray, second: np.ndarray) -> float:
        return direct_mmd2(kernel, set(first.astype(int).tolist()))

    places = np.arange(n + m, dtype=float)
    exact = stats.permutation_test(
        (places[:n], places[n:]), statistic, alternative="greater", n_resamples=np.inf, vectorized=False
    ).pvalue
    found = permutation_test({"one": kernel}, n, seed=0, level=0.05, permutations=20_000)
    # standard error of a share near 0.5 of 20,000 draws: 0.0035
    assert found.p_value == pytest.approx(exact, abs=0.015)


def test_p_value_counts_the_data_as_one_permutation_and_is_never_zero():
    far = np.concatenate([rows(3, 30), rows(4, 30) + 100])
    found = permutation_test(bank(far), 30, seed=0, level=0.05)
    assert (found.p_value, found.permutations) == (1 / 1000, 999)
    closer = permutation_test(bank(far), 30, seed=0, level=0.001)
    assert closer.permutations == draws_for(0.001) == 7999
    assert closer.p_value == 1 / 8000


def test_p_value_is_one_where_all_items_are_equal():
    assert permutation_test(bank(np.ones((20, 3))), 10, seed=0, level=0.01).p_value == 1


@pytest.mark.parametrize(("n", "m"), [(20, 20), (12, 40)])
def test_level_is_the_stated_one_for_a_bank_of_widths(n, m):
    repeats = 300
    p_values = [permutation_test(bank(rows(seed, n + m)), n, seed, 0.05).p_value for seed in range(repeats)]
    assert within(int((np.array(p_values) <= 0.05).sum()), repeats, 0.05)
    assert within(int((np.array(p_values) <= 0.5).sum()), repeats, 0.5)


def test_level_is_the_stated_one_where_small_p_values_are_looked_at_again():
    """Two thirds of the second test's draws at a tenth of the usual number, so that the simulation is quick."""
    repeats = 800
    found = [permutation_test(bank(rows(seed, 24)), 12, seed, 0.02, permutations=99) for seed in range(repeats)]
    assert {one.permutations for one in found} == {99, 999}
    for level in (0.02, 0.1, 0.3):
        assert within(sum(one.p_value <= level for one in found), repeats, level)


def test_new_concept_in_a_tenth_of_the_arrivals_is_found_with_300_a_side():
    hits = 0
    for seed in range(12):
        generator = np.random.default_rng(seed)
        sample = generator.normal(size=(600, 32)) / np.arange(1, 33) ** 0.5
        sample[300:330] = 0.3 * sample[300:330] + generator.normal(size=32)
        hits += permutation_test(bank(sample), 300, seed, 0.05).p_value <= 0.05
    assert hits >= 9  # 12 of 12 when written; 9 leaves room for another order of sums


def test_kernels_of_any_scale_and_order_give_one_p_value():
    sample = np.concatenate([rows(5, 25), rows(6, 25) + 0.3])
    kernels = bank(sample)
    plain = permutation_test(kernels, 25, seed=3, level=0.05)
    scaled = {name: 1000 * kernels[name] + 7 for name in reversed(kernels)}
    again = permutation_test(scaled, 25, seed=3, level=0.05)
    assert again.p_value == pytest.approx(plain.p_value, abs=0.002)  # ties turned by rounding
    assert again.strongest == plain.strongest


def test_items_in_another_order_give_the_same_statistics():
    sample = np.concatenate([rows(5, 25), rows(6, 25) + 0.3])
    order = np.concatenate([np.random.default_rng(0).permutation(25), 25 + np.random.default_rng(1).permutation(25)])
    plain, again = (permutation_test(bank(each), 25, seed=3, level=0.05) for each in (sample, sample[order]))
    assert list(again.mmd2.values()) == pytest.approx(list(plain.mmd2.values()), abs=1e-6)
    assert again.p_value == pytest.approx(plain.p_value, abs=0.03)  # other labels are drawn for the same items


def test_strongest_kernel_is_the_one_that_shows_the_change():
    generator = np.random.default_rng(0)
    values, noise = generator.normal(size=(2, 120))
    values[60:] += 1.5
    found = permutation_test({"noise": number_kernel(noise), "shift": number_kernel(values)}, 60, 0, 0.05)
    assert found.strongest == "shift" and found.deviations["shift"] > 5 > found.deviations["noise"]


def test_result_is_a_function_of_the_seed():
    kernels = bank(rows(7, 30))
    assert permutation_test(kernels, 15, 1, 0.05) == permutation_test(kernels, 15, 1, 0.05)
    assert permutation_test(kernels, 15, 1, 0.05) != permutation_test(kernels, 15, 2, 0.05)


def test_spread_before_permuting_is_that_of_the_permutations():
    """Deviations are in units of the permutation distribution: another sample's scatter around 0 with variance 1."""
    deviations = [permutation_test(bank(rows(seed, 60)), 30, seed, 0.05, 9).deviations["1.0"] for seed in range(300)]
    assert np.std(deviations) == pytest.approx(1, abs=0.25)
    assert np.mean(deviations) == pytest.approx(0, abs=0.2)


def test_fewest_items_are_those_with_enough_splits():
    for level in (0.05, 0.001, 1e-5):
        n = items_for_level(level)
        assert 1 / math.comb(2 * n, n) <= level < 1 / math.comb(2 * n - 2, n - 1)


def test_kernels_that_cannot_be_used_are_refused():
    with pytest.raises(InputError, match="2 items a side, found 1 and 4"):
        permutation_test(bank(rows(0, 5)), 1, 0, 0.05)
    with pytest.raises(InputError, match="square matrix"):
        permutation_test({"a": np.ones((3, 4))}, 2, 0, 0.05)
    with pytest.raises(InputError, match="at least one kernel"):
        permutation_test({}, 2, 0, 0.05)
    with pytest.raises(NonFiniteError, match="kernel a"):
        permutation_test({"a": np.full((6, 6), np.nan)}, 3, 0, 0.05)
    with pytest.raises(InputError, match="level"):
        permutation_test(bank(rows(0, 10)), 5, 0, 0.0)
