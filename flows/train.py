"""`fresco train`: one run, told in order. The driver first, then the loop that every worker executes.

The driver prepares what is missing, starts the worker group, shows its progress, and writes the record last. A run's
folder is named by the fingerprint of its recipe: the same command continues an unfinished run and finds a finished one.
Everything random in the loop is a function of (seed, step, position in the global batch), see `components/noise.py`.
"""

import os
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
from cluster.checkpoints import CheckpointWriter
from cluster.engine import MASTER
from cluster.exchange import OVER, STEP
from cluster.placement import PlacementSection, check_placement, plan_batch
from cluster.session import local_session
from cluster.zero import choose_stage, memory_table
from components.dataset import DatasetVersion
from components.ema import Ema
from components.freezing import apply_plan, trainable
from components.models import Parts, embedded_base, load_parts, model_fingerprint
from components.objective import make_objective
from components.optim import rate_factor, state_names
from components.recipe import TrainSection, trains_text
from flows.config import AFTER_A_RUN, Config, recipe_fingerprint
from flows.console import program, say, step
from flows.encode import EncodedPaths, ensure_encoded
from flows.job import Job
from flows.models import base_of
from flows.prepare import ensure_dataset
from flows.progress import RunProgress
from flows.replay import check_parts, old_version
from flows.run_weights import RunWeights
from flows.train_step import Loop, engine_of
from flows.watch import Watch, load_split

LOG_EVERY_STEPS = 10


# ------------------------------------------------------------------------------------------------- the driver


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
        step(
            f"train: run {run_id} on {inputs.dataset.id}, plan {config.train.freezing}, {config.train.steps} steps, {batch}"
        )
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
            "config": job.config.model_dump(),
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


# ------------------------------------------------------------------------------------------------- the loop


def train_worker(job: Job) -> None:
    """Train on one worker of the group: every rank runs these lines, each on its part of the global batch."""
    train, placement = job.config.train, job.config.placement
    here = workers.context()

    # Model, plan, engine. A frozen text encoder is not loaded: its states come from the cache.
    wanted = {"denoiser", "tokenizer"} | ({"text_encoder"} if trains_text(train.freezing) else set())
    parts = load_parts(job.base, only=wanted)
    objective = make_objective(
        parts.prediction, parts.scheduler, train.timestep_sampling, train.weighting, train.min_snr_gamma
    )
    model = apply_plan(parts, train.freezing, train.seed)
    names = [name for name, _ in trainable(model)]
    trained = sum(parameter.numel() for _, parameter in trainable(model))
    frozen = sum(parameter.numel() for parameter in model.parameters()) - trained
    engine, zero_stage = engine_of(job.config, model, (trained, frozen), here)
    ema = Ema(engine.masters, train.ema_decay, train.average_with_base)

    # Data, the newest checkpoint, logs.
    data = load_split(job.data, job.dataset, "train", parts, job.old)
    loop = Loop(job.config, engine, objective, data, here)
    kinds = (MASTER, *state_names(train))
    weights = RunWeights(job.directory, engine, ema, names, kinds)
    progress = weights.resume(lambda step: loop.forward_backward(step))
    writer = CheckpointWriter(job.directory / "checkpoints", here.rank, here.world_size, placement.keep_checkpoints)
    watch = Watch.open(job, parts, objective, here)
    log = None
    pids = workers.gather(os.getpid())
    if here.rank == 0:
        log = telemetry.RunLog(job.directory, job.mlflow_uri, job.mlflow_run_id, progress.step)
        log.write(
            {
                "event": "start",
                "step": progress.step,
                "pids": pids,
                "device": str(here.device),
                "stage": zero_stage,
                "trained": trained,
                "frozen": frozen,
                "resumed": bool(progress.step),
                "memory": memory_table(trained, frozen, here.world_size, train.precision == "bf16", zero_stage),
            }
        )

    while True:
        # Measure, compare, report, draw; the weights measured are the averaged ones that would be exported.
        last = progress.step >= train.steps
        if progress.step % train.eval_every_steps == 0 or last:
            unjudged = dict(vars(progress))
            with weights.averaged():
                seen = watch.look(engine.forward)
                progress.judge(seen[telemetry.EVAL_LOSS])
                over = last or (train.patience > 0 and progress.bad_evals >= train.patience)
                go_on = workers.report({STEP: float(progress.step), OVER: float(over), **seen})
                drawn = over or not (go_on and job.pictures_at_end and stage.fetch(watch.first_pictures))
                if drawn:
                    watch.draw(progress.step, engine.forward)
            if train.patience and progress.best_step == progress.step:
                weights.save_best(progress, here)
            if log is not None:
                log.write({"step": progress.step, **seen})
                if drawn:
                    log.picture(watch.picture_path(progress.step))
                log.flush()
            if not go_on:
                # The search wants no more of it now. Whoever continues here sees and judges this evaluation again.
                writer.save(progress.step, weights.tensors(), unjudged)
                writer.close()
                return
            if over:
                break

        # One optimizer step.
        began = time.perf_counter()
        loss, norm, data_seconds = loop.train_step(progress.step)
        ema.update(progress.step)
        progress.step += 1
        progress.images += train.global_batch
        progress.seconds += time.perf_counter() - began
        if log is not None and (progress.step % LOG_EVERY_STEPS == 0 or progress.step == train.steps):
            data_share = data_seconds / (time.perf_counter() - began)
            log.write(progress.numbers(loss, norm, rate_factor(train, progress.step - 1), data_share))

        # A resumable checkpoint; it is copied here and written while the next steps run.
        if progress.step % placement.checkpoint_every_steps == 0 and progress.step < train.steps:
            writer.save(progress.step, weights.tensors(), vars(progress))

    writer.close()
    use_best = bool(train.patience) and progress.best_step != progress.step
    weights.export(job.base, train.freezing, use_best, here.rank)
    if here.rank == 0:
        write_json_atomic(job.directory / "outcome.json", progress.outcome(zero_stage, use_best))
