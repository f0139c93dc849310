"""The config of a continuation: what it sets, what it leaves, when it starts anew, and what is refused."""

from dataclasses import replace
from pathlib import Path

import pytest

from components.dataset import TEST, TRAIN, DatasetVersion, Item
from components.errors import InputError
from components.standing import RetrainSection
from flows import prepare, train
from flows.config import Config, load_config, recipe_fingerprint, with_overrides
from flows.continual import continued, replay_share, seed_of
from flows.models import ResolvedModel
from flows.replay import check_parts, old_version


def version_of(*items: Item, fingerprint: str = "0" * 12) -> DatasetVersion:
    return DatasetVersion("emblems", fingerprint, Path("unread"), items)


OLD = [Item(f"{i:064x}", "a red circle", TRAIN if i % 3 else TEST, "") for i in range(9)]
NEW = [Item(f"{i:064x}", "a teal star", TRAIN, "") for i in range(100, 104)]
PARENT, GROWN = version_of(*OLD, fingerprint="a" * 12), version_of(*OLD, *NEW, fingerprint="b" * 12)
CHAMPION = ResolvedModel(Path("/models/champion"), "run-1", 3, "weights", "fresco")


def config_of(*overrides: str) -> Config:
    return load_config(overrides=["train.steps=900", "retrain.steps=300", *overrides])


def test_continuation_starts_from_the_champion_on_new_pictures_with_replay() -> None:
    config = config_of("retrain.average_with_champion=0.2", "train.freezing=denoiser")
    found = continued(config, CHAMPION, PARENT, GROWN, drift=0.5, cycle=1)
    expected = {
        "data.version": GROWN.id,
        "model.base": "/models/champion",
        "train.steps": 300,
        "train.warmup_steps": 20,
        "train.replay_of": PARENT.id,
        "train.replay_fraction": 0.3,
        "train.average_with_base": 0.2,
        "train.seed": seed_of(0, GROWN),
    }
    assert found == with_overrides(config, expected)
    assert found.train.freezing == "denoiser" and found.train.learning_rate == config.train.learning_rate


@pytest.mark.parametrize(
    ("retrain_steps", "steps", "warmup"), [(0, 900, 20), (300, 300, 20), (100, 100, 10), (10, 10, 1), (5, 5, 0)]
)
def test_learning_rate_warms_up_to_its_peak_and_falls_in_a_continuation_of_any_length(
    retrain_steps: int, steps: int, warmup: int
) -> None:
    from components.optim import rate_factor

    found = continued(config_of(f"retrain.steps={retrain_steps}"), CHAMPION, PARENT, GROWN, 0.0, 1).train
    assert (found.steps, found.warmup_steps) == (steps, warmup)
    factors = [rate_factor(found, step) for step in range(found.steps)]
    assert max(factors) == 1.0 and factors.index(1.0) == warmup
    assert factors[-1] < 0.15


@pytest.mark.parametrize(
    ("least", "most", "drift", "share"),
    [(0.1, 0.5, 0.0, 0.1), (0.1, 0.5, 1.0, 0.5), (0.1, 0.5, 0.25, 0.2), (0.0, 0.0, 0.7, 0.0), (0.1, 0.5, 7.0, 0.5)],
)
def test_replay_grows_with_drift(least: float, most: float, drift: float, share: float) -> None:
    assert replay_share(RetrainSection(replay_fraction=least, most_replay_fraction=most), drift) == share


@pytest.mark.parametrize(("every", "anchors"), [(5, {5, 10}), (1, set(range(1, 12))), (0, set())])
def test_anchor_cycles_start_from_the_base_on_everything(every: int, anchors: set[int]) -> None:
    config = config_of(f"retrain.anchor_every={every}", "retrain.average_with_champion=0.2", "model.base=/models/base")
    for cycle in range(1, 12):
        found = continued(config, CHAMPION, PARENT, GROWN, 0.5, cycle)
        if cycle in anchors:
            anew = {"data.version": GROWN.id, "train.seed": seed_of(0, GROWN)}
            assert found == with_overrides(config, anew), "base, steps, and no replay"
        else:
            assert found.model.base == "/models/champion" and found.train.replay_of == PARENT.id


def test_equal_arguments_make_the_same_run_and_another_dataset_another_seed() -> None:
    one, again = (continued(config_of(), CHAMPION, PARENT, GROWN, 0.31, cycle) for cycle in (1, 2))
    fingerprints = {recipe_fingerprint(config, GROWN.id, "base") for config in (one, again)}
    assert len(fingerprints) == 1
    more = replace(GROWN, fingerprint="c" * 12)
    assert continued(config_of(), CHAMPION, PARENT, more, 0.31, 1).train.seed != one.train.seed


def test_no_new_training_picture_is_refused() -> None:
    only_test = version_of(*OLD, replace(NEW[0], split=TEST))
    with pytest.raises(InputError, match=r"training pictures in emblems@0+ that are not in it, found none of 6"):
        continued(config_of(), CHAMPION, PARENT, only_test, 0.0, 1)


def test_replay_of_pictures_that_the_data_does_not_hold_is_refused() -> None:
    config = config_of(f"train.replay_of={PARENT.id}", "train.replay_fraction=0.1")
    with pytest.raises(InputError, match=r"training pictures of emblems@a+ in emblems@0+, found none of 4"):
        check_parts(config, PARENT, version_of(*NEW))
    check_parts(with_overrides(config, {"train.replay_fraction": 0.0}), PARENT, version_of(*NEW))


def test_unknown_and_useless_versions_are_refused_before_anything_starts(
    tmp_path: Path, examined_here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = ["data.resolution_px=16", "data.source=emblems://base?count=40&seed=0", "name=tiny"]
    config = load_config(overrides=small, workspace=str(tmp_path))
    known = prepare.ensure_dataset(config)

    def started(*_: object) -> None:
        raise AssertionError("a session was started")

    monkeypatch.setattr(train, "local_session", started)
    unknown = with_overrides(config, {"train.replay_of": "tiny@ffffffffffff"})
    with pytest.raises(InputError, match=f"train.replay_of: expected dataset version.*found {known.id}"):
        train.run(unknown)
    pinned = with_overrides(config, {"train.replay_of": known.id, "data.version": known.id})
    with pytest.raises(InputError, match="not in it, found none of"):
        train.run(pinned)
    found = old_version(with_overrides(config, {"train.replay_of": known.id}))
    assert found is not None and found.id == known.id


def test_averaging_of_adapters_is_refused_before_a_cycle_trains() -> None:
    config = config_of("train.freezing=lora:4", "retrain.average_with_champion=0.2")
    with pytest.raises(InputError, match="found lora:4: averaged adapters"):
        continued(config, CHAMPION, PARENT, GROWN, 0.0, 1)
