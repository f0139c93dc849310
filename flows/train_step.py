"""One optimizer step of a run: the engine that takes it, every worker's part of the batch, the check that stops all.

Shape letters: B samples, C channels, H, W latent height and width.
"""

import time
from typing import Any

import torch
from torch import Tensor

from cluster import workers
from cluster.engine import Engine, EngineOptions, make_engine
from cluster.placement import plan_batch
from cluster.zero import choose_stage
from components.batches import Batch, SplitData, training_batch
from components.errors import NonFiniteError
from components.freezing import parameter_groups
from components.objective import Objective, squared_error
from components.optim import make_optimizer, rate_factor, state_names
from flows.config import Config


def engine_of(config: Config, model: Any, counts: tuple[int, int], here: workers.WorkerContext) -> tuple[Engine, int]:
    """Return this worker's engine and its ZeRO stage; `counts` are the parameters that train and that are frozen."""
    train, placement = config.train, config.placement
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


class Loop:
    """One optimizer step over this worker's part of the global batch, with the checks that precede it."""

    def __init__(
        self, config: Config, engine: Engine, objective: Objective, data: SplitData, here: workers.WorkerContext
    ) -> None:
        self.train, self.engine, self.objective, self.data, self.here = config.train, engine, objective, data, here
        self.batch = plan_batch(self.train.global_batch, here.world_size, config.placement.micro_batch)

    def train_step(self, at: int) -> tuple[float, float, float]:
        """Return (loss over the global batch, gradient norm, seconds of making batches); NonFiniteError stops all."""
        loss, data_seconds, indexes = self.forward_backward(at)
        checks = workers.total(torch.stack([loss, torch.tensor(float(not self.engine.gradients_finite()))]).cpu())
        if not torch.isfinite(checks[0]) or checks[1]:
            keys = [self.data.keys[index][:12] for rows in workers.gather(indexes) for index in rows]
            what = "loss" if not torch.isfinite(checks[0]) else "gradient"
            raise NonFiniteError(
                f"expected a finite {what}, found {float(checks[0]) / self.here.world_size} at step {at}; no weight was"
                f" moved. Samples (sha256): {', '.join(sorted(set(keys)))}. Lower train.learning_rate, or look at them"
            )
        norm = self.engine.step(rate_factor(self.train, at))
        return float(checks[0]) / self.here.world_size, norm, data_seconds

    def forward_backward(self, at: int) -> tuple[Tensor, float, list[int]]:
        """Accumulate the gradients of this worker's positions; return their mean loss, data seconds and indexes."""
        mean, data_seconds, indexes = torch.zeros(()), 0.0, []
        for part in range(self.batch.accumulation):
            began = time.perf_counter()
            first = self.here.rank * self.batch.per_worker + part * self.batch.micro_batch
            batch = training_batch(
                self.data, self.objective, self.train, at, range(first, first + self.batch.micro_batch)
            )
            indexes += batch.indexes.tolist()
            data_seconds += time.perf_counter() - began
            loss = self._loss(batch)
            self.engine.backward(loss, last=part == self.batch.accumulation - 1)
            mean = mean + loss.detach().cpu() / self.batch.accumulation
        return mean, data_seconds, indexes

    def _loss(self, batch: Batch) -> Tensor:
        device = self.here.device
        prediction_BCHW = self.engine.forward(
            batch.noisy_BCHW.to(device),
            batch.timestep_B.to(device),
            batch.text.states_BLD.to(device),
            batch.text.mask_BL.to(device),
        )
        return (squared_error(prediction_BCHW, batch.target_BCHW.to(device)) * batch.weight_B.to(device)).mean()
