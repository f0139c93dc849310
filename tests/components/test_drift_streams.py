"""What is compared: features of both sides, pooled in order, and refused where they do not belong together."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from components.drift_kernels import WIDTHS
from components.drift_streams import (
    ALIGNMENT,
    CAPTIONS,
    COSINE,
    IMAGES,
    PROMPTS,
    STREAMS,
    WORDS,
    Items,
    Texts,
    check_encoders,
    compared,
    kernel_features,
    make_bank,
    thumbnails,
)
from components.errors import InputError

NOUNS = ("red", "blue", "star", "ring")


def items(seed: int, n: int, encoder: str = "abc", prompts: int = 0, width: int = 6) -> Items:
    generator = np.random.default_rng(seed)

    def texts(count: int) -> Texts:
        captions = tuple(" ".join(generator.choice(NOUNS, 2)) for _ in range(count))
        return Texts(captions, generator.normal(size=(count, width)).astype(np.float32))

    pictures = generator.normal(size=(n, 6)).astype(np.float32)
    small = generator.uniform(size=(n, 192)).astype(np.float32)
    return Items(encoder, pictures, small, texts(n), {}, texts(prompts) if prompts else None)


def test_thumbnails_are_mean_colours_in_the_unit_range():
    picture = Image.new("RGB", (64, 64), (255, 0, 0))
    picture.paste((0, 0, 255), (32, 0, 64, 64))
    found = thumbnails([picture, picture.convert("L")]).reshape(2, 8, 8, 3)
    assert found[0, 0, 0].tolist() == [1, 0, 0] and found[0, 7, 7].tolist() == [0, 0, 1]
    assert (found[1, ..., 0] == found[1, ..., 1]).all() and thumbnails([]).shape == (0, 192)


@pytest.mark.parametrize("stream", STREAMS)
def test_bank_is_over_the_reference_and_then_the_arrivals(stream):
    reference, arrivals = items(0, 12), items(1, 9, prompts=7)
    bank = make_bank(stream, reference, arrivals)
    expected = 7 if stream == PROMPTS else 9
    assert (bank.num_reference, bank.num_arrivals) == (12, expected) and len(bank.rows_ND) == 12 + expected
    for kernel in bank.kernels.values():
        assert kernel.shape == (12 + expected,) * 2 and np.allclose(kernel, kernel.T, atol=1e-5)


@pytest.mark.parametrize("stream", STREAMS)
def test_kernels_do_not_depend_on_which_side_an_item_is_on(stream):
    """Exchanging the sides reorders the matrices and changes no value: nothing was fitted on one side."""
    one, other = items(0, 8, prompts=8), items(1, 8, prompts=8)
    if stream == PROMPTS:
        one = Items(one.encoder, one.picture_rows_ND, one.thumbnails_ND, one.captions, {}, one.captions)
        other = Items(other.encoder, other.picture_rows_ND, other.thumbnails_ND, other.captions, {}, other.captions)
    order = np.r_[8:16, 0:8]
    plain, swapped = make_bank(stream, one, other), make_bank(stream, other, one)
    for name, kernel in plain.kernels.items():
        np.testing.assert_allclose(swapped.kernels[name][np.ix_(order, order)], kernel, atol=2e-5)


def test_alignment_has_the_cosine_only_where_pictures_and_texts_share_a_space():
    assert COSINE in make_bank(ALIGNMENT, items(0, 8), items(1, 8)).kernels
    other = make_bank(ALIGNMENT, items(0, 8, width=5), items(1, 8, width=5))
    assert COSINE not in other.kernels and len(other.pairs) == 4


def test_marginals_do_not_enter_the_pairs():
    """A constant added to the picture kernel, as a common part of all pictures does, changes no pair."""
    reference, arrivals = items(0, 10), items(1, 10)
    shifted = [Items(s.encoder, s.picture_rows_ND + 3, s.thumbnails_ND, s.captions) for s in (reference, arrivals)]
    plain, moved = make_bank(ALIGNMENT, reference, arrivals), make_bank(ALIGNMENT, *shifted)
    for name, pair in plain.pairs.items():
        np.testing.assert_allclose(moved.pairs[name], pair, atol=1e-5)


def test_prompts_of_which_only_features_were_kept_are_compared_without_words():
    reference, arrivals = items(0, 8), items(1, 8, prompts=6)
    assert arrivals.prompts is not None
    without = replace(arrivals, prompts=Texts(("",) * 6, arrivals.prompts.rows_ND))
    assert WORDS in make_bank(PROMPTS, reference, arrivals).kernels
    assert set(make_bank(PROMPTS, reference, without).kernels) == {f"encoder, width {width:g}" for width in WIDTHS}


def test_kernel_features_give_the_kernel_back():
    rows = np.random.default_rng(0).normal(size=(20, 3))
    features = kernel_features(rows @ rows.T, most=5)
    centred = rows - rows.mean(axis=0)
    assert features.shape == (20, 3)
    np.testing.assert_allclose(features @ features.T, centred @ centred.T, atol=1e-8)


def test_kernel_features_of_equal_items_are_none_and_of_many_items_are_the_leading_ones():
    assert kernel_features(np.ones((30, 30))).shape == (30, 0)
    rows = np.random.default_rng(0).normal(size=(300, 80)) * np.arange(1, 81) ** -1.0
    features = kernel_features(rows @ rows.T, most=5)
    leading = np.linalg.eigvalsh(np.cov(rows.T) * 299)[-5:]
    assert np.sort((features**2).sum(axis=0)) == pytest.approx(leading, rel=1e-2)


def test_rows_of_two_encoders_are_not_compared():
    with pytest.raises(InputError, match=r"reference's encoder abc, found\s+xyz.*pin the reference again"):
        check_encoders(items(0, 5), items(1, 5, encoder="xyz"))
    check_encoders(items(0, 5), items(1, 5))


def test_of_too_many_items_so_many_are_drawn_in_their_order_the_same_each_time():
    reference, arrivals = items(0, 50, prompts=40), items(1, 20)
    few, all_of_them = compared(reference, arrivals, seed=3, most_items=30)
    assert len(few) == len(few.captions.texts) == 30 and few.prompts is not None and len(few.prompts.texts) == 30
    places = [reference.picture_rows_ND.tolist().index(row) for row in few.picture_rows_ND.tolist()]
    assert places == sorted(places)
    assert few.captions.texts == tuple(reference.captions.texts[place] for place in places)
    np.testing.assert_array_equal(all_of_them.picture_rows_ND, arrivals.picture_rows_ND)
    again = compared(reference, arrivals, seed=3, most_items=30)[0]
    np.testing.assert_array_equal(again.picture_rows_ND, few.picture_rows_ND)
    assert not np.array_equal(compared(reference, arrivals, 4, 30)[0].picture_rows_ND, few.picture_rows_ND)


def test_what_does_not_belong_together_is_refused():
    with pytest.raises(InputError, match="2 texts, 3 rows"):
        Texts(("a", "b"), np.zeros((3, 2), np.float32))
    with pytest.raises(InputError, match="4 pictures, 5 thumbnails"):
        Items("abc", np.zeros((4, 2), np.float32), np.zeros((5, 192), np.float32), Texts((), np.zeros((0, 2))))
    with pytest.raises(InputError, match="one width on both sides"):
        make_bank(CAPTIONS, items(0, 5), items(1, 5, width=7))
    with pytest.raises(InputError, match="no served prompts"):
        make_bank(PROMPTS, items(0, 5), items(1, 5))
    with pytest.raises(InputError, match="'smell'"):
        make_bank("smell", items(0, 5), items(1, 5))
    assert set(make_bank(IMAGES, items(0, 5), items(1, 5)).kernels) > {"encoder, width 1"}
