"""KID and CMMD against direct double loops, torchmetrics and simulation."""

import numpy as np
import pytest
import torch
from scipy import stats

from components.errors import InputError
from components.kernel_distances import cmmd, kid


def kernel(x: np.ndarray, y: np.ndarray) -> float:
    return float((x @ y / len(x) + 1) ** 3)


def kid_by_loops(real: np.ndarray, generated: np.ndarray, paired: bool) -> float:
    m, n = len(real), len(generated)
    within_real = np.mean([kernel(real[i], real[j]) for i in range(m) for j in range(m) if i != j])
    within_generated = np.mean([kernel(generated[i], generated[j]) for i in range(n) for j in range(n) if i != j])
    across = [kernel(real[i], generated[j]) for i in range(m) for j in range(n) if not (paired and i == j)]
    return float(within_real + within_generated - 2 * np.mean(across))


def jackknife_variance(values: list[float]) -> float:
    return (len(values) - 1) * float(np.var(values))


def test_kid_agrees_with_direct_loops():
    rng = np.random.default_rng(0)
    real, generated = rng.normal(size=(7, 5)), rng.normal(0.5, 1, size=(9, 5))
    estimate = kid(real, generated)
    assert estimate.value == pytest.approx(kid_by_loops(real, generated, paired=False))
    assert estimate.n == 7
    variance = jackknife_variance([kid_by_loops(np.delete(real, i, 0), generated, False) for i in range(7)])
    variance += jackknife_variance([kid_by_loops(real, np.delete(generated, i, 0), False) for i in range(9)])
    assert estimate.high - estimate.value == pytest.approx(np.sqrt(variance) * stats.t.ppf(0.975, 6))


def test_kid_of_pairs_agrees_with_direct_loops():
    rng = np.random.default_rng(1)
    real = rng.normal(size=(8, 5))
    generated = real + rng.normal(0.2, 0.3, size=(8, 5))
    estimate = kid(real, generated, paired=True)
    assert estimate.value == pytest.approx(kid_by_loops(real, generated, paired=True))
    without = [kid_by_loops(np.delete(real, i, 0), np.delete(generated, i, 0), True) for i in range(8)]
    assert estimate.high - estimate.value == pytest.approx(np.sqrt(jackknife_variance(without)) * stats.t.ppf(0.975, 7))


@pytest.mark.parametrize("paired", [False, True])
def test_kid_is_unbiased_when_both_sets_come_from_one_distribution(paired):
    values = []
    for seed in range(400):
        rng = np.random.default_rng(seed)
        caption = rng.normal(size=(20, 6)) if paired else np.zeros((1, 6))
        values.append(kid(caption + rng.normal(size=(20, 6)), caption + rng.normal(size=(20, 6)), paired).value)
    standard_error = np.std(values) / np.sqrt(len(values))
    assert abs(np.mean(values)) < 3 * standard_error
    assert min(values) < 0


def test_kid_would_be_biased_if_pictures_of_one_caption_were_compared():
    values = []
    for seed in range(400):
        rng = np.random.default_rng(seed)
        caption = rng.normal(size=(20, 6))
        values.append(kid(caption + rng.normal(size=(20, 6)), caption + rng.normal(size=(20, 6))).value)
    assert np.mean(values) < -3 * np.std(values) / np.sqrt(len(values))


def test_kid_interval_covers_the_true_distance():
    def sample(seed: int, n: int, mean: float) -> np.ndarray:
        return np.random.default_rng(seed).normal(mean, 1, size=(n, 4))

    truth = kid(sample(10_000, 4000, 0), sample(10_001, 4000, 0.7)).value
    hits = 0
    for seed in range(200):
        estimate = kid(sample(2 * seed, 40, 0), sample(2 * seed + 1, 40, 0.7))
        hits += estimate.low <= truth <= estimate.high
    assert hits / 200 >= 0.9  # 95 % stated, standard error 1.5 %


def test_kid_grows_with_the_distance():
    rng = np.random.default_rng(0)
    real = rng.normal(size=(50, 8))
    values = [kid(real, rng.normal(shift, 1, size=(50, 8))).value for shift in (0, 0.5, 1, 2)]
    assert values == sorted(values)


def test_kid_blocks_do_not_change_the_value(monkeypatch):
    rng = np.random.default_rng(0)
    real, generated = rng.normal(size=(2100, 3)), rng.normal(size=(30, 3))  # more than two blocks
    gram = ((real @ generated.T) / 3 + 1) ** 3
    within_real = ((real @ real.T) / 3 + 1) ** 3
    within = ((generated @ generated.T) / 3 + 1) ** 3
    expected = (within_real.sum() - np.trace(within_real)) / (2100 * 2099)
    expected += (within.sum() - np.trace(within)) / (30 * 29) - 2 * gram.mean()
    assert kid(real, generated).value == pytest.approx(expected)


def test_kid_refuses_what_it_cannot_compare():
    with pytest.raises(InputError, match="one width"):
        kid(np.ones((5, 3)), np.ones((5, 4)))
    with pytest.raises(InputError, match="at least 3"):
        kid(np.ones((5, 3)), np.ones((2, 3)))
    with pytest.raises(InputError, match="as many pictures"):
        kid(np.ones((5, 3)), np.ones((4, 3)), paired=True)


def test_kid_agrees_with_torchmetrics_on_the_same_features():
    from torchmetrics.image.kid import poly_mmd

    rng = np.random.default_rng(0)
    real, generated = rng.normal(size=(60, 16)), rng.normal(0.3, 1.2, size=(60, 16))
    theirs = poly_mmd(torch.from_numpy(real), torch.from_numpy(generated), degree=3, coef=1.0)
    assert kid(real, generated).value == pytest.approx(theirs.item(), rel=1e-9)


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def cmmd_by_loops(real: np.ndarray, generated: np.ndarray, paired: bool) -> float:
    def gaussian(x: np.ndarray, y: np.ndarray) -> float:
        return float(np.exp(-((x - y) ** 2).sum() / 200))

    m, n = len(real), len(generated)
    within_real = np.mean([gaussian(real[i], real[j]) for i in range(m) for j in range(m) if i != j])
    within_generated = np.mean([gaussian(generated[i], generated[j]) for i in range(n) for j in range(n) if i != j])
    across = [gaussian(real[i], generated[j]) for i in range(m) for j in range(n) if not (paired and i == j)]
    return float(1000 * (within_real + within_generated - 2 * np.mean(across)))


@pytest.mark.parametrize("paired", [False, True])
def test_cmmd_agrees_with_direct_loops(paired):
    rng = np.random.default_rng(2)
    real = unit(rng.normal(size=(9, 5)))
    generated = unit(real + rng.normal(0.2, 0.4, size=(9, 5)))
    estimate = cmmd(real, generated, paired)
    assert estimate.value == pytest.approx(cmmd_by_loops(real, generated, paired), rel=1e-8)
    assert estimate.n == 9
    if paired:
        without = [cmmd_by_loops(np.delete(real, i, 0), np.delete(generated, i, 0), True) for i in range(9)]
        half = np.sqrt(jackknife_variance(without)) * stats.t.ppf(0.975, 8)
        assert estimate.high - estimate.value == pytest.approx(half, rel=1e-6)


def test_cmmd_without_the_bias_differs_from_the_reference_by_its_diagonal():
    """The reference code averages over all pairs, a row with itself among them."""
    rng = np.random.default_rng(3)
    real, generated = unit(rng.normal(size=(30, 8))), unit(rng.normal(0.2, 1, size=(30, 8)))

    def mean_kernel(x: np.ndarray, y: np.ndarray) -> float:
        return float(np.exp(-((x[:, None] - y[None]) ** 2).sum(-1) / 200).mean())

    biased = 1000 * (mean_kernel(real, real) + mean_kernel(generated, generated) - 2 * mean_kernel(real, generated))
    within = [1000 * (1 - (30 * mean_kernel(x, x) - 1) / 29) / 30 for x in (real, generated)]
    assert cmmd(real, generated).value == pytest.approx(biased - sum(within), rel=1e-8)
    assert cmmd(real, generated).value < biased


def test_cmmd_of_equal_distributions_is_zero_on_average():
    values = []
    for seed in range(300):
        rng = np.random.default_rng(seed)
        values.append(cmmd(unit(rng.normal(size=(20, 6))), unit(rng.normal(size=(20, 6)))).value)
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(len(values)) and min(values) < 0


def test_cmmd_is_about_the_squared_distance_of_the_means():
    """At sigma 10 the kernel of unit rows is nearly linear: 1000 / 100 times the squared distance, up to 2 %."""
    rng = np.random.default_rng(5)
    real, generated = unit(rng.normal(0.5, 1, (4000, 6))), unit(rng.normal(-0.5, 1, (4000, 6)))
    distance = ((real.mean(axis=0) - generated.mean(axis=0)) ** 2).sum()
    assert cmmd(real, generated).value == pytest.approx(10 * distance, rel=0.02)


def test_cmmd_refuses_rows_that_are_not_of_unit_length():
    with pytest.raises(InputError, match="unit length"):
        cmmd(np.ones((5, 3)), np.ones((5, 3)))
