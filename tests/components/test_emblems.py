"""The built-in data: one example per (world, seed, index), captions that say what is drawn, clean pictures."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.emblem_shapes import SHAPES, silhouette
from components.emblems import (
    WORLDS,
    Emblem,
    caption_of,
    draw,
    emblem_at,
    example,
    parse_caption,
    sample_emblem,
)

RED_CIRCLE = Emblem("large", "red", "circle", "white", 1, "top left", False, "base")
SEEDS = st.integers(0, 2**63)


def _distance(a, b):
    return np.linalg.norm(np.subtract(a, b))


@pytest.mark.parametrize("world", [*WORLDS, "collage"])
def test_example_is_the_same_when_drawn_again_and_out_of_order(world):
    forwards = [example(world, 5, index) for index in range(6)]
    backwards = [example(world, 5, index) for index in reversed(range(6))][::-1]
    for (picture, caption), (again, caption_again) in zip(forwards, backwards, strict=True):
        assert picture.tobytes() == again.tobytes()
        assert caption == caption_again


@pytest.mark.parametrize("world", [*WORLDS, "collage"])
def test_examples_differ_between_indices_and_between_seeds(world):
    pictures = {example(world, seed, index)[0].tobytes() for seed in range(3) for index in range(20)}
    assert len(pictures) == 60


@pytest.mark.parametrize("world", WORLDS)
def test_emblem_at_is_what_the_caption_of_the_example_says(world):
    for index in range(100):
        assert parse_caption(example(world, 9, index)[1]) == emblem_at(world, 9, index)


@given(seed=SEEDS, world=st.sampled_from(sorted(WORLDS)))
@settings(max_examples=300, deadline=None)
def test_parse_caption_inverts_every_wording(seed, world):
    rng = np.random.default_rng(seed)
    emblem = sample_emblem(rng, world)
    assert parse_caption(caption_of(emblem, rng)) == emblem


@pytest.mark.parametrize(
    ("text", "emblem"),
    [
        ("a large red circle in the top left on a white background", RED_CIRCLE),
        ("White background with one BIG red circle at the top left.", RED_CIRCLE),
        ("a little red circle, white background", replace(RED_CIRCLE, size="small", position="center")),
        ("three large red crosses on white", replace(RED_CIRCLE, shape="cross", count=3, position=None)),
        (
            "outlines of two small teal stars on a mint background",
            Emblem("small", "teal", "star", "mint", 2, None, True, "drifted"),
        ),
    ],
)
def test_parse_caption_reads_wording_by_hand(text, emblem):
    assert parse_caption(text) == emblem


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a collage",
        "a red circle on a white background",  # no size
        "a large red circle",  # no ground
        "a large red blue circle on a white background",
        "a large red dog on a white background",
        "three large red circle on a white background",
        "large red circles on a white background",
        "a large red circle in the top on a white background",
        "two large red circles in the center on a white background",
        "a large teal circle on a white background",  # colour of one world, shape of the other
        "a large teal star on a mint background",  # that world has outlines only
        "a large outlined red circle on a white background",
    ],
)
def test_parse_caption_refuses_what_is_not_one_full_description(text):
    assert parse_caption(text) is None


def test_captions_of_one_emblem_vary():
    rng = np.random.default_rng(0)
    assert len({caption_of(RED_CIRCLE, rng) for _ in range(200)}) > 20


@pytest.mark.parametrize("world", WORLDS)
def test_sampling_reaches_every_word_of_the_world(world):
    rng = np.random.default_rng(1)
    emblems = [sample_emblem(rng, world) for _ in range(600)]
    words = WORLDS[world]
    assert {emblem.colour for emblem in emblems} == set(words.colours)
    assert {emblem.shape for emblem in emblems} == set(words.shapes)
    assert {emblem.background for emblem in emblems} == set(words.backgrounds)
    assert {emblem.count for emblem in emblems} == {1, 2, 3}
    assert all((emblem.position is None) == (emblem.count > 1) for emblem in emblems)


@pytest.mark.parametrize("world", WORLDS)
def test_named_colours_are_as_far_apart_as_the_reader_needs(world):
    words = WORLDS[world]
    colours, grounds = list(words.colours.values()), list(words.backgrounds.values())
    assert min(_distance(a, b) for a, b in itertools.combinations(colours, 2)) >= 90
    assert min(_distance(a, b) for a, b in itertools.combinations(grounds, 2)) >= 79
    assert min(_distance(a, b) for a, b in itertools.product(colours, grounds)) >= 100


def test_drifted_shares_no_colour_or_ground_with_base_and_has_new_shapes():
    base, drifted = WORLDS["base"], WORLDS["drifted"]
    assert not base.colours.keys() & drifted.colours.keys()
    assert not base.backgrounds.keys() & drifted.backgrounds.keys()
    assert len(set(drifted.shapes) - set(base.shapes)) == 4
    assert {emblem_at("drifted", 0, index).outline for index in range(20)} == {True}


def test_every_ground_of_drifted_is_far_from_every_ground_of_base():
    pairs = itertools.product(WORLDS["base"].backgrounds.values(), WORLDS["drifted"].backgrounds.values())
    assert min(_distance(a, b) for a, b in pairs) > 40


def test_drifted_emblems_are_mostly_hollow():
    for index in range(40):
        emblem = emblem_at("drifted", 4, index)
        lined, filled = draw(emblem, None), draw(replace(emblem, outline=False), None)
        ground = WORLDS["drifted"].backgrounds[emblem.background]
        inked = [np.abs(np.asarray(picture, dtype=float) - ground).sum() for picture in (lined, filled)]
        assert 0.2 < inked[0] / inked[1] < 0.85


@pytest.mark.parametrize("world", WORLDS)
def test_emblems_stay_inside_the_picture(world):
    for index in range(200):
        pixels = np.asarray(example(world, 2, index)[0]).astype(int)
        corner = pixels[0, 0]
        border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        assert np.abs(border - corner).max() <= 1


def test_draw_without_rng_is_centred_and_has_the_exact_colours():
    pixels = np.asarray(draw(replace(RED_CIRCLE, position="center"), None)).astype(int)
    assert tuple(pixels[32, 32]) == WORLDS["base"].colours["red"]
    assert tuple(pixels[0, 0]) == WORLDS["base"].backgrounds["white"]
    inked = np.abs(pixels - pixels[0, 0]).sum(-1)
    rows, columns = np.indices(inked.shape)
    middle = (inked * rows).sum() / inked.sum(), (inked * columns).sum() / inked.sum()
    np.testing.assert_allclose(middle, 31.5, atol=0.15)  # half a pixel of the fourfold picture is 0.125


@pytest.mark.parametrize("size_px", [16, 64, 96])
def test_pictures_have_the_size_that_was_asked_for(size_px):
    for world in ("base", "drifted", "collage"):
        picture, _ = example(world, 0, 0, size_px)
        assert (picture.size, picture.mode) == ((size_px, size_px), "RGB")


@pytest.mark.parametrize("shape", SHAPES)
def test_silhouettes_are_centred_and_of_radius_about_one(shape):
    points = silhouette(shape)
    np.testing.assert_allclose(points.min(0), -points.max(0), atol=1e-9)
    assert 0.85 <= np.abs(points).max() <= 1.05


def test_half_of_the_collages_lie_on_white():
    corners = [np.asarray(example("collage", 3, index)[0])[0, 0] for index in range(200)]
    assert 0.35 < np.mean([(corner == 255).all() for corner in corners]) < 0.65


def test_unknown_world_lists_the_known_ones():
    with pytest.raises(ValueError, match="base, drifted"):
        emblem_at("atlantis", 0, 0)
