"""Optimizers and learning-rate schedules by name; steps are optimizer steps, whatever the number of workers."""

import math
from typing import Any

import torch
from torch import nn

from components.errors import InputError
from components.freezing import ParameterGroup
from components.recipe import TrainSection

FINAL_SHARE = 0.01
"""Share of the peak rate that cosine and linear schedules end at."""
STATE_NAMES = {"adamw": ("exp_avg", "exp_avg_sq"), "sgd": ("momentum_buffer",)}
"""Optimizer state kept for each parameter, by torch's names."""


def make_optimizer(model: nn.Module, groups: list[ParameterGroup], train: TrainSection) -> torch.optim.Optimizer:
    """Make the optimizer with one parameter group for each `groups` entry; the peak rate is kept as `peak_lr`."""
    by_name = dict(model.named_parameters())
    options: list[dict[str, Any]] = []
    for group in groups:
        rate = getattr(train.learning_rate, group.component)
        options.append(
            {
                "params": [by_name[name] for name in group.names],
                "lr": rate,
                "peak_lr": rate,
                "weight_decay": train.weight_decay if group.decayed else 0.0,
            }
        )
    if train.optimizer == "adamw":
        return torch.optim.AdamW(options, betas=(0.9, 0.999), eps=1e-8, fused=True)
    if train.optimizer == "sgd":
        return torch.optim.SGD(options, momentum=train.momentum, fused=True)
    raise InputError(f"train.optimizer expected to be adamw or sgd, found {train.optimizer!r}")


def state_names(train: TrainSection) -> tuple[str, ...]:
    """Return the optimizer state that exists for each parameter; sgd without momentum keeps none."""
    return () if train.optimizer == "sgd" and train.momentum == 0 else STATE_NAMES[train.optimizer]


def rate_factor(train: TrainSection, step: int) -> float:
    """Return the share of the peak rate at optimizer step `step` (0-based), in (0, 1]."""
    if step < train.warmup_steps:
        return (step + 1) / (train.warmup_steps + 1)
    progress = (step - train.warmup_steps) / max(1, train.steps - train.warmup_steps)
    progress = min(1.0, progress)
    if train.schedule == "constant":
        return 1.0
    if train.schedule == "linear":
        return 1 - (1 - FINAL_SHARE) * progress
    if train.schedule == "cosine":
        return FINAL_SHARE + (1 - FINAL_SHARE) * (1 + math.cos(math.pi * progress)) / 2
    raise InputError(f"train.schedule expected to be constant, cosine or linear, found {train.schedule!r}")
