"""How is one shape drawn, and what does a free collage of shapes look like?

The silhouettes that emblems are made of, painted antialiased by supersampling, and the pictures of the `collage` world:
icon-like heaps of shapes in any colour, turn and fill, half of them on white. This module knows no words:
`emblems` says what is shown, `emblem_reader` compares with the same silhouettes.
Shapes are polygons (n, 2) with x to the right and y down; colours are RGB in 0 to 255; all randomness is the caller's.
"""

import colorsys
from functools import lru_cache

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

RGB = tuple[int, int, int]

SUPERSAMPLING = 4
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring", "star", "heart", "crescent", "arrow")
LATER_SHAPES = ("house",)
"""Not in collages, whose draws must stay as they were when the autoencoder was trained on them."""
RING_WIDTH = 0.4  # of the radius: a ring is a circle with a stroke of this width


@lru_cache(maxsize=16)
def silhouette(shape: str) -> np.ndarray:
    """The outer polygon of a shape of radius about 1, (n, 2), with its bounding box centred on 0."""
    turn = np.linspace(0, 2 * np.pi, 72, endpoint=False)
    if shape in ("circle", "ring"):
        points = np.stack([np.cos(turn), np.sin(turn)], axis=1) * 0.98
    elif shape == "square":
        points = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * 0.87
    elif shape == "triangle":
        points = np.array([(0, -0.9), (1, 0.86), (-1, 0.86)])
    elif shape == "diamond":
        points = np.array([(0, -1), (0.82, 0), (0, 1), (-0.82, 0)])
    elif shape == "cross":
        arm, reach = 0.33, 0.97
        quarter = np.array([(arm, -reach), (arm, -arm), (reach, -arm)])
        points = np.concatenate([quarter @ _quarter_turns(k) for k in range(4)])
    elif shape == "star":
        angles = np.arange(10) * np.pi / 5 - np.pi / 2
        rays = np.where(np.arange(10) % 2 == 0, 1.06, 0.52)
        points = np.stack([np.cos(angles) * rays, np.sin(angles) * rays], axis=1)
    elif shape == "heart":
        heart_y = 5 * np.cos(2 * turn) + 2 * np.cos(3 * turn) + np.cos(4 * turn) - 13 * np.cos(turn)
        points = np.stack([16 * np.sin(turn) ** 3, heart_y], axis=1) / 16.5
    elif shape == "crescent":
        points = _crescent()
    elif shape == "arrow":
        head_x, shaft = -0.02, 0.44
        half = [(-1.0, -shaft), (head_x, -shaft), (head_x, -0.98), (1.0, 0.0)]
        points = np.array(half + [(x, -y) for x, y in half[-2::-1]])
    elif shape == "house":
        points = np.array([(0, -1), (0.9, -0.2), (0.9, 0.9), (-0.9, 0.9), (-0.9, -0.2)])
    else:
        raise ValueError(f"expected one of the shapes {', '.join(SHAPES + LATER_SHAPES)}, found {shape!r}")
    return points - (points.min(0) + points.max(0)) / 2


def _quarter_turns(k: int) -> np.ndarray:
    cos, sin = ((1, 0), (0, 1), (-1, 0), (0, -1))[k]
    return np.array([(cos, sin), (-sin, cos)])


def _crescent() -> np.ndarray:
    """A moon open to the right: an arc of the unit circle, and back from tip to tip round a centre further right."""
    opening, inner_x = np.radians(46), 0.8
    outer = np.linspace(opening, 2 * np.pi - opening, 48)
    tip_x, tip_y = np.cos(opening) - inner_x, np.sin(opening)
    start = np.arctan2(tip_y, tip_x)
    inner = np.linspace(2 * np.pi - start, start, 32)[1:-1]
    back = np.stack([inner_x + np.cos(inner) * np.hypot(tip_x, tip_y), np.sin(inner) * np.hypot(tip_x, tip_y)], axis=1)
    return np.concatenate([np.stack([np.cos(outer), np.sin(outer)], axis=1), back])


def shape_mask(size: tuple[int, int], polygon: np.ndarray, stroke: float | None) -> Image.Image:
    """The pixels of a polygon as an "L" mask; a stroke of that many pixels lies wholly inside the polygon."""
    corners = [(float(x), float(y)) for x, y in polygon]
    mask = Image.new("L", size)
    ImageDraw.Draw(mask).polygon(corners, fill=255)
    if stroke is None:
        return mask
    edge = Image.new("L", size)
    pen = ImageDraw.Draw(edge)
    pen.line([*corners, corners[0]], fill=255, width=round(2 * stroke))
    for corner in corners:  # Pillow's own joints leave gaps between the short sides of a circle
        pen.circle(corner, stroke, fill=255)
    return ImageChops.darker(mask, edge)


def paint(canvas: Image.Image, polygon: np.ndarray, fill: RGB | Image.Image, stroke: float | None = None) -> None:
    """Paints a polygon onto the canvas (changed), flat or through a picture of the canvas size."""
    left, top = np.floor(polygon.min(0)).astype(int) - 1
    right, bottom = np.ceil(polygon.max(0)).astype(int) + 2
    mask = shape_mask((right - left, bottom - top), polygon - (left, top), stroke)
    if isinstance(fill, Image.Image):
        fill = fill.crop((left, top, right, bottom))
        canvas.paste(fill, (left, top), mask)
    else:
        canvas.paste(fill, (left, top, right, bottom), mask)


def draw_collage(rng: np.random.Generator, size_px: int = 64) -> Image.Image:
    """A picture of 1 to 8 overlapping shapes of any colour, turn and fill; half of them lie on white."""
    side = size_px * SUPERSAMPLING
    ground = rng.random()
    if ground < 0.5:
        canvas = Image.new("RGB", (side, side), (255, 255, 255))
    elif ground < 0.75:
        canvas = Image.new("RGB", (side, side), _any_colour(rng))
    else:
        canvas = _gradient(rng, side)
    num_shapes = int(rng.integers(1, 9))
    heaped = rng.random() < 0.6  # as an icon is: a large shape in the middle, smaller ones upon it
    palette = [_any_colour(rng) for _ in range(int(rng.integers(2, 5)))]
    for nth in range(num_shapes):
        if heaped:
            radius = side * rng.uniform(0.28, 0.46) * 0.78**nth
            centre = side * (0.5 + rng.normal(0, 0.03 + 0.1 * (nth > 0), size=2))
        else:
            radius = side * rng.uniform(0.06, 0.34)
            centre = side * rng.uniform(0.1, 0.9, size=2)
        polygon = _any_polygon(rng) * radius + centre
        if rng.random() < 0.15:
            _cast_shadow(canvas, polygon + side * 0.03)
        colour = palette[int(rng.integers(len(palette)))]
        fill = _gradient(rng, side, colour) if rng.random() < 0.2 else colour
        stroke = max(3.0, radius * rng.uniform(0.08, 0.35)) if rng.random() < 0.22 else None
        paint(canvas, polygon, fill, stroke)
    return canvas.reduce(SUPERSAMPLING)


def _any_polygon(rng: np.random.Generator) -> np.ndarray:
    """A shape, ellipse, bar or star-shaped polygon of radius about 1, stretched and turned at random."""
    kind = rng.random()
    if kind < 0.5:
        polygon = silhouette(SHAPES[int(rng.integers(len(SHAPES)))])
        stretch = rng.uniform(0.8, 1.0, size=2)
    elif kind < 0.72:
        polygon, stretch = silhouette("circle"), rng.uniform(0.35, 1.0, size=2)
    elif kind < 0.88:
        polygon, stretch = silhouette("square"), np.array([1.2, rng.uniform(0.06, 0.8)])
    else:
        angles = np.sort(rng.uniform(0, 2 * np.pi, size=int(rng.integers(3, 9))))
        reach = rng.uniform(0.5, 1.1, size=len(angles))
        polygon = np.stack([np.cos(angles) * reach, np.sin(angles) * reach], axis=1)
        stretch = np.ones(2)
    turn = rng.uniform(0, 2 * np.pi) if rng.random() < 0.7 else 0.0
    cos, sin = np.cos(turn), np.sin(turn)
    return (polygon * stretch) @ np.array([(cos, sin), (-sin, cos)])


def _any_colour(rng: np.random.Generator) -> RGB:
    """Vivid, pastel, deep or grey."""
    kind = rng.random()
    saturation, value = rng.uniform(0.65, 1.0), rng.uniform(0.75, 1.0)
    if kind < 0.25:
        saturation, value = rng.uniform(0.15, 0.45), rng.uniform(0.85, 1.0)
    elif kind < 0.4:
        saturation, value = rng.uniform(0.4, 1.0), rng.uniform(0.2, 0.6)
    elif kind < 0.52:
        saturation, value = 0.0, rng.choice((0.08, 0.5, 0.75, 1.0))
    red, green, blue = colorsys.hsv_to_rgb(rng.random(), saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def _gradient(rng: np.random.Generator, side: int, start: RGB | None = None) -> Image.Image:
    """A smooth passage between two colours in a random direction, as a picture."""
    ends = np.array([start or _any_colour(rng), _any_colour(rng)], dtype=np.float64)
    weight = rng.random((2, 2, 1))
    corners = ends[0] * weight + ends[1] * (1 - weight)
    return Image.fromarray(corners.round().astype(np.uint8)).resize((side, side), Image.Resampling.BILINEAR)


def _cast_shadow(canvas: Image.Image, polygon: np.ndarray) -> None:
    mask = shape_mask(canvas.size, polygon, None).reduce(SUPERSAMPLING)
    soft = mask.filter(ImageFilter.GaussianBlur(1.6)).point(lambda level: level * 0.35)
    canvas.paste((20, 20, 40), (0, 0, *canvas.size), soft.resize(canvas.size, Image.Resampling.BILINEAR))
