"""Pictures of every kind against pixel values known beforehand, and damaged bytes that must never crash."""

import io
import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from components import images
from components.images import TURNS, Limits, PictureError, decode, preprocess, to_pixels, to_png

RED, WHITE = (255, 0, 0), (255, 255, 255)
ANY_SIZE = Limits(min_side_px=1)
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixel(content: bytes, x: int = 0, y: int = 0) -> tuple[int, ...]:
    image = decode(content, ANY_SIZE)
    assert image.mode == "RGB"
    return image.getpixel((x, y))


def marked() -> Image.Image:
    """3 x 2 white with one red pixel at the top left."""
    image = Image.new("RGB", (3, 2), WHITE)
    image.putpixel((0, 0), RED)
    return image


def noise(seed: int = 0, size: tuple[int, int] = (48, 40)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(orientation: int) -> None:
    """A camera that turns the picture stores it turned back; the decoder must give the upright one."""
    upright = marked()
    undo = {6: 8, 8: 6}.get(orientation, orientation)
    stored = upright if orientation == 1 else upright.transpose(TURNS[undo])
    exif = Image.Exif()
    exif[0x0112] = orientation
    decoded = decode(encoded(stored, exif=exif), ANY_SIZE)
    assert np.array_equal(np.asarray(decoded), np.asarray(upright))


def test_exif_orientation_six_turns_the_stored_top_left_to_the_top_right() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    decoded = decode(encoded(marked(), exif=exif), ANY_SIZE)
    assert decoded.size == (2, 3)
    assert decoded.getpixel((1, 0)) == RED


def test_palette_without_and_with_transparency() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, 0, 0, 255])
    image.putdata([0, 1])
    assert pixel(encoded(image), 0) == RED
    assert pixel(encoded(image, transparency=0), 0) == WHITE
    assert pixel(encoded(image, transparency=0), 1) == (0, 0, 255)
    assert pixel(encoded(image, transparency=bytes([0, 128])), 1) == (127, 127, 255)
    assert pixel(encoded(image, "GIF", transparency=0), 0) == WHITE


@pytest.mark.parametrize(("alpha", "expected"), [(0, WHITE), (255, RED), (51, (255, 204, 204))])
def test_alpha_is_composited_on_white(alpha: int, expected: tuple[int, int, int]) -> None:
    assert pixel(encoded(Image.new("RGBA", (1, 1), (*RED, alpha)))) == expected


def test_greyscale_with_and_without_alpha_and_one_bit() -> None:
    assert pixel(encoded(Image.new("L", (1, 1), 90))) == (90, 90, 90)
    assert pixel(encoded(Image.new("LA", (1, 1), (0, 102)))) == (153, 153, 153)
    assert pixel(encoded(Image.new("1", (1, 1), 1))) == WHITE
    assert pixel(encoded(Image.new("L", (1, 1), 90), transparency=90)) == WHITE


@pytest.mark.parametrize(("value", "expected"), [(0, 0), (257 * 100, 100), (65535, 255), (32768, 128)])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_scaled_not_clipped(value: int, expected: int, kind: str) -> None:
    image = Image.fromarray(np.full((1, 1), value, dtype=np.uint16))
    assert image.mode == "I;16"
    assert pixel(encoded(image, kind)) == (expected,) * 3


def test_integer_mode_is_read_as_sixteen_bit_and_refused_beyond() -> None:
    assert pixel(encoded(Image.new("I", (1, 1), 257 * 30), "TIFF")) == (30, 30, 30)
    with pytest.raises(PictureError, match=r"^unreadable$"):
        decode(encoded(Image.new("I", (1, 1), 70000), "TIFF"), ANY_SIZE)


def test_transparent_sixteen_bit_grey_is_white() -> None:
    image = Image.fromarray(np.full((1, 1), 300, dtype=np.uint16))
    assert pixel(encoded(image, transparency=300)) == WHITE


def test_cmyk_becomes_the_colours_it_prints() -> None:
    for ink, expected in (((0, 255, 255, 0), RED), ((0, 0, 0, 255), (0, 0, 0)), ((0, 0, 0, 0), WHITE)):
        assert pixel(encoded(Image.new("CMYK", (8, 8), ink), "TIFF")) == expected
        found = np.array(pixel(encoded(Image.new("CMYK", (8, 8), ink), "JPEG", quality=95)))
        assert np.abs(found - expected).max() <= 3  # JPEG rounding


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "zero_bytes"),
        (b"this is text, whatever the name says", "unreadable"),
        (b"\x89PNG\r\n\x1a\n", "unreadable"),
        (encoded(noise())[:1500], "truncated"),
        (encoded(noise(), "JPEG")[:700], "truncated"),
        (encoded(noise(size=(40, 15))), "too_small"),
        (encoded(Image.new("1", (1100, 1000))), "decompression_bomb"),
        (encoded(Image.new("F", (32, 32)), "TIFF"), "unreadable"),
    ],
)
def test_unusable_bytes_are_rejected_with_the_reason(content: bytes, reason: str) -> None:
    with pytest.raises(PictureError, match=f"^{reason}$"):
        decode(content, Limits(min_side_px=16, max_pixels=1_000_000))


def test_the_pixel_limit_is_ours_and_pillows_is_left_as_it_was() -> None:
    before = Image.MAX_IMAGE_PIXELS
    large = Image.new("1", (20_000, 10_000))  # beyond twice Pillow's own limit, 25 MB in memory
    with pytest.raises(PictureError, match="decompression_bomb"):
        decode(encoded(large), Limits(max_pixels=199_999_999))
    assert before == Image.MAX_IMAGE_PIXELS


def test_pillows_limit_is_left_as_it_was_by_threads_that_overlap() -> None:
    before, inside = Image.MAX_IMAGE_PIXELS, threading.Barrier(2)
    first_out = threading.Event()

    def first() -> None:
        with images._own_pixel_limit:
            inside.wait(30)
        first_out.set()

    thread = threading.Thread(target=first)
    thread.start()
    with images._own_pixel_limit:
        inside.wait(30)
        assert first_out.wait(30) and Image.MAX_IMAGE_PIXELS is None, "the other one is still inside"
    thread.join()
    assert before == Image.MAX_IMAGE_PIXELS


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(FORMATS),
    cut=st.floats(0, 1),
    changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=8),
)
def test_damaged_bytes_give_a_picture_or_a_reason_and_nothing_else(
    kind: str, cut: float, changes: list[tuple[float, int]]
) -> None:
    content = bytearray(encoded(noise(), kind))
    for place, value in changes:
        content[int(place * min(len(content), 200))] = value
    try:
        image = decode(bytes(content[: max(1, int(cut * len(content)))]))
    except PictureError as error:
        assert str(error) in {"unreadable", "truncated", "too_small", "decompression_bomb"}
    else:
        assert image.mode == "RGB"


def test_preprocess_keeps_the_centre_square() -> None:
    image = Image.new("RGB", (40, 20), (0, 0, 255))
    image.paste(RED, (10, 0, 30, 20))
    for resolution_px in (10, 20, 30):
        square = preprocess(image, resolution_px)
        assert square.size == (resolution_px, resolution_px)
        assert set(square.get_flattened_data()) == {RED}


def test_pixels_span_minus_one_to_one_and_survive_png() -> None:
    images = [Image.new("RGB", (2, 2), colour) for colour in ((0, 0, 0), (255, 255, 255), (255, 0, 51))]
    stored = [Image.open(io.BytesIO(to_png(image))) for image in images]
    pixels_BCHW = to_pixels(stored)
    assert pixels_BCHW.shape == (3, 3, 2, 2)
    assert pixels_BCHW.dtype == np.float32
    np.testing.assert_allclose(pixels_BCHW[:, :, 0, 0], [[-1, -1, -1], [1, 1, 1], [1, -1, -0.6]], atol=1e-6)
