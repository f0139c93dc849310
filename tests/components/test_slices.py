"""Which slices captions fall into, and that none is too small to speak of."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from components.emblems import example, parse_caption
from components.slices import MIN_ITEMS, caption_slices

EMBLEMS = [example("drifted", 0, index)[1] for index in range(200)]


def test_emblems_are_sliced_by_length_and_by_what_they_show():
    slices = caption_slices(EMBLEMS)
    kinds = [name.split(":")[0] for name in slices]
    assert kinds == sorted(kinds, key=["length", "shape", "count", "background"].index)
    assert [name for name in slices if name.startswith("count")] == ["count: one", "count: two", "count: three"]
    assert {"shape: star", "count: one", "count: three", "background: mint"} <= slices.keys()
    for name, mask in slices.items():
        kind, value = name.split(": ")
        if kind in ("shape", "background"):
            assert [getattr(parse_caption(caption), kind) == value for caption in EMBLEMS] == mask.tolist()


def test_the_slices_of_one_kind_part_the_captions():
    slices = caption_slices(EMBLEMS)
    for kind in ("length", "shape", "count", "background"):
        assert (sum(mask.astype(int) for name, mask in slices.items() if name.startswith(kind)) == 1).all()


def test_other_captions_are_sliced_by_their_frequent_words():
    captions = ["A portrait of the painter"] * 30 + ["A street in the rain, painter"] * 12 + ["the painter"] * 15
    slices = caption_slices(captions)
    words = [name for name in slices if name.startswith("word")]
    assert words == ["word: portrait", "word: rain", "word: street"]  # not the glue, nor what every caption has
    assert slices["word: street"].sum() == 12


def test_captions_of_one_length_are_one_slice():
    slices = caption_slices(["one two three"] * 40)
    assert list(slices) == ["length: up to 3 words"] and slices["length: up to 3 words"].all()


def test_no_captions_have_no_slices():
    assert caption_slices([]) == {}


@given(st.lists(st.text(max_size=40), max_size=60))
def test_no_slice_is_too_small_and_length_keeps_everybody_once(captions):
    slices = caption_slices(captions, min_items=1)
    lengths = [mask for name, mask in slices.items() if name.startswith("length")]
    assert not captions or (np.sum(lengths, axis=0) == 1).all()
    assert all(mask.sum() >= MIN_ITEMS for mask in caption_slices(captions).values())
