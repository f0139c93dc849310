"""Sampling a stream: uniform, and one sample whatever the order, the batches, the workers and the interruptions."""

import io

import numpy as np
import pytest
from scipy import stats

from components.errors import InputError
from components.reservoir import Reservoir, add, as_arrays, from_arrays, key_of, merged, priorities, would_enter

KEYS = np.random.default_rng(0).integers(0, 2**63, 5000).astype(np.uint64)
ROWS = np.arange(10000.0).reshape(5000, 2)
NAMES = np.array([f"item {index}" for index in range(5000)])


def filled(places: np.ndarray, start: Reservoir | None = None, batch: int = 700) -> Reservoir:
    found = start or Reservoir(size=50, seed=7)
    for first in range(0, len(places), batch):
        part = places[first : first + batch]
        found = add(found, KEYS[part], {"rows": ROWS[part], "names": NAMES[part]})
    return found


def same(one: Reservoir, other: Reservoir) -> bool:
    columns = all((one.columns[name] == other.columns[name]).all() for name in one.columns)
    return (
        columns and (one.keys == other.keys).all() and one.seen == other.seen and set(one.columns) == {"rows", "names"}
    )


def test_sample_is_a_function_of_the_items_alone():
    plain = filled(np.arange(5000))
    assert len(plain.keys) == 50 and plain.seen == 5000
    assert same(plain, filled(np.random.default_rng(1).permutation(5000)))
    assert same(plain, filled(np.arange(5000), batch=1 + 4999))


def test_resumed_run_equals_an_undisturbed_one():
    half = filled(np.arange(2500))
    stored = io.BytesIO()
    np.savez(stored, **as_arrays(half))
    stored.seek(0)
    with np.load(stored) as arrays:
        resumed = from_arrays({name: arrays[name] for name in arrays.files})
    assert same(filled(np.arange(5000)), filled(np.arange(2500, 5000), resumed))


def test_samples_of_two_workers_merge_into_the_sample_of_both_streams():
    even, odd = filled(np.arange(0, 5000, 2)), filled(np.arange(1, 5000, 2))
    assert same(filled(np.arange(5000)), merged(even, odd)) and same(merged(even, odd), merged(odd, even))
    empty = Reservoir(size=50, seed=7)
    assert same(merged(empty, even), even) and same(merged(even, empty), even)


def test_item_delivered_twice_is_in_the_sample_once():
    twice = filled(np.arange(5000), filled(np.arange(5000)))
    assert (twice.keys == filled(np.arange(5000)).keys).all() and len(np.unique(twice.keys)) == 50


def test_items_that_would_not_enter_need_not_be_handed_in():
    sample, looked_at = Reservoir(size=50, seed=7), 0
    for first in range(0, 5000, 100):
        part = np.arange(first, first + 100)
        part = part[would_enter(sample, KEYS[part])]
        looked_at += len(part)
        columns = {"rows": ROWS[part], "names": NAMES[part]}
        sample = add(sample, KEYS[part], columns, passed_over=100 - len(part))
    assert same(sample, filled(np.arange(5000)))
    assert looked_at < 50 * (1 + np.log(5000 / 50)) * 1.5 + 100  # k (1 + ln(n / k)), and the first batch


def test_every_item_is_as_likely_as_any_other_whatever_its_place():
    """Neighbouring keys 0, 1, 2 ...: the hardest for a hash. 2,000 seeds, samples of 5 of 40."""
    counts = np.zeros(40)
    for seed in range(2000):
        counts[add(Reservoir(5, seed), np.arange(40), {}).keys.astype(int)] += 1
    assert counts.sum() == 10_000
    # Without replacement counts vary by 1 - 5/40 of the multinomial: the test is a little conservative
    assert stats.chisquare(counts).pvalue > 1e-4


def test_pairs_of_items_are_drawn_together_as_often_as_chance_says():
    together = 0
    for seed in range(4000):
        keys = add(Reservoir(10, seed), np.arange(40), {}).keys
        together += bool({0, 1} <= set(keys.tolist()))
    assert stats.binomtest(together, 4000, 10 * 9 / (40 * 39)).pvalue > 1e-4


def test_priorities_are_one_to_one_and_differ_by_seed():
    keys = np.arange(200_000)
    assert len(np.unique(priorities(keys, 3))) == len(keys)
    assert abs(np.corrcoef(priorities(keys, 3).astype(float), priorities(keys, 4).astype(float))[0, 1]) < 0.01


def test_key_is_the_start_of_the_hash():
    assert key_of("00000000000000ff" + "0" * 48) == 255


def test_ten_million_arrivals_pass_in_bounded_memory():
    sample = Reservoir(size=1000, seed=1)
    for first in range(0, 10_000_000, 1_000_000):
        keys = np.arange(first, first + 1_000_000, dtype=np.uint64)
        keys = keys[would_enter(sample, keys)]
        sample = add(sample, keys, {"key": keys}, passed_over=1_000_000 - len(keys))
    assert (len(sample.keys), sample.seen) == (1000, 10_000_000)
    assert stats.kstest(sample.columns["key"] / 1e7, "uniform").pvalue > 1e-4


def test_what_does_not_fit_together_is_refused():
    sample = filled(np.arange(10))
    with pytest.raises(InputError, match="columns"):
        add(sample, KEYS[:2], {"rows": ROWS[:2]})
    with pytest.raises(InputError, match="one value for each of 2 items, found 3"):
        add(sample, KEYS[:2], {"rows": ROWS[:3], "names": NAMES[:2]})
    with pytest.raises(InputError, match="one size and seed"):
        merged(sample, Reservoir(size=50, seed=8))
    with pytest.raises(InputError, match="at least 1"):
        Reservoir(size=0, seed=0)
