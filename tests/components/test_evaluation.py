"""What is said of an evaluation is no more than its intervals and p-values allow."""

import numpy as np
import pytest

from components.compare import Paired
from components.evaluation import Evaluation, Side, decided, lead, metric_rows
from components.metrics import Estimate
from components.scorecard import ADHERENCE, CLIP, COPYING, DIVERSITY, FID, KID, LOSS, Scorecard

BETTER = Paired(-0.1, -0.12, -0.08, 0.0005, 40, None)
WORSE = Paired(0.1, 0.08, 0.12, 0.0005, 40, None)
UNCLEAR = Paired(-0.1, -0.3, 0.1, 0.31, 40, 833)
DISPUTED = Paired(-0.1, -0.2, -0.001, 0.07, 40, 60)


def side(loss: float) -> Side:
    estimates = {
        LOSS: Estimate(loss, loss - 0.01, loss + 0.01, 40),
        CLIP: Estimate(60.0, 55.0, 65.0, 3),
        KID: Estimate(0.1, 0.0, 0.2, 3),
        FID: Estimate(90.0, 80.0, 99.0, 3),
        DIVERSITY: Estimate(0.1, 0.05, 0.2, 3),
        COPYING: Estimate(0.4, 0.3, 0.6, 3),
        ADHERENCE: Estimate(2 / 3, 0.2, 0.9, 3),
    }
    return Side(Scorecard(estimates, {}), [], np.ones(3))


def evaluation(changes: dict[str, Paired], against: str = "") -> Evaluation:
    return Evaluation(side(0.3), side(0.4), changes, ["a", "b", "c"], [0, 1, 2], [], None, against)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (BETTER, "25 % below the base (p < 0.001)."),
        (WORSE, "25 % above the base (p < 0.001)."),
        (UNCLEAR, "not clearly different from the base (p = 0.31; about 840 pictures would decide, here are 40)."),
        (DISPUTED, "not clearly different from the base"),
        (None, "on 40 test pictures. "),
    ],
)
def test_the_lead_claims_what_interval_and_p_value_support(change, said):
    assert said in lead(evaluation({LOSS: change} if change else {}))


def test_the_lead_counts_pictures_that_show_their_prompt():
    assert "2 of 3 drawn pictures show all that their prompt says; of the base's, 2." in lead(evaluation({}))


def test_another_model_is_not_called_the_base():
    said = lead(evaluation({LOSS: BETTER}, against="run-2"))
    assert "25 % below the other model" in said and "base" not in said


@pytest.mark.parametrize(
    ("p_value", "needed", "said"),
    [
        (0.0001, None, "p < 0.001"),
        (0.043, None, "p = 0.043"),
        (0.5, 1234, "p = 0.50; about 1,300 prompts would decide, here are 40"),
        (0.06, 38, "p = 0.060; about 41 prompts would decide, here are 40"),
        (1.0, 10**9, "p = 1.00; no number of prompts within reach would decide so small a difference"),
    ],
)
def test_the_p_value_is_told_with_what_would_decide(p_value, needed, said):
    assert decided(Paired(0.1, -0.1, 0.2, p_value, 40, needed), "prompts") == said


def test_losses_that_do_not_compare_are_shown_without_the_base():
    [loss, kid] = metric_rows(evaluation({}), [LOSS, KID])
    assert loss.base is None and kid.base is not None


def test_what_is_never_compared_stands_beside_the_base_without_a_difference():
    [fid] = metric_rows(evaluation({LOSS: BETTER}), [FID])
    assert fid.base is not None and fid.change is None and fid.decided == ""


@pytest.mark.parametrize(
    ("key", "change", "better"),
    [
        (LOSS, BETTER, -1),
        (LOSS, UNCLEAR, 0),
        (LOSS, DISPUTED, 0),
        (CLIP, WORSE, 1),
        (KID, WORSE, -1),
        (DIVERSITY, WORSE, 0),
        (COPYING, WORSE, 0),
    ],
)
def test_a_row_is_coloured_only_where_the_difference_is_clear_and_has_a_good_side(key, change, better):
    [row] = metric_rows(evaluation({key: change}), [key])
    assert row.better == better and row.change.value == change.difference
