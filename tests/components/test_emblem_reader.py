"""The exact reader: right on every drawn picture, patient with mild artefacts, deaf to wrong or broken ones."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageFilter

from components.emblem_reader import ATTRIBUTES, disagreements, read, shows
from components.emblems import POSITIONS, SIZES, WORLDS, Emblem, draw, emblem_at, rng_at

RED_SQUARE = Emblem("large", "red", "square", "white", 1, "center", False, "base")
TEAL_STARS = Emblem("large", "teal", "star", "mint", 2, None, True, "drifted")


def _drawn(world, num, seed=11):
    emblems = [emblem_at(world, seed, index) for index in range(num)]
    return [(emblem, draw(emblem, rng_at(seed + 1, index))) for index, emblem in enumerate(emblems)]


def _worn(picture, rng, blur_px=0.6, noise=6.0, tint=0.0):
    """A picture as a small autoencoder gives it back."""
    pixels = np.asarray(picture.filter(ImageFilter.GaussianBlur(blur_px)), dtype=float)
    pixels = pixels + rng.normal(0, noise, pixels.shape) + rng.uniform(-tint, tint, 3)
    return np.clip(pixels.round(), 0, 255).astype(np.uint8)


def _variants(emblem):
    """(attribute, emblem) for every other value of every single attribute."""
    words = WORLDS[emblem.world]
    values = {
        "size": SIZES,
        "colour": words.colours,
        "shape": words.shapes,
        "background": words.backgrounds,
        "outline": (False, True),
        "position": POSITIONS if emblem.count == 1 else (),
    }
    for name, choices in values.items():
        for value in choices:
            if value != getattr(emblem, name):
                yield name, replace(emblem, **{name: value})
    for count in {1, 2, 3} - {emblem.count}:
        yield "count", replace(emblem, count=count, position="center" if count == 1 else None)


@pytest.mark.parametrize("world", WORLDS)
def test_every_drawn_emblem_is_read_exactly(world):
    for emblem, picture in _drawn(world, 400):
        assert disagreements(picture, emblem) == (), emblem


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("tint", [0.0, 20.0])
def test_noise_soft_edges_and_tint_are_tolerated(world, tint):
    rng = np.random.default_rng(0)
    right = [shows(_worn(picture, rng, tint=tint), emblem) for emblem, picture in _drawn(world, 200)]
    assert np.mean(right) >= 0.99  # measured 1.0 on 3000 of each world, with and without tint


@pytest.mark.parametrize("world", WORLDS)
def test_each_changed_attribute_is_named_and_rejected(world):
    for emblem, picture in _drawn(world, 12, seed=21):
        for name, other in _variants(emblem):
            assert name in disagreements(picture, other), (name, emblem, other)


@pytest.mark.parametrize("world", WORLDS)
def test_a_picture_that_differs_in_one_attribute_is_rejected(world):
    for index in range(10):
        emblem = emblem_at(world, 31, index)
        for name, other in _variants(emblem):
            if name == "outline" and "ring" in (emblem.shape, other.shape):
                continue  # a ring is a line in either case
            assert not shows(draw(other, rng_at(32, index)), emblem), (name, emblem, other)


def test_reading_says_what_is_there():
    seen = read(draw(RED_SQUARE, None))
    assert {name: getattr(seen, name) for name in ATTRIBUTES} == {
        name: getattr(RED_SQUARE, name) for name in ATTRIBUTES
    }


@pytest.mark.parametrize("size_px", [48, 96, 128])
def test_pictures_of_other_sizes_are_read(size_px):
    for emblem in (RED_SQUARE, TEAL_STARS):
        assert shows(draw(emblem, None, size_px), emblem)


def test_arrays_and_pictures_read_alike():
    picture = draw(TEAL_STARS, rng_at(0, 0))
    assert read(np.asarray(picture), "drifted") == read(picture, "drifted")


@pytest.mark.parametrize("shift_px", [(2, 0), (-2, 1), (0, -2)])
def test_small_shifts_are_tolerated(shift_px):
    for emblem in (RED_SQUARE, replace(RED_SQUARE, position="top left"), replace(RED_SQUARE, count=3, position=None)):
        moved = np.roll(np.asarray(draw(emblem, None)), shift_px, axis=(0, 1))
        assert shows(moved, emblem)


def _broken_pictures():
    square = np.asarray(draw(RED_SQUARE, None)).copy()
    red, white = square[32, 32].copy(), square[0, 0].copy()
    halved = square.copy()
    halved[30:34] = white
    torn = square.copy()
    torn[16:32, 16:32] = white
    two_coloured = square.copy()
    two_coloured[:32][square[:32, :, 1] < 100] = WORLDS["base"].colours["blue"]
    surplus = square.copy()
    surplus[4:9, 4:9] = red
    pale_surplus = square.copy()
    pale_surplus[3:11, 3:11] = WORLDS["base"].backgrounds["sky"]
    pierced = square.copy()
    pierced[27:37, 27:37] = white
    mush = np.asarray(draw(RED_SQUARE, None).filter(ImageFilter.GaussianBlur(3.5)))
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    blank = np.full((64, 64, 3), white, dtype=np.uint8)
    striped = square.copy()
    striped[:, 58:] = WORLDS["base"].backgrounds["sky"]
    return {
        "halved": halved,
        "torn": torn,
        "two_coloured": two_coloured,
        "surplus": surplus,
        "pale_surplus": pale_surplus,
        "pierced": pierced,
        "mush": mush,
        "noise": noise,
        "blank": blank,
        "striped": striped,
    }


@pytest.mark.parametrize("fault", list(_broken_pictures()))
def test_broken_pictures_are_rejected(fault):
    assert not shows(_broken_pictures()[fault], RED_SQUARE)


def test_merged_objects_are_rejected():
    pair = replace(RED_SQUARE, count=2, position=None)
    pixels = np.asarray(draw(pair, None)).copy()
    assert shows(pixels, pair)
    pixels[28:36, 20:44] = pixels[32, 16]
    assert {"count", "shape"} <= set(disagreements(pixels, pair))


def test_a_broken_outline_is_rejected():
    emblem = replace(TEAL_STARS, count=1, position="center", shape="square")
    pixels = np.asarray(draw(emblem, None)).copy()
    assert shows(pixels, emblem)
    pixels[:32, 28:36] = pixels[0, 0]
    assert "shape" in disagreements(pixels, emblem)


def test_blank_picture_reads_as_no_object():
    seen = read(Image.new("RGB", (64, 64), WORLDS["base"].backgrounds["sky"]))
    assert (seen.background, seen.count, seen.colour, seen.position) == ("sky", 0, "unknown", None)


def test_a_picture_that_is_not_square_is_refused():
    with pytest.raises(ValueError, match="square picture, found 64 x 32"):
        read(Image.new("RGB", (64, 32)))
