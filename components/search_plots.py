"""Plots of a search: loss curves of all trials, importance bars, rate against loss by plan, cost against quality.

Drawn with the placeholders of `components/plots.py`, so they take colours and font from the page. The best trial is the
accented one; freezing plans are told apart by their marker, which needs no colour.
"""

import math
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from components.plots import ACCENT, INK, LINE, OTHER, SOFT, make_figure, to_svg
from components.search_results import Trial

MARKERS = "osD^vPX*<>"
PLAN = "train.freezing"
WIDE = 300  # rates that span more than this factor are marked at powers of ten alone


def plot_trial_curves(trials: Sequence[Trial], best: Trial) -> str:
    """Validation loss by step of every trial; where a line ends, the trial was stopped."""
    figure, axes = make_figure()
    for trial in trials:
        if trial is best or not trial.curve:
            continue
        steps, losses = zip(*trial.curve, strict=True)
        axes.plot(steps, losses, color=OTHER, alpha=0.55, linewidth=1.4)
        axes.plot(steps[-1], losses[-1], color=OTHER, marker="x" if trial.state == "failed" else "o", markersize=3.5)
    steps, losses = zip(*best.curve, strict=True)
    axes.plot(steps, losses, color=ACCENT, linewidth=2.2, marker="o", markersize=4)
    axes.annotate(f"trial {best.number}", (steps[-1], losses[-1]), (6, 0), textcoords="offset points", color=ACCENT)
    axes.margins(x=0.1)
    axes.set_xlabel("optimizer step", color=SOFT, fontsize=10.5)
    _clip_outliers(axes, [loss for trial in trials for _, loss in trial.curve])
    return to_svg(figure)


def plot_importance(shares: Mapping[str, float]) -> str:
    """A bar for each key."""
    figure, axes = make_figure()
    names = [path.removeprefix("train.") for path in shares][::-1]
    values = list(shares.values())[::-1]
    axes.barh(range(len(names)), values, color=[OTHER] * (len(names) - 1) + [ACCENT], height=0.55)
    axes.set_yticks(range(len(names)), names)
    for place, value in enumerate(values):
        axes.annotate(f"{value:.2f}", (value, place), (5, 0), textcoords="offset points", va="center", color=SOFT)
    axes.grid(visible=False)
    axes.set_xlim(0, max(1.0, *values) if values else 1.0)
    axes.set_xlabel("share of the ranks' variance explained alone", color=SOFT, fontsize=10.5)
    return to_svg(figure)


def plot_rates(trials: Sequence[Trial], best: Trial, path: str, losses: Sequence[float]) -> str:
    """One searched rate against the loss at a common step, a marker for each freezing plan."""
    figure, axes = make_figure()
    plans = list(dict.fromkeys(str(trial.overrides.get(PLAN, "")) for trial in trials))
    shown = []
    for trial, loss in zip(trials, losses, strict=True):
        if path not in trial.overrides or not math.isfinite(loss):
            continue
        colour = ACCENT if trial is best else OTHER
        marker = MARKERS[plans.index(str(trial.overrides.get(PLAN, ""))) % len(MARKERS)]
        axes.plot(trial.overrides[path], loss, color=colour, marker=marker, linestyle="none", markersize=7)
        shown.append(loss)
    axes.set_xscale("log")
    drawn = [trial.overrides[path] for trial in trials if path in trial.overrides]
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(drawn) / min(drawn) < WIDE else (1,)))
    axes.xaxis.set_major_formatter(FuncFormatter(_rate))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(path.removeprefix("train."), color=SOFT, fontsize=10.5)
    _clip_outliers(axes, shown)
    _plan_legend(axes, plans)
    return to_svg(figure)


def plot_cost(trials: Sequence[Trial], best: Trial, total_steps: int) -> str:
    """The best loss found so far against the steps spent on all trials, and each trial's end."""
    figure, axes = make_figure()
    spent, lowest = 0, math.inf
    line: list[tuple[int, float]] = []
    ends = []
    for trial in trials:
        for step, loss in trial.curve:
            if trial.state != "failed" and step == total_steps and loss < lowest:
                lowest = loss
                line.append((spent + step, loss))
        spent += trial.steps
        if math.isfinite(trial.loss):
            axes.plot(
                spent,
                trial.loss,
                color=ACCENT if trial is best else OTHER,
                marker="o",
                markersize=6,
                linestyle="none",
                fillstyle="full" if trial.steps == total_steps else "none",
            )
            ends.append(trial.loss)
    if line:
        line.append((spent, line[-1][1]))
        axes.step(*zip(*line, strict=True), where="post", color=INK, linewidth=1.2)
    axes.set_xlabel("optimizer steps spent on all trials", color=SOFT, fontsize=10.5)
    _clip_outliers(axes, ends)
    return to_svg(figure)


def _rate(value: float, _place: int) -> str:
    """A rate as people type it: 5e-4."""
    mantissa, exponent = f"{value:.0e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def _clip_outliers(axes: Axes, losses: Sequence[float]) -> None:
    """Keep a trial that diverged from flattening all others."""
    finite = sorted(loss for loss in losses if math.isfinite(loss))
    if len(finite) > 4:
        low, middle = finite[0], finite[len(finite) // 2]
        room = 4 * max(middle - low, 1e-9)
        if finite[-1] > middle + room:
            axes.set_ylim(low - 0.1 * room, middle + room)


def _plan_legend(axes: Axes, plans: Sequence[str]) -> None:
    if plans == [""]:
        return
    handles = [
        Line2D([], [], color=SOFT, marker=MARKERS[i % len(MARKERS)], linestyle="none", label=plan or "the recipe's")
        for i, plan in enumerate(plans)
    ]
    axes.legend(
        handles=handles,
        frameon=False,
        labelcolor=SOFT,
        fontsize=9.5,
        ncols=min(4, len(plans)),
        loc="lower left",
        bbox_to_anchor=(0, 1),
        handletextpad=0.2,
        edgecolor=LINE,
    )
