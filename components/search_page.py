"""The page that `fresco tune` leaves behind: what won, how it compares, what mattered, what it cost.

Trials that were stopped are compared with the others at the last step that all of them reached; only the winner's loss
at full length is a result. Nothing is left out: failed trials are in the table with their reasons.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from PIL import Image

from components.report import folded, notes, page, plot, plots, section, sheet
from components.search_plots import plot_cost, plot_importance, plot_rates, plot_trial_curves
from components.search_results import OWN, Trial, at_equal_steps, common_step, importance, losses_at

MAX_SHEETS = 12
ORIGINS = {OWN: "own recipe", "random": "chance", "tpe": "TPE", "evolution": "evolution"}
EXPLAINED = {
    "loss": "The deterministic validation loss of the averaged weights: same pictures, timesteps and noise for every"
    " trial, so differences are the recipe's.",
    "stopped": "The scheduler saw the trial behind the others at the same step. It is not known what it would have"
    " become.",
    "importance": "The share of the variance of the losses' ranks that a key explains alone, less what it would explain"
    " of shuffled ranks. Keys act together: the shares need not add up to 1.",
    "own recipe": "The config as it was given, tried first: what the search has to beat.",
    "winner": "The trial with the lowest loss, continued to its full length: a trial runs on the full schedule from its"
    " first step, so its end is what fresco train with the same overrides gives.",
}


@dataclass(frozen=True)
class Search:
    """A finished search."""

    trials: Sequence[Trial]
    best: Trial
    total_steps: int
    """Steps of a full-length trial."""
    gaps_s: Sequence[float]
    """Seconds between the end of a trial and the next one's first step."""
    pictures: Mapping[int, Image.Image]
    """The last sample sheet of a trial, by number."""


def make_search_page(title: str, search: Search, facts: Mapping[str, str], settings: Mapping[str, str]) -> str:
    """The whole HTML document."""
    sections = [
        section(
            "Trials", "Best first. A stopped trial shows the loss at the step where it was stopped.", _table(search)
        ),
        _curves(search),
        *_what_mattered(search),
    ]
    if search.pictures:
        sections.append(_pictures(search))
    folds = [folded(name, text) for name, text in settings.items()]
    sections.append(section("How to read this", "", notes(EXPLAINED), *folds))
    return page(title, "Fresco search", lead(search), facts, sections, "Made by fresco tune.")


def lead(search: Search) -> str:
    """Two sentences that say the result."""
    spent = sum(trial.steps for trial in search.trials)
    full = search.total_steps * len(search.trials)
    recipe = ", ".join(f"{path.removeprefix('train.')} {_value(v)}" for path, v in search.best.overrides.items())
    first = search.best.curve[0][1]
    change = search.best.loss / first - 1
    return (
        f"Trial {search.best.number} won with {recipe}: validation loss {search.best.loss:.5f}, {_percent(change)} its"
        f" start.{_beside_own(search)} {len(search.trials)} trials took {spent} steps,"
        f" {spent / full:.0%} of what running all of them to the end would have taken."
    )


def _beside_own(search: Search) -> str:
    """A sentence on the config's own recipe, where it was tried."""
    own = next((trial for trial in search.trials if trial.origin == OWN), None)
    if own is search.best:
        return " It is the config's own recipe: no trial beat it."
    pair = at_equal_steps(own.curve, search.best.curve) if own and math.isfinite(own.loss) else None
    if pair is None:
        return ""
    step, theirs, ours = pair
    return f" At step {step} it was {_percent(ours / theirs - 1)} the config's own recipe ({theirs:.5f})."


def _percent(change: float) -> str:
    return f"{abs(change):.0%} {'below' if change < 0 else 'above'}"


def _table(search: Search) -> str:
    paths = list(dict.fromkeys(path for trial in search.trials for path in trial.overrides))
    head = ["trial", "drawn by", *(path.removeprefix("train.") for path in paths), "state", "steps", "loss"]
    lines = []
    for trial in sorted(search.trials, key=lambda one: (one.loss, one.number)):
        reason = (
            f'<small style="white-space: normal">{escape(trial.reason.splitlines()[0][:90])}</small>'
            if trial.reason
            else ""
        )
        name = f"<b>{trial.number}</b>" if trial is search.best else str(trial.number)
        cells = [
            f"{name}<small>{escape(trial.run_id)}</small>",
            escape(ORIGINS.get(trial.origin, trial.origin)),
            *(_value(trial.overrides.get(path, "")) for path in paths),
            f"{escape(trial.state)}{reason}",
            str(trial.steps),
            f"{trial.loss:.5f}" if math.isfinite(trial.loss) else "–",
        ]
        lines.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    titles = "".join(f"<th>{escape(title)}</th>" for title in head)
    return f'<div class="scroll"><table><thead><tr>{titles}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else escape(str(value))


def _curves(search: Search) -> str:
    drawn = [
        plot(
            "Validation loss by step",
            "a line that ends early was stopped",
            plot_trial_curves(search.trials, search.best),
        ),
        plot(
            "Cost against quality",
            "full circles are full-length trials, the line is the best of them so far",
            plot_cost(search.trials, search.best, search.total_steps),
        ),
    ]
    note = "Every trial's validation loss, and what the search had found after how many steps."
    if search.gaps_s:
        middle = sorted(search.gaps_s)[len(search.gaps_s) // 2]
        note += f" From a trial's last evaluation to the next one's first step: {middle:.1f} s (median)."
    return section("Curves", note, plots(drawn))


def _what_mattered(search: Search) -> list[str]:
    at = common_step(search.trials)
    losses = losses_at(search.trials, at).tolist()
    drawn = []
    shares = importance(search.trials)
    if shares:
        drawn.append(plot("Importance", f"by the loss at step {at}", plot_importance(shares)))
    for path in dict.fromkeys(path for trial in search.trials for path in trial.overrides):
        values = [trial.overrides[path] for trial in search.trials if path in trial.overrides]
        if path.startswith("train.learning_rate") and len(values) > 1:
            title = f"{path.rpartition('.')[2].replace('_', ' ').capitalize()} rate"
            drawn.append(plot(title, f"loss at step {at}", plot_rates(search.trials, search.best, path, losses)))
    if not drawn:
        return []
    return [section("What mattered", f"All trials that did not fail were measured at step {at}.", plots(drawn))]


def _pictures(search: Search) -> str:
    ranked = sorted((trial for trial in search.trials if trial.number in search.pictures), key=lambda one: one.loss)
    items = [
        plot(
            f"Trial {trial.number}",
            f"loss {trial.loss:.5f} at step {trial.steps}",
            sheet(search.pictures[trial.number]),
        )
        for trial in ranked[:MAX_SHEETS]
    ]
    return section("Pictures", "Fixed prompts and seeds where each trial ended, beside the base's.", plots(items))
