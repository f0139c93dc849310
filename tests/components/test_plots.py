"""Plots as inline SVG: well-formed, themed by the page, repeatable, and safe beside one another."""

import re
from xml.etree import ElementTree

import matplotlib
import pytest

from components.plots import Curve, _running_mean, plot_bands, plot_curves, plot_slices, whiskers

CURVES = [
    Curve("training", range(50), [1 / (1 + step) for step in range(50)], dense=True, accent=False),
    Curve("validation", [0, 25, 49], [1.0, 0.3, 0.2]),
]
BANDS = {"base": [(0.5, 0.4, 0.6), (0.7, 0.6, 0.8)], "model": [(0.3, 0.2, 0.4), (0.5, 0.4, 0.6)]}


@pytest.fixture(params=["curves", "bands", "slices", "whiskers"])
def svg(request):
    return {
        "curves": lambda: plot_curves(CURVES, "step"),
        "bands": lambda: plot_bands(["0–499", "500–999"], BANDS, "timestep"),
        "slices": lambda: plot_slices(["shape: star (12)", "shape: heart (20)"], BANDS, "loss"),
        "whiskers": lambda: whiskers((0.5, 0.4, 0.6), (0.2, 0.1, 0.3)),
    }[request.param]


def test_svg_is_well_formed_repeatable_and_takes_its_colours_from_the_page(svg):
    text = svg()
    ElementTree.fromstring(text.replace("xlink:", ""))
    assert text == svg()
    assert "var(--" in text and not re.search(r"#0101|#[0-9a-f]{6}", text)
    assert "<style" not in text and "<metadata" not in text and "xmlns" not in text


def test_names_stay_text():
    text = plot_curves(CURVES, "optimizer step")
    for word in ("training", "validation", "optimizer step"):
        assert f">{word}</text>" in text


def test_slices_are_named_with_a_line_each_however_many():
    few, many = (plot_slices([f"kind {i}" for i in range(n)], {"model": [(1, 0, 2)] * n}, "loss") for n in (3, 30))
    assert all(f">kind {i}</text>" in many for i in range(30))
    heights = [float(re.search(r'viewBox="0 0 \S+ (\S+)"', text).group(1)) for text in (few, many)]
    assert heights[1] > 3 * heights[0]


def test_two_plots_in_a_page_share_no_id():
    first, second = plot_curves(CURVES, "step"), plot_bands(["a", "b"], BANDS, "t")
    ids = [set(re.findall(r'\bid="([^"]+)"', text)) for text in (first, second)]
    assert not ids[0] & ids[1]
    for text, own in zip((first, second), ids, strict=True):
        used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', text))
        assert used <= own


def test_matplotlibs_global_settings_are_left_alone():
    before = dict(matplotlib.rcParams)
    plot_curves(CURVES, "step")
    assert dict(matplotlib.rcParams) == before


def test_running_mean_of_a_constant_is_that_constant():
    assert _running_mean([3.0] * 200) == pytest.approx([3.0] * 200)
    assert _running_mean([2.0]) == [2.0]


def test_whiskers_put_both_lines_on_one_scale():
    text = whiskers((0.5, 0.4, 0.6), (0.2, 0.0, 0.3))
    places = [float(x) for x in re.findall(r'cx="([0-9.]+)"', text)]
    assert places[0] > places[1]
    assert len(re.findall("<circle", whiskers((1.0, 1.0, 1.0), None))) == 1  # no width, no division by zero
