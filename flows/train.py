"""`fresco train`: one run, told in order. The driver first, then the loop that every worker executes.

The driver prepares what is missing, starts the worker group, shows its progress, and writes the record last. A run's
folder is named by the fingerprint of its recipe: the same command continues an unfinished run and finds a finished one.
Everything random in the loop is a function of (seed, step, position in the global batch), see `components/noise.py`.
"""

import os
import shutil
import time
from pathlib import Path
from typing import Any

from cluster import telemetry, workers
from cluster.artifacts import open_workspace, read_json, read_record, write_json_atomic, write_record
from cluster.checkpoints import CheckpointWriter
from cluster.engine import MASTER, Engine, EngineOptions, make_engine
from cluster.placement import check_placement, plan_batch
from cluster.session import local_session
from cluster.zero import choose_stage, memory_table
from components.ema import Ema
from components.freezing import apply_plan, parameter_groups, trainable
from components.models import Parts, embedded_base, load_parts, model_fingerprint
from components.objective import make_objective
from components.optim import make_optimizer, rate_factor, state_names
from components.recipe import TrainSection, trains_text
from flows.config import Config, recipe_fingerprint
from flows.console import program, say, step
from flows.encode import ensure_encoded
from flows.job import Job
from flows.prepare import ensure_dataset
from flows.progress import RunProgress
from flows.run_weights import RunWeights
from flows.train_step import Loop
from flows.watch import Watch, load_split

LOG_EVERY_STEPS = 10


# ------------------------------------------------------------------------------------------------- the driver


def run(config: Config) -> dict[str, Any]:
    """Train one recipe to its end, continuing what an earlier attempt left; return the verb's JSON object."""
    check_placement(config.placement)
    batch = plan_batch(config.train.global_batch, config.placement.workers, config.placement.micro_batch)
    base = Path(config.model.base).expanduser().resolve() if config.model.base else embedded_base()
    base_fingerprint = model_fingerprint(base)
    workspace = open_workspace(config.workspace)
    with local_session(config.placement):
        dataset = ensure_dataset(config)
        fingerprint = recipe_fingerprint(config, dataset.id, base_fingerprint)
        run_id = f"{config.name}-{fingerprint}"
        directory = workspace.run_dir(run_id)
        record = read_record(directory)
        if record is not None:
            say(f"run {run_id}: complete with the same fingerprint, nothing to do")
            return dict(record["results"])
        data = ensure_encoded(config, dataset, base, with_text=not trains_text(config.train.freezing))
        step(f"train: run {run_id} on {dataset.id}, plan {config.train.freezing}, {config.train.steps} steps, {batch}")
        directory.mkdir(parents=True, exist_ok=True)
        uri = config.placement.tracking_uri or workspace.mlflow_uri
        mlflow_run_id = _mlflow_run(config, directory, uri, run_id, dataset.id)
        job = Job(config, base, directory, data, dataset.directory, uri, mlflow_run_id)
        started = time.monotonic()
        try:
            with RunProgress(directory, config.train.steps):
                workers.run_group(train_worker, job, config.placement, directory)
        except BaseException as error:
            telemetry.end_run(uri, mlflow_run_id, "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
            raise
        telemetry.end_run(uri, mlflow_run_id, "FINISHED")
    outcome = read_json(directory / "outcome.json") or {}
    results = {
        "run_id": run_id,
        "checkpoint": str(directory / "pipeline"),
        **outcome,
        "workers": config.placement.workers,
        "seconds": round(time.monotonic() - started, 1),
    }
    write_record(
        directory,
        {
            "config": config.model_dump(),
            "fingerprint": fingerprint,
            "inputs": {"dataset": dataset.id, "base": base_fingerprint, "base_path": str(base)},
            "provenance": {
                "commit": telemetry.code_commit(),
                "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            },
            "mlflow_run_id": mlflow_run_id,
            "pipeline": "pipeline",
            "results": results,
        },
    )
    shutil.rmtree(directory / "ray", ignore_errors=True)
    first, last = results["eval_loss_first"], results["eval_loss_last"]
    say(f"eval loss {first:.4f} -> {last:.4f} ({last / first - 1:+.1%}) in {results['seconds']:.0f} s")
    say(f"pipeline: {directory / 'pipeline'}\nnext: {program()} promote {run_id} --workspace {config.workspace}")
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
        stage = choose_stage(config.placement, trained, frozen, bf16, workers.host_memory_bytes())
        lines += [f"plan {config.train.freezing}: {trained:,} parameters train, {frozen:,} are frozen"]
        lines += memory_table(trained, frozen, config.placement.workers, bf16, stage)
    else:
        lines.append(f"model.base {str(base)!r} is not here: no memory estimate")
    steps = [f"train {config.train.steps} steps on {config.placement.workers} workers with {config.placement.engine}"]
    return [*lines, *steps, f"export a diffusers directory under {config.workspace}/runs"]


def _count(train: TrainSection, parts: Parts) -> tuple[int, int]:
    model = apply_plan(parts, train.freezing, train.seed)
    trained = sum(parameter.numel() for _, parameter in trainable(model))
    return trained, sum(parameter.numel() for parameter in model.parameters()) - trained


def _mlflow_run(config: Config, directory: Path, uri: str, run_id: str, dataset_id: str) -> str:
    """Return the MLflow run of this folder, creating it once."""
    known = read_json(directory / "mlflow.json")
    if known is not None and telemetry.run_exists(uri, known["run_id"]):
        return str(known["run_id"])
    params = {"dataset": dataset_id, **config.model_dump(exclude={"serve", "workspace"})}
    artifacts = Path(config.workspace).expanduser().resolve() / "mlartifacts"
    created = telemetry.start_run(uri, config.name, run_id, params, artifacts)
    write_json_atomic(directory / "mlflow.json", {"run_id": created})
    return created


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
    engine, stage = _engine(job, model, (trained, frozen), here)
    ema = Ema(engine.masters, train.ema_decay)

    # Data, the newest checkpoint, logs.
    data = load_split(job.data, job.dataset, "train", parts)
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
                "stage": stage,
                "trained": trained,
                "frozen": frozen,
                "resumed": bool(progress.step),
                "memory": memory_table(trained, frozen, here.world_size, train.precision == "bf16", stage),
            }
        )

    while True:
        # Measure, draw, compare, report; the weights measured are the averaged ones that would be exported.
        last = progress.step >= train.steps
        if progress.step % train.eval_every_steps == 0 or last:
            with weights.averaged():
                seen = watch.look(progress.step, engine.forward)
            progress.judge(seen[telemetry.EVAL_LOSS])
            if train.patience and progress.best_step == progress.step:
                weights.save_best(progress, here)
            if log is not None:
                log.write({"step": progress.step, **seen})
                log.picture(watch.picture_path(progress.step))
                log.flush()
            workers.report({"step": float(progress.step), **seen})
            if last or (train.patience and progress.bad_evals >= train.patience):
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
        write_json_atomic(job.directory / "outcome.json", progress.outcome(stage, use_best))


def _engine(job: Job, model: Any, counts: tuple[int, int], here: workers.WorkerContext) -> tuple[Engine, int]:
    train, placement = job.config.train, job.config.placement
    bf16 = train.precision == "bf16"
    if train.gradient_checkpointing:
        model.denoiser.enable_gradient_checkpointing()
        if model.text_encoder is not None:
            model.text_encoder.gradient_checkpointing_enable()
    room = workers.host_memory_bytes() // (1 if here.device.type == "cuda" else here.world_size)
    stage = choose_stage(placement, *counts, bf16, room) if placement.engine == "deepspeed" else 0
    options = EngineOptions(
        batch=plan_batch(train.global_batch, here.world_size, placement.micro_batch),
        placement=placement,
        stage=stage,
        clip_norm=train.clip_norm,
        bf16=bf16,
        device=here.device,
        state_names=state_names(train),
    )
    model.to(here.device)
    return make_engine(model, make_optimizer(model, parameter_groups(model), train), options), stage
