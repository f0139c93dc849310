"""Optimizers and schedules: rates per group, decay where it belongs, warm-up in optimizer steps."""

import pytest
import torch
from torch import nn

from components.errors import InputError
from components.freezing import ParameterGroup
from components.optim import FINAL_SHARE, STATE_NAMES, make_optimizer, rate_factor
from components.recipe import LearningRate, TrainSection


@pytest.fixture
def model() -> nn.Module:
    return nn.ModuleDict({"denoiser": nn.Linear(3, 3), "text_encoder": nn.Linear(3, 3)})


GROUPS = [
    ParameterGroup("denoiser", True, ("denoiser.weight",)),
    ParameterGroup("denoiser", False, ("denoiser.bias",)),
    ParameterGroup("text_encoder", True, ("text_encoder.weight",)),
]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_optimizer_has_a_rate_and_a_decay_for_each_group(model: nn.Module, optimizer: str) -> None:
    rates = LearningRate(denoiser=0.1, text_encoder=0.2)
    train = TrainSection(optimizer=optimizer, learning_rate=rates, weight_decay=0.3)
    made = make_optimizer(model, GROUPS, train)
    found = [(group["lr"], group["peak_lr"], group["weight_decay"]) for group in made.param_groups]
    assert found == [(0.1, 0.1, 0.3), (0.1, 0.1, 0.0), (0.2, 0.2, 0.3)]
    held = {id(parameter) for group in made.param_groups for parameter in group["params"]}
    assert id(model["text_encoder"].bias) not in held


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_state_names_are_what_torch_keeps(model: nn.Module, optimizer: str) -> None:
    made = make_optimizer(model, GROUPS, TrainSection(optimizer=optimizer))
    sum(p.square().sum() for group in made.param_groups for p in group["params"]).backward()
    made.step()
    kept = set(made.state[model["denoiser"].weight]) - {"step"}
    assert kept == set(STATE_NAMES[optimizer])


def test_sgd_step_is_the_closed_form(model: nn.Module) -> None:
    train = TrainSection(optimizer="sgd", learning_rate=LearningRate(denoiser=0.5), weight_decay=0.1, momentum=0.0)
    made = make_optimizer(model, GROUPS[:2], train)
    weight, bias = model["denoiser"].weight, model["denoiser"].bias
    before, before_bias = weight.detach().clone(), bias.detach().clone()
    (weight.sum() + bias.sum()).backward()
    made.step()
    torch.testing.assert_close(weight.detach(), before - 0.5 * (1 + 0.1 * before))
    torch.testing.assert_close(bias.detach(), before_bias - 0.5)


def test_unknown_optimizer_and_schedule_are_errors_that_list_the_known_ones(model: nn.Module) -> None:
    # model_construct skips the config's own check: code may ask as well.
    with pytest.raises(InputError, match=r"adamw or sgd, found 'adam'"):
        make_optimizer(model, GROUPS, TrainSection().model_copy(update={"optimizer": "adam"}))
    with pytest.raises(InputError, match=r"constant, cosine or linear, found 'step'"):
        rate_factor(TrainSection().model_copy(update={"schedule": "step"}), 50)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
def test_rate_warms_up_evenly_and_never_reaches_zero(schedule: str) -> None:
    train = TrainSection(steps=100, warmup_steps=9, schedule=schedule)
    factors = [rate_factor(train, step) for step in range(100)]
    assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert all(0 < factor <= 1 for factor in factors)
    after = factors[9:]
    assert after == sorted(after, reverse=True)


@pytest.mark.parametrize(("schedule", "half"), [("constant", 1.0), ("cosine", 0.505), ("linear", 0.505)])
def test_rate_after_warm_up_is_the_closed_form(schedule: str, half: float) -> None:
    train = TrainSection(steps=110, warmup_steps=10, schedule=schedule)
    assert rate_factor(train, 10) == pytest.approx(1.0)
    assert rate_factor(train, 60) == pytest.approx(half)
    assert rate_factor(train, 110) == pytest.approx(1.0 if schedule == "constant" else FINAL_SHARE)
    assert rate_factor(train, 200) == rate_factor(train, 110)


def test_rate_of_a_run_shorter_than_its_warm_up_only_rises() -> None:
    train = TrainSection(steps=5, warmup_steps=20)
    factors = [rate_factor(train, step) for step in range(5)]
    assert factors == sorted(factors) and factors[-1] < 1


def test_rate_without_warm_up_starts_at_the_peak() -> None:
    assert rate_factor(TrainSection(warmup_steps=0), 0) == 1.0
