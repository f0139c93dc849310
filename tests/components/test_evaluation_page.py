"""The evaluation page shows what was measured, in an order nobody chose."""

import re

import numpy as np
from PIL import Image

from components.compare import Paired
from components.evaluation import CopyPair, Evaluation, Side
from components.evaluation_page import make_grid, make_page
from components.metrics import Estimate
from components.plots import Curve
from components.scorecard import ADHERENCE, BAND, CLIP, FID, KID, LOSS, Scorecard, slice_key


def pictures(value: int, count: int = 3) -> list[Image.Image]:
    return [Image.fromarray(np.full((16, 16, 3), value, np.uint8))] * count


def side(loss: float, shows: float = 1.0) -> Side:
    bands = {f"{BAND}{band}": Estimate(loss, loss - 0.01, loss + 0.01, 40) for band in range(4)}
    estimates = {
        LOSS: Estimate(loss, loss - 0.01, loss + 0.01, 40),
        **bands,
        CLIP: Estimate(60.0, 55.0, 65.0, 3),
        KID: Estimate(0.1, 0.0, 0.2, 3, "0123456789ab"),
        FID: Estimate(90.0, 80.0, 100.0, 3, "0123456789ab", "biased below 10,000 pictures"),
        slice_key("shape: star"): Estimate(loss, loss - 0.02, loss + 0.02, 12),
        ADHERENCE: Estimate(2 / 3, 0.2, 0.9, 3),
    }
    return Side(Scorecard(estimates, {}), pictures(int(loss * 100)), np.array([shows, 0.0, shows]))


def evaluation(change: Paired | None = None, with_base: bool = True, against: str = "") -> Evaluation:
    return Evaluation(
        side(0.3),
        side(0.4) if with_base else None,
        {LOSS: change} if change else {},
        ["a red circle", "a <b>blue</b> square", "a star"],
        [0, 1, 2],
        pictures(200),
        np.array([0.1, 0.5, 0.3]) if with_base else None,
        against,
        ["shape: star"],
    )


BETTER = Paired(-0.1, -0.12, -0.08, 0.0005, 40, None)


def test_page_shows_both_models_the_marks_and_the_reasons():
    html = make_page("run-1", evaluation(BETTER), {"Run": "run-1"}, [], {"Config": "a: 1"})
    for text in ("fine-tuned ✓", "fine-tuned ✗", "base ✓", "real", "seed 2", "neither has seen", "&lt;b&gt;blue"):
        assert text in html
    assert "Loss by step" not in html
    curves = [Curve("validation", [0, 1], [1.0, 0.5])]
    assert "Loss by step" in make_page("run-1", evaluation(), {}, curves, {})


def test_page_of_a_model_without_a_base_does_not_speak_of_one():
    html = make_page("m", evaluation(with_base=False), {}, [], {})
    assert "fine-tuned" not in html and "its base" not in html


def test_page_gives_the_reason_for_what_was_not_measured():
    alone = evaluation(with_base=False)
    card = Scorecard(
        {LOSS: alone.model.card.estimates[LOSS]} | bands_of(alone), {ADHERENCE: "no caption can be checked"}
    )
    html = make_page(
        "m",
        Evaluation(Side(card, pictures(1), np.full(3, np.nan)), None, {}, alone.captions, [0, 1, 2], pictures(2)),
        {},
        [],
        {},
    )
    assert "Prompt adherence: not measured" in html and "no caption can be checked." in html and "✓" not in html


def bands_of(alone: Evaluation) -> dict[str, Estimate]:
    return {name: value for name, value in alone.model.card.estimates.items() if name.startswith(BAND)}


def test_grid_has_base_model_and_real_side_by_side():
    with_base, without = make_grid(evaluation()), make_grid(evaluation(with_base=False))
    shades = {colour for _, colour in with_base.getcolors(1 << 24)}
    assert {(40,) * 3, (30,) * 3, (200,) * 3} <= shades
    assert (40,) * 3 not in {colour for _, colour in without.getcolors(1 << 24) if _ > 10_000}


def test_pictures_stand_in_the_order_of_how_far_the_two_drawings_are_apart():
    html = make_page("run-1", evaluation(BETTER), {}, [], {})
    assert re.findall(r"seed (\d), (0\.\d+) apart", html) == [("1", "0.50"), ("2", "0.30"), ("0", "0.10")]
    assert "differ most" in html and "not chosen" not in html
    alone = make_page("run-1", evaluation(with_base=False), {}, [], {})
    assert re.findall(r"seed (\d)", alone) == ["0", "1", "2"] and "not chosen" in alone


def test_page_has_slices_encoder_warning_and_p_value():
    html = make_page("run-1", evaluation(BETTER), {}, [], {})
    for text in ("shape: star (12)", "0123456789ab", "biased below 10,000", "p &lt; 0.001", "kind of caption"):
        assert text in html


def test_a_comparison_with_another_model_names_it_so():
    html = make_page("run-1", evaluation(BETTER, against="run-2"), {"Against": "run-2"}, [], {})
    assert "the other model" in html and "other ✓" in html and "its base" not in html and "fine-tuned" not in html
    assert re.search(r"other 0\.\d+, <span", html) and ">base 0" not in html, "tiles name it too"


def test_the_nearest_training_pictures_stand_beside_what_was_drawn():
    given = evaluation(BETTER)
    near = Side(given.model.card, given.model.drawn, given.model.shows_P, [CopyPair(2, pictures(7)[0], 0.031, 0.2)])
    html = make_page("m", Evaluation(near, None, {}, given.captions, [0, 1, 2], given.real), {}, [], {})
    assert "Nearest training pictures" in html and "0.03 apart, pixels 0.20" in html
    assert "Nearest training pictures" not in make_page("m", given, {}, [], {})
