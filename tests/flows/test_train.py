"""The training verb on real Ray workers: it learns, freezes what it says, survives kills, resumes anywhere, exports."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cluster.artifacts import read_json, read_record
from cluster.checkpoints import newest_complete
from cluster.workers import read_lines
from components.errors import NonFiniteError
from components.models import load_parts
from flows import train
from flows.config import Config, load_config

STEPS = 24
WAIT_S = 240


def config_of(base: Path, workspace: Path, *overrides: str) -> Config:
    return load_config(
        overrides=[
            f"model.base={base}",
            "name=tiny",
            "data.source=emblems://base?count=100&seed=0",
            "data.resolution_px=16",
            f"train.steps={STEPS}",
            "train.global_batch=8",
            "train.learning_rate.denoiser=2e-3",
            "train.learning_rate.text_encoder=1e-3",
            "train.eval_every_steps=12",
            "evaluate.sampling_steps=3",
            "placement.checkpoint_every_steps=4",
            *overrides,
        ],
        workspace=str(workspace),
    )


def weights_of(directory: str | Path) -> dict[str, torch.Tensor]:
    """Every tensor of an exported pipeline, by folder and name."""
    tensors = {}
    for path in sorted(Path(directory).glob("*/*.safetensors")):
        tensors |= {f"{path.parent.name}/{name}": value for name, value in load_file(path).items()}
    return tensors


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("train")


@pytest.fixture(scope="module")
def undisturbed(ray_session: None, tiny_base: Path, workspace: Path) -> dict[str, Any]:
    """Two workers, ZeRO 2, plan `all`, from start to end without an accident."""
    return train.run(config_of(tiny_base, workspace))


@pytest.fixture
def encoded(undisturbed: dict[str, Any], workspace: Path, tmp_path: Path) -> Path:
    """A workspace without runs in which the data is prepared already."""
    for name in ("data", "encoded"):
        shutil.copytree(workspace / name, tmp_path / name)
    return tmp_path


def wait_for(directory: Path, condition: Any) -> list[dict[str, Any]]:
    """Poll a run's log until `condition(lines)`; fails after WAIT_S."""
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        for found in directory.glob("runs/*/metrics.jsonl"):
            lines = read_lines(found)
            if condition(lines, found.parent):
                return lines
        threading.Event().wait(0.05)
    raise AssertionError(f"nothing happened in {directory} within {WAIT_S} s")


def test_run_learns_records_and_is_found_complete(
    undisturbed: dict[str, Any], tiny_base: Path, workspace: Path
) -> None:
    assert undisturbed["steps"] == STEPS
    assert undisturbed["eval_loss_last"] < 0.95 * undisturbed["eval_loss_first"]
    directory = workspace / "runs" / undisturbed["run_id"]
    record = read_record(directory)
    assert record is not None and record["results"] == undisturbed
    again = train.run(config_of(tiny_base, workspace, "placement.workers=1", "placement.zero_stage=0"))
    assert again == undisturbed, "placement must not make another run"
    assert sorted(path.name for path in (directory / "samples").glob("step-*.png")) == [
        f"step-{step:08d}.png" for step in (0, 12, 24)
    ]


def test_metrics_reach_mlflow(undisturbed: dict[str, Any], workspace: Path) -> None:
    from mlflow import MlflowClient

    known = read_json(workspace / "runs" / undisturbed["run_id"] / "mlflow.json")
    client = MlflowClient(f"sqlite:///{workspace / 'mlflow.db'}")
    run = client.get_run(known["run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.params["train.freezing"] == "all"
    history = client.get_metric_history(known["run_id"], "eval/loss")
    assert [point.step for point in history] == [0, 12, 24]
    assert [file.path for file in client.list_artifacts(known["run_id"], "samples")]


def test_killed_worker_restarts_the_group_and_changes_nothing(
    undisturbed: dict[str, Any], tiny_base: Path, encoded: Path
) -> None:
    killed: list[int] = []

    def kill_one() -> None:
        lines = wait_for(encoded, lambda lines, run: newest_complete(run / "checkpoints") is not None)
        killed.append(lines[0]["pids"][1])
        os.kill(killed[0], signal.SIGKILL)

    thread = threading.Thread(target=kill_one)
    thread.start()
    result = train.run(config_of(tiny_base, encoded))
    thread.join()
    starts = [line for line in read_lines(encoded / "runs" / result["run_id"] / "metrics.jsonl") if "pids" in line]
    assert starts[-1]["resumed"], "the group must have continued from a checkpoint"
    assert killed and killed[0] not in starts[-1]["pids"]
    assert largest_difference(weights_of(result["checkpoint"]), weights_of(undisturbed["checkpoint"])) == 0.0


@pytest.mark.slow
def test_killed_driver_continues_on_another_placement(
    undisturbed: dict[str, Any], tiny_base: Path, encoded: Path
) -> None:
    config = config_of(tiny_base, encoded)
    path = encoded / "config.json"
    path.write_text(json.dumps(config.model_dump()))
    command = [sys.executable, "-m", "flows", "train", "--config", str(path)]
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        wait_for(encoded, lambda lines, run: newest_complete(run / "checkpoints") is not None)
    finally:
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()
    assert not list(encoded.glob("runs/*/record.json")), "a killed run must not look complete"
    moved = config_of(tiny_base, encoded, "placement.workers=1", "placement.zero_stage=3", "placement.micro_batch=4")
    result = train.run(moved)
    starts = [line for line in read_lines(encoded / "runs" / result["run_id"] / "metrics.jsonl") if "pids" in line]
    assert starts[-1]["resumed"] and len(starts[-1]["pids"]) == 1
    assert result["eval_loss_last"] == pytest.approx(undisturbed["eval_loss_last"], rel=1e-4)


@pytest.mark.slow
def test_cached_captions_train_like_live_ones_and_frozen_parts_stay(
    ray_session: None, tiny_base: Path, workspace: Path
) -> None:
    plan = ("train.freezing=denoiser", "placement.workers=1", "placement.engine=torch", "train.steps=8")
    result = train.run(config_of(tiny_base, workspace, *plan))
    before, after = weights_of(tiny_base), weights_of(result["checkpoint"])
    moved = {name.split("/")[0] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"unet"}
    assert all(not torch.equal(before[name], after[name]) for name in before if name.startswith("unet/")), (
        "every trained tensor must have moved"
    )


@pytest.mark.slow
def test_z_image_trains_adapters_under_zero_3(ray_session: None, tiny_z_image: Path, workspace: Path) -> None:
    result = train.run(
        config_of(tiny_z_image, workspace, "train.freezing=lora:4", "placement.zero_stage=3", "train.steps=12")
    )
    assert result["zero_stage"] == 3
    assert result["eval_loss_last"] < result["eval_loss_first"]
    assert (Path(result["checkpoint"]) / "lora" / "pytorch_lora_weights.safetensors").exists()
    parts = load_parts(result["checkpoint"])
    assert not any("lora" in name for name, _ in parts.denoiser.named_parameters()), "the export is merged"


@pytest.mark.slow
def test_early_stop_exports_the_best_step(ray_session: None, tiny_base: Path, workspace: Path) -> None:
    stopping = (
        "train.patience=1",
        "train.learning_rate.denoiser=0.5",
        "train.optimizer=sgd",
        "train.clip_norm=0",
        "train.momentum=0",
        "train.warmup_steps=0",
        "train.freezing=denoiser",
        "train.ema_decay=0",
        "train.eval_every_steps=2",
        "placement.workers=1",
        "placement.engine=torch",
    )
    result = train.run(config_of(tiny_base, workspace, *stopping))
    assert result["steps"] < STEPS
    assert result["exported_step"] < result["steps"]
    assert result["eval_loss_best"] <= result["eval_loss_last"]


@pytest.mark.slow
def test_non_finite_loss_stops_before_the_weights_move(ray_session: None, tiny_base: Path, workspace: Path) -> None:
    wild = (
        "train.optimizer=sgd",
        "train.learning_rate.denoiser=1e30",
        "train.clip_norm=0",
        "placement.workers=1",
        "train.warmup_steps=0",
        "train.freezing=denoiser",
        "train.eval_every_steps=24",
    )
    with pytest.raises(NonFiniteError, match=r"step \d+; no weight was moved"):
        train.run(config_of(tiny_base, workspace, *wild))
    (broken,) = (log.parent for log in workspace.glob("runs/*/failure.json"))
    assert read_record(broken) is None
