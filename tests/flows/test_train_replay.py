"""Replay and averaging on real workers: placement, kills and engines change nothing, and frozen parts stay frozen."""

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.artifacts import read_record
from cluster.checkpoints import newest_complete
from cluster.workers import read_lines
from flows import prepare, train
from flows.config import Config
from tests.flows.test_train import config_of, largest_difference, wait_for, weights_of

ALONE = ("placement.workers=1", "placement.engine=torch", "placement.micro_batch=2")


@pytest.fixture(scope="module")
def workspace(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("replay")


@pytest.fixture(scope="module")
def old(tiny_base: Path, workspace: Path) -> str:
    return prepare.ensure_dataset(config_of(tiny_base, workspace, "data.source=emblems://base?count=60&seed=0")).id


def replaying(base: Path, workspace: Path, old: str, *overrides: str) -> Config:
    replay = [f"train.replay_of={old}", "train.replay_fraction=0.3", "train.average_with_base=0.25"]
    recipe = ["data.source=emblems://base?count=120&seed=0", "train.freezing=denoiser", "train.eval_every_steps=8"]
    return config_of(base, workspace, *recipe, *replay, *overrides)


def lines_of(workspace: Path, result: dict[str, Any]) -> list[dict[str, Any]]:
    return read_lines(workspace / "runs" / result["run_id"] / "metrics.jsonl")


def curve(lines: list[dict[str, Any]], key: str) -> dict[int, float]:
    """Values by step; of a step that was logged twice, after a kill, the last one."""
    return {line["step"]: line[key] for line in lines if key in line}


@pytest.mark.slow
def test_two_killed_workers_under_zero_2_and_one_plain_one_train_the_same_model(
    tiny_base: Path, workspace: Path, old: str, tmp_path: Path
) -> None:
    alone = train.run(replaying(tiny_base, workspace, old, *ALONE))
    directory = workspace / "runs" / alone["run_id"]
    kept = directory.rename(tmp_path / alone["run_id"])
    config = replaying(tiny_base, workspace, old, "placement.workers=2", "placement.zero_stage=2")

    def kill_one() -> None:
        lines = wait_for(workspace, lambda lines, run: newest_complete(run / "checkpoints") is not None)
        os.kill(lines[0]["pids"][1], signal.SIGKILL)

    thread = threading.Thread(target=kill_one)
    thread.start()
    killed = train.run(config)
    thread.join()

    assert killed["run_id"] == alone["run_id"]
    lines, undisturbed = lines_of(workspace, killed), read_lines(kept / "metrics.jsonl")
    starts = [line for line in lines if "pids" in line]
    assert starts[-1]["resumed"], "the group must have continued from a checkpoint"
    for key in ("train/loss", "eval/loss", "eval/loss_old", "eval/loss_new"):
        found, expected = curve(lines, key), curve(undisturbed, key)
        assert found.keys() == expected.keys() and len(found) >= 2
        assert found == pytest.approx(expected, rel=1e-4), key
    before = weights_of(tiny_base)
    one, two = weights_of(kept / "pipeline"), weights_of(killed["checkpoint"])
    for name in before:
        if not name.startswith("unet/"):
            assert torch.equal(two[name], before[name]), f"{name} is frozen"
    assert largest_difference(one, before) > 1e-2
    assert largest_difference(one, two) < 2e-3  # Adam's first steps magnify rounding; a moved weight moves by 1e-2


@pytest.mark.slow
def test_exported_weights_are_the_evaluated_ones_and_hold_the_bases_share(
    tiny_base: Path, workspace: Path, old: str
) -> None:
    short = (*ALONE, "train.steps=6", "train.eval_every_steps=6")
    whole, mixed = (
        train.run(replaying(tiny_base, workspace, old, *short, f"train.average_with_base={share}"))
        for share in (0.0, 0.25)
    )
    base = weights_of(tiny_base)
    trained, exported = weights_of(whole["checkpoint"]), weights_of(mixed["checkpoint"])
    expected = {name: torch.lerp(trained[name], base[name], 0.25) for name in base}
    assert largest_difference(exported, expected) < 1e-6
    assert largest_difference(exported, trained) > 1e-4
    assert mixed["eval_loss_last"] != whole["eval_loss_last"]
    assert mixed["eval_loss_first"] == whole["eval_loss_first"]
    # Nothing but its weights is between a run's last number and its export: another run from it begins with that.
    again = train.run(
        replaying(Path(mixed["checkpoint"]), workspace, old, *short, "train.average_with_base=0", "train.steps=1")
    )
    assert again["eval_loss_first"] == pytest.approx(mixed["eval_loss_last"], rel=1e-5)
    record = read_record(workspace / "runs" / again["run_id"])
    assert record is not None and record["config"]["train"]["replay_of"] == old
