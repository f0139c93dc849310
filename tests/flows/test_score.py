"""From pictures to claims: a model that hands its training pictures back is found out; one that does not is not."""

from pathlib import Path

import numpy as np
import pytest

from cluster.artifacts import Workspace, open_workspace
from components.clip_encoder import ClipEncoder
from components.dataset import TRAIN, VALIDATION
from components.emblems import parse_caption
from components.encode import read_pictures
from components.models import embedded_clip
from components.recipe import DataSection, EvaluateSection
from flows import measure, prepare, score
from flows.config import Config
from flows.measure import HeldOut, Performance
from flows.models import ResolvedModel


@pytest.fixture(scope="module")
def encoder() -> ClipEncoder:
    return ClipEncoder(embedded_clip())


@pytest.fixture
def config(config: Config, examined_here: None) -> Config:
    source = "emblems://base?count=300&seed=3"
    sections = {
        "data": DataSection(source=source, resolution_px=32, test_fraction=0.2, validation_fraction=0.2),
        "evaluate": EvaluateSection(prompts=40, bootstrap=200),
    }
    return config.model_copy(update=sections)


@pytest.fixture
def workspace(config: Config) -> Workspace:
    return open_workspace(config.workspace)


@pytest.fixture
def data(config: Config, workspace: Workspace) -> HeldOut:
    return measure.held_out(config, workspace, prepare.ensure_dataset(config))


def model(dataset: str | None, name: str = "m") -> ResolvedModel:
    return ResolvedModel(Path(name), name, None, name, name, {"fresco.dataset": dataset} if dataset else {})


def performance(data: HeldOut, split: str, shift: float = 0.0) -> Performance:
    """A "model" that draws the real pictures of a split, whatever the prompt; its losses are a table."""
    keys = [item.sha256 for item in data.dataset.split(split)[: len(data.prompts)]]
    drawn = read_pictures(data.pixels, keys)
    losses = np.random.default_rng(0).gamma(4, 0.1, (len(data.pictures), 4)) + shift
    return Performance(losses, drawn, [[drawn[row], drawn[row + 1]] for row in range(6)])


def test_training_pictures_handed_back_are_found_out_and_unseen_ones_are_not(config, workspace, data, encoder):
    own = model(data.dataset.id)
    copier = score.score(config, workspace, data, encoder, [(own, performance(data, TRAIN))], True)
    honest = score.score(config, workspace, data, encoder, [(own, performance(data, VALIDATION))], True)
    caught, fair = (each.model.card.estimates for each in (copier, honest))
    assert caught["copying"].low > 0.9 and caught["near_copies"].low > 0.9
    assert fair["copying"].low < 0.5 < fair["copying"].high and fair["near_copies"].value < 0.1
    assert [pair.distance for pair in copier.model.nearest] == [0.0] * score.NEAREST_SHOWN
    first = copier.model.nearest[0]
    assert (np.asarray(first.training) == np.asarray(copier.model.drawn[first.index])).all()


def test_copying_is_told_only_beside_the_models_own_training_pictures(config, workspace, data, encoder):
    drawn = performance(data, VALIDATION)
    elsewhere = score.score(config, workspace, data, encoder, [(model("other@1"), drawn)], True)
    assert "trained on other@1" in elsewhere.model.card.not_measured["copying"]
    unknown = score.score(config, workspace, data, encoder, [(model(None), drawn)], True)
    assert "copying" in unknown.model.card.estimates and not unknown.model.nearest


def test_features_of_training_pictures_are_computed_once(config, workspace, data, encoder, monkeypatch):
    keys = [item.sha256 for item in data.dataset.split(TRAIN)]
    first = measure.features_of(workspace, encoder, data.pixels, keys)
    assert first == pytest.approx(encoder.images(read_pictures(data.pixels, keys)), abs=1e-5)
    monkeypatch.setattr(measure, "ShardStore", None)
    assert (measure.features_of(workspace, encoder, data.pixels, keys) == first).all()


def test_the_loss_is_told_for_each_kind_of_caption(config, workspace, data, encoder):
    drawn = performance(data, VALIDATION)
    card = score.score(config, workspace, data, encoder, [(model(None), drawn)], True).model.card.estimates
    rows = [parse_caption(item.caption).count == 1 for item in data.pictures]
    single = card["denoising_loss_slice_count_one"]
    assert single.value == pytest.approx(drawn.losses_NK[rows].mean()) and single.n == sum(rows) > 10


def test_two_models_are_compared_and_their_drawings_set_apart(config, workspace, data, encoder):
    sides = [(model(None, "a"), performance(data, VALIDATION, -0.1)), (model(None, "b"), performance(data, TRAIN))]
    found = score.score(config, workspace, data, encoder, sides, True)
    assert found.change["denoising_loss"].difference == pytest.approx(-0.1)
    assert found.change["copying"].high < 0  # b hands training pictures back
    assert found.apart_P.shape == (40,) and found.apart_P.min() >= -1e-6 and found.apart_P.max() > 0.1
    numbers = score.numbers_of(found)
    assert numbers["change"]["denoising_loss"]["p_value"] < 0.01
    assert numbers["scorecard"]["kid"]["encoder"] == encoder.identity
    without = score.score(config, workspace, data, encoder, sides, False)
    assert "denoising_loss" not in without.change and "kid" in without.change


def test_real_pictures_of_another_split_score_as_well_as_can_be(config, workspace, data, encoder):
    """They are of one distribution with the test pictures: distances cover 0, coverage is high, captions do not fit."""
    found = score.score(config, workspace, data, encoder, [(model(None), performance(data, VALIDATION))], True)
    card = found.model.card.estimates
    assert card["kid"].low <= 0 <= card["kid"].high and card["cmmd"].low <= 0 <= card["cmmd"].high
    assert card["coverage"].value > 0.8
    assert card["prompt_adherence"].value < 0.3
