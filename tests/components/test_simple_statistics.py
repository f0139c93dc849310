"""Named statistics: closed forms, second opinions by scipy, exact p-values by enumeration, level of the whole set."""

from itertools import combinations

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from components.errors import InputError, NonFiniteError
from components.simple_statistics import (
    KINDS,
    anderson_darling,
    anderson_darling_p_value,
    caption_statistics,
    compare_statistics,
    fisher_p_value,
    holm,
    kolmogorov_distance,
    picture_statistics,
)


def labels_of(n: int, size: int) -> np.ndarray:
    return (np.arange(size) < n).astype(np.float32)[None]


@pytest.mark.parametrize("rounded", [False, True])
def test_statistic_is_that_of_scholz_and_stephens(rounded):
    generator = np.random.default_rng(0)
    one, other = generator.normal(size=13), generator.normal(0.4, 2, size=8)
    if rounded:  # ties
        one, other = one.round(), other.round()
    found = anderson_darling(np.r_[one, other], labels_of(13, 21))[0] * 13 * 8 / 21
    centre, spread = _scipy_scale(13, 8)
    expected = stats.anderson_ksamp([one, other], variant="right", method=stats.PermutationMethod(n_resamples=9))
    assert found == pytest.approx(expected.statistic * spread + centre)


def _scipy_scale(n: int, m: int) -> tuple[float, float]:
    """scipy standardises A^2 by its mean (k - 1) and by Scholz and Stephens' standard deviation (their eq. 4)."""
    size, k = n + m, 2
    inverse = np.sum(1 / np.array([n, m]))
    h = np.sum(1 / np.arange(1, size))
    g = sum(1 / ((size - i) * j) for i in range(1, size - 1) for j in range(i + 1, size))
    a = (4 * g - 6) * (k - 1) + (10 - 6 * g) * inverse
    b = (2 * g - 4) * k**2 + 8 * h * k + (2 * g - 14 * h - 4) * inverse - 8 * h + 4 * g - 6
    c = (6 * h + 2 * g - 2) * k**2 + (4 * h - 4 * g + 6) * k + (2 * h - 6) * inverse + 4 * h
    d = (2 * h + 6) * k**2 - 4 * h * k
    variance = (a * size**3 + b * size**2 + c * size + d) / ((size - 1) * (size - 2) * (size - 3))
    return k - 1, float(np.sqrt(variance))


def test_p_value_of_numbers_is_that_of_all_splits():
    one, other = np.array([1.0, 2.0, 2.0, 5.0]), np.array([4.0, 5.0, 7.0, 9.0, 9.0])
    pooled = np.r_[one, other]
    chosen = np.zeros((126, 9), np.float32)
    for row, places in enumerate(combinations(range(9), 4)):
        chosen[row, list(places)] = 1
    every = anderson_darling(pooled, chosen)
    exact = (every >= anderson_darling(pooled, labels_of(4, 9))[0] - 1e-9).mean()
    found = np.mean([anderson_darling_p_value(one, other, 0.05, seed) for seed in range(20)])
    assert found == pytest.approx(exact, abs=0.01)  # 20 times 999 splits: standard error 0.001


def test_p_value_of_flags_is_the_share_of_splits_that_are_no_likelier():
    one, other = np.array([0, 0, 0, 0, 1.0]), np.array([1, 1, 1, 0.0])
    counts = [sum(np.r_[one, other][list(places)]) for places in combinations(range(9), 5)]
    chance = {value: counts.count(value) / len(counts) for value in set(counts)}
    exact = sum(share for share in chance.values() if share <= chance[1.0] + 1e-12)
    assert fisher_p_value(one, other) == pytest.approx(exact)


def test_holm_is_the_closure_of_bonferroni():
    p_values = {"a": 0.011, "b": 0.04, "c": 0.012, "d": 0.5, "e": 0.039}
    expected = {
        name: max(
            min(1, size * min(p_values[one] for one in subset))
            for size in range(1, 6)
            for subset in combinations(p_values, size)
            if name in subset
        )
        for name in p_values
    }
    assert holm(p_values) == pytest.approx(expected)
    assert list(holm(p_values)) == list(p_values) and holm({}) == {}


def test_kolmogorov_distance_is_scipys():
    generator = np.random.default_rng(0)
    one, other = generator.normal(size=40).round(1), generator.normal(0.5, size=31).round(1)
    assert kolmogorov_distance(one, other) == pytest.approx(stats.ks_2samp(one, other).statistic)


def sides(seed: int, n: int = 40) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Two sides alike; numbers hang together."""
    generator = np.random.default_rng(seed)

    def side() -> dict[str, np.ndarray]:
        shared = generator.gamma(2, size=n)
        values = {name: np.round(shared + generator.gamma(2, size=n), 1) for name in KINDS}
        return values | {name: (values[name] > 5).astype(float) for name, kind in KINDS.items() if kind == "flag"}

    return side(), side()


def test_set_raises_a_false_alarm_at_most_at_the_level_of_one_test():
    alarms = sum(
        min(change.adjusted for change in compare_statistics(*sides(seed), 0.1, seed)) <= 0.1 for seed in range(80)
    )
    assert alarms <= stats.binom.ppf(0.999, 80, 0.1)


@pytest.mark.parametrize("name", list(KINDS))
def test_statistic_that_changed_is_the_one_that_is_named(name):
    reference, arrivals = sides(3, 150)
    moved = 1 - reference[name] if KINDS[name] == "flag" else arrivals[name] * 1.6
    found = {one.name: one for one in compare_statistics(reference, arrivals | {name: moved}, 0.01, 0)}
    assert {one for one in found if found[one].adjusted <= 0.01} == {name}
    assert found[name].large_enough and list(found) == list(KINDS)


def test_wider_spread_around_the_same_mean_is_found():
    generator = np.random.default_rng(0)
    one, other = generator.normal(0.5, 0.1, 200), generator.normal(0.5, 0.2, 200)
    assert compare_statistics({"brightness": one}, {"brightness": other}, 0.01, 0)[0].adjusted <= 0.01


def test_sides_need_not_be_of_one_length_and_are_compared_where_both_have_a_statistic():
    reference = {"rejected": np.zeros(500), "brightness": np.linspace(0, 1, 30)}
    found = compare_statistics(reference, {"rejected": np.r_[np.ones(30), np.zeros(70)]}, 0.01, 0)
    assert [one.name for one in found] == ["rejected"]
    assert (found[0].reference, found[0].arrivals, found[0].effect) == (0, 0.3, 0.3)
    assert (found[0].num_reference, found[0].num_arrivals) == (500, 100) and found[0].adjusted < 1e-10


def test_sure_but_small_change_is_not_large_enough():
    reference, arrivals = np.zeros(100_000), np.zeros(100_000)
    arrivals[:500] = 1
    change = compare_statistics({"rejected": reference}, {"rejected": arrivals}, 0.01, 0)[0]
    assert change.adjusted < 1e-10 and not change.large_enough


def test_caption_statistics_count_words_and_the_rare_ones_among_them():
    found = caption_statistics(["A red star", "zebra, zebra!", ""], {"a": 50, "red": 5, "star": 4})
    assert found["caption_words"].tolist() == [3, 2, 0]
    assert found["rare_words"].tolist() == pytest.approx([1 / 3, 1, 0])


def test_picture_statistics_are_those_of_a_plain_picture():
    found = picture_statistics(Image.new("RGB", (8, 8), (255, 0, 0)), 2000, 1000)
    assert found == pytest.approx({"megapixels": 2, "aspect_ratio": 2, "brightness": 0.2126, "saturation": 1})
    assert picture_statistics(Image.new("L", (8, 8), 0), 10, 10)["saturation"] == 0


def test_values_that_cannot_be_used_are_refused():
    with pytest.raises(InputError, match=r"expected statistics among .*, found colour"):
        compare_statistics({"colour": [1, 2]}, {}, 0.05, 0)
    with pytest.raises(InputError, match="0 or 1"):
        compare_statistics({"rejected": [0, 0.5]}, {"rejected": [0, 1]}, 0.05, 0)
    with pytest.raises(InputError, match="at least 2 numbers"):
        compare_statistics({"brightness": [0.1]}, {"brightness": [0, 1]}, 0.05, 0)
    with pytest.raises(NonFiniteError, match="brightness"):
        compare_statistics({"brightness": [0.1, np.nan]}, {"brightness": [0, 1]}, 0.05, 0)
