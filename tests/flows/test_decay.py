"""Decay: the ratio of two mean losses with a bound that holds as often as it says."""

from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.artifacts import open_workspace
from cluster.registry import Registry
from components.dataset import TEST, DatasetVersion
from components.models import load_parts, save_parts
from components.triggers import Decay
from flows import arrivals, decay, prepare
from flows.decay import compare, decay_beside
from flows.models import resolve_model
from tests.loop_world import arrive, crown, loop_config


def test_means_and_ratio_of_known_losses() -> None:
    found = compare(np.array([1.0, 1.0, 1.0]), np.array([1.5, 1.5]))
    assert (found.own, found.arrivals, found.pictures, found.skipped) == (1.0, 1.5, 2, "")
    assert found.low == pytest.approx(0.5), "without spread the bound is the ratio itself"


def test_bound_lies_below_the_true_ratio_in_about_95_of_100_samples() -> None:
    dice = np.random.default_rng(0)
    below = 0
    for _ in range(2000):
        own, arrived = dice.gamma(16, 1 / 16, 64), 1.3 * dice.gamma(16, 1 / 16, 40)
        below += compare(own, arrived).low < 0.3
    assert 0.93 <= below / 2000 <= 0.97  # binomial: 0.95 +- 0.01 at two standard deviations, and the normal's own error


def test_both_champions_denoise_the_same_arrivals_once(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = loop_config(tmp_path, tiny_base)
    workspace = open_workspace(config.workspace)
    worse = load_parts(tiny_base)
    worse.denoiser.conv_out.bias.data.fill_(3.0)
    save_parts(worse, tmp_path / "worse")
    models = (resolve_model(config, str(tiny_base)), resolve_model(config, str(tmp_path / "worse")))
    nobody = DatasetVersion("none", "0" * 12, tmp_path / "nowhere", ())

    arrive(tmp_path / "source", "drifted", 0, decay.FEWEST - 1)
    assert decay_beside(config, workspace, models, arrivals.look(config, nobody, settle_s=0)) is None
    arrive(tmp_path / "source", "drifted", 100, 6)
    seen = arrivals.look(config, nobody, settle_s=0)
    found = decay_beside(config, workspace, models, seen)
    assert found is not None and found.former_N.shape == found.new_N.shape == (decay.FEWEST + 5,)
    assert (found.new_N > found.former_N).all()

    monkeypatch.setattr(decay, "load_parts", None)  # nothing is measured again
    again = decay_beside(config, workspace, models, seen)
    assert again is not None and np.array_equal(again.new_N, found.new_N)


def test_champion_is_measured_on_its_own_test_pictures_and_on_arrivals_of_another_world(
    tiny_base: Path, tmp_path: Path, empty_registry: Path, examined_here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "workspace").mkdir()
    (tmp_path / "workspace" / "mlflow.db").write_bytes(empty_registry.read_bytes())
    arrive(tmp_path / "source", "base", 0, 80)
    config = loop_config(tmp_path, tiny_base, "data.test_fraction=0.4")
    workspace = open_workspace(config.workspace)
    parent = prepare.ensure_dataset(config)
    crown(config, tiny_base, "run-0", parent.id)
    champion = Registry(workspace).by_number(config.name, 1)

    def measured() -> Decay:
        return decay.measure_decay(config, workspace, champion, parent, arrivals.look(config, parent, settle_s=0))

    arrive(tmp_path / "source", "drifted", 0, decay.FEWEST - 1)
    assert measured().skipped.startswith(f"{decay.FEWEST - 1} arrivals and {len(parent.split(TEST))} test pictures")
    arrive(tmp_path / "source", "drifted", 100, 6)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setattr(decay, "MOST_PARAMETERS_ON_CPU", 1)
        assert "without a GPU costs too much" in measured().skipped
    found = measured()
    assert not found.skipped and found.pictures == decay.FEWEST + 5
    ratio = found.arrivals / found.own - 1
    assert found.own > 0 and found.own != found.arrivals and abs(ratio) < 1, "the same noise, other pictures"
    assert ratio - 1 < found.low < ratio
    monkeypatch.setattr(decay, "load_parts", None)  # nothing is measured again
    assert measured() == found
