"""The page that `fresco evaluate` leaves behind: what changed, how sure that is, and the pictures to judge by eye.

Nothing on it is chosen by hand: pictures are in the order of how far the two models' drawings are apart, or, of one
model alone, in that of the test pictures' hashes. What it claims is `evaluation.py`'s.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from components.evaluation import BAND_RANGES, Evaluation, Side, lead, metric_rows
from components.metric_texts import EXPLANATIONS
from components.objective import NUM_BANDS
from components.plots import Curve, plot_bands, plot_curves, plot_slices
from components.report import (
    Card,
    cards,
    draw_grid,
    folded,
    notes,
    page,
    plot,
    plots,
    scorecard_table,
    section,
    tiles,
)
from components.scorecard import (
    ADHERENCE,
    BAND,
    CLIP,
    KID,
    LOSS,
    SLICE,
    TITLES,
)

CARDS = 24  # pictures are data in the page: more would make it slow to open
GRID_ROWS = 12


def make_page(
    title: str, evaluation: Evaluation, facts: Mapping[str, str], curves: Sequence[Curve], settings: Mapping[str, str]
) -> str:
    """The whole HTML document; `curves` are the run's losses (none for a model from elsewhere), `settings` are YAML."""
    main = metric_rows(evaluation, [LOSS, CLIP, KID, ADHERENCE])
    rest = metric_rows(evaluation, [key for key in TITLES if key not in (LOSS, CLIP, KID, ADHERENCE)])
    bands = metric_rows(evaluation, [f"{BAND}{band}" for band in range(NUM_BANDS)])
    in_short = "The number, and below it its 95 % interval."
    if evaluation.base:
        in_short += (
            f" The lines put the model (above) and {evaluation.other} (below) on one scale; a coloured difference is"
            " clear of 0."
        )
    sections = [
        section("In short", in_short, tiles(main, evaluation.labels[1])),
        _pictures(evaluation),
        *_loss(evaluation, curves),
    ]
    table_note = "Every metric, with the number of items behind it."
    if evaluation.base:
        table_note += (
            f" Differences are model minus {evaluation.other}, item by item; p is the chance of one as large between"
            " equal models. Many numbers are looked at: one in twenty would be clear by chance."
        )
    sections.append(
        section(
            "Scorecard", table_note, scorecard_table([*main, *rest, *bands], evaluation.labels[0], evaluation.labels[1])
        )
    )
    if evaluation.model.nearest:
        sections.append(_nearest(evaluation))
    explained = {TITLES[key]: EXPLANATIONS[key] for key in TITLES if key in evaluation.model.card.estimates}
    missing = {f"{TITLES[key]}: not measured": f"{why}." for key, why in evaluation.model.card.not_measured.items()}
    folds = [folded(name, text) for name, text in settings.items()]
    sections.append(section("How it was measured", "", notes({**explained, **missing}), *folds))
    return page(title, "Fresco evaluation", lead(evaluation), facts, sections, "Made by fresco evaluate.")


def make_grid(evaluation: Evaluation) -> Image.Image:
    """The grid of the first prompts, not chosen: the other model (where there is one), model, real picture."""
    base = evaluation.base
    names = (evaluation.labels[1], evaluation.labels[0], "real") if base else ("model", "real")
    pairs = zip(evaluation.model.drawn, evaluation.real, strict=True)
    rows = [(base.drawn[i], *pair) if base else pair for i, pair in enumerate(pairs)]
    return draw_grid(rows[:GRID_ROWS], evaluation.captions[:GRID_ROWS], names)


def _pictures(evaluation: Evaluation) -> str:
    total = len(evaluation.captions)
    count = min(CARDS, total)
    apart = evaluation.apart_P if evaluation.base else None
    order = range(total) if apart is None else np.argsort(-apart, kind="stable").tolist()
    items = []
    for index in list(order)[:count]:
        name, other = evaluation.labels
        pictures = [(f"{name}{_mark(evaluation.model, index)}", evaluation.model.drawn[index])]
        if evaluation.base:
            pictures.insert(0, (f"{other}{_mark(evaluation.base, index)}", evaluation.base.drawn[index]))
        pictures.append(("real", evaluation.real[index]))
        detail = f"seed {evaluation.seeds[index]}" + ("" if apart is None else f", {apart[index]:.2f} apart")
        items.append(Card(evaluation.captions[index], detail, tuple(pictures)))
    note = f"The first {count} of {total} drawn, in the order of the test pictures' hashes: not chosen."
    if apart is not None:
        note = (
            f"The {count} of {total} prompts whose two drawings differ most, the farthest apart first (1 − cosine in"
            " the encoder's space): differences look larger here than they are on the whole."
        )
    if evaluation.base:
        note += " Both models drew from the same prompt and seed; neither has seen the real picture."
    if not np.isnan(evaluation.model.shows_P).all():
        note += " ✓ says that the pixels show all of the prompt."
    return section("Pictures", note, cards(items))


def _nearest(evaluation: Evaluation) -> str:
    items = []
    for pair in evaluation.model.nearest:
        detail = f"{pair.distance:.2f} apart, pixels {pair.pixels:.2f}"
        pictures = (("drawn", evaluation.model.drawn[pair.index]), ("training", pair.training))
        items.append(Card(evaluation.captions[pair.index], detail, pictures))
    note = (
        "The drawn pictures that come nearest to one the model was trained on, beside it: the distance of their"
        " features, and the root mean square difference of their pixels (0 to 1). Alike is not copied: see Copying."
    )
    return section("Nearest training pictures", note, cards(items))


def _loss(evaluation: Evaluation, curves: Sequence[Curve]) -> list[str]:
    drawings = []
    if curves:
        drawings.append(plot("Loss by step", "as the run recorded it", plot_curves(curves, "optimizer step")))
    if f"{BAND}0" in evaluation.model.card.estimates:
        bands = _series(evaluation, [f"{BAND}{band}" for band in range(NUM_BANDS)])
        drawings.append(
            plot("Test loss by timestep", "95 % intervals", plot_bands(BAND_RANGES, bands, "clean to noise"))
        )
    keys = [key for key in evaluation.model.card.estimates if key.startswith(SLICE)]
    if keys:
        names = evaluation.slices or [key.removeprefix(SLICE).replace("_", " ") for key in keys]
        counts = [evaluation.model.card.estimates[key].n for key in keys]
        labels = [f"{name} ({count})" for name, count in zip(names, counts, strict=True)]
        title, note = "Test loss by kind of caption", "95 % intervals, number of pictures in brackets; kinds overlap"
        drawings.append(plot(title, note, plot_slices(labels, _series(evaluation, keys), "denoising loss")))
    if not drawings:
        return []
    note = "Where on the way from a clean picture to pure noise the error sits, and for which captions."
    note += " Training loss is noisier: timesteps and noise change with every step." if curves else ""
    return [section("Loss", note, plots(drawings))]


def _mark(side: Side, index: int) -> str:
    return {1.0: " ✓", 0.0: " ✗"}.get(float(side.shows_P[index]), "")


def _series(evaluation: Evaluation, keys: Sequence[str]) -> dict[str, list[tuple[float, float, float]]]:
    """(value, low, high) by key: of the model alone where the two do not compare."""
    sides = {"model": evaluation.model}
    if evaluation.base and LOSS in evaluation.change:
        sides = {evaluation.labels[1]: evaluation.base, evaluation.labels[0]: evaluation.model}
    found = {name: [side.card.estimates[key] for key in keys] for name, side in sides.items()}
    return {name: [(each.value, each.low, each.high) for each in estimates] for name, estimates in found.items()}
