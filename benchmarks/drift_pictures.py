"""Does the monitor see what happened to real pictures? Splits of a folder with captions, changed in known ways.

Each split draws two disjoint sides. `shuffled captions` are judged by the alignment stream alone, though neither the
pictures nor the captions as such have changed; `greyscale` by all streams; `nothing` is one random half of the folder
against the other. Every look tests at the level of daily looks with one false alarm a year.
"""

import json
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from components.clip_encoder import ClipEncoder
from components.drift import DriftSettings, look
from components.drift_streams import ALIGNMENT, CAPTIONS, IMAGES, Items, Texts, thumbnails
from components.metrics import proportion_wilson
from components.models import embedded_clip

LEVEL = 1 / 365
A_SIDE = 300
ALL = (IMAGES, CAPTIONS, ALIGNMENT)
Sides = Callable[[np.random.Generator], tuple[Items, Items]]


def encode_folder(folder: Path) -> tuple[Items, Items]:
    """The pictures of an ImageFolder with `metadata.jsonl`, as they are and in greyscale."""
    entries = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines() if line.strip()]
    pictures = [Image.open(folder / entry["file_name"]).convert("RGB") for entry in entries]
    encoder = ClipEncoder(embedded_clip())
    captions = Texts(tuple(entry["text"] for entry in entries), encoder.texts([entry["text"] for entry in entries]))
    grey = [picture.convert("L").convert("RGB") for picture in pictures]
    as_is, greyed = (
        Items(encoder.identity, encoder.images(shown), thumbnails(shown), captions) for shown in (pictures, grey)
    )
    return as_is, greyed


def picked(items: Items, rows: np.ndarray, caption_rows: np.ndarray | None = None) -> Items:
    """Some pictures, with their own captions or with those of other rows."""
    told = rows if caption_rows is None else caption_rows
    captions = Texts(tuple(items.captions.texts[row] for row in told), items.captions.rows_ND[told])
    return Items(items.encoder, items.picture_rows_ND[rows], items.thumbnails_ND[rows], captions)


def changes(items: Items, grey: Items) -> dict[str, tuple[str, tuple[str, ...], Sides]]:
    """By name: the verdict that is right, the streams that look, and how two sides are drawn."""

    def two(generator: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
        order = generator.permutation(len(items))
        return order[:size], order[size : 2 * size]

    def halves(generator: np.random.Generator) -> tuple[Items, Items]:
        one, other = two(generator, len(items) // 2)
        return picked(items, one), picked(items, other)

    def shuffled(generator: np.random.Generator) -> tuple[Items, Items]:
        one, other = two(generator, A_SIDE)
        return picked(items, one), picked(items, other, generator.permutation(other))

    def greyscale(generator: np.random.Generator) -> tuple[Items, Items]:
        one, other = two(generator, A_SIDE)
        return picked(items, one), picked(grey, other)

    return {
        "shuffled captions, alignment alone": ("drift", (ALIGNMENT,), shuffled),
        "greyscale": ("drift", ALL, greyscale),
        "nothing: half against half": ("no_drift", ALL, halves),
    }


def show_pictures(folder: Path, splits: int) -> None:
    """One row of a Markdown table for each change."""
    items, grey = encode_folder(folder)
    print(f"\n{len(items)} pictures; level {LEVEL:.4f}; encoder {items.encoder} (the embedded tiny CLIP)")
    print("\n| change | right verdict | of splits | Wilson 95 % | all verdicts | by stream, drift | s a look |")
    print("|---|---|---|---|---|---|---|")
    for name, (right, streams, sides) in changes(items, grey).items():
        started, verdicts, by_stream = time.perf_counter(), Counter[str](), Counter[str]()
        for split in range(splits):
            found = look(*sides(np.random.default_rng(split)), LEVEL, split, DriftSettings(streams=streams))
            verdicts[found.verdict] += 1
            by_stream.update(finding.stream for finding in found.streams if finding.verdict == "drift")
        share, spent_s = proportion_wilson(verdicts[right], splits), (time.perf_counter() - started) / splits
        told = ", ".join(f"{verdict} {count}" for verdict, count in verdicts.items())
        drifted = ", ".join(f"{stream} {by_stream[stream]}" for stream in streams)
        interval = f"{share.low:.2f} to {share.high:.2f}"
        print(f"| {name} | {right} | {verdicts[right]} of {splits} | {interval} | {told} | {drifted} | {spent_s:.2f} |")
