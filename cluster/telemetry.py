"""Where a run's numbers go: JSON lines in the run's folder, and MLflow (one run, resumed by id), from rank 0 alone.

The lines are the truth that reports and the live progress read; MLflow gets the same numbers in batches, at the points
where the loop pauses anyway. A resumed run drops the lines after its checkpoint: they will be written again.
"""

import json
import logging
import math
import os
import subprocess
import time
from pathlib import Path
from typing import Any

from cluster.artifacts import write_bytes_atomic
from cluster.workers import read_lines

TRAIN_LOSS, EVAL_LOSS, GRAD_NORM = "train/loss", "eval/loss", "train/grad_norm"
LEARNING_RATE, IMAGES_PER_S = "train/learning_rate_factor", "system/images_per_s"
DATA_WAIT, MEMORY_PEAK = "system/data_wait_share", "system/memory_peak_mib"
MAX_PARAM_CHARS = 6000


class RunLog:
    """Appends to `metrics.jsonl` and mirrors metrics to an MLflow run; only rank 0 makes one."""

    def __init__(self, directory: Path, tracking_uri: str, mlflow_run_id: str, step: int) -> None:
        self.path = directory / "metrics.jsonl"
        self._client = _client(tracking_uri)
        self._run_id = mlflow_run_id
        self._pending: list[dict[str, Any]] = []
        # What an earlier attempt logged beyond the checkpoint that this one starts from will be logged again; so will
        # the evaluation of the checkpoint's own step.
        kept = [line for line in read_lines(self.path) if line["step"] < step + (EVAL_LOSS not in line)]
        write_bytes_atomic(self.path, "".join(json.dumps(line) + "\n" for line in kept).encode())

    def write(self, line: dict[str, Any]) -> None:
        """Append one line; numbers with a `/` in their name also go to MLflow at the next `flush`."""
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        self._pending.append({**line, "time_ms": int(time.time() * 1000)})

    def flush(self) -> None:
        """Send what is pending to MLflow in one batch."""
        from mlflow.entities import Metric

        metrics = [
            Metric(key, float(value), line["time_ms"], int(line.get("step", 0)))
            for line in self._pending
            for key, value in line.items()
            if "/" in key and isinstance(value, int | float) and math.isfinite(value)
        ]
        for start in range(0, len(metrics), 1000):
            self._client.log_batch(self._run_id, metrics=metrics[start : start + 1000])
        self._pending.clear()

    def picture(self, path: Path) -> None:
        """Attach a picture to the MLflow run."""
        self._client.log_artifact(self._run_id, str(path), "samples")


def start_run(tracking_uri: str, experiment: str, name: str, params: dict[str, Any], artifacts: Path) -> str:
    """Create an MLflow run with flattened params and the code's commit; return its id."""
    client = _client(tracking_uri)
    found = client.get_experiment_by_name(experiment)
    if found is None:
        location = artifacts.as_uri() if tracking_uri.startswith("sqlite:") else None
        experiment_id = client.create_experiment(experiment, artifact_location=location)
    else:
        experiment_id = found.experiment_id
    run = client.create_run(experiment_id, run_name=name, tags={"fresco.run_id": name, "fresco.commit": code_commit()})
    run_id: str = run.info.run_id
    for key, value in flatten(params).items():
        client.log_param(run_id, key, str(value)[:MAX_PARAM_CHARS])
    return run_id


def end_run(tracking_uri: str, run_id: str, status: str) -> None:
    """Set the MLflow run's final state: FINISHED, FAILED or KILLED."""
    _client(tracking_uri).set_terminated(run_id, status)


def run_exists(tracking_uri: str, run_id: str) -> bool:
    """Whether the tracking server knows the run."""
    from mlflow.exceptions import MlflowException

    try:
        _client(tracking_uri).get_run(run_id)
    except MlflowException:
        return False
    return True


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn nested sections into dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def code_commit() -> str:
    """Return the commit of the source tree this code runs from, or `unknown`."""
    try:
        done = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short=12", "HEAD"],
            capture_output=True,
            text=True,
            check=False,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() or "unknown"


def _client(tracking_uri: str) -> Any:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic"):  # importing mlflow sets its own level again
        logging.getLogger(name).setLevel(logging.ERROR)
    return MlflowClient(tracking_uri=tracking_uri)
