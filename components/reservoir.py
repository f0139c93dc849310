"""A uniform sample of a stream of any length in bounded memory, whatever its order, its batches and its interruptions.

An item's priority is a hash of (seed, key), and the items with the smallest priorities stay: bottom-k sampling (Cohen &
Kaplan 2007, doi:10.1145/1281100.1281133). So nothing depends on a generator's state: a resumed run equals an
undisturbed one, samples of two workers merge into the sample of both streams, and an item delivered twice counts once.
What is costly (decoding, encoding) is done only for the items that `would_enter`: about k (1 + ln(n / k)) of n.
Shape letters: N items handed in, k items kept.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from components.errors import InputError

Keys = NDArray[np.uint64]
Columns = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Reservoir:
    """At most `size` items of a stream, in the order of their priorities."""

    size: int
    seed: int
    seen: int = 0
    """Rows handed in, an item delivered twice counted twice."""
    keys: Keys = field(default_factory=lambda: np.zeros(0, np.uint64))
    columns: Columns = field(default_factory=dict)
    """Arrays over the kept items, such as features (k, D)."""

    def __post_init__(self) -> None:
        if self.size < 1:
            raise InputError(f"a reservoir expects a size of at least 1, found {self.size}")


def key_of(sha256: str) -> int:
    """The key of an item from the hash of its bytes (hex digits)."""
    return int(sha256[:16], 16)


def priorities(keys: Any, seed: int) -> Keys:
    """A hash of (seed, key): the mixer of splitmix64 (Steele et al. 2014), twice. One to one for a seed: no ties."""
    keys = np.asarray(keys, np.uint64)
    start = _mixed(np.array([seed], np.uint64))
    return _mixed(_mixed(keys) ^ start)


def _mixed(values: Keys) -> Keys:
    values = values + np.uint64(0x9E3779B97F4A7C15)  # arrays wrap around, as they should
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def would_enter(reservoir: Reservoir, keys: Any) -> NDArray[np.bool_]:
    """Which of these items (N,) the sample may take: the others need not be looked at."""
    keys = np.asarray(keys, np.uint64)
    if len(reservoir.keys) < reservoir.size:
        return np.ones(len(keys), bool)
    last = priorities(reservoir.keys[-1:], reservoir.seed)
    return np.asarray(priorities(keys, reservoir.seed) < last)


def add(
    reservoir: Reservoir, keys: Any, columns: Mapping[str, Sequence[Any] | NDArray[Any]], passed_over: int = 0
) -> Reservoir:
    """The sample after these items; `columns` are arrays over them. `passed_over` counts items left out beforehand."""
    keys = np.asarray(keys, np.uint64)
    if not len(keys):
        return replace(reservoir, seen=reservoir.seen + passed_over)
    given = {name: np.asarray(values) for name, values in columns.items()}
    for name, values in given.items():
        if len(values) != len(keys):
            raise InputError(f"column {name} expected one value for each of {len(keys)} items, found {len(values)}")
    if len(reservoir.keys) and set(given) != set(reservoir.columns):
        raise InputError(
            f"a reservoir expected the columns {sorted(reservoir.columns)}, found {sorted(given)}; start a new one"
        )
    if len(reservoir.keys):
        given = {name: np.concatenate([reservoir.columns[name], values]) for name, values in given.items()}
    seen = reservoir.seen + len(keys) + passed_over
    return _smallest(reservoir, np.concatenate([reservoir.keys, keys]), given, seen)


def merged(one: Reservoir, other: Reservoir) -> Reservoir:
    """The sample of both streams, as if one had seen them all; InputError for samples of two sizes or seeds."""
    if (one.size, one.seed) != (other.size, other.seed):
        raise InputError(
            f"merging expected two reservoirs of one size and seed, found {(one.size, one.seed)} and"
            f" {(other.size, other.seed)}"
        )
    if not len(one.keys):
        return _smallest(other, other.keys, other.columns, one.seen + other.seen)
    return add(one, other.keys, other.columns, passed_over=other.seen - len(other.keys))


def as_arrays(reservoir: Reservoir) -> Columns:
    """The whole state as plain arrays, for `numpy.savez`; `from_arrays` reads it."""
    numbers = np.array([reservoir.size, reservoir.seed, reservoir.seen], np.uint64)
    return {"reservoir": numbers, "keys": reservoir.keys} | {
        f"column.{name}": values for name, values in reservoir.columns.items()
    }


def from_arrays(arrays: Mapping[str, NDArray[Any]]) -> Reservoir:
    """The state that `as_arrays` gave."""
    size, seed, seen = (int(number) for number in arrays["reservoir"])
    columns = {name.removeprefix("column."): arrays[name] for name in arrays if name.startswith("column.")}
    return Reservoir(size, seed, seen, np.asarray(arrays["keys"], np.uint64), columns)


def _smallest(reservoir: Reservoir, keys: Keys, columns: Columns, seen: int) -> Reservoir:
    """Keep each key once, and of the keys those with the smallest priorities."""
    keys, first = np.unique(keys, return_index=True)
    order = np.argsort(priorities(keys, reservoir.seed))[: reservoir.size]
    kept = {name: values[first[order]] for name, values in columns.items()}
    return Reservoir(reservoir.size, reservoir.seed, seen, keys[order], kept)
