"""A version's parts: repeated prompts are encoded once, the cache is bounded, tables are made once."""

import threading

import pytest
import torch

from components.models import encode_text, make_tiny
from components.versions import TextCache, TextCounts, Version


@pytest.mark.parametrize("family", ["stable_diffusion", "z_image"])
def test_repeated_prompts_are_encoded_once_and_as_without_a_cache(family: str) -> None:
    parts = make_tiny(family)
    cache = TextCache(parts, 4)
    first, again = cache.states("a red circle"), cache.states("a red circle")
    assert again is first and (cache.counts.hits, cache.counts.misses) == (1, 1)
    assert torch.equal(first.states_BLD, encode_text(parts, ["a red circle"]).states_BLD)
    assert first.num_tokens == (int(first.mask_BL.sum()),)


def test_the_prompts_used_last_are_kept() -> None:
    cache = TextCache(make_tiny("stable_diffusion"), 2)
    for prompt in ("a", "b", "a", "c", "a", "b"):
        cache.states(prompt)
    assert len(cache) == 2 and (cache.counts.hits, cache.counts.misses) == (2, 4)


def test_many_threads_share_a_cache_and_lose_no_count() -> None:
    cache = TextCache(make_tiny("stable_diffusion"), 2)

    def ask() -> None:
        for number in range(12):
            cache.states(f"prompt {number % 3}")

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert cache.counts.hits + cache.counts.misses == 48 and len(cache) == 2


def test_versions_add_to_one_count_and_only_encoding_takes_seconds() -> None:
    parts, counts = make_tiny("stable_diffusion"), TextCounts()
    caches = [TextCache(parts, 4, counts) for _ in range(2)]
    for cache in caches:
        cache.states("a red circle")
    encoded_s = counts.encoding_s
    assert (counts.hits, counts.misses) == (0, 2) and encoded_s > 0
    caches[0].states("a red circle")
    assert (counts.hits, counts.encoding_s) == (1, encoded_s)


def test_many_threads_add_seconds_and_lose_none() -> None:
    counts = TextCounts()

    def add() -> None:
        for _ in range(5000):
            counts.add(hits=1, encoding_s=0.25)

    threads = [threading.Thread(target=add) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (counts.hits, counts.encoding_s) == (40_000, 10_000.0)


def test_step_tables_are_made_once_for_each_schedule() -> None:
    version = Version("v1", make_tiny("stable_diffusion"), 4)
    assert version.table(5, 16, None, 0) is version.table(5, 16, None, 0)
    assert len(version.table(5, 16, None, 2)) == 3 and len(version.table(6, 16, "dpm++2m", 0)) == 6


def test_kept_text_states_are_bounded_in_bytes_too() -> None:
    parts = make_tiny("stable_diffusion")
    states = TextCache(parts, 4).states("a")
    one = states.states_BLD.nbytes + states.mask_BL.nbytes
    cache = TextCache(parts, 100, max_bytes=2 * one)
    for prompt in ("a", "b", "a", "c", "a", "b"):
        cache.states(prompt)
    assert len(cache) == 2 and cache.num_bytes == 2 * one and (cache.counts.hits, cache.counts.misses) == (2, 4)
    tiny = TextCache(parts, 100, max_bytes=one - 1)
    assert torch.equal(tiny.states("a").states_BLD, states.states_BLD) and len(tiny) == tiny.num_bytes == 0
