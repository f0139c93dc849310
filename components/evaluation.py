"""What two models did side by side, and what may be said of it: no more than the intervals allow.

A difference counts where the interval of the paired difference excludes zero and its p-value agrees; where it does not,
the reader is told how many more items would decide. The layout is `evaluation_page.py`'s.
Shape letter: P prompts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from components.compare import Paired
from components.metric_texts import NOTES
from components.metrics import Estimate
from components.objective import NUM_BANDS, TIMESTEPS
from components.report import MetricRow, rounded
from components.scorecard import (
    ADHERENCE,
    BAND,
    CLIP,
    KID,
    LOSS,
    LOWER_IS_BETTER,
    NEITHER_IS_BETTER,
    NOT_COMPARED,
    TITLES,
    Scorecard,
)

BAND_RANGES = [f"{k * TIMESTEPS // NUM_BANDS}–{(k + 1) * TIMESTEPS // NUM_BANDS - 1}" for k in range(NUM_BANDS)]
SIGNIFICANCE = 0.05
OUT_OF_REACH = 1_000_000


@dataclass(frozen=True)
class CopyPair:
    """A drawn picture (by its prompt's place) and the training picture it comes nearest to."""

    index: int
    training: Image.Image
    distance: float
    pixels: float


@dataclass(frozen=True)
class Side:
    """One model's part: its scorecard, what it drew, and whether each picture shows its prompt (1, 0, NaN)."""

    card: Scorecard
    drawn: Sequence[Image.Image]
    shows_P: np.ndarray
    nearest: Sequence[CopyPair] = ()


@dataclass(frozen=True)
class Evaluation:
    """A model, what it is compared with (where there is something), and what both drew from the same prompts and seeds.

    `against` is empty where that is the base it came from. `apart_P` is how far the two drawings of a prompt are apart:
    1 - cosine in the encoder's space.
    """

    model: Side
    base: Side | None
    change: Mapping[str, Paired]
    captions: Sequence[str]
    seeds: Sequence[int]
    real: Sequence[Image.Image]
    apart_P: np.ndarray | None = None
    against: str = ""
    slices: Sequence[str] = ()  # as the plot names them, in the order of the scorecard's keys

    @property
    def labels(self) -> tuple[str, str]:
        """What stands under the pictures of the model and of the other."""
        if self.base is None:
            return "model", ""
        return ("model", "other") if self.against else ("fine-tuned", "base")

    @property
    def other(self) -> str:
        """What a sentence calls the other model."""
        return "the other model" if self.against else "the base"


def lead(evaluation: Evaluation) -> str:
    """Sentences that say the result, no stronger than the intervals allow."""
    model, base = evaluation.model.card.estimates, evaluation.base.card.estimates if evaluation.base else {}
    said = []
    if LOSS in model:
        text = f"Denoising loss {rounded(model[LOSS])[0]} on {model[LOSS].n} test pictures"
        change = evaluation.change.get(LOSS)
        if change and not is_clear(change):
            text += f", not clearly different from {evaluation.other} ({decided(change, 'pictures')})"
        elif change:
            share = abs(change.difference) / base[LOSS].value
            text += f", {100 * share:.0f} % {'below' if change.difference < 0 else 'above'} {evaluation.other}"
            text += f" ({decided(change, 'pictures')})"
        said.append(f"{text}.")
    if ADHERENCE in model:
        count, n = round(model[ADHERENCE].value * model[ADHERENCE].n), model[ADHERENCE].n
        text = f"{count} of {n} drawn pictures show all that their prompt says"
        if ADHERENCE in base:
            text += f"; of {evaluation.other}'s, {round(base[ADHERENCE].value * base[ADHERENCE].n)}"
        said.append(f"{text}.")
    elif CLIP in model:
        text = f"CLIP score {rounded(model[CLIP])[0]}"
        said.append(f"{text}, {evaluation.other} {rounded(base[CLIP])[0]}." if CLIP in base else f"{text}.")
    return " ".join(said)


def is_clear(change: Paired) -> bool:
    """Whether interval and p-value both say that a difference is not chance."""
    return change.p_value <= SIGNIFICANCE and not change.low <= 0 <= change.high


def decided(change: Paired, items: str) -> str:
    """The p-value in words, and what it would take to decide where it does not."""
    said = "p < 0.001" if change.p_value < 0.001 else f"p = {change.p_value:.{3 if change.p_value < 0.1 else 2}f}"
    if change.needed is None:
        return said
    if change.needed >= OUT_OF_REACH:
        return f"{said}; no number of {items} within reach would decide so small a difference"
    return f"{said}; about {_two_digits(max(change.needed, change.n + 1)):,} {items} would decide, here are {change.n}"


def _two_digits(number: int) -> int:
    """The number to two digits: a power calculation supports no more."""
    unit = 10 ** max(0, len(str(number)) - 2)
    return -(-number // unit) * unit


def metric_rows(evaluation: Evaluation, keys: Sequence[str]) -> list[MetricRow]:
    """The measured ones among `keys`, with the other model and the difference where they can be compared."""
    rows = []
    for key in keys:
        if key not in evaluation.model.card.estimates:
            continue
        band = key.removeprefix(BAND) if key.startswith(BAND) else None
        change = evaluation.change.get(key)
        shown = evaluation.base is not None and (change is not None or key == KID or key in NOT_COMPARED)
        rows.append(
            MetricRow(
                name=f"Denoising loss, band {band}" if band else TITLES[key],
                note=f"timesteps {BAND_RANGES[int(band)]}" if band else NOTES[key],
                model=evaluation.model.card.estimates[key],
                base=evaluation.base.card.estimates.get(key) if evaluation.base and shown else None,
                change=Estimate(change.difference, change.low, change.high, change.n) if change else None,
                better=_direction(key) if change and is_clear(change) else 0,
                decided=decided(change, "pictures" if key.startswith(LOSS) else "prompts") if change else "",
            )
        )
    return rows


def _direction(key: str) -> int:
    """1 where more is better, -1 where less is, 0 where neither."""
    if key in NEITHER_IS_BETTER:
        return 0
    return -1 if key.startswith(LOSS) or key in LOWER_IS_BETTER else 1
