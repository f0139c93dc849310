"""What may be done to a finished picture, by name: larger, smoother, other colours, more contrast. Off unless asked.

Pure functions from an 8-bit RGB picture to one, in Pillow; no randomness, no model. They change what the model drew, so
they are applied only when a request names them, in the order it names them.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType

from PIL import Image, ImageEnhance, ImageFilter, ImageOps, ImageStat

from components.errors import InputError

Retouch = Callable[[Image.Image], Image.Image]

MEDIAN_PX = 3
"""Side of the square whose median replaces a pixel: removes specks, keeps edges."""
CLIPPED_SHARE = 0.005
"""Of the darkest and of the brightest pixels, that may become black or white, so that one pixel decides nothing."""
STRONGER = 1.25
"""Factor on the distance from grey (saturation) in `vivid`."""
MOST_CAST = 1.5
"""Largest factor on a channel: a picture that is meant to be blue must not be turned grey."""
SHARPEN_RADIUS_PX, SHARPEN_STRENGTH, SHARPEN_THRESHOLD = 1.0, 0.8, 3


def upscale(picture: Image.Image, factor: int) -> Image.Image:
    """Enlarge both sides by a whole factor with a Lanczos filter."""
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.LANCZOS)


def denoise(picture: Image.Image) -> Image.Image:
    """Replace each pixel by the median of its neighbourhood."""
    return picture.filter(ImageFilter.MedianFilter(MEDIAN_PX))


def sharpen(picture: Image.Image) -> Image.Image:
    """Raise the contrast of edges (unsharp mask)."""
    return picture.filter(ImageFilter.UnsharpMask(SHARPEN_RADIUS_PX, round(100 * SHARPEN_STRENGTH), SHARPEN_THRESHOLD))


def stretch_contrast(picture: Image.Image) -> Image.Image:
    """Spread brightness over the whole range, all channels alike, so that hues stay."""
    return ImageOps.autocontrast(picture, cutoff=100 * CLIPPED_SHARE, preserve_tone=True)


def balance_colour(picture: Image.Image) -> Image.Image:
    """Take out a colour cast: scale channels so that their means meet (grey world), within `MOST_CAST`."""
    means = ImageStat.Stat(picture).mean
    grey = sum(means) / len(means)
    channels = []
    for channel, mean in zip(picture.split(), means, strict=True):
        factor = min(MOST_CAST, max(1 / MOST_CAST, grey / mean)) if mean else 1.0
        channels.append(channel.point([min(255, round(value * factor)) for value in range(256)]))
    return Image.merge("RGB", channels)


def make_vivid(picture: Image.Image) -> Image.Image:
    """Strengthen saturation by a quarter."""
    return ImageEnhance.Color(picture).enhance(STRONGER)


ENLARGES: Mapping[str, int] = MappingProxyType({"upscale_2x": 2, "upscale_4x": 4})
"""Factor on both sides of the steps that have one."""
RETOUCHES: Mapping[str, Retouch] = MappingProxyType(
    {
        **{name: partial(upscale, factor=factor) for name, factor in ENLARGES.items()},
        "denoise": denoise,
        "sharpen": sharpen,
        "contrast": stretch_contrast,
        "colour": balance_colour,
        "vivid": make_vivid,
    }
)
"""What `postprocess` may name."""


def check_names(names: Sequence[str]) -> None:
    """InputError with all names when one is unknown or given twice."""
    known = ", ".join(RETOUCHES)
    for name in names:
        if name not in RETOUCHES:
            raise InputError(f"postprocess expected names from {known}; found {name!r}")
    if len(set(names)) < len(names):
        raise InputError(f"postprocess expected each name once, found {', '.join(names)}")


def retouch(picture: Image.Image, names: Sequence[str]) -> Image.Image:
    """Apply the named steps in order to an RGB picture; no names give the picture back untouched."""
    check_names(names)
    for name in names:
        picture = RETOUCHES[name](picture)
    return picture
