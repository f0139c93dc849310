"""Which captions belong together, so that a loss can be told for each kind of picture?

A model that is better on average may be worse on one kind. Captions are sliced by their length and, where they speak of
emblems, by what they say; else by their most frequent words. Slices overlap, and small ones are left out: a number over
a handful of pictures invites to see what is not there. Shape letter: N captions.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from components.emblems import parse_caption

MIN_ITEMS = 10
MAX_WORDS = 8
ATTRIBUTES = ("shape", "count", "background")
COUNTS = {1: "one", 2: "two", 3: "three"}
GLUE = frozenset(
    ["a", "an", "the", "of", "in", "on", "at", "by", "to", "with", "and", "or", "for", "from", "is", "are", "its"]
)
Mask = NDArray[np.bool_]


def caption_slices(captions: Sequence[str], min_items: int = MIN_ITEMS) -> dict[str, Mask]:
    """Masks (N,) by name, such as `length: up to 6 words` or `shape: star`, each of at least `min_items` captions."""
    emblems = [parse_caption(caption) for caption in captions]
    slices = _by_length(captions)
    if captions and all(emblem is not None for emblem in emblems):
        values: dict[str, list[int]] = defaultdict(list)
        for index, emblem in enumerate(emblems):
            for attribute in ATTRIBUTES:
                value = getattr(emblem, attribute)
                values[f"{attribute}: {COUNTS.get(value, value)}"].append(index)
        counts = {f"count: {word}": str(number) for number, word in COUNTS.items()}
        order = sorted(values, key=lambda name: (ATTRIBUTES.index(name.split(":")[0]), counts.get(name, name)))
        slices |= {name: _mask(values[name], len(captions)) for name in order}
    else:
        slices |= _by_word(captions, min_items)
    return {name: mask for name, mask in slices.items() if mask.sum() >= min_items}


def _by_length(captions: Sequence[str]) -> dict[str, Mask]:
    """Terciles by number of words; captions of one length stay together, so the thirds are rough."""
    if not captions:
        return {}
    words = np.array([len(caption.split()) for caption in captions])
    low, high = (int(np.quantile(words, share, method="lower")) for share in (1 / 3, 2 / 3))
    slices = {f"length: up to {low} words": words <= low}
    if high > low:
        middle = f"{low + 1} to {high}" if high > low + 1 else f"{high}"
        slices[f"length: {middle} words"] = (words > low) & (words <= high)
    return slices | {f"length: over {max(low, high)} words": words > high}


def _by_word(captions: Sequence[str], min_items: int) -> dict[str, Mask]:
    """The most frequent words that not nearly every caption has; ties by the alphabet."""
    spoken = [{word.strip(".,;:!?\"'()").lower() for word in caption.split()} - GLUE - {""} for caption in captions]
    counts = Counter(word for words in spoken for word in words)
    telling = [word for word, count in counts.items() if min_items <= count <= len(captions) - min_items]
    chosen = sorted(telling, key=lambda word: (-counts[word], word))[:MAX_WORDS]
    return {f"word: {word}": np.array([word in words for words in spoken]) for word in chosen}


def _mask(rows: list[int], length: int) -> Mask:
    mask = np.zeros(length, bool)
    mask[rows] = True
    return mask
