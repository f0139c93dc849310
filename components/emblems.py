"""What does the built-in data look like, and what does its caption say?

Captioned flat pictures, drawn without limit from a seed: nothing is downloaded, and no two indices share a stream.
`base` and `drifted` follow one grammar (size, colour, shape, background, and a position or a count), so that
`emblem_reader` can judge a generated picture exactly. `drifted` has other shapes, colours and grounds, in outline;
`village` is a smaller step on from there: one new shape (house) and a new palette.
`collage` is free variety to train an autoencoder or CLIP; it has no grammar and is never read back.
This module refuses to rotate emblems (a turned square is a diamond). Lengths are in px of a 64 px picture, y down.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from PIL import Image

from components.emblem_shapes import RGB, RING_WIDTH, SUPERSAMPLING, draw_collage, paint, silhouette

Item = TypeVar("Item")

POSITIONS = {
    "center": (0, 0),
    "top left": (-1, -1),
    "top right": (1, -1),
    "bottom left": (-1, 1),
    "bottom right": (1, 1),
}
SIZES = ("small", "large")
NUMBERS = {"two": 2, "three": 3}
# Radius of the single and of the repeated emblem: 6 % larger and 2 px away, all stay inside the picture.
RADIUS_PX = {("small", 1): 10.0, ("large", 1): 16.5, ("small", 2): 8.5, ("large", 2): 12.75}
CORNER_OFFSET_PX = {"small": 15.0, "large": 11.5}
BASE_STROKE_PX, STROKE_OF_RADIUS = 1.4, 0.13  # an outline is this thick, and thicker by this share of the radius
LAYOUTS_PX = {2: ((-15.5, 0.0), (15.5, 0.0)), 3: ((0.0, -14.5), (-15.5, 13.5), (15.5, 13.5))}


@dataclass(frozen=True)
class World:
    """The words of one grammar, and the RGB values that they name."""

    colours: dict[str, RGB]
    backgrounds: dict[str, RGB]
    shapes: tuple[str, ...]
    outline: bool  # every emblem of the world is drawn as a thick outline


# RGB distance is at least 90 between colours, 79 between grounds and 100 from a colour to a ground of its world.
WORLDS = {
    "base": World(
        colours={
            "red": (214, 32, 40),
            "orange": (246, 122, 12),
            "yellow": (252, 212, 40),
            "green": (30, 152, 80),
            "blue": (36, 98, 226),
            "purple": (124, 50, 190),
            "pink": (246, 112, 178),
            "black": (30, 30, 36),
        },
        backgrounds={
            "white": (250, 250, 248),
            "grey": (166, 173, 182),
            "sand": (240, 212, 168),
            "sky": (176, 217, 248),
        },
        shapes=("circle", "square", "triangle", "diamond", "cross", "ring"),
        outline=False,
    ),
    "drifted": World(
        colours={
            "teal": (0, 136, 136),
            "gold": (206, 150, 0),
            "crimson": (178, 8, 56),
            "navy": (22, 32, 98),
            "magenta": (220, 30, 190),
            "brown": (100, 54, 36),
            "olive": (112, 148, 20),
            "indigo": (92, 60, 204),
        },
        backgrounds={
            "mint": (160, 232, 190),
            "salmon": (250, 164, 146),
            "lavender": (204, 180, 250),
            "lemon": (250, 248, 120),
        },
        shapes=("star", "heart", "crescent", "arrow", "square", "triangle"),
        outline=True,
    ),
    "village": World(
        colours={"coral": (240, 84, 60), "plum": (110, 16, 84), "cobalt": (20, 70, 190), "pine": (10, 90, 60)},
        backgrounds={"cream": (252, 246, 222), "glacier": (150, 226, 236)},
        shapes=("house", "triangle", "diamond"),
        outline=True,
    ),
}
SIZE_WORDS = {"small": ("small", "small", "little"), "large": ("large", "large", "big")}


@dataclass(frozen=True)
class Emblem:
    """What one picture shows."""

    size: str  # one of SIZES
    colour: str  # of the world's colours
    shape: str  # of the world's shapes
    background: str  # of the world's backgrounds
    count: int  # 1, 2 or 3 equal shapes
    position: str | None  # one of POSITIONS where count is 1, else None
    outline: bool  # stroked rather than filled
    world: str  # one of WORLDS


def world_named(name: str) -> World:
    """The grammar called `name`; ValueError lists the ones there are."""
    if name not in WORLDS:
        raise ValueError(f"expected a world with a grammar ({', '.join(WORLDS)}), found {name!r}")
    return WORLDS[name]


def rng_at(seed: int, index: int) -> np.random.Generator:
    """The random stream of one example: counter-based, so any index is reached without drawing those before it."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, index], dtype=np.uint64)))


def _pick(rng: np.random.Generator, items: Iterable[Item]) -> Item:
    choices = tuple(items)
    return choices[int(rng.integers(len(choices)))]


def sample_emblem(rng: np.random.Generator, world: str = "base") -> Emblem:
    """One emblem, uniform over the words of the world; three in five are single."""
    words = world_named(world)
    count = int(rng.choice((1, 2, 3), p=(0.6, 0.2, 0.2)))
    return Emblem(
        size=_pick(rng, SIZES),
        colour=_pick(rng, words.colours),
        shape=_pick(rng, words.shapes),
        background=_pick(rng, words.backgrounds),
        count=count,
        position=_pick(rng, POSITIONS) if count == 1 else None,
        outline=words.outline,
        world=world,
    )


def emblem_at(world: str, seed: int, index: int) -> Emblem:
    """The emblem that `example` shows at this place."""
    return sample_emblem(rng_at(seed, index), world)


def example(world: str, seed: int, index: int, size_px: int = 64) -> tuple[Image.Image, str]:
    """Picture and caption number `index` of a world, the same on every machine; "collage" is a world here."""
    rng = rng_at(seed, index)
    if world == "collage":
        return draw_collage(rng, size_px), "a collage"
    emblem = sample_emblem(rng, world)
    return draw(emblem, rng, size_px), caption_of(emblem, rng)


def caption_of(emblem: Emblem, rng: np.random.Generator) -> str:
    """One of many wordings; `parse_caption` inverts each. The position "center" is left unsaid half of the time."""
    size = _pick(rng, SIZE_WORDS[emblem.size])
    number = {n: word for word, n in NUMBERS.items()}.get(emblem.count)
    shape = emblem.shape if number is None else plural(emblem.shape)
    kind = f"{emblem.colour} {shape}"
    article = number or _pick(rng, ("a", "a", "one"))
    if emblem.outline and rng.random() < 0.3:
        thing = f"{'the outline' if number is None else 'outlines'} of {number or 'a'} {size} {kind}"
    else:
        thing = f"{article} {size} {'outlined ' if emblem.outline else ''}{kind}"
    where = ""
    if emblem.position == "center" and rng.random() < 0.5:
        where = _pick(rng, (" in the center", " in the middle"))
    elif emblem.position not in (None, "center"):
        where = _pick(
            rng, (f" in the {emblem.position}", f" in the {emblem.position} corner", f" at the {emblem.position}")
        )
    ground = f"{emblem.background} background"
    wordings = (
        f"{thing}{where} on a {ground}",
        f"{thing} on a {ground}{where}",
        f"{thing}{where}, {ground}",
        f"{ground} with {thing}{where}",
        f"on a {ground}, {thing}{where}",
    )
    return _pick(rng, wordings)


def plural(shape: str) -> str:
    return shape + ("es" if shape.endswith("s") else "s")


FILLERS = frozenset(["a", "an", "one", "the", "in", "at", "on", "of", "with", "background", "corner"])
OUTLINE_WORDS = ("outlined", "outline", "outlines")


def parse_caption(text: str) -> Emblem | None:
    """The emblem a caption speaks of, or None where a word is unknown, missing or contradicted by another.

    Word order is free: "big red circle on white" parses. An unsaid position is the center.
    """
    spoken = [word for word in re.findall(r"[^\s,.]+", text.lower()) if word not in FILLERS]
    for world, words in WORLDS.items():
        meanings = _meanings(words)
        said: dict[str, str] = {}
        if all(word in meanings and said.setdefault(*meanings[word]) == meanings[word][1] for word in spoken):
            emblem = _emblem_said(said, world)
            if emblem is not None:
                return emblem
    return None


def _meanings(words: World) -> dict[str, tuple[str, str]]:
    """word -> (attribute, value), for every word of one world save the fillers."""
    meanings = {word: ("size", size) for size, synonyms in SIZE_WORDS.items() for word in synonyms}
    meanings |= {colour: ("colour", colour) for colour in words.colours}
    meanings |= {background: ("background", background) for background in words.backgrounds}
    meanings |= {shape: ("shape", shape) for shape in words.shapes}
    meanings |= {plural(shape): ("shapes", shape) for shape in words.shapes}
    meanings |= {number: ("number", number) for number in NUMBERS}
    meanings |= {word: ("row", word) for word in ("top", "bottom")}
    meanings |= {word: ("column", word) for word in ("left", "right")}
    meanings |= dict.fromkeys(("center", "middle"), ("middle", "center"))
    if words.outline:
        meanings |= dict.fromkeys(OUTLINE_WORDS, ("outline", "outline"))
    return meanings


def _emblem_said(said: dict[str, str], world: str) -> Emblem | None:
    """The emblem of the attributes found in a caption, or None where they are not exactly one full description."""
    needed = {"size", "colour", "background"} | ({"outline"} if WORLDS[world].outline else set())
    if needed | {"number", "shapes"} == said.keys():
        count, shape, position = NUMBERS[said["number"]], said["shapes"], None
    elif needed | {"shape", "row", "column"} == said.keys():
        count, shape, position = 1, said["shape"], f"{said['row']} {said['column']}"
    elif needed | {"shape"} == said.keys() - {"middle"}:
        count, shape, position = 1, said["shape"], "center"
    else:
        return None
    return Emblem(said["size"], said["colour"], shape, said["background"], count, position, "outline" in said, world)


def draw(emblem: Emblem, rng: np.random.Generator | None, size_px: int = 64) -> Image.Image:
    """The picture of an emblem, (size_px, size_px) RGB; without rng it has no jitter.

    With rng everything moves by up to 2 px, scales by up to 6 %, and each colour shifts by up to 4 levels.
    """
    words = world_named(emblem.world)
    shift_px, scale, tints = np.zeros(2), 1.0, np.zeros((2, 3), dtype=int)
    if rng is not None:
        shift_px, scale, tints = rng.uniform(-2, 2, 2), rng.uniform(0.94, 1.06), rng.integers(-4, 5, (2, 3))
    colour = _tinted(words.colours[emblem.colour], tints[0])
    side = size_px * SUPERSAMPLING
    canvas = Image.new("RGB", (side, side), _tinted(words.backgrounds[emblem.background], tints[1]))
    radius_px = radius_of(emblem.size, emblem.count) * scale
    stroke_px = stroke_of(emblem.shape, emblem.outline, radius_px)
    zoom = side / 64
    for centre_px in _centres_px(emblem):
        polygon = (silhouette(emblem.shape) * radius_px + centre_px + shift_px) * zoom
        # Pixel i of PIL covers i to i + 1 and is addressed by its corner: half a pixel keeps the shape centred.
        paint(canvas, polygon - 0.5, colour, None if stroke_px is None else stroke_px * zoom)
    return canvas.reduce(SUPERSAMPLING)


def radius_of(size: str, count: int) -> float:
    """The radius in px of a 64 px picture, before jitter."""
    return RADIUS_PX[size, min(count, 2)]


def stroke_of(shape: str, outline: bool, radius_px: float) -> float | None:
    """How thick the line of an emblem is in px of a 64 px picture, or None where it is filled."""
    if shape == "ring":
        return RING_WIDTH * radius_px
    return BASE_STROKE_PX + STROKE_OF_RADIUS * radius_px if outline else None


def _centres_px(emblem: Emblem) -> np.ndarray:
    if emblem.count > 1:
        return 32 + np.array(LAYOUTS_PX[emblem.count])
    return 32 + np.array([POSITIONS[emblem.position or "center"]]) * CORNER_OFFSET_PX[emblem.size]


def _tinted(colour: RGB, tint: np.ndarray) -> RGB:
    red, green, blue = np.clip(np.add(colour, tint), 0, 255).tolist()
    return red, green, blue
