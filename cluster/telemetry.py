"""Where a run's numbers go: JSON lines in the run's folder, and MLflow (one run, resumed by id), from rank 0 alone.

The lines are the truth that reports and the live progress read; MLflow gets the same numbers in batches, at the points
where the loop pauses anyway. A resumed run drops the lines after its checkpoint: they will be written again.
"""

import functools
import json
import logging
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cluster import stage
from cluster.artifacts import write_bytes_atomic, write_json_atomic
from cluster.errors import TrackingError, reason_of
from cluster.workers import is_disk_full, read_lines

TRAIN_LOSS, EVAL_LOSS, GRAD_NORM = "train/loss", "eval/loss", "train/grad_norm"
LEARNING_RATE, IMAGES_PER_S = "train/learning_rate_factor", "system/images_per_s"
DATA_WAIT, MEMORY_PEAK = "system/data_wait_share", "system/memory_peak_mib"
MAX_PARAM_CHARS, PARAMS_AT_ONCE = 6000, 100
PARENT_TAG = "mlflow.parentRunId"
UNSENT = "unsent.json"


class RunLog:
    """Appends to `metrics.jsonl` and mirrors metrics to an MLflow run; only rank 0 makes one."""

    def __init__(self, directory: Path, tracking_uri: str, mlflow_run_id: str, step: int) -> None:
        self.path = directory / "metrics.jsonl"
        self._client = _client(tracking_uri)
        self._run_id = mlflow_run_id
        self._pending: list[Any] = []
        self._pictures: list[Path] = []
        # What an earlier attempt logged beyond the checkpoint that this one starts from will be logged again; so will
        # the evaluation of the checkpoint's own step.
        stage.fetch(self.path)
        kept = [line for line in read_lines(self.path) if line["step"] < step + (EVAL_LOSS not in line)]
        write_bytes_atomic(self.path, "".join(json.dumps(line) + "\n" for line in kept).encode())

    def write(self, line: dict[str, Any]) -> None:
        """Append one line; numbers with a `/` in their name also go to MLflow at the next `flush`."""
        line = {**line, "time_s": round(time.time(), 3)}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        self.mirror(line)

    def mirror(self, line: dict[str, Any]) -> None:
        """Have the numbers of a line sent to MLflow at the next `flush`."""
        from mlflow.entities import Metric

        # The line's own time: a point that is sent twice is one point to MLflow.
        line_ms = int(line["time_s"] * 1000)
        self._pending += [
            Metric(key, float(value), line_ms, int(line.get("step", 0)))
            for key, value in line.items()
            if "/" in key and isinstance(value, int | float) and math.isfinite(value)
        ]

    def flush(self) -> None:
        """Send what is pending to MLflow; a server that is away gets it at the next flush, and training goes on."""
        from mlflow.exceptions import MlflowException

        stage.keep(self.path)
        try:
            while self._pending:
                self._client.log_batch(self._run_id, metrics=self._pending[:1000])
                del self._pending[:1000]
            while self._pictures:
                self._client.log_artifact(self._run_id, str(self._pictures[0]), "samples")
                del self._pictures[0]
        except (MlflowException, OSError) as error:  # requests' errors are OSErrors
            if is_disk_full(error):
                raise
            write_json_atomic(self.path.parent / UNSENT, {"reason": str(error)[:1000]})
        else:
            stage.remove(self.path.parent / UNSENT)

    def picture(self, path: Path) -> None:
        """Attach a picture to the MLflow run at the next flush."""
        stage.keep(path)
        self._pictures.append(path)


def send_again(directory: Path, tracking_uri: str, mlflow_run_id: str) -> None:
    """Send a run's whole log and its pictures where its last flush did not get through."""
    if not stage.fetch(directory / UNSENT):
        return
    log = RunLog(directory, tracking_uri, mlflow_run_id, sys.maxsize)
    for line in read_lines(log.path):
        log.mirror(line)
    stage.fetch_tree(directory / "samples")
    for path in sorted((directory / "samples").glob("step-*.png")):
        log.picture(path)
    log.flush()


def start_run(
    tracking_uri: str, experiment: str, name: str, params: dict[str, Any], artifacts: Path, parent: str = ""
) -> str:
    """Create an MLflow run with flattened params and the code's commit, under the run `parent`; return its id."""
    from mlflow.entities import Param

    client = _client(tracking_uri)
    tags = {"fresco.run_id": name, "fresco.commit": code_commit()}
    if parent:
        tags[PARENT_TAG] = parent
    flat = [Param(key, str(value)[:MAX_PARAM_CHARS]) for key, value in flatten(params).items()]
    with _reaching(tracking_uri):
        found = client.get_experiment_by_name(experiment)
        if found is None:
            location = artifacts.as_uri() if tracking_uri.startswith("sqlite:") else None
            experiment_id = client.create_experiment(experiment, artifact_location=location)
        else:
            experiment_id = found.experiment_id
        run_id: str = client.create_run(experiment_id, run_name=name, tags=tags).info.run_id
        for start in range(0, len(flat), PARAMS_AT_ONCE):
            client.log_batch(run_id, params=flat[start : start + PARAMS_AT_ONCE])
    return run_id


def end_run(tracking_uri: str, run_id: str, status: str) -> None:
    """Set the MLflow run's final state: FINISHED, FAILED or KILLED; TrackingError when the server is away."""
    with _reaching(tracking_uri):
        _client(tracking_uri).set_terminated(run_id, status)


def try_end_run(tracking_uri: str, run_id: str, status: str, tags: dict[str, str], metrics: dict[str, float]) -> bool:
    """Set an MLflow run's final state, tags and metrics; False when the tracking server is away."""
    from mlflow.entities import Metric, RunTag

    now_ms = int(time.time() * 1000)
    try:
        with _reaching(tracking_uri):
            _client(tracking_uri).log_batch(
                run_id,
                metrics=[Metric(key, value, now_ms, 0) for key, value in metrics.items() if math.isfinite(value)],
                tags=[RunTag(key, value) for key, value in tags.items()],
            )
            _client(tracking_uri).set_terminated(run_id, status)
    except TrackingError:
        return False
    return True


def check_tracking(tracking_uri: str) -> None:
    """TrackingError when the tracking server cannot be reached."""
    with _reaching(tracking_uri):
        _client(tracking_uri).search_experiments(max_results=1)


def attach(tracking_uri: str, run_id: str, path: Path) -> None:
    """Attach a file to an MLflow run; TrackingError when the server is away."""
    with _reaching(tracking_uri):
        _client(tracking_uri).log_artifact(run_id, str(path))


def run_exists(tracking_uri: str, run_id: str) -> bool:
    """Whether the tracking server knows the run."""
    from mlflow.exceptions import MlflowException

    with _reaching(tracking_uri):
        try:
            _client(tracking_uri).get_run(run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return False
    return True


@contextmanager
def _reaching(tracking_uri: str) -> Iterator[None]:
    """Say of whatever a tracking server refuses, or does not answer, what to do."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, OSError) as error:  # requests' errors are OSErrors
        if is_disk_full(error):
            raise
        raise TrackingError(
            f"placement.tracking_uri expected a tracking server at {tracking_uri!r}, found: {reason_of(error)}; start"
            " it and run the same command again: finished work is kept"
        ) from error


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn nested sections into dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


@functools.cache
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
    # A server that is away is waited for by whoever can do without it for a while, not inside each call.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "1")
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic"):  # importing mlflow sets its own level again
        logging.getLogger(name).setLevel(logging.ERROR)
    return MlflowClient(tracking_uri=tracking_uri)
