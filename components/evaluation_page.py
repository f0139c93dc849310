"""The page that `fresco evaluate` leaves behind: what changed, how sure that is, and the pictures to judge by eye.

It claims an improvement only where the interval of the paired difference excludes zero. Nothing on it is chosen by
hand: the pictures are those of the first test captions by hash.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from components.metrics import Estimate
from components.objective import NUM_BANDS, TIMESTEPS
from components.plots import Curve, plot_bands, plot_curves
from components.report import (
    Card,
    MetricRow,
    cards,
    draw_grid,
    folded,
    notes,
    page,
    plot,
    plots,
    rounded,
    scorecard_table,
    section,
    tiles,
)
from components.scorecard import (
    ADHERENCE,
    BAND,
    CLIP,
    EXPLANATIONS,
    KID,
    LOSS,
    LOWER_IS_BETTER,
    NOTES,
    TITLES,
    Scorecard,
)

CARDS = 24  # pictures are data in the page: more would make it slow to open
GRID_ROWS = 12
BAND_RANGES = [f"{k * TIMESTEPS // NUM_BANDS}–{(k + 1) * TIMESTEPS // NUM_BANDS - 1}" for k in range(NUM_BANDS)]


@dataclass(frozen=True)
class Side:
    """One model's part: its scorecard, what it drew, and whether each picture shows its prompt (1, 0, NaN)."""

    card: Scorecard
    drawn: Sequence[Image.Image]
    shows_P: np.ndarray


@dataclass(frozen=True)
class Evaluation:
    """A model, the base it came from (where there is one), and what both drew from the same prompts and seeds."""

    model: Side
    base: Side | None
    change: Mapping[str, Estimate]
    captions: Sequence[str]
    seeds: Sequence[int]
    real: Sequence[Image.Image]


def make_page(
    title: str, evaluation: Evaluation, facts: Mapping[str, str], curves: Sequence[Curve], settings: Mapping[str, str]
) -> str:
    """The whole HTML document; `curves` are the run's losses (none for a model from elsewhere), `settings` are YAML."""
    main = metric_rows(evaluation, [LOSS, CLIP, KID, ADHERENCE])
    bands = metric_rows(evaluation, [f"{BAND}{band}" for band in range(NUM_BANDS)])
    in_short = "The number, and below it its 95 % interval."
    if evaluation.base:
        in_short += (
            " The lines put the model (above) and its base (below) on one scale; a coloured difference is clear of 0."
        )
    sections = [section("In short", in_short, tiles(main)), _pictures(evaluation)]
    drawings = []
    if curves:
        drawings.append(plot("Loss by step", "as the run recorded it", plot_curves(curves, "optimizer step")))
    if bands:
        drawings.append(
            plot(
                "Test loss by timestep", "95 % intervals", plot_bands(BAND_RANGES, _bands(evaluation), "clean to noise")
            )
        )
    if drawings:
        note = "Where on the way from a clean picture to pure noise the error sits."
        note += " Training loss is noisier: timesteps and noise change with every step." if curves else ""
        sections.append(section("Loss", note, plots(drawings)))
    table_note = "Every metric, with the number of pictures behind it."
    sections.append(section("Scorecard", table_note, scorecard_table([*main, *bands])))
    explained = {TITLES[key]: EXPLANATIONS[key] for key in TITLES if key in evaluation.model.card.estimates}
    missing = {f"{TITLES[key]}: not measured": f"{why}." for key, why in evaluation.model.card.not_measured.items()}
    folds = [folded(name, text) for name, text in settings.items()]
    sections.append(section("How it was measured", "", notes({**explained, **missing}), *folds))
    return page(title, "Fresco evaluation", lead(evaluation), facts, sections, "Made by fresco evaluate.")


def lead(evaluation: Evaluation) -> str:
    """Two sentences that say the result, no stronger than the intervals allow."""
    model, base = evaluation.model.card.estimates, evaluation.base.card.estimates if evaluation.base else {}
    said = []
    if LOSS in model:
        text = f"Denoising loss {rounded(model[LOSS])[0]} on {model[LOSS].n} test pictures"
        change = evaluation.change.get(LOSS)
        if change and change.low <= 0 <= change.high:
            text += ", not clearly different from the base"
        elif change:
            share = abs(change.value) / base[LOSS].value
            text += f", {100 * share:.0f} % {'below' if change.value < 0 else 'above'} the base"
        said.append(f"{text}.")
    if ADHERENCE in model:
        count, n = round(model[ADHERENCE].value * model[ADHERENCE].n), model[ADHERENCE].n
        text = f"{count} of {n} drawn pictures show all that their prompt says"
        if ADHERENCE in base:
            text += f"; of the base's, {round(base[ADHERENCE].value * base[ADHERENCE].n)}"
        said.append(f"{text}.")
    elif CLIP in model:
        text = f"CLIP score {rounded(model[CLIP])[0]}"
        said.append(f"{text}, the base {rounded(base[CLIP])[0]}." if CLIP in base else f"{text}.")
    return " ".join(said)


def metric_rows(evaluation: Evaluation, keys: Sequence[str]) -> list[MetricRow]:
    """The measured ones among `keys`, with base and difference where they can be compared."""
    rows = []
    for key in keys:
        if key not in evaluation.model.card.estimates:
            continue
        band = key.removeprefix(BAND) if key.startswith(BAND) else None
        comparable = evaluation.base is not None and (key in evaluation.change or key == KID)
        rows.append(
            MetricRow(
                name=f"Denoising loss, band {band}" if band else TITLES[key],
                note=f"timesteps {BAND_RANGES[int(band)]}" if band else NOTES[key],
                model=evaluation.model.card.estimates[key],
                base=evaluation.base.card.estimates.get(key) if evaluation.base and comparable else None,
                change=evaluation.change.get(key),
                lower_is_better=band is not None or key in LOWER_IS_BETTER,
            )
        )
    return rows


def make_grid(evaluation: Evaluation) -> Image.Image:
    """The before/after grid of the first prompts: base (where there is one), model, real picture."""
    base = evaluation.base
    names = ("base", "fine-tuned", "real") if base else ("model", "real")
    pairs = zip(evaluation.model.drawn, evaluation.real, strict=True)
    rows = [(base.drawn[i], *pair) if base else pair for i, pair in enumerate(pairs)]
    return draw_grid(rows[:GRID_ROWS], evaluation.captions[:GRID_ROWS], names)


def _pictures(evaluation: Evaluation) -> str:
    count = min(CARDS, len(evaluation.captions))
    items = []
    for index in range(count):
        pictures = [
            (
                f"{'fine-tuned' if evaluation.base else 'model'}{_mark(evaluation.model, index)}",
                evaluation.model.drawn[index],
            )
        ]
        if evaluation.base:
            pictures.insert(0, (f"base{_mark(evaluation.base, index)}", evaluation.base.drawn[index]))
        pictures.append(("real", evaluation.real[index]))
        items.append(Card(evaluation.captions[index], f"seed {evaluation.seeds[index]}", tuple(pictures)))
    total = len(evaluation.captions)
    note = f"The first {count} of {total} drawn, in the order of the test pictures' hashes: not chosen."
    if evaluation.base:
        note += " Both models drew from the same prompt and seed; neither has seen the real picture."
    if not np.isnan(evaluation.model.shows_P).all():
        note += " ✓ says that the pixels show all of the prompt."
    return section("Pictures", note, cards(items))


def _mark(side: Side, index: int) -> str:
    return {1.0: " ✓", 0.0: " ✗"}.get(float(side.shows_P[index]), "")


def _bands(evaluation: Evaluation) -> dict[str, list[tuple[float, float, float]]]:
    sides = {"model": evaluation.model}
    if evaluation.base and LOSS in evaluation.change:
        sides = {"base": evaluation.base, "fine-tuned": evaluation.model}
    found = {name: [side.card.estimates[f"{BAND}{band}"] for band in range(NUM_BANDS)] for name, side in sides.items()}
    return {name: [(each.value, each.low, each.high) for each in estimates] for name, estimates in found.items()}
