"""Which metrics a measurement gives, which it cannot give and why, and how paired differences behave."""

import numpy as np
import pytest

from components.scorecard import ADHERENCE, BAND, CLIP, KID, LOSS, Measurement, Reference, make_scorecard, paired_change


def unit_rows(seed: int, n: int) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(n, 8))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def measurement(seed: int, num_pictures: int = 20, num_prompts: int = 10, shows: float = 1.0) -> Measurement:
    losses = np.random.default_rng(seed).gamma(4, 0.1, (num_pictures, 4))
    return Measurement(losses, unit_rows(seed, num_prompts), np.full(num_prompts, shows))


def reference(num_prompts: int = 10) -> Reference:
    return Reference(unit_rows(100, num_prompts), unit_rows(101, num_prompts), seed=0, resamples=200)


def test_everything_is_measured_where_there_is_enough():
    card = make_scorecard(measurement(0), reference())
    assert set(card.estimates) == {LOSS, CLIP, KID, ADHERENCE, *(f"{BAND}{band}" for band in range(4))}
    assert card.not_measured == {}
    assert card.as_dict()[LOSS].keys() == {"value", "low", "high", "n"}
    assert card.estimates[LOSS].value == pytest.approx(measurement(0).losses_NK.mean())
    assert card.estimates[ADHERENCE].value == 1


@pytest.mark.parametrize(
    ("num_pictures", "num_prompts", "missing"),
    [(1, 1, {LOSS, CLIP, KID}), (2, 2, {KID}), (3, 3, set())],
)
def test_too_few_pictures_leave_a_metric_out_with_its_reason(num_pictures, num_prompts, missing):
    card = make_scorecard(measurement(0, num_pictures, num_prompts), reference(num_prompts))
    assert set(card.not_measured) == missing
    assert all(card.not_measured.values()) and not missing & set(card.estimates)


def test_adherence_counts_only_the_prompts_that_can_be_checked():
    model = measurement(0)
    shows = np.array([1, 0, 1, 1, *[np.nan] * 6])
    card = make_scorecard(Measurement(model.losses_NK, model.features_PD, shows), reference())
    assert (card.estimates[ADHERENCE].value, card.estimates[ADHERENCE].n) == (0.75, 4)
    assert ADHERENCE in make_scorecard(measurement(0, shows=np.nan), reference()).not_measured


def test_a_perfect_copy_of_the_test_pictures_scores_better_than_a_stranger():
    ref = reference()
    copy = Measurement(measurement(0).losses_NK, ref.real_features_PD, np.ones(10))
    stranger = Measurement(measurement(0).losses_NK, np.roll(np.eye(8, dtype=np.float32)[[0] * 10], 1, 0), np.ones(10))
    assert make_scorecard(copy, ref).estimates[KID].value < make_scorecard(stranger, ref).estimates[KID].value


def test_paired_change_is_the_difference_and_far_sharper_than_the_two_intervals():
    base = measurement(0)
    better = Measurement(base.losses_NK - 0.02, base.features_PD, base.shows_P)
    change = paired_change(better, base, reference(), same_latents=True)
    assert change[LOSS].value == pytest.approx(-0.02)
    assert change[LOSS].high < 0 < make_scorecard(base, reference()).estimates[LOSS].high
    assert change[CLIP].value == change[ADHERENCE].value == 0


def test_losses_of_different_latent_spaces_are_not_subtracted():
    change = paired_change(measurement(0), measurement(1), reference(), same_latents=False)
    assert set(change) == {CLIP, ADHERENCE}


def test_equal_models_differ_significantly_no_more_often_than_stated():
    repeats, alarms = 200, 0
    for repeat in range(repeats):
        rng = np.random.default_rng(repeat)
        shared = rng.gamma(4, 0.1, (40, 1))
        models = [
            Measurement(shared + rng.normal(0, 0.05, (40, 1)), unit_rows(0, 1), np.full(1, np.nan)) for _ in range(2)
        ]
        change = paired_change(models[0], models[1], Reference(unit_rows(1, 1), unit_rows(2, 1), 0, 300), True)[LOSS]
        alarms += not change.low <= 0 <= change.high
    # 5 % stated; 200 repeats have a standard error of 1.5 %, and 40 items cost the bootstrap about 1 %
    assert alarms / repeats <= 0.105
