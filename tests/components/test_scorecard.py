"""Which metrics a measurement gives, which it cannot give and why, and how paired differences behave."""

import numpy as np
import pytest

from components.copies import Nearest
from components.scorecard import (
    ADHERENCE,
    BAND,
    CLIP,
    CMMD,
    COPYING,
    COVERAGE,
    DENSITY,
    DIVERSITY,
    FID,
    INCEPTION,
    KID,
    LOSS,
    NEAR_COPIES,
    NEED_ENCODER,
    NOT_COMPARED,
    TITLES,
    Measurement,
    Reference,
    make_scorecard,
    paired_change,
    slice_key,
)


def unit_rows(seed: int, n: int) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(n, 8))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def distances(seed: int, n: int) -> Nearest:
    rng = np.random.default_rng(seed)
    return Nearest(np.zeros(n, int), rng.gamma(2, 1, n), rng.gamma(2, 1, n))


def measurement(seed: int, num_pictures: int = 20, num_prompts: int = 10, shows: float = 1.0) -> Measurement:
    losses = np.random.default_rng(seed).gamma(4, 0.1, (num_pictures, 4))
    drawn = unit_rows(seed, num_prompts)
    seeds = np.stack([drawn, unit_rows(seed + 50, num_prompts)], axis=1)
    return Measurement(losses, drawn, np.full(num_prompts, shows), seeds, distances(seed, num_prompts))


def reference(num_prompts: int = 10, num_pictures: int = 20) -> Reference:
    return Reference(
        unit_rows(100, num_prompts),
        unit_rows(101, num_prompts),
        seed=0,
        resamples=200,
        encoder="clip-tiny 0123456789ab",
        slices={"shape: star": np.arange(num_pictures) < 12},
        class_features_CD=unit_rows(102, 3),
        unseen=distances(103, 30),
    )


STAR = slice_key("shape: star")
BANDS = {f"{BAND}{band}" for band in range(4)}


def test_everything_is_measured_where_there_is_enough():
    card = make_scorecard(measurement(0), reference())
    assert set(card.estimates) == {*TITLES, *BANDS, STAR}
    assert card.not_measured == {}
    assert card.as_dict()[LOSS].keys() == {"value", "low", "high", "n"}
    assert card.estimates[LOSS].value == pytest.approx(measurement(0).losses_NK.mean())
    assert card.estimates[STAR].value == pytest.approx(measurement(0).losses_NK[:12].mean())
    assert (STAR, card.estimates[STAR].n) == ("denoising_loss_slice_shape_star", 12)
    assert card.estimates[ADHERENCE].value == 1
    for estimate in card.estimates.values():
        assert estimate.low <= estimate.value <= estimate.high


def test_what_depends_on_an_encoder_names_it_and_nothing_else_does():
    card = make_scorecard(measurement(0), reference())
    named = {name for name, numbers in card.as_dict().items() if "encoder" in numbers}
    assert named == set(NEED_ENCODER)
    assert card.as_dict()[KID]["encoder"] == "clip-tiny 0123456789ab"


def test_fid_and_inception_score_of_few_pictures_carry_a_warning():
    card = make_scorecard(measurement(0), reference()).as_dict()
    assert {name for name, numbers in card.items() if "warning" in numbers} == {FID, INCEPTION}
    assert "10,000" in card[FID]["warning"] and "5,000" in card[INCEPTION]["warning"]


@pytest.mark.parametrize(
    ("num_pictures", "num_prompts", "missing"),
    [
        (1, 1, {LOSS, CLIP, KID, CMMD, FID, INCEPTION, COVERAGE, DENSITY, DIVERSITY, COPYING, NEAR_COPIES}),
        (2, 2, {KID, CMMD, FID, INCEPTION, COVERAGE, DENSITY, COPYING, NEAR_COPIES}),
        (3, 3, {FID, COVERAGE, DENSITY}),
        (7, 7, set()),
    ],
)
def test_too_few_pictures_leave_a_metric_out_with_its_reason(num_pictures, num_prompts, missing):
    card = make_scorecard(measurement(0, num_pictures, num_prompts), reference(num_prompts, num_pictures))
    assert set(card.not_measured) == missing
    assert all(card.not_measured.values()) and not missing & set(card.estimates)


def test_what_was_not_given_is_left_out_with_its_reason():
    full, ref = measurement(0), reference()
    model = Measurement(full.losses_NK, full.features_PD, full.shows_P)
    bare = Reference(ref.text_features_PD, ref.real_features_PD, 0, 200, no_copy_check="trained on other data")
    missing = make_scorecard(model, bare).not_measured
    assert set(missing) == {DIVERSITY, COPYING, NEAR_COPIES, INCEPTION}
    assert "no classes given" in missing[INCEPTION] and missing[COPYING] == "trained on other data"
    assert "seeds_per_prompt" in missing[DIVERSITY]


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


def better_than(base: Measurement, by: float) -> Measurement:
    return Measurement(base.losses_NK - by, base.features_PD, base.shows_P, base.features_QSD, base.nearest)


def test_paired_change_is_the_difference_and_far_sharper_than_the_two_intervals():
    base = measurement(0)
    change = paired_change(better_than(base, 0.02), base, reference(), same_latents=True)
    assert set(change) == {*TITLES, *BANDS, STAR} - set(NOT_COMPARED)
    assert change[LOSS].difference == pytest.approx(-0.02)
    assert change[LOSS].high < 0 < make_scorecard(base, reference()).estimates[LOSS].high
    assert change[LOSS].p_value < 0.01 and change[LOSS].needed is None
    for name in (CLIP, ADHERENCE, KID, CMMD, COVERAGE, DIVERSITY, COPYING):
        assert change[name].difference == 0 and change[name].p_value == 1


def test_set_metrics_are_compared_prompt_by_prompt():
    model, base, ref = measurement(0, 20, 40), measurement(1, 20, 40), reference(40)
    change = paired_change(model, base, ref, same_latents=True)
    for name in (KID, CMMD, COVERAGE, DENSITY, COPYING):
        values = [make_scorecard(each, ref).estimates[name].value for each in (model, base)]
        assert change[name].difference == pytest.approx(values[0] - values[1])
        assert change[name].low < change[name].difference < change[name].high
        assert (change[name].p_value < 0.05) == (change[name].low * change[name].high > 0)


def test_losses_of_different_latent_spaces_are_not_subtracted():
    change = paired_change(measurement(0), measurement(1), reference(), same_latents=False)
    assert set(change) == set(TITLES) - {LOSS, *NOT_COMPARED}


@pytest.mark.parametrize("name", [KID, CMMD, COVERAGE])
def test_equal_models_differ_by_a_set_metric_no_more_often_than_stated(name):
    """Two models that draw alike: a jackknife errs on the wide side."""
    alarms = 0
    for repeat in range(200):
        rng = np.random.default_rng(repeat)
        captions = rng.normal(size=(30, 8))
        real, one, other = (captions + rng.normal(size=(30, 8)) for _ in range(3))
        real, one, other = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (real, one, other))
        none = np.full(30, np.nan)
        sides = [Measurement(np.ones((1, 1)), rows, none) for rows in (one, other)]
        change = paired_change(*sides, Reference(captions, real, 0, 100), False)[name]
        alarms += change.p_value < 0.05
    assert alarms / 200 <= 0.1  # 5 % stated, standard error 1.5 %


def test_a_difference_that_is_not_clear_says_how_many_prompts_would_decide():
    rng = np.random.default_rng(0)
    captions = rng.normal(size=(40, 8))
    real, one, other = (captions + spread * rng.normal(size=(40, 8)) for spread in (1, 1, 1.3))
    real, one, other = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (real, one, other))
    sides = [Measurement(np.ones((1, 1)), rows, np.full(40, np.nan)) for rows in (one, other)]
    change = paired_change(*sides, Reference(captions, real, 0, 100), False)[KID]
    assert change.p_value > 0.05 and change.needed is not None and change.needed > 40


def test_equal_models_differ_significantly_no_more_often_than_stated():
    repeats, alarms = 200, 0
    for repeat in range(repeats):
        rng = np.random.default_rng(repeat)
        shared = rng.gamma(4, 0.1, (40, 1))
        models = [
            Measurement(shared + rng.normal(0, 0.05, (40, 1)), unit_rows(0, 1), np.full(1, np.nan)) for _ in range(2)
        ]
        change = paired_change(models[0], models[1], Reference(unit_rows(1, 1), unit_rows(2, 1), 0, 300), True)[LOSS]
        alarms += change.p_value <= 0.05
    # 5 % stated; 200 repeats have a standard error of 1.5 %, and 40 items cost the bootstrap about 1 %
    assert alarms / repeats <= 0.105
