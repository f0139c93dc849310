"""Has something plain changed: lengths, sizes, light, colour, shares of duplicates and of rejects?

A fixed, named set, each compared by the test that fits it: numbers by Anderson and Darling's two-sample statistic under
permutation (ties as in Scholz & Stephens 1987, doi:10.1080/01621459.1987.10478517), which sees places and spreads and
looks at the tails; yes-or-no values by Fisher's exact test, which is the permutation test itself. Their p-values are
Holm's (1979), so that the whole set raises a false alarm at most at the level of one test, however they hang together.
Shape letters: N pooled items (reference first), B permutations.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import stats

from components.drift_kernels import words_of
from components.errors import InputError, NonFiniteError
from components.two_sample import BLOCK, LOOK_CLOSER, PERMUTATIONS, SLACK, draws_for, random_labels

Kind = Literal["number", "flag"]
Array = NDArray[np.float64]

KINDS: dict[str, Kind] = {
    "caption_words": "number",
    "rare_words": "number",
    "megapixels": "number",
    "aspect_ratio": "number",
    "brightness": "number",
    "saturation": "number",
    "near_duplicate": "flag",
    "rejected": "flag",
}
SMALLEST_SHIFT: dict[Kind, float] = {"number": 0.1, "flag": 0.02}
"""Below this effect a difference is not called drift, however sure it is."""
RARE_BELOW = 5
FIRST_STREAM, CLOSER_STREAM = 21, 22


@dataclass(frozen=True)
class Change:
    """One statistic on both sides."""

    name: str
    kind: Kind
    p_value: float
    adjusted: float
    """Holm's p-value over the set; below the set's level it is significant."""
    reference: float
    """Mean, or share."""
    arrivals: float
    effect: float
    """Numbers: Kolmogorov's distance, the share of items that would have to change. Flags: the change of the share."""
    num_reference: int
    num_arrivals: int

    @property
    def large_enough(self) -> bool:
        return abs(self.effect) >= SMALLEST_SHIFT[self.kind]


def caption_statistics(captions: Sequence[str], known: Mapping[str, int]) -> dict[str, Array]:
    """Words in each caption, and the share of them that are rare: in fewer than 5 of the captions behind `known`.

    `known` counts captions by word in the champion's *training* split, which is neither side of the comparison.
    """
    words = [words_of(caption) for caption in captions]
    rare = [sum(known.get(word, 0) < RARE_BELOW for word in each) / max(1, len(each)) for each in words]
    return {"caption_words": np.array([len(each) for each in words], np.float64), "rare_words": np.array(rare)}


def picture_statistics(picture: Image.Image, width_px: int, height_px: int) -> dict[str, float]:
    """Of one RGB picture; its size as it arrived is given, since `picture` may be cropped and scaled already."""
    pixels = np.asarray(picture.convert("RGB"), np.float64) / 255
    high, low = pixels.max(axis=2), pixels.min(axis=2)
    return {
        "megapixels": width_px * height_px / 1e6,
        "aspect_ratio": width_px / height_px,
        "brightness": float((pixels @ [0.2126, 0.7152, 0.0722]).mean()),
        "saturation": float(np.where(high > 0, (high - low) / np.where(high > 0, high, 1), 0).mean()),
    }


def compare_statistics(
    reference: Mapping[str, Any], arrivals: Mapping[str, Any], level: float, seed: int
) -> tuple[Change, ...]:
    """Compare every statistic that both sides have, in the order of `KINDS`; the sides may differ in length.

    Significant at `level` is what has `adjusted <= level`. InputError for names that are not in `KINDS`.
    """
    if unknown := (set(reference) | set(arrivals)) - set(KINDS):
        raise InputError(f"expected statistics among {', '.join(KINDS)}, found {', '.join(sorted(unknown))}")
    names = [name for name in KINDS if name in reference and name in arrivals]
    sides = {name: (_values(name, reference[name]), _values(name, arrivals[name])) for name in names}
    p_values = {
        name: fisher_p_value(*sides[name])
        if KINDS[name] == "flag"
        else anderson_darling_p_value(*sides[name], level / len(names), seed + place)
        for place, name in enumerate(names)
    }
    adjusted = holm(p_values)
    return tuple(
        Change(
            name,
            KINDS[name],
            p_values[name],
            adjusted[name],
            float(one.mean()),
            float(other.mean()),
            float(other.mean() - one.mean()) if KINDS[name] == "flag" else kolmogorov_distance(one, other),
            len(one),
            len(other),
        )
        for name, (one, other) in sides.items()
    )


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down p-values: the i-th smallest of k times k - i + 1, never below the one before, at most 1."""
    adjusted, floor = {}, 0.0
    for place, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        floor = max(floor, min(1.0, (len(p_values) - place) * p_values[name]))
        adjusted[name] = floor
    return {name: adjusted[name] for name in p_values}


def fisher_p_value(reference: Array, arrivals: Array) -> float:
    """Two-sided p-value of two shares of yes (1) and no (0)."""
    counts = [[int(side.sum()), len(side) - int(side.sum())] for side in (reference, arrivals)]
    return float(min(1.0, stats.fisher_exact(counts).pvalue))


def kolmogorov_distance(reference: Array, arrivals: Array) -> float:
    """The largest difference of the two distribution functions, in [0, 1]."""
    at = np.union1d(reference, arrivals)
    shares = [np.searchsorted(np.sort(side), at, "right") / len(side) for side in (reference, arrivals)]
    return float(np.abs(shares[0] - shares[1]).max())


def anderson_darling_p_value(reference: Array, arrivals: Array, level: float, seed: int) -> float:
    """Permutation p-value; near `level` by more permutations, as `two_sample.permutation_test` says and why."""
    p_value = _anderson_darling(reference, arrivals, PERMUTATIONS, np.random.default_rng((seed, FIRST_STREAM)))
    wanted = draws_for(level)
    if wanted > PERMUTATIONS and p_value < (LOOK_CLOSER + 1) / (PERMUTATIONS + 1):
        return _anderson_darling(reference, arrivals, wanted, np.random.default_rng((seed, CLOSER_STREAM)))
    return p_value


def _anderson_darling(reference: Array, arrivals: Array, permutations: int, generator: np.random.Generator) -> float:
    pooled = np.concatenate([reference, arrivals])
    labels = np.zeros((1, len(pooled)), np.float32)
    labels[0, : len(reference)] = 1
    observed = float(anderson_darling(pooled, labels)[0])
    reaching, block = 0, max(1, BLOCK // len(pooled))
    for start in range(0, permutations, block):
        drawn = random_labels(generator, min(block, permutations - start), len(reference), len(pooled))
        reaching += int((anderson_darling(pooled, drawn) >= observed * (1 - SLACK)).sum())
    return (reaching + 1) / (permutations + 1)


def anderson_darling(pooled_N: Any, first_BN: Any) -> Array:
    """The squared difference of the two distribution functions, weighted by 1 / (H (1 - H)) of the pooled one, (B,).

    Summed over items below the largest value; times n m / N it is Scholz and Stephens' A^2 (their eq. 6).
    """
    pooled, first = np.asarray(pooled_N, np.float64), np.asarray(first_BN, np.float64)
    order = np.argsort(pooled, kind="stable")
    ordered, size, n = pooled[order], len(pooled), float(first[0].sum())
    ends = np.flatnonzero(np.append(ordered[1:] > ordered[:-1], True))
    counts = np.diff(ends, prepend=-1)[:-1]
    ends = ends[:-1]  # both functions are 1 at the largest value
    below = np.cumsum(first[:, order], axis=1)[:, ends]
    share = (ends + 1) / size
    gap = below / n - ((ends + 1) - below) / (size - n)
    return np.asarray((gap**2 * (counts / size / (share * (1 - share)))).sum(axis=1))


def _values(name: str, given: Any) -> Array:
    values = np.asarray(given, np.float64)
    if values.ndim != 1 or len(values) < 2:
        raise InputError(f"statistic {name} expected at least 2 numbers a side, found shape {values.shape}")
    if not np.isfinite(values).all():
        raise NonFiniteError(f"statistic {name} expected finite numbers, found NaN or infinity; leave such items out")
    if KINDS[name] == "flag" and not np.isin(values, (0, 1)).all():
        raise InputError(f"statistic {name} expected 0 or 1 for each item, found {values[~np.isin(values, (0, 1))][0]}")
    return values


def items_for_flags(share: float, level: float, power: float) -> int:
    """Items a side with which a share that rises from 0 by `share` is found with `power` (normal approximation)."""
    reach = float(stats.norm.ppf(1 - level / 2) + stats.norm.ppf(power))
    return math.ceil(2 * (share / 2) * (1 - share / 2) * (reach / share) ** 2)
