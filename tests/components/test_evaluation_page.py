"""The evaluation page says no more than the intervals allow."""

import numpy as np
import pytest
from PIL import Image

from components.evaluation_page import Evaluation, Side, lead, make_grid, make_page, metric_rows
from components.metrics import Estimate
from components.plots import Curve
from components.scorecard import ADHERENCE, BAND, CLIP, KID, LOSS, Scorecard


def pictures(value: int, count: int = 3) -> list[Image.Image]:
    return [Image.fromarray(np.full((16, 16, 3), value, np.uint8))] * count


def side(loss: float, shows: float = 1.0) -> Side:
    bands = {f"{BAND}{band}": Estimate(loss, loss - 0.01, loss + 0.01, 40) for band in range(4)}
    estimates = {
        LOSS: Estimate(loss, loss - 0.01, loss + 0.01, 40),
        **bands,
        CLIP: Estimate(60.0, 55.0, 65.0, 3),
        KID: Estimate(0.1, 0.0, 0.2, 3),
        ADHERENCE: Estimate(2 / 3, 0.2, 0.9, 3),
    }
    return Side(Scorecard(estimates, {}), pictures(int(loss * 100)), np.array([shows, 0.0, shows]))


def evaluation(change: Estimate | None, with_base: bool = True) -> Evaluation:
    return Evaluation(
        side(0.3),
        side(0.4) if with_base else None,
        {LOSS: change} if change else {},
        ["a red circle", "a <b>blue</b> square", "a star"],
        [0, 1, 2],
        pictures(200),
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (Estimate(-0.1, -0.12, -0.08, 40), "25 % below the base"),
        (Estimate(0.1, 0.08, 0.12, 40), "25 % above the base"),
        (Estimate(-0.1, -0.3, 0.1, 40), "not clearly different from the base"),
        (None, "on 40 test pictures. "),
    ],
)
def test_the_lead_claims_what_the_paired_interval_supports(change, said):
    assert said in lead(evaluation(change))


def test_the_lead_counts_pictures_that_show_their_prompt():
    assert "2 of 3 drawn pictures show all that their prompt says; of the base's, 2." in lead(evaluation(None))


def test_losses_that_do_not_compare_are_shown_without_the_base():
    [loss, kid] = metric_rows(evaluation(None), [LOSS, KID])
    assert loss.base is None and kid.base is not None


def test_page_shows_both_models_the_marks_and_the_reasons():
    html = make_page("run-1", evaluation(Estimate(-0.1, -0.12, -0.08, 40)), {"Run": "run-1"}, [], {"Config": "a: 1"})
    for text in ("fine-tuned ✓", "fine-tuned ✗", "base ✓", "real", "seed 2", "neither has seen", "&lt;b&gt;blue"):
        assert text in html
    assert "Loss by step" not in html
    curves = [Curve("validation", [0, 1], [1.0, 0.5])]
    assert "Loss by step" in make_page("run-1", evaluation(None), {}, curves, {})


def test_page_of_a_model_without_a_base_does_not_speak_of_one():
    html = make_page("m", evaluation(None, with_base=False), {}, [], {})
    assert "fine-tuned" not in html and "its base" not in html


def test_page_gives_the_reason_for_what_was_not_measured():
    alone = evaluation(None, with_base=False)
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
    with_base, without = make_grid(evaluation(None)), make_grid(evaluation(None, with_base=False))
    shades = {colour for _, colour in with_base.getcolors(1 << 24)}
    assert {(40,) * 3, (30,) * 3, (200,) * 3} <= shades
    assert (40,) * 3 not in {colour for _, colour in without.getcolors(1 << 24) if _ > 10_000}
