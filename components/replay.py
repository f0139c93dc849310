"""Which pictures stand in a batch when a run replays old ones among the new?

Of the first n places of a run, floor(n * share) hold old pictures, so a share is met exactly over the run and within
one picture in every batch. In a batch the old ones stand evenly spread from a random begin (systematic sampling), each
position equally often: positions are strata of the timestep, so old and new pictures see every noise level alike. Old
and new pictures come each in epochs of their own, in random order: every epoch over the new visits each of them once.
All of it is a function of (seed, step, position), as in `noise.py`.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from components.noise import OLD_ORDER_STREAM, OLD_PLACE_STREAM, generator_at, samples_at


@dataclass(frozen=True)
class OldAndNew:
    """The rows of one split that count as old, and the others."""

    old_rows: np.ndarray
    new_rows: np.ndarray


def tell_apart(keys: Sequence[str], old: Collection[str]) -> OldAndNew:
    """Sort the rows of a split (picture i has the sha256 keys[i]) by whether their picture is in `old`."""
    is_old = np.array([key in old for key in keys], dtype=bool)
    return OldAndNew(np.flatnonzero(is_old), np.flatnonzero(~is_old))


def replayed_indexes(
    seed: int, step: int, positions: Sequence[int], global_batch: int, parts: OldAndNew, share: float
) -> np.ndarray:
    """Return the rows at `positions` of the global batch of step `step`, a `share` of which are old ones."""
    before = num_old(step * global_batch, share)
    count = num_old((step + 1) * global_batch, share) - before
    is_old = _old_positions(seed, step, global_batch, count)
    # The how-manieth old or new picture of the run stands at each position.
    old_places = before + np.cumsum(is_old) - 1
    new_places = step * global_batch - before + np.cumsum(~is_old) - 1
    chosen = np.asarray(positions, dtype=np.int64)
    here = is_old[chosen]
    rows = np.empty(len(chosen), dtype=np.int64)
    if here.any():
        places = old_places[chosen[here]]
        rows[here] = parts.old_rows[samples_at(seed, places, len(parts.old_rows), OLD_ORDER_STREAM)]
    if not here.all():
        rows[~here] = parts.new_rows[samples_at(seed, new_places[chosen[~here]], len(parts.new_rows))]
    return rows


def num_old(num_places: int, share: float) -> int:
    """Return how many of a run's first places hold old pictures; in whole numbers, so no rounding adds up."""
    exact = Fraction(str(share))
    return num_places * exact.numerator // exact.denominator


def _old_positions(seed: int, step: int, global_batch: int, count: int) -> np.ndarray:
    """Return a mask (global_batch,) with `count` positions evenly spread from a random begin."""
    is_old = np.zeros(global_batch, dtype=bool)
    if count:
        begin = int(generator_at(seed, OLD_PLACE_STREAM, step, 0).integers(global_batch))
        is_old[(np.arange(count) * global_batch + begin) // count] = True
    return is_old
