"""The search verb on real workers: bad trials and deaths are survived, the winner is what `train` makes of it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cluster.artifacts import open_workspace, read_journal, read_json, read_record, write_record
from cluster.errors import PlacementError
from cluster.workers import read_lines
from components.errors import InputError
from flows import train, tune
from flows.config import Config, load_config
from flows.search_record import TRIALS, SearchRecord

pytestmark = pytest.mark.slow  # whole searches on real workers, killed and continued

STEPS, WAIT_S = 12, 240
DENOISER = "train.learning_rate.denoiser"
SPACE = f'{{train.freezing: {{choice: [denoiser, "lora:2"]}}, {DENOISER}: {{choice: [1.0e-3, 3.0e-3, 1.0e+30]}}}}'


def config_of(base: Path, workspace: Path, *overrides: str) -> Config:
    return load_config(
        overrides=[
            f"model.base={base}",
            "name=tiny",
            "data.source=emblems://base?count=100&seed=0",
            "data.resolution_px=16",
            f"train.steps={STEPS}",
            "train.global_batch=8",
            "train.warmup_steps=1",
            "train.clip_norm=0",
            "train.eval_every_steps=4",
            "evaluate.sampling_steps=3",
            "placement.checkpoint_every_steps=2",
            *overrides,
        ],
        workspace=str(workspace),
    )


def searched(base: Path, workspace: Path, *overrides: str) -> Config:
    rules = ["search.trials=6", "search.random_trials=3", "search.grace_steps=4", "search.reduction_factor=2"]
    return config_of(base, workspace, *rules, f"search.space={SPACE}", *overrides)


def weights_of(directory: str | Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for path in sorted(Path(directory).glob("*/*.safetensors")):
        tensors |= {f"{path.parent.name}/{name}": value for name, value in load_file(path).items()}
    return tensors


def wait_for(condition: Any) -> Any:
    """Poll until the condition holds; fails after WAIT_S."""
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        if found := condition():
            return found
        threading.Event().wait(0.05)
    raise AssertionError(f"nothing happened within {WAIT_S} s")


def kill_a_worker_of(runs: Path, killed: list[int]) -> None:
    """Kill rank 1 as soon as some trial is under way."""

    def under_way() -> list[int]:
        lines = [line for log in runs.glob("*/metrics.jsonl") for line in read_lines(log)]
        return [line["pids"][1] for line in lines if "pids" in line]

    killed += wait_for(under_way)[:1]
    os.kill(killed[0], signal.SIGKILL)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tune")


@pytest.fixture(scope="module")
def result(ray_session: None, tiny_base: Path, workspace: Path) -> dict[str, Any]:
    """All six recipes of the space, two of which cannot be trained; one worker is killed on the way."""
    killed: list[int] = []
    thread = threading.Thread(target=kill_a_worker_of, args=(workspace / "runs", killed))
    thread.start()
    found = tune.run(searched(tiny_base, workspace))
    thread.join()
    assert killed
    return found


def test_search_survives_bad_trials_and_a_dead_worker(result: dict[str, Any]) -> None:
    by_rate: dict[float, list[dict[str, Any]]] = {}
    for trial in result["trials"]:
        by_rate.setdefault(trial["overrides"][DENOISER], []).append(trial)
    assert {rate: len(trials) for rate, trials in by_rate.items()} == {1e-3: 2, 3e-3: 2, 1e30: 2}
    for trial in by_rate.pop(1e30):
        assert trial["state"] == "failed" and trial["eval_loss"] is None
        assert "finite" in trial["reason"]
    assert {trial["state"] for trials in by_rate.values() for trial in trials} <= {"complete", "stopped"}
    best = result["best"]
    assert best["steps"] == STEPS and best["state"] == "complete"
    losses = [trial["eval_loss"] for trial in result["trials"] if trial["eval_loss"] is not None]
    assert best["eval_loss"] == min(losses)
    assert result["seconds_between_trials"]


def test_winner_is_bit_for_bit_what_train_makes_of_its_overrides(
    result: dict[str, Any], tiny_base: Path, workspace: Path, tmp_path: Path
) -> None:
    for folder in ("data", "encoded"):
        shutil.copytree(workspace / folder, tmp_path / folder)
    overrides = [f"{path}={value}" for path, value in result["best"]["overrides"].items()]
    alone = train.run(config_of(tiny_base, tmp_path, *overrides))
    assert alone["run_id"] == result["best"]["run_id"]
    assert alone["eval_loss_last"] == result["best"]["eval_loss"]
    ours, theirs = weights_of(result["best"]["checkpoint"]), weights_of(alone["checkpoint"])
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_search_leaves_a_report_pictures_and_nested_runs(result: dict[str, Any], workspace: Path) -> None:
    from mlflow import MlflowClient

    page = Path(result["report"]).read_text()
    assert all(trial["run_id"] in page for trial in result["trials"]) and "<svg" in page
    client = MlflowClient(f"sqlite:///{workspace / 'mlflow.db'}")
    parent = read_json(workspace / "searches" / result["search"] / "mlflow.json")["run_id"]
    assert [file.path for file in client.list_artifacts(parent)] == [Path(result["report"]).name]
    for trial in result["trials"]:
        directory = workspace / "runs" / trial["run_id"]
        run = client.get_run(read_json(directory / "mlflow.json")["run_id"])
        assert run.data.tags["mlflow.parentRunId"] == parent and run.data.tags["fresco.state"] == trial["state"]
        if trial["state"] != "failed":
            assert (directory / "samples" / f"step-{trial['steps']:08d}.png").exists()
        winner = trial["run_id"] == result["best"]["run_id"]
        assert (read_record(directory) is not None) == winner
        assert (directory / "checkpoints").exists() <= winner, "what nobody will continue is removed"


def test_same_command_finds_the_finished_search(result: dict[str, Any], tiny_base: Path, workspace: Path) -> None:
    assert tune.run(searched(tiny_base, workspace)) == result
    assert [line["search"] for line in read_journal(open_workspace(str(workspace))) if line["event"] == "search"] == [
        result["search"]
    ]


def test_killed_driver_continues_and_no_trial_is_lost_or_doubled(
    result: dict[str, Any], tiny_base: Path, workspace: Path, tmp_path: Path
) -> None:
    for folder in ("data", "encoded"):
        shutil.copytree(workspace / folder, tmp_path / folder)
    config = searched(tiny_base, tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config.model_dump()))
    command = [sys.executable, "-m", "flows", "tune", "--config", str(path)]
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)

    def third_trial() -> bool:
        return any(len(SearchRecord(found.parent).trials) >= 3 for found in tmp_path.glob(f"searches/*/{TRIALS}"))

    try:
        wait_for(third_trial)
    finally:
        driver.kill()
        driver.wait()
    again = tune.run(config)
    assert [trial["run_id"] for trial in again["trials"]] == [trial["run_id"] for trial in result["trials"]]
    assert again["best"]["run_id"] == result["best"]["run_id"]
    assert again["best"]["eval_loss"] == result["best"]["eval_loss"]
    assert [(trial["state"], trial["steps"]) for trial in again["trials"]] == [
        (trial["state"], trial["steps"]) for trial in result["trials"]
    ]


def test_search_whose_command_was_killed_before_it_told_the_journal_is_told_by_the_next_once(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the books are of interest: dataset and workers are stood for."""
    config, workspace = searched(tiny_base, tmp_path), open_workspace(str(tmp_path))
    inputs = SimpleNamespace(workspace=workspace, run_id=lambda config: "run-0")
    monkeypatch.setattr(tune, "local_session", lambda placement: nullcontext())
    monkeypatch.setattr(tune, "open_inputs", lambda config: inputs)
    name = f"tiny-{tune.search_fingerprint(config, inputs)}"  # type: ignore[arg-type]
    best = {"run_id": "tiny-1", "overrides": {DENOISER: 1e-3}, "eval_loss": 0.5, "steps": STEPS}
    results = {"search": name, "trials": [best, {"run_id": "tiny-2"}], "best": best, "report": "report.html"}
    write_record(workspace.searches / name, {"asked": tune._asked(config), "results": results})
    for _ in range(2):
        assert tune.run(config) == results
        (line,) = read_journal(workspace)
        facts = {"search": name, "trials": 2, "run_id": "tiny-1", "overrides": {DENOISER: 1e-3}, "eval_loss": 0.5}
        assert {key: line[key] for key in facts} == facts and line["event"] == "search"


@pytest.mark.parametrize(
    ("space", "kind", "message"),
    [
        ("{train.freezing: {choice: [all, everything]}}", InputError, "search.space train.freezing.*everything"),
        ("{train.global_batch: {choice: [8, 9]}}", PlacementError, "must divide"),
        ("{train.learning_rat.denoiser: {choice: [1]}}", InputError, "nearest key"),
        ("{placement.workers: {choice: [1, 2]}}", InputError, "placement never changes a result"),
        ("{train.weight_decay: {uniform: [1, 0]}}", InputError, "empty range"),
    ],
)
def test_what_can_never_run_is_refused_before_anything_is_touched(
    space: str, kind: type[Exception], message: str, tiny_base: Path, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=message) as caught:
        tune.run(config_of(tiny_base, tmp_path, f"search.space={space}"))
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
