"""What every worker of a run does: load, resume, then measure and train until the steps are done.

Everything random is a function of (seed, step, position in the global batch), see `components/noise.py`.
"""

import os
import time

from cluster import stage, telemetry, workers
from cluster.artifacts import write_json_atomic
from cluster.checkpoints import CheckpointWriter
from cluster.engine import MASTER
from cluster.exchange import OVER, STEP
from cluster.zero import memory_table
from components.ema import Ema
from components.freezing import apply_plan, trainable
from components.models import load_parts
from components.objective import make_objective
from components.optim import rate_factor, state_names
from components.recipe import trains_text
from flows.job import Job
from flows.run_weights import RunWeights
from flows.train_step import Loop, engine_of
from flows.watch import Watch, load_split

LOG_EVERY_STEPS = 10


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
