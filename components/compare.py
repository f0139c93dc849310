"""Is one model better than another on the same items? The paired difference, how sure it is, and what would settle it.

Both models are measured on the same pictures and noise, so only the difference of each item counts. The interval is
the BCa bootstrap of the mean (Efron 1987). The p-value is a permutation test: where two models are interchangeable, the
sign of an item's difference is a coin toss. Zero exceedances of m are (0 + 1) / (m + 1), never 0 (Phipson and Smyth
2010). Both speak of these two models and other pictures, not of other seeds of the same recipe: see `policy`.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import special

from components.errors import InputError, NonFiniteError
from components.metrics import mean_with_bootstrap

SIGNIFICANCE = 0.05
POWER = 0.8
MOST_ITEMS = 10**9
"""Stands for "no number of items": the difference is zero, or next to it."""
BLOCK = 2**22
"""Signs drawn at once: 32 MiB of products."""


@dataclass(frozen=True)
class Paired:
    """Candidate minus other over the items that both were measured on."""

    difference: float
    low: float
    high: float
    """Two-sided 95 % BCa bootstrap interval over items; of heavy tails it covers 93 % at n = 120, 90 % at n = 30."""
    p_value: float
    """Two-sided sign-flip permutation p-value."""
    n: int
    needed: int | None
    """Items that would make such a difference significant at 5 % with 80 % power; None where it is clear already."""


def compare_paired(candidate_N: Any, other_N: Any, seed: int, resamples: int = 2000) -> Paired:
    """Compare item by item; InputError for lists that do not pair up, NonFiniteError for broken numbers.

    `resamples` are the bootstrap's and the sign flips alike; both are functions of `seed`.
    """
    candidate, other = np.asarray(candidate_N, np.float64), np.asarray(other_N, np.float64)
    if candidate.shape != other.shape or candidate.ndim != 1 or len(candidate) < 2:
        raise InputError(
            f"a paired comparison expected two lists of at least 2 numbers for the same items, found shapes"
            f" {candidate.shape} and {other.shape}; measure both models on the same pictures"
        )
    for name, values in (("candidate", candidate), ("other", other)):
        if not np.isfinite(values).all():
            bad = int((~np.isfinite(values)).sum())
            raise NonFiniteError(f"expected finite numbers of the {name}, found {bad} of {len(values)} that are not")
    difference_N = candidate - other
    estimate = mean_with_bootstrap(difference_N, seed, resamples)
    p_value = sign_flip_p_value(difference_N, seed, resamples)
    clear = p_value <= SIGNIFICANCE
    needed = None if clear else items_needed(estimate.value, float(difference_N.std(ddof=1)), SIGNIFICANCE / 2)
    return Paired(estimate.value, estimate.low, estimate.high, p_value, estimate.n, needed)


def sign_flip_p_value(difference_N: NDArray[np.float64], seed: int, flips: int) -> float:
    """How often random signs move the mean as far from zero as the data do, both ways; the data count as one flip."""
    generator = np.random.default_rng((seed, 1))
    n, observed, exceeding = len(difference_N), abs(difference_N.sum()), 0
    slack = 1e-12 * np.abs(difference_N).sum()  # equal sums in another order differ by rounding
    for start in range(0, flips, max(1, BLOCK // n)):
        rows = min(max(1, BLOCK // n), flips - start)
        signs = generator.integers(0, 2, (rows, n), dtype=np.int8) * 2 - 1
        exceeding += int((np.abs(signs @ difference_N) >= observed - slack).sum())
    return (exceeding + 1) / (flips + 1)


def items_needed(effect: float, spread: float, tail: float, power: float = POWER) -> int:
    """Items with which a mean of `effect` (standard deviation `spread`) passes a test of one-sided size `tail`."""
    reach = float(special.ndtri(1 - tail) + special.ndtri(power)) * spread
    if abs(effect) * math.sqrt(MOST_ITEMS) <= reach:
        return MOST_ITEMS
    return max(2, math.ceil((reach / effect) ** 2))
