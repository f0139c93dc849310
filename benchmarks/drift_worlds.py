"""Made-up data for the drift benchmark: items like an encoder's rows, with a known amount of novelty.

Rows lie on the unit sphere around a common direction with a power-law spectrum, as CLIP's do. A new concept is one
tight cluster away from the rest. Shape letters: N items, D feature width.
"""

import numpy as np

from components.drift_streams import Items, Texts

WIDTH = 256
CONCEPT_SPREAD, CONCEPT_DISTANCE = 0.5, 1.0
NOUNS = ("cat", "dog", "house", "tree", "car", "boat", "star", "moon")
COLOURS = ("red", "blue", "green", "white", "black")


def cone_rows(generator: np.random.Generator, n: int, new_share: float, width: int = WIDTH) -> np.ndarray:
    """Rows (N, D) of unit length; a binomial number of them, `new_share` on average, of one new concept."""
    spectrum = np.arange(1, width + 1) ** -0.5
    spectrum = spectrum / np.sqrt((spectrum**2).sum())
    rows = generator.normal(size=(n, width)) * spectrum
    new = generator.random(n) < new_share
    towards = generator.normal(size=width) * spectrum
    towards *= CONCEPT_DISTANCE / np.linalg.norm(towards)
    rows[new] = CONCEPT_SPREAD * rows[new] + towards
    rows[:, 0] += 1.0  # the cone's axis
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), np.float32)


def captioned_items(generator: np.random.Generator, n: int) -> Items:
    """Pictures of eight kinds of thing with captions that say kind and colour, and two simple statistics; no drift."""
    centres = np.random.default_rng(1).normal(size=(len(NOUNS), 16))
    looks = np.random.default_rng(2).uniform(size=(len(NOUNS), 192))
    kind, colour = generator.integers(0, len(NOUNS), n), generator.integers(0, len(COLOURS), n)
    captions = tuple(f"a {COLOURS[hue]} {NOUNS[one]}" for hue, one in zip(colour, kind, strict=True))
    pictures, texts = (centres[kind] + generator.normal(size=(n, 16)) for _ in range(2))
    unit = [(rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32) for rows in (pictures, texts)]
    small = (looks[kind] + 0.3 * generator.normal(size=(n, 192))).astype(np.float32)
    statistics = {
        "caption_words": generator.poisson(6, n).astype(float),
        "brightness": generator.beta(4, 3, n),
        "saturation": generator.beta(2, 3, n),
        "rejected": generator.binomial(1, 0.03, n),
    }
    return Items("made up", unit[0], small, Texts(captions, unit[1]), statistics)
