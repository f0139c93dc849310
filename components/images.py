"""Is this file a usable picture, and what does the model see of it?

Everything a folder may hold becomes 8-bit RGB on white: EXIF orientation applied, palettes and alpha resolved, 16-bit
grey scaled (not clipped), CMYK converted. What cannot become that is a `PictureError` with a reason, never a crash.
Colour profiles are not applied, only the first frame of an animation is used, and floating-point TIFFs are refused.
Shape letters: B pictures, C channels, H rows, W columns.
"""

import io
import struct
import threading
import warnings
import zlib
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
from PIL import Image, UnidentifiedImageError

# Part of every key under which pixels or latents are stored: change it when `preprocess` or `decode` changes.
PREPROCESSING_VERSION = "crop1"
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")

ZERO_BYTES = "zero_bytes"
UNREADABLE = "unreadable"
TRUNCATED = "truncated"
TOO_SMALL = "too_small"
DECOMPRESSION_BOMB = "decompression_bomb"

EXIF_ORIENTATION = 0x0112
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What Pillow's decoders raise on damaged files.
DECODER_ERRORS = (
    *(OSError, EOFError, SyntaxError, ValueError, LookupError, TypeError, AttributeError),
    *(RuntimeError, ArithmeticError, struct.error, zlib.error),
)


class PictureError(ValueError):
    """The bytes are no usable picture; the message is the reason as counted in the data card."""


@dataclass(frozen=True)
class Limits:
    """What size of picture is accepted."""

    min_side_px: int = 16
    max_pixels: int = 50_000_000


def decode(content: bytes, limits: Limits = Limits()) -> Image.Image:
    """Return the upright RGB picture on white; PictureError with the reason when there is none."""
    if not content:
        raise PictureError(ZERO_BYTES)
    with _own_pixel_limit:
        try:
            image = Image.open(io.BytesIO(content), formats=FORMATS)
        except UnidentifiedImageError:
            raise PictureError(UNREADABLE) from None
        except DECODER_ERRORS as error:
            raise PictureError(_reason(error)) from error
        # Before the pixels are decoded: a bomb is told from its header.
        if image.width * image.height > limits.max_pixels:
            raise PictureError(DECOMPRESSION_BOMB)
        if min(image.size) < limits.min_side_px:
            raise PictureError(TOO_SMALL)
        try:
            image.load()
            return _upright(_on_white(image), image)
        except DECODER_ERRORS as error:
            raise PictureError(_reason(error)) from error


def preprocess(image: Image.Image, resolution_px: int) -> Image.Image:
    """Crop the centred square of an RGB picture and scale it to resolution_px with a Lanczos filter."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    if side == resolution_px:
        return square
    # Cropped first: `resize(box=...)` lets the filter reach beyond the box.
    return square.resize((resolution_px, resolution_px), Image.Resampling.LANCZOS)


def to_png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()


def to_pixels(images: Sequence[Image.Image]) -> np.ndarray:
    """Stack RGB pictures of one size as (B, C, H, W) float32 in [-1, 1]."""
    pixels_BHWC = np.stack([np.asarray(image.convert("RGB"), dtype=np.float32) for image in images])
    return np.ascontiguousarray(pixels_BHWC.transpose(0, 3, 1, 2)) / np.float32(127.5) - np.float32(1)


def _on_white(image: Image.Image) -> Image.Image:
    """Convert any mode to RGB, what is transparent on white; ValueError for a mode that has no 8-bit meaning."""
    if image.mode.startswith("I"):
        image = _from_16_bit(image)
    elif image.mode == "F":
        raise ValueError("floating-point pictures have no agreed white")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        coloured = image.convert("RGBA")
        white = Image.new("RGBA", coloured.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, coloured).convert("RGB")
    return image.convert("RGB")


def _from_16_bit(image: Image.Image) -> Image.Image:
    """Scale 0 ... 65535 to 0 ... 255; a transparent grey value becomes white, as it would on white."""
    grey = np.asarray(image).astype(np.int64)
    if grey.min() < 0 or grey.max() > 65535:
        raise ValueError("integer picture with values outside 16 bits")
    scaled = np.round(grey / 257).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        scaled[grey == transparent] = 255
    return Image.fromarray(scaled)


def _upright(picture: Image.Image, original: Image.Image) -> Image.Image:
    """Turn `picture` as the EXIF orientation of `original` says; damaged EXIF data means as stored."""
    try:
        turn = TURNS.get(original.getexif().get(EXIF_ORIENTATION, 1))
    except DECODER_ERRORS:
        turn = None
    return picture if turn is None else picture.transpose(turn)


def _reason(error: Exception) -> str:
    cut_short = isinstance(error, EOFError | struct.error) or "truncated" in str(error).lower()
    return TRUNCATED if cut_short else UNREADABLE


class _OwnPixelLimit:
    """Puts Pillow's limit and its warnings aside: `Limits.max_pixels` decides, from the header.

    Both belong to the process, so threads that decode at the same time share one putting aside: the first one in does
    it and the last one out undoes it. Each on its own, they would leave each other's state behind.
    """

    def __init__(self) -> None:
        self._lock, self._inside, self._undo = threading.Lock(), 0, ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._undo.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore")
                self._undo.callback(setattr, Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
                Image.MAX_IMAGE_PIXELS = None

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._undo.close()


_own_pixel_limit = _OwnPixelLimit()
