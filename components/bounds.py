"""How low or high can a mean be, given few and skewed items, and what would a test of it find?

Losses by picture are skewed, and a few dozen of them are a small sample: Student's one-sided limits are then too
optimistic on one side. Both limits here are the wider of Student's and of Hall's (1992), whose cubic transformation
takes the skewness out of the t statistic. A second source of variance that items cannot show (another seed of the same
recipe) is added to a limit's width in squares, as Zou and Donner (2008, "MOVER") add limits of independent parts.
Nothing is random here. Shape letters: N items.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

from components.errors import InputError, NonFiniteError

MOST_ITEMS = 10**7
"""Beyond this many, "collect more pictures" is no advice."""


@dataclass(frozen=True)
class Bounds:
    """A mean with one-sided limits; each is missed by the truth at most at the stated rate."""

    mean: float
    low: float
    high: float
    deviation: float
    """Standard deviation of the items."""
    n: int


def mean_bounds(values_N: Any, significance: float, extra_width: float = 0.0) -> Bounds:
    """Mean of the items with a lower and an upper limit, each at `significance`.

    `extra_width` is the half-width, at the same significance, of what is not seen in the items; see `wider`.
    """
    values = np.asarray(values_N, np.float64)
    if values.ndim != 1 or len(values) < 2:
        raise InputError(f"limits of a mean expected a list of at least 2 numbers, found shape {values.shape}")
    if not np.isfinite(values).all():
        raise NonFiniteError("expected finite numbers, found infinity or NaN; the model that made them is broken")
    n, mean, deviation = len(values), float(values.mean()), float(values.std(ddof=1))
    error = deviation / math.sqrt(n)
    quantile = float(stats.t.ppf(1 - significance, n - 1))
    unskewed = _hall_inverse(values, mean)
    below = error * max(quantile, unskewed(quantile))
    above = error * max(quantile, -unskewed(-quantile))
    return Bounds(mean, mean - wider(below, extra_width), mean + wider(above, extra_width), deviation, n)


def wider(width: float, extra_width: float) -> float:
    """Half-width of a sum of two independent parts from theirs."""
    return math.hypot(width, extra_width)


def _hall_inverse(values: NDArray[np.float64], mean: float) -> Callable[[float], float]:
    """The inverse of g(t) = t + a t^2 + a^2 t^3 / 3 + b, a = skew / (3 sqrt n), b = skew / (6 sqrt n) (Hall 1992)."""
    spread = float(((values - mean) ** 2).mean())
    skew = float(((values - mean) ** 3).mean()) / spread**1.5 if spread else 0.0
    slope, shift = skew / (3 * math.sqrt(len(values))), skew / (6 * math.sqrt(len(values)))
    if abs(slope) < 1e-9:
        return lambda x: x - shift
    return lambda x: (float(np.cbrt(1 + 3 * slope * (x - shift))) - 1) / slope


def power_of(effect: float, deviation: float, n: int, significance: float, extra_width: float = 0.0) -> float:
    """Chance that the upper limit of a mean whose truth is `effect` falls below zero; normal approximation.

    `deviation` is that of the items. The truth is that of these two models: what another seed would change is in
    `extra_width`, which makes the test harder, and not in what is drawn here.
    """
    error = deviation / math.sqrt(n)
    if error == 0:
        return float(effect + extra_width < 0)
    quantile = float(stats.t.ppf(1 - significance, n - 1))
    return float(special.ndtr((-effect - wider(quantile * error, extra_width)) / error))


def items_to_decide(
    effect: float, deviation: float, significance: float, power: float, extra_width: float = 0.0
) -> int | None:
    """Items with which a mean of `effect`, either sign, is told from zero with `power`; None where no number does."""
    effect = -abs(effect)
    if power_of(effect, deviation, MOST_ITEMS, significance, extra_width) < power:
        return None
    low, high = 2, MOST_ITEMS
    while low < high:
        middle = (low + high) // 2
        if power_of(effect, deviation, middle, significance, extra_width) < power:
            low = middle + 1
        else:
            high = middle
    return low


def smallest_effect(deviation: float, n: int, significance: float, power: float, extra_width: float = 0.0) -> float:
    """Distance from zero that n items tell from zero with `power`."""
    error = deviation / math.sqrt(n)
    quantile = float(stats.t.ppf(1 - significance, n - 1))
    return wider(quantile * error, extra_width) + float(special.ndtri(power)) * error
