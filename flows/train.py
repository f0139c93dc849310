"""`fresco train`: one run, told in order, as the driver sees it; what the workers do is `train_loop`.

The driver prepares what is missing, starts the worker group, shows its progress, and writes the record last. A run's
folder is named by the fingerprint of its recipe: the same command continues an unfinished run and finds a finished one.
"""

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster import stage, telemetry, workers
from cluster.artifacts import (
    Workspace,
    fetch_parts,
    open_workspace,
    read_json,
    read_record,
    write_json_atomic,
    write_record,
)
from cluster.placement import PlacementSection, check_placement, plan_batch
from cluster.session import local_session
from cluster.zero import choose_stage, memory_table
from components.dataset import DatasetVersion
from components.freezing import apply_plan, trainable
from components.models import Parts, embedded_base, load_parts, model_fingerprint
from components.recipe import TrainSection, trains_text
from flows.config import AFTER_A_RUN, Config, recipe_fingerprint, told_config
from flows.console import program, say, step
from flows.encode import EncodedPaths, ensure_encoded
from flows.job import Job
from flows.models import base_of
from flows.prepare import ensure_dataset
from flows.progress import RunProgress
from flows.replay import check_parts, old_version
from flows.train_loop import train_worker

Execute = Callable[[Callable[[Any], None], Any, PlacementSection, Path], None]


@dataclass(frozen=True)
class Inputs:
    """What a recipe is applied to."""

    workspace: Workspace
    dataset: DatasetVersion
    base: Path
    base_fingerprint: str
    old: Path | None = None
    """Dataset version whose pictures are replayed; None: all pictures are alike."""

    def run_id(self, config: Config) -> str:
        return f"{config.name}-{recipe_fingerprint(config, self.dataset.id, self.base_fingerprint)}"


def run(config: Config, execute: Execute = workers.run_group) -> dict[str, Any]:
    """Train one recipe to its end, continuing what an earlier attempt left; return the verb's JSON object.

    `execute` has workers run the loop: a group of their own, or one that a search keeps.
    """
    check_placement(config.placement)
    batch = plan_batch(config.train.global_batch, config.placement.workers, config.placement.micro_batch)
    old_version(config)
    with local_session(config.placement):
        inputs = open_inputs(config)
        run_id = inputs.run_id(config)
        directory = inputs.workspace.run_dir(run_id)
        record = read_record(directory)
        if record is not None:
            say(f"run {run_id}: complete with the same fingerprint, nothing to do")
            return dict(record["results"])
        data = ensure_encoded(config, inputs.dataset, inputs.base, with_text=not trains_text(config.train.freezing))
        if config.train.warmup_steps >= config.train.steps:
            say(f"note: train.warmup_steps={config.train.warmup_steps} is no less than train.steps: no peak, no fall")
        facts = f"plan {config.train.freezing}, {config.train.steps} steps, {batch}"
        step(f"train: run {run_id} on {inputs.dataset.id}, {facts}")
        job = open_job(config, inputs, data)
        started = time.monotonic()
        try:
            with RunProgress(directory, config.train.steps):
                execute(train_worker, job, config.placement, directory)
        except BaseException as error:
            status = "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"
            telemetry.try_end_run(job.mlflow_uri, job.mlflow_run_id, status, {}, {})
            raise
        telemetry.send_again(directory, job.mlflow_uri, job.mlflow_run_id)
        telemetry.end_run(job.mlflow_uri, job.mlflow_run_id, "FINISHED")
    results = _record(job, inputs, time.monotonic() - started)
    shutil.rmtree(directory / "ray", ignore_errors=True)
    first, last = results["eval_loss_first"], results["eval_loss_last"]
    say(f"eval loss {first:.4f} -> {last:.4f} ({last / first - 1:+.1%}) in {results['seconds']:.0f} s")
    say(f"pipeline: {directory / 'pipeline'}\nnext: {program()} promote {run_id} --workspace {config.workspace}")
    return results


def open_inputs(config: Config) -> Inputs:
    """Find what the recipe is applied to; makes the dataset version when there is none. A Ray session must run."""
    workspace = open_workspace(config.workspace)
    base = base_of(config, workspace)
    base_fingerprint = model_fingerprint(base)
    dataset, old = ensure_dataset(config), old_version(config)
    if old is None:
        return Inputs(workspace, dataset, base, base_fingerprint)
    check_parts(config, old, dataset)
    return Inputs(workspace, dataset, base, base_fingerprint, old.directory)


def open_job(
    config: Config, inputs: Inputs, data: EncodedPaths, parent: str = "", pictures_at_end: bool = False
) -> Job:
    """Make the folder and the MLflow run of a recipe (under the MLflow run `parent`), or find them again."""
    run_id = inputs.run_id(config)
    directory = inputs.workspace.run_dir(run_id)
    directory.mkdir(parents=True, exist_ok=True)
    uri = config.placement.tracking_uri or inputs.workspace.mlflow_uri
    known = read_json(directory / "mlflow.json")
    mlflow_run_id = str(known["run_id"]) if known is not None else ""
    if not mlflow_run_id or not telemetry.run_exists(uri, mlflow_run_id):
        params = {"dataset": inputs.dataset.id, **config.model_dump(exclude={*AFTER_A_RUN, "search", "workspace"})}
        artifacts = inputs.workspace.root / "mlartifacts"
        params = stage.portable(params, inputs.workspace.root)
        mlflow_run_id = telemetry.start_run(uri, config.name, run_id, params, artifacts, parent)
        write_json_atomic(directory / "mlflow.json", {"run_id": mlflow_run_id})
    dataset_dir = inputs.dataset.directory
    return Job(config, inputs.base, directory, data, dataset_dir, uri, mlflow_run_id, inputs.old, pictures_at_end)


def _record(job: Job, inputs: Inputs, seconds: float) -> dict[str, Any]:
    """Mark the run complete; return its results."""
    outcome = read_json(job.directory / "outcome.json") or {}
    fetch_parts(job.directory)  # of workers on another machine
    results = {
        "run_id": job.directory.name,
        "checkpoint": str(job.directory / "pipeline"),
        **outcome,
        "workers": job.config.placement.workers,
        "seconds": round(seconds, 1),
    }
    write_record(
        job.directory,
        {
            "config": told_config(job.config.model_dump()),
            "fingerprint": recipe_fingerprint(job.config, inputs.dataset.id, inputs.base_fingerprint),
            "inputs": {
                "dataset": inputs.dataset.id,
                "base": inputs.base_fingerprint,
                "base_path": str(inputs.base),
            },
            "provenance": {
                "commit": telemetry.code_commit(),
                "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            },
            "mlflow_run_id": job.mlflow_run_id,
            "pipeline": "pipeline",
            "results": results,
        },
    )
    return results


def plan(config: Config) -> list[str]:
    """Return what `run` would do, with the batch arithmetic and the memory estimate; touches nothing."""
    check_placement(config.placement)
    batch = plan_batch(config.train.global_batch, config.placement.workers, config.placement.micro_batch)
    base = Path(config.model.base).expanduser() if config.model.base else embedded_base()
    lines = [f"batch: {batch}"]
    if base.is_dir():
        trained, frozen = _count(config.train, load_parts(base, only={"denoiser", "text_encoder"}))
        bf16 = config.train.precision == "bf16"
        zero_stage = choose_stage(config.placement, trained, frozen, bf16, workers.host_memory_bytes())
        lines += [f"plan {config.train.freezing}: {trained:,} parameters train, {frozen:,} are frozen"]
        lines += memory_table(trained, frozen, config.placement.workers, bf16, zero_stage)
    else:
        lines.append(f"model.base {str(base)!r} is not here: no memory estimate")
    if config.train.replay_of:
        lines.append(
            f"replay: {config.train.replay_fraction:.1%} of each batch are pictures of {config.train.replay_of}"
        )
    steps = [f"train {config.train.steps} steps on {config.placement.workers} workers with {config.placement.engine}"]
    return [*lines, *steps, f"export a diffusers directory under {config.workspace}/runs"]


def _count(train: TrainSection, parts: Parts) -> tuple[int, int]:
    model = apply_plan(parts, train.freezing, train.seed)
    trained = sum(parameter.numel() for _, parameter in trainable(model))
    return trained, sum(parameter.numel() for parameter in model.parameters()) - trained
