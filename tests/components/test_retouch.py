"""Retouching by name: each step does what its name says, and nothing happens unasked."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from components.errors import InputError
from components.retouch import RETOUCHES, check_names, retouch


def noise(seed: int = 0, low: int = 0, high: int = 256) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(low, high, (20, 30, 3), dtype=np.uint8))


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture, np.float64)


def test_nothing_is_done_unasked() -> None:
    picture = noise()
    assert retouch(picture, []) is picture


@pytest.mark.parametrize("factor", [2, 4])
def test_upscaled_picture_shows_the_same_in_more_pixels(factor: int) -> None:
    smooth = Image.linear_gradient("L").resize((32, 24)).convert("RGB")
    larger = retouch(smooth, [f"upscale_{factor}x"])
    assert larger.size == (32 * factor, 24 * factor)
    # Down again by averaging: Lanczos overshoots by a few levels at most on a gradient.
    assert np.abs(pixels(larger.resize((32, 24), Image.Resampling.BOX)) - pixels(smooth)).max() <= 4


def test_denoise_removes_specks_and_keeps_an_edge() -> None:
    clean = Image.new("RGB", (20, 20), "white")
    clean.paste((200, 0, 0), (10, 0, 20, 20))
    specked = clean.copy()
    for at in ((3, 3), (15, 7), (6, 16)):
        specked.putpixel(at, (0, 255, 0))
    assert retouch(specked, ["denoise"]).tobytes() == clean.tobytes()


def test_contrast_spreads_a_flat_picture_over_the_range_and_keeps_grey_grey() -> None:
    stretched = pixels(retouch(noise(low=100, high=140), ["contrast"]))
    assert stretched.min() < 20 and stretched.max() > 235
    grey = Image.linear_gradient("L").point(lambda value: 100 + value // 8).convert("RGB")
    channels = pixels(retouch(grey, ["contrast"]))
    assert np.ptp(channels, axis=2).max() == 0 and np.ptp(channels) > 240


def test_colour_takes_out_a_cast_within_limits() -> None:
    cast = pixels(noise(low=60, high=120)) * (1.3, 1.0, 0.9)
    balanced = pixels(retouch(Image.fromarray(cast.astype(np.uint8)), ["colour"])).mean((0, 1))
    assert np.ptp(cast.mean((0, 1))) > 30 and np.ptp(balanced) < 1.5
    blue = pixels(retouch(Image.new("RGB", (4, 4), (0, 10, 250)), ["colour"]))[0, 0]
    assert blue[2] > 5 * blue[1] and blue[0] == 0, "what is meant to be blue stays blue"


def test_vivid_strengthens_saturation_and_sharpen_edges() -> None:
    dull = Image.new("RGB", (4, 4), (120, 100, 100))
    assert np.ptp(pixels(retouch(dull, ["vivid"]))[0, 0]) > 20
    step = Image.new("RGB", (20, 4), (100, 100, 100))
    step.paste((150, 150, 150), (10, 0, 20, 4))
    assert np.ptp(pixels(retouch(step, ["sharpen"]))) > 50


def test_steps_are_applied_in_the_order_of_their_names() -> None:
    first, second = retouch(noise(), ["denoise", "vivid"]), retouch(noise(), ["vivid", "denoise"])
    assert first.tobytes() == retouch(retouch(noise(), ["denoise"]), ["vivid"]).tobytes() != second.tobytes()


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(sorted(RETOUCHES)), st.integers(1, 9), st.integers(1, 9), st.integers(0, 255))
def test_any_picture_stays_rgb_and_the_input_as_it_was(name: str, width: int, height: int, level: int) -> None:
    picture = Image.new("RGB", (width, height), (level, 255 - level, 0))
    before = picture.tobytes()
    changed = retouch(picture, [name])
    assert changed.mode == "RGB" and changed.width % width == 0 and picture.tobytes() == before
    assert changed.tobytes() == retouch(picture, [name]).tobytes()


def test_wrong_names_are_refused_with_the_right_ones() -> None:
    with pytest.raises(InputError, match=r"upscale_2x, upscale_4x, denoise, .*; found 'blur'"):
        check_names(["denoise", "blur"])
    with pytest.raises(InputError, match="each name once"):
        retouch(noise(), ["denoise", "denoise"])
