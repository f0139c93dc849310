"""Does a model give its training pictures back? How near each drawn picture comes to them, beside unseen real ones.

A distance alone says little: simple pictures are alike without being copied. So the nearest training picture of every
drawn picture is looked up in the encoder's space, and the same is done for real pictures that the model has not seen;
copying is being nearer than those (Meehan, Chaudhuri & Dasgupta 2020). Pixels have their say in `near_copies`, since an
encoder may call two pictures alike that no person would. Refuses to speak where there are no unseen pictures.
Shape letters: N items, T training pictures, D feature width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from components.errors import InputError
from components.metrics import Array, Estimate, LeftOut, proportion_wilson

BLOCK_ROWS = 512
NEAR_QUANTILE = 0.01
"""A near copy is nearer than all but this share of the unseen pictures."""


@dataclass(frozen=True)
class Nearest:
    """For every picture its nearest training picture: which, how far in the encoder's space, how far in pixels."""

    index_N: np.ndarray
    distance_N: Array
    pixels_N: Array


def nearest_rows(features_ND: Any, training_TD: Any) -> tuple[np.ndarray, Array]:
    """Index and Euclidean distance of the nearest training row of unit length, in blocks."""
    features, training = np.asarray(features_ND, np.float64), np.asarray(training_TD, np.float64)
    if len(training) < 1:
        raise InputError("a copy check expects training pictures, found none")
    found = []
    for start in range(0, len(features), BLOCK_ROWS):
        cosines = features[start : start + BLOCK_ROWS] @ training.T
        found.append(cosines.argmax(axis=1))
    index_N = np.concatenate(found) if found else np.zeros(0, np.int64)
    # Not sqrt(2 - 2 cos): that loses all digits where it matters, near zero
    return index_N, np.linalg.norm(features - training[index_N], axis=1)


def pixel_distances(pictures: Sequence[Image.Image], others: Sequence[Image.Image]) -> Array:
    """Root mean square difference of pixels in [0, 1], picture by picture, (N,)."""
    pairs = zip(pictures, others, strict=True)
    return np.array([_pixel_distance(one, other) for one, other in pairs], dtype=np.float64)


def _pixel_distance(one: Image.Image, other: Image.Image) -> float:
    if one.size != other.size:
        other = other.resize(one.size, Image.Resampling.LANCZOS)
    first, second = (np.asarray(each.convert("RGB"), np.float64) / 255 for each in (one, other))
    return float(np.sqrt(((first - second) ** 2).mean()))


def copying(drawn: Nearest, unseen: Nearest) -> LeftOut:
    """How often a drawn picture is nearer to the training pictures than an unseen real one is, ties half.

    0.5 says no nearer than pictures it cannot know, 1 that all are nearer. Below 0.5 they are farther: the model draws
    something else. The statistic is Mann-Whitney's; left out are drawn and unseen pictures in turn (DeLong 1988).
    """
    mine, theirs = drawn.distance_N, unseen.distance_N
    n, m = len(mine), len(theirs)
    if min(n, m) < 3:
        raise InputError(f"a copy check expects at least 3 drawn and 3 unseen pictures, found {n} and {m}")
    wins_N = 1 - _share_below(theirs, mine)
    wins_M = _share_below(mine, theirs)
    value = float(wins_N.mean())
    without = ((value * n - wins_N) / (n - 1), (value * m - wins_M) / (m - 1))
    return LeftOut(value, without, n)


def near_copies(drawn: Nearest, unseen: Nearest) -> Estimate:
    """Share of drawn pictures nearer to a training picture than 99 % of unseen ones, in features and in pixels.

    About 1 % or less where nothing is copied. Wilson's interval, for the limits that these unseen pictures give.
    """
    limits = [np.quantile(values, NEAR_QUANTILE, method="lower") for values in (unseen.distance_N, unseen.pixels_N)]
    near_N = (drawn.distance_N < limits[0]) & (drawn.pixels_N < limits[1])
    return proportion_wilson(int(near_N.sum()), len(near_N))


def _share_below(values: Array, at: Array) -> Array:
    """For each of `at` the share of `values` below it, equal ones half."""
    ordered = np.sort(values)
    counts = np.searchsorted(ordered, at, "left") + np.searchsorted(ordered, at, "right")
    return np.asarray(counts / (2 * len(values)), np.float64)
