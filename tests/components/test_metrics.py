"""Metrics against closed forms, direct double loops, scipy's own statistics, and simulation."""

import numpy as np
import pytest
from scipy import stats

from components.errors import InputError, NonFiniteError
from components.metrics import (
    Estimate,
    LeftOut,
    clip_score,
    clip_scores,
    diversity,
    mean_with_bootstrap,
    proportion_wilson,
)


def skewed(seed: int, n: int) -> np.ndarray:
    return np.random.default_rng(seed).gamma(1.5, 1.0, n)


@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_bootstrap_agrees_with_scipys_bca(confidence):
    values = skewed(1, 60)
    ours = mean_with_bootstrap(values, seed=0, resamples=20_000, confidence=confidence)
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, confidence_level=confidence, method="BCa", rng=np.random.default_rng(7)
    ).confidence_interval
    # two sets of 20,000 resamples: their quantiles differ by about 1 % of the interval
    tolerance = 0.03 * (theirs.high - theirs.low)
    assert ours.value == pytest.approx(values.mean())
    assert ours.low == pytest.approx(theirs.low, abs=tolerance)
    assert ours.high == pytest.approx(theirs.high, abs=tolerance)


def test_bootstrap_interval_covers_the_mean_of_a_skewed_population_as_often_as_it_says():
    repeats, hits = 300, 0
    for repeat in range(repeats):
        estimate = mean_with_bootstrap(skewed(repeat, 50), seed=repeat, resamples=400)
        hits += estimate.low <= 1.5 <= estimate.high
    # 95 % stated; 50 items of a skewed law reach about 93 %. 300 repeats have a standard error of 1.4 %
    assert 0.89 <= hits / repeats <= 0.985


def test_bootstrap_is_a_function_of_the_seed_and_leaves_the_global_generator_alone():
    np.random.seed(3)
    before = np.random.get_state()[1].copy()
    first, again, other = (mean_with_bootstrap(skewed(0, 30), seed) for seed in (5, 5, 6))
    assert first == again and first != other
    assert (np.random.get_state()[1] == before).all()


def test_bootstrap_of_equal_values_has_no_width():
    estimate = mean_with_bootstrap([0.25] * 10, seed=0)
    assert (estimate.value, estimate.low, estimate.high, estimate.n) == (0.25, 0.25, 0.25, 10)


def test_bootstrap_refuses_what_has_no_interval():
    with pytest.raises(InputError, match="at least 2"):
        mean_with_bootstrap([1.0], seed=0)
    with pytest.raises(NonFiniteError, match="1 of 3"):
        mean_with_bootstrap([1.0, float("nan"), 2.0], seed=0)


def test_clip_score_is_hundred_times_the_clipped_cosine():
    images = np.array([[2.0, 0.0], [0.0, 3.0], [1.0, 0.0]])
    texts = np.array([[1.0, 0.0], [1.0, 1.0], [-1.0, 0.0]])
    assert clip_scores(images, texts) == pytest.approx([100, 100 / np.sqrt(2), 0])
    estimate = clip_score(images, texts)
    assert estimate.value == pytest.approx(100 * (1 + 1 / np.sqrt(2)) / 3)
    assert estimate.low <= estimate.value <= estimate.high and estimate.n == 3


def test_clip_score_refuses_unmatched_rows():
    with pytest.raises(InputError, match="one caption for each picture"):
        clip_scores(np.ones((3, 4)), np.ones((2, 4)))


def test_estimate_says_encoder_and_warning_only_where_there_are_any():
    assert Estimate(1.0, 0.5, 1.5, 9).as_dict() == {"value": 1.0, "low": 0.5, "high": 1.5, "n": 9}
    told = Estimate(1.0, 0.5, 1.5, 9, "clip-tiny 0123", "too few").as_dict()
    assert (told["encoder"], told["warning"]) == ("clip-tiny 0123", "too few")
    assert Estimate(**told).as_dict() == told


def test_diversity_agrees_with_a_loop_over_pairs():
    rows = np.random.default_rng(0).normal(size=(4, 3, 6))
    rows /= np.linalg.norm(rows, axis=2, keepdims=True)
    pairs = [(0, 1), (0, 2), (1, 2)]
    expected = [np.mean([1 - prompt[i] @ prompt[j] for i, j in pairs]) for prompt in rows]
    assert diversity(rows) == pytest.approx(expected)
    assert diversity(np.repeat(rows[:, :1], 2, axis=1)) == pytest.approx(np.zeros(4))
    with pytest.raises(InputError, match="at least 2 seeds"):
        diversity(rows[:, :1])


def left_out_mean(values: np.ndarray) -> LeftOut:
    n = len(values)
    return LeftOut(float(values.mean()), ((values.sum() - values) / (n - 1),), n)


def test_jackknife_of_a_mean_is_students_interval():
    values = skewed(3, 25)
    estimate = left_out_mean(values).estimate()
    half = stats.t.ppf(0.975, 24) * values.std(ddof=1) / 5
    assert (estimate.low, estimate.high) == pytest.approx((values.mean() - half, values.mean() + half))
    clipped = left_out_mean(values).estimate(low=values.mean(), high=values.mean())
    assert clipped.low == clipped.high == values.mean()


def test_jackknife_of_a_difference_leaves_out_what_both_share():
    shared, noise = 10 * skewed(4, 40), 0.01 * skewed(5, 40)
    change = left_out_mean(shared + noise).minus(left_out_mean(shared))
    assert change.value == pytest.approx(noise.mean())
    assert change.standard_error == pytest.approx(noise.std(ddof=1) / np.sqrt(40))


def test_jackknife_of_a_share_is_wilsons_interval_and_never_without_width():
    values = np.array([1.0] * 15 + [0.0] * 25)
    ours, theirs = left_out_mean(values).share(), proportion_wilson(15, 40)
    # the jackknife divides by n - 1: its effective count is 39
    assert (ours.value, ours.n) == (theirs.value, theirs.n)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.003)
    nearly = LeftOut(1.0, (np.where(np.arange(64) < 3, 62 / 63, 1.0),), 64).share()  # three items hang on one other
    assert 0.85 < nearly.low < proportion_wilson(64, 64).low + 1e-9 and nearly.high == 1
    for constant in (0.0, 1.0):
        certain = left_out_mean(np.full(40, constant)).share()
        assert (certain.low, certain.high) == pytest.approx(
            (proportion_wilson(int(40 * constant), 40).low, proportion_wilson(int(40 * constant), 40).high)
        )


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (10, 10), (3, 10), (1, 1), (57, 64)])
def test_wilson_interval_agrees_with_scipy(successes, n):
    ours = proportion_wilson(successes, n)
    theirs = stats.binomtest(successes, n).proportion_ci(0.95, "wilson")
    assert (ours.value, ours.n) == (successes / n, n)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high))


def test_wilson_refuses_impossible_counts():
    for successes, n in ((0, 0), (3, 2), (-1, 4)):
        with pytest.raises(InputError):
            proportion_wilson(successes, n)
