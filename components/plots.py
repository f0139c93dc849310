"""Plots for reports: matplotlib figures as inline SVG that takes its colours and its font from the page.

A figure is drawn with placeholder colours which become CSS variables, so one drawing serves light and dark pages.
Nothing here opens a window or touches matplotlib's global state.
"""

import hashlib
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

INK, SOFT, LINE, ACCENT, OTHER = "#010101", "#010102", "#010103", "#010104", "#010105"
CSS_COLOURS = {
    INK: "var(--ink)",
    SOFT: "var(--soft)",
    LINE: "var(--line)",
    ACCENT: "var(--accent)",
    OTHER: "var(--other)",
}
RAW_POINTS = 400  # a longer curve is drawn by its smoothed line only, thinned to about so many points


@dataclass(frozen=True)
class Curve:
    """Values by step; a dense one is drawn faint with its running mean on top, a sparse one with its points."""

    name: str
    steps: Sequence[float]
    values: Sequence[float]
    dense: bool = False
    accent: bool = True


def plot_curves(curves: Sequence[Curve], x_label: str) -> str:
    """Curves over steps, each named at its right end."""
    figure, axes = make_figure()
    names: list[tuple[float, str, str]] = []
    for curve in curves:
        colour = ACCENT if curve.accent else OTHER
        if curve.dense:
            smooth = _running_mean(curve.values)
            if len(curve.steps) <= RAW_POINTS:
                axes.plot(curve.steps, curve.values, color=colour, alpha=0.25, linewidth=0.8)
            thin = slice(None, None, max(1, len(smooth) // RAW_POINTS))
            axes.plot(list(curve.steps)[thin], smooth[thin], color=colour, linewidth=1.8)
            names.append((smooth[-1], curve.name, colour))
        else:
            axes.plot(curve.steps, curve.values, color=colour, linewidth=2, marker="o", markersize=4)
            names.append((curve.values[-1], curve.name, colour))
    low, high = axes.get_ylim()
    above = -math.inf
    for height, name, colour in sorted(names):  # names keep a line's distance from each other
        above = max(height, above + (high - low) * 0.075)
        place = (1.015, (above - low) / (high - low))
        axes.annotate(name, place, xycoords="axes fraction", va="center", color=colour, fontsize=10.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel(x_label, color=SOFT, fontsize=10.5)
    return to_svg(figure)


def plot_bands(labels: Sequence[str], series: Mapping[str, Sequence[tuple[float, float, float]]], x_label: str) -> str:
    """(value, low, high) of each series in each band, side by side; the last series is the accented one."""
    figure, axes = make_figure()
    last = len(series) - 1
    for index, (name, estimates) in enumerate(series.items()):
        colour = ACCENT if index == last else OTHER
        places = [band + (index - last / 2) * 0.16 for band in range(len(labels))]
        values = [value for value, _, _ in estimates]
        below = [value - low for value, low, _ in estimates]
        above = [high - value for value, _, high in estimates]
        axes.errorbar(
            places, values, yerr=[below, above], fmt="o", color=colour, markersize=5, elinewidth=2, label=name
        )
    axes.set_xticks(range(len(labels)), labels)
    axes.set_xlim(-0.6, len(labels) - 0.4)
    axes.set_ylim(bottom=0)
    axes.set_xlabel(x_label, color=SOFT, fontsize=10.5)
    if len(series) > 1:
        axes.legend(frameon=False, labelcolor=SOFT, fontsize=10.5, ncols=2, loc="lower right", bbox_to_anchor=(1, 1))
    return to_svg(figure)


def plot_slices(labels: Sequence[str], series: Mapping[str, Sequence[tuple[float, float, float]]], x_label: str) -> str:
    """(value, low, high) of each series for each label, a line each from top to bottom; the last series is accented."""
    figure, axes = make_figure(height=1.2 + 0.26 * len(labels))
    last = len(series) - 1
    for index, (name, estimates) in enumerate(series.items()):
        colour = ACCENT if index == last else OTHER
        places = [row + (index - last / 2) * 0.3 for row in range(len(labels))]
        ends = [[value - low for value, low, _ in estimates], [high - value for value, _, high in estimates]]
        values = [value for value, _, _ in estimates]
        axes.errorbar(values, places, xerr=ends, fmt="o", color=colour, markersize=4, elinewidth=1.8, label=name)
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.set_xlim(left=0)
    axes.grid(visible=False, axis="y")
    axes.grid(axis="x", color=LINE, linewidth=0.8)
    axes.set_xlabel(x_label, color=SOFT, fontsize=10.5)
    if len(series) > 1:
        axes.legend(frameon=False, labelcolor=SOFT, fontsize=10.5, ncols=2, loc="lower right", bbox_to_anchor=(1, 1))
    return to_svg(figure)


def whiskers(model: tuple[float, float, float], base: tuple[float, float, float] | None) -> str:
    """A line a side with (value, low, high), both on one scale: the model above, the base below."""
    rows = [row for row in (model, base) if row is not None]
    low, high = min(row[1] for row in rows), max(row[2] for row in rows)
    scale = 188 / (high - low) if high > low else 0.0
    parts = []
    for index, (value, left, right) in enumerate(rows):
        y = (9 if index == 0 else 25) if len(rows) > 1 else 17
        colour = "var(--accent)" if index == 0 else "var(--other)"
        x1, x2, x = (6 + (place - low) * scale for place in (left, right, value))
        parts.append(f'<path d="M{x1:.1f} {y}H{x2:.1f}" stroke="{colour}" stroke-width="2.5" stroke-linecap="round"/>')
        parts.append(f'<circle cx="{x:.1f}" cy="{y}" r="4.5" fill="{colour}"/>')
    return f'<svg viewBox="0 0 200 34" preserveAspectRatio="xMinYMid meet" aria-hidden="true">{"".join(parts)}</svg>'


def make_figure(height: float = 3.5) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.4, height), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(LINE)
    axes.grid(axis="y", color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelcolor=SOFT, labelsize=10.5, pad=6)
    return figure, axes


def _running_mean(values: Sequence[float]) -> list[float]:
    """Exponential running mean without the pull towards zero at its start; its memory is 1/20 of the curve."""
    keep = 1 - 1 / max(1.0, len(values) / 20)
    total = weight = 0.0
    smooth = []
    for value in values:
        total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        smooth.append(total / weight)
    return smooth


def to_svg(figure: Figure) -> str:
    """The figure as an <svg> element that can stand in a page beside others."""
    buffer = io.StringIO()
    # Dates and ids would differ from run to run; text stays text, so that the page's font applies
    nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "fresco"}):
        figure.savefig(buffer, format="svg", metadata=nothing)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" role="img">', svg, count=1)
    # ids are global in a page: two figures must not clip each other
    own = f"plot-{hashlib.sha256(svg.encode()).hexdigest()[:6]}-"
    svg = re.sub(r'(\bid="|url\(#|href="#)', lambda match: match.group(1) + own, svg)
    for placeholder, variable in CSS_COLOURS.items():
        svg = svg.replace(placeholder, variable)
    return svg
