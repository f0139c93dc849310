"""Which emblem does a picture show? Told from the pixels alone, exactly, without any network.

The judge of a generator trained on `emblems`: each attribute is read by geometry and nearest colour, and a picture
that is not clean enough to say reads "unknown", which agrees with no emblem. Soft edges, a few levels of noise, tints
and small shifts are tolerated; merged, broken, smeared or surplus objects are not.
Steps: ground from the border; objects as connected pixels far from the ground; silhouette (holes filled) against the
drawn silhouettes by intersection over union; holes tell an outline from a filled shape. All lengths are of 64 px.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image
from scipy import ndimage

from components.emblem_shapes import RGB, SUPERSAMPLING, shape_mask, silhouette
from components.emblems import SIZES, Emblem, radius_of, stroke_of, world_named

UNKNOWN = "unknown"
SIDE_PX = 64
GROUND_TOLERANCE = 50.0  # RGB distance; named grounds are at least 79 apart
COLOUR_TOLERANCE = 62.0  # RGB distance; named colours are at least 90 apart
MIN_CONTRAST = 55.0  # RGB distance between object and ground below which nothing is seen
SPECK_PX = 10  # connected areas up to this many pixels are artefacts; the smallest emblem covers 50
MIN_OVERLAP = 0.78  # intersection over union with the drawn silhouette
MIN_LINE_OVERLAP = 0.5  # the same for lines, a px or two thick, where half a px of difference weighs more
SIZE_TOLERANCE = 1.25  # a radius may be this many times smaller or larger than the nominal one of its size
MAX_SOFT_BAND_PX = 2.0  # mean width of the passage between object and ground; drawn edges have 0.6, mush more than 2.5
CENTER_HALF_WIDTH_PX = 6.5  # drawn emblems lie within 2 or beyond 10 of the middle
ATTRIBUTES = ("background", "count", "colour", "shape", "size", "position", "outline")


@dataclass(frozen=True)
class Reading:
    """What was seen; a word is "unknown" where the picture does not say, or where its objects differ."""

    background: str
    count: int
    colour: str
    shape: str
    size: str
    position: str | None  # None where count is not 1
    outline: bool | None  # None where the shape is unknown


@dataclass(frozen=True)
class _Thing:
    """One connected object."""

    colour: str
    shape: str
    outline: bool | None
    radius_px: float
    centre_px: tuple[float, float]  # x, y from the middle of the picture


def read(image: Image.Image | np.ndarray, world: str = "base") -> Reading:
    """Reads a square RGB picture of any size with the words of one world."""
    words = world_named(world)
    pixels_HWC = _pixels_of(image)
    ground = _ground_of(pixels_HWC)
    if ground is None:
        return Reading(UNKNOWN, 0, UNKNOWN, UNKNOWN, UNKNOWN, None, None)
    coverage_HW, objects_HW = _objects_of(np.linalg.norm(pixels_HWC - ground, axis=-1))
    labels_HW, _ = ndimage.label(objects_HW)
    things = []
    for nth, window in enumerate(ndimage.find_objects(labels_HW), start=1):
        inside_HW = labels_HW == nth
        if inside_HW[window].sum() > SPECK_PX:
            colour = _colour_of(pixels_HWC, ground, inside_HW, words.colours)
            things.append(_look_at(inside_HW, coverage_HW, window, colour, words.shapes))
    outlines = {thing.outline for thing in things}
    return Reading(
        background=_nearest(ground, words.backgrounds, GROUND_TOLERANCE),
        count=len(things),
        colour=_agreed(thing.colour for thing in things),
        shape=_agreed(thing.shape for thing in things),
        size=_agreed(_size_of(thing, len(things)) for thing in things),
        position=_position_of(things[0]) if len(things) == 1 else None,
        outline=outlines.pop() if len(outlines) == 1 else None,
    )


def disagreements(image: Image.Image | np.ndarray, emblem: Emblem) -> tuple[str, ...]:
    """The attributes that the picture does not show as the emblem has them, in the order of `ATTRIBUTES`."""
    seen = read(image, emblem.world)
    return tuple(name for name in ATTRIBUTES if getattr(seen, name) != getattr(emblem, name))


def shows(image: Image.Image | np.ndarray, emblem: Emblem) -> bool:
    """Whether every attribute of the emblem is there, all together."""
    return not disagreements(image, emblem)


def _pixels_of(image: Image.Image | np.ndarray) -> np.ndarray:
    picture = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    if picture.width != picture.height:
        raise ValueError(f"expected a square picture, found {picture.width} x {picture.height}: crop it first")
    picture = picture.convert("RGB")
    if picture.width != SIDE_PX:
        picture = picture.resize((SIDE_PX, SIDE_PX), Image.Resampling.BOX)
    return np.asarray(picture, dtype=np.float64)


def _nearest(colour: np.ndarray, palette: dict[str, RGB], tolerance: float) -> str:
    distances = {name: float(np.linalg.norm(colour - rgb)) for name, rgb in palette.items()}
    name = min(distances, key=distances.__getitem__)
    return name if distances[name] <= tolerance else UNKNOWN


def _agreed(words: Iterable[str]) -> str:
    said = set(words)
    return said.pop() if len(said) == 1 else UNKNOWN


def _ground_of(pixels_HWC: np.ndarray) -> np.ndarray | None:
    """The median colour of the border, or None where a tenth of the border has another colour."""
    frame_HW = np.ones(pixels_HWC.shape[:2], dtype=bool)
    frame_HW[1:-1, 1:-1] = False
    border = pixels_HWC[frame_HW]
    ground = np.median(border, axis=0)
    alike = np.linalg.norm(border - ground, axis=-1) < GROUND_TOLERANCE
    return ground if alike.mean() > 0.9 else None


def _objects_of(contrast_HW: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How much of each pixel is object, in [0, 1], and which pixels are: those covered by half, or pale but apart.

    Where edges are smeared all pixels are object, so that nothing can be read from the picture.
    """
    strong = contrast_HW[contrast_HW > MIN_CONTRAST]
    if len(strong) <= SPECK_PX:
        return np.zeros_like(contrast_HW), np.zeros_like(contrast_HW, dtype=bool)
    coverage_HW = np.clip(contrast_HW / np.percentile(strong, 85), 0, 1)
    coverage_HW[coverage_HW < 0.15] = 0  # noise on the ground
    objects_HW = coverage_HW > 0.5
    pale_HW = (contrast_HW > MIN_CONTRAST) & ~ndimage.binary_dilation(objects_HW, iterations=2)
    objects_HW |= ndimage.binary_opening(pale_HW)
    edge_px = (objects_HW & ~ndimage.binary_erosion(objects_HW, np.ones((3, 3)), border_value=1)).sum()
    soft_px = ((coverage_HW > 0.25) & (coverage_HW < 0.75)).sum()
    return coverage_HW, objects_HW if soft_px <= MAX_SOFT_BAND_PX * edge_px else np.ones_like(objects_HW)


def _colour_of(pixels_HWC: np.ndarray, ground: np.ndarray, inside_HW: np.ndarray, palette: dict[str, RGB]) -> str:
    """The palette's name for the inner pixels of an object; a thin line has none, its purest third stands in."""
    core = pixels_HWC[ndimage.binary_erosion(inside_HW)]
    if len(core) < 12:
        body = pixels_HWC[inside_HW]
        contrast = np.linalg.norm(body - ground, axis=-1)
        core = body[contrast >= np.percentile(contrast, 67)]
    colour = np.median(core, axis=0)
    alike = np.linalg.norm(core - colour, axis=-1) < COLOUR_TOLERANCE
    return _nearest(colour, palette, COLOUR_TOLERANCE) if alike.mean() > 0.85 else UNKNOWN


def _look_at(
    inside_HW: np.ndarray, coverage_HW: np.ndarray, window: tuple[slice, slice], colour: str, shapes: tuple[str, ...]
) -> _Thing:
    """Draws each shape at the centroid and area of an object; the one that covers its silhouette best is its shape."""
    rows, columns = window
    middle = ((columns.start + columns.stop - SIDE_PX) / 2, (rows.start + rows.stop - SIDE_PX) / 2)
    around = tuple(slice(max(side.start - 4, 0), side.stop + 4) for side in window)
    inside_HW, coverage_HW = inside_HW[around], coverage_HW[around]
    filled_HW = ndimage.binary_fill_holes(inside_HW)
    centroid = np.array(ndimage.center_of_mass(filled_HW)[::-1]) + 0.5
    fits = {}
    for shape in shapes:
        if shape == "ring":
            continue  # a circle, until its hole is looked at
        unit_area, unit_centroid = _area_and_centroid(shape)
        radius_px = float(np.sqrt(filled_HW.sum() / unit_area))
        polygon = silhouette(shape) * radius_px + (centroid - unit_centroid * radius_px)
        fits[shape] = _overlap(filled_HW, _drawn(polygon, None, filled_HW.shape) > 0.5), radius_px, polygon
    shape = max(fits, key=lambda name: fits[name][0])
    overlap, radius_px, polygon = fits[shape]
    if overlap < MIN_OVERLAP:
        return _Thing(colour, UNKNOWN, None, radius_px, middle)
    near_HW = ndimage.binary_dilation(filled_HW, iterations=2)
    hollow = "ring" if shape == "circle" and "ring" in shapes else shape
    line = _overlap(coverage_HW * near_HW, _drawn(polygon, stroke_of(hollow, True, radius_px), filled_HW.shape))
    solid = _overlap(coverage_HW * near_HW, _drawn(polygon, None, filled_HW.shape))
    if line > solid:
        shape, outline = (hollow, hollow != "ring") if line >= MIN_LINE_OVERLAP else (UNKNOWN, None)
    else:
        whole = solid >= MIN_OVERLAP and (filled_HW & ~inside_HW).sum() <= SPECK_PX
        shape, outline = (shape, False) if whole else (UNKNOWN, None)
    return _Thing(colour, shape, outline, radius_px, middle)


@lru_cache(maxsize=16)
def _area_and_centroid(shape: str) -> tuple[float, np.ndarray]:
    """Of the silhouette of radius 1, by the shoelace formula."""
    here = silhouette(shape)
    onward = np.roll(here, -1, axis=0)
    cross = here[:, 0] * onward[:, 1] - onward[:, 0] * here[:, 1]
    centroid = ((here + onward) * cross[:, None]).sum(0) / (3 * cross.sum())
    return abs(float(cross.sum())) / 2, centroid


def _drawn(polygon: np.ndarray, stroke_px: float | None, size_HW: tuple[int, int]) -> np.ndarray:
    """How much of each pixel a polygon covers, in [0, 1]."""
    fine_WH = (size_HW[1] * SUPERSAMPLING, size_HW[0] * SUPERSAMPLING)
    stroke = None if stroke_px is None else stroke_px * SUPERSAMPLING
    return np.asarray(shape_mask(fine_WH, polygon * SUPERSAMPLING - 0.5, stroke).reduce(SUPERSAMPLING)) / 255


def _overlap(seen_HW: np.ndarray, drawn_HW: np.ndarray) -> float:
    """Intersection over union of two coverages."""
    return float(np.minimum(seen_HW, drawn_HW).sum() / max(np.maximum(seen_HW, drawn_HW).sum(), 1))


def _size_of(thing: _Thing, count: int) -> str:
    ratios = {size: thing.radius_px / radius_of(size, count) for size in SIZES}
    size = min(ratios, key=lambda name: abs(np.log(ratios[name])))
    return size if 1 / SIZE_TOLERANCE < ratios[size] < SIZE_TOLERANCE else UNKNOWN


def _position_of(thing: _Thing) -> str:
    x, y = thing.centre_px
    away = (abs(x) > CENTER_HALF_WIDTH_PX, abs(y) > CENTER_HALF_WIDTH_PX)
    if away[0] != away[1]:
        return UNKNOWN
    return f"{'top' if y < 0 else 'bottom'} {'left' if x < 0 else 'right'}" if away[0] else "center"
