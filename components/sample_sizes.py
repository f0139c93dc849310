"""How many items must both sides have, so that "no drift" means something? Planned on the reference alone.

The change to be found is made out of the reference itself. A new concept: as tight as ten neighbours of the reference,
and as far from the rest as the most distinct tenth of such groups. Wrong captions: captions dealt at random to a share
of the pictures. With the null's first moments and a normal distribution under the change, the power of one kernel's
test is a formula. A bank of kernels, which hang together closely, is planned as its best member at half the level. All
of it is approximate: it says when to stay silent, and never whether something drifted.
Shape letters: R reference items.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import special

from components.drift_kernels import centred

MOST_ITEMS = 10**6
CONCEPT_ITEMS, CONCEPT_QUANTILE, CONCEPTS = 10, 0.9, 100
"""Neighbours that make a concept, which of the concepts is taken by its distance, and how many are looked at."""
BANK = 2
"""The level's divisor: what choosing among a stream's kernels costs, about."""
Power = Callable[[int], float]
"""Items a side -> chance to find the change."""


def smallest_size(power_at: Power, power: float) -> int | None:
    """The fewest items a side that reach `power`, None where no million does; power is taken to grow with size."""
    if power_at(MOST_ITEMS) < power:
        return None
    low, high = 2, MOST_ITEMS
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if power_at(middle) < power else (low, middle)
    return low


def concept_power(reference_kernel: Any, share: float, level: float) -> Power:
    """Power of the MMD test of this kernel (R, R) against a new concept in `share` of the arrivals."""
    kernel = np.asarray(reference_kernel, np.float64)
    distance = concept_distance(kernel)
    around = centred(kernel)
    spread = math.sqrt(2 * float((_off_diagonal(around) ** 2).mean()))  # times 1/n + 1/m: two_sample._centred
    if spread <= 0 or distance <= 0:
        return lambda n: 0.0
    threshold = null_quantile(_skewness(around), level / BANK)

    def power_at(n: int) -> float:
        null = spread * 2 / n
        found = share**2 * distance
        chance_of_share = 2 * share * distance * math.sqrt(share * (1 - share) / n)  # how many of n are of the concept
        return float(special.ndtr((found - threshold * null) / math.hypot(null, chance_of_share)))

    return power_at


def concept_distance(kernel: NDArray[np.float64]) -> float:
    """Squared MMD between ten neighbours of the reference and the rest: the 90 % quantile over items."""
    size, near = len(kernel), CONCEPT_ITEMS
    if size < 2 * near:
        return 0.0
    own, sums = np.diagonal(kernel), kernel.sum(axis=1) - np.diagonal(kernel)
    others, found = size - near, []
    for item in np.unique(np.linspace(0, size - 1, CONCEPTS).astype(int)):
        concept = np.argsort(own - 2 * kernel[item], kind="stable")[:near]
        inner = float(kernel[np.ix_(concept, concept)].sum() - own[concept].sum())
        across = float(sums[concept].sum()) - inner
        rest = float(sums.sum()) - inner - 2 * across
        within = inner / (near * (near - 1)) + rest / (others * (others - 1))
        found.append(within - 2 * across / (near * others))
    return float(np.quantile(found, CONCEPT_QUANTILE))


def mismatch_power(reference_pairs: Any, share: float, level: float) -> Power:
    """Power of the test of mean agreement where `share` of the arrivals have captions of other pictures.

    `reference_pairs` (R, R) is `drift_kernels.pair_kernel`. With g the mean of its values off the diagonal, a pair of
    the reference agrees by g (1 - share / 2) with n + n pairs; wrong ones agree by 0.
    """
    kernel = np.asarray(reference_pairs, np.float64)
    size = len(kernel)
    values = _off_diagonal(kernel)
    gain = float(values.mean())
    agreement = values.reshape(size, size - 1).mean(axis=1)
    of_pairs = float(values.var())
    of_items = max(0.0, float(agreement.var(ddof=1)) - of_pairs / (size - 1))
    if gain <= 0:
        return lambda n: 0.0
    threshold = -float(special.ndtri(level / BANK / 2))

    def power_at(n: int) -> float:
        error = math.sqrt((of_items + of_pairs / (2 * n)) * 2 / n)
        return float(special.ndtr(gain * share * (1 - share / 2) / error - threshold))

    return power_at


def shift_power(shift: float, level: float) -> Power:
    """Power of a two-sided test of two means that are `shift` standard deviations apart."""
    threshold = -float(special.ndtri(level / BANK / 2))
    return lambda n: float(special.ndtr(abs(shift) * math.sqrt(n / 2) - threshold))


def null_quantile(skewness: float, level: float) -> float:
    """The upper `level` quantile of a gamma distribution of mean 0, deviation 1 and this skewness."""
    shape = 4 / max(0.02, skewness) ** 2
    return float((special.gammainccinv(shape, level) - shape) / math.sqrt(shape))


def _skewness(kernel: NDArray[np.float64]) -> float:
    single = kernel.astype(np.float32)
    cubes = float(np.einsum("ij,ij->", single @ single, single, dtype=np.float64))
    squares = float((kernel**2).sum())
    return math.sqrt(8) * cubes / squares**1.5 if squares > 0 else 1.0


def _off_diagonal(kernel: NDArray[np.float64]) -> NDArray[np.float64]:
    """The values off the diagonal, row by row, (R (R - 1),)."""
    return np.asarray(kernel[~np.eye(len(kernel), dtype=bool)])
