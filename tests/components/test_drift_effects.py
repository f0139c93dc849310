"""Sizes of changes: what a known change is measured as, and that it stays so as items grow in number."""

import numpy as np
import pytest

from components.drift_effects import agreements, measured_effect, pair_behind, stream_auroc
from components.drift_streams import ALIGNMENT, IMAGES, Items, Texts, make_bank
from components.two_sample import permutation_test


def rows_of(kinds: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    return (np.eye(24)[kinds] * 4 + 0.3 * generator.normal(size=(len(kinds), 24))).astype(np.float32)


def items(seed: int, n: int, new: float = 0.0, wrong: float = 0.0) -> Items:
    """Ten kinds, `new` of the items of an eleventh; of `wrong` of them the captions are of other pictures."""
    generator = np.random.default_rng((seed, n))
    kinds = generator.integers(0, 10, n)
    kinds[: round(new * n)] = 10
    told = kinds.copy()
    told[n - round(wrong * n) :] = generator.permutation(told[n - round(wrong * n) :])
    texts = Texts(tuple(f"kind{kind}" for kind in told), rows_of(told, generator))
    return Items("abc", rows_of(kinds, generator), rows_of(kinds, generator), texts)


def measured(stream: str, kernel: str, n: int, **change: float) -> tuple[dict[str, float], dict[str, float]]:
    bank = make_bank(stream, items(0, n), items(1, n, **change))
    test = permutation_test({kernel: bank.kernels[kernel]}, n, 0, 0.05)
    sides = agreements(bank, test.strongest) if stream == ALIGNMENT else {}
    return measured_effect(bank, test, 0), sides


@pytest.mark.parametrize("share", [0.1, 0.3])
def test_effect_of_new_pictures_is_a_share_below_theirs_however_many_there_are(share):
    few, many = (measured(IMAGES, "encoder, width 1", n, new=share)[0]["effect"] for n in (300, 1200))
    assert 0.4 * share < few <= 1.1 * share and 0.4 * share < many <= 1.1 * share
    assert many == pytest.approx(few, rel=0.3)  # the null's deviation at n = 300 is a quarter of it


@pytest.mark.parametrize(
    ("kernel", "wrong", "low", "high"),
    [
        ("pixels x words agreement", 1.0, 0.85, 1.1),
        ("pixels x words agreement", 0.3, 0.4, 0.65),  # 1 - 0.7^2 = 0.51
        ("pixels x words", 1.0, 0.85, 1.1),
        ("pixels x words", 0.3, 0.15, 0.35),  # 0.3 / sqrt(1 + 0.7^2) = 0.25
    ],
)
def test_effect_of_wrong_captions_is_the_share_of_agreement_that_is_lost(kernel, wrong, low, high):
    few, many = (measured(ALIGNMENT, kernel, n, wrong=wrong)[0]["effect"] for n in (150, 600))
    assert low < few < high and low < many < high


def test_agreement_within_a_side_is_zero_where_captions_are_dealt_at_random():
    sides = measured(ALIGNMENT, "pixels x words", 300, wrong=1.0)[1]
    assert abs(sides["agreement_arrivals"]) < 0.1 * sides["agreement_reference"]


def test_nothing_new_is_below_what_the_reference_shows_against_itself_but_rarely():
    """The 99 % quantile between halves, brought to the same n: of 60 undisturbed pairs of sides few may exceed it."""
    above = 0
    for seed in range(60):
        bank = make_bank(IMAGES, items(2 * seed, 80), items(2 * seed + 1, 50))
        kernels = {"encoder, width 1": bank.kernels["encoder, width 1"]}
        found = measured_effect(bank, permutation_test(kernels, 80, seed, 0.05, 19), seed)
        above += found["mmd2"] > found["split_quantile"]
    assert above <= 4  # 99.9 % quantile of the binomial at 1 %


def test_pair_behind_a_kernel_of_the_alignment_is_its_own():
    bank = make_bank(ALIGNMENT, items(0, 20), items(1, 20))
    assert pair_behind(bank, "pixels x words agreement") is bank.pairs["pixels x words agreement"]
    np.testing.assert_array_equal(pair_behind(bank, "pixels x words"), bank.kernels["pixels x words"])
    assert pair_behind(bank, "cosine") is next(iter(bank.pairs.values()))


def test_auroc_of_the_alignment_is_the_chance_that_a_pair_of_the_reference_agrees_better():
    bank = make_bank(ALIGNMENT, items(0, 100), items(1, 100, wrong=1.0))
    found = stream_auroc(ALIGNMENT, bank, "pixels x words agreement", 0)
    assert found is not None and found.low > 0.7
