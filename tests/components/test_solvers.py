"""Solvers against diffusers' schedulers run alone, and in batches of rows that all stand somewhere else."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from torch import Tensor

from components.errors import InputError
from components.solvers import (
    CLEAN_KEEP,
    CLEAN_MOVE,
    TIMESTEP,
    StepTable,
    advance,
    columns_at,
    diffusion_table,
    flow_table,
)

# fp32 on both sides, but other factors are rounded: two orders above one rounding, three below a wrong coefficient.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
SPACINGS: list[dict[str, Any]] = [
    {"timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False, "beta_schedule": "scaled_linear"},
    {"timestep_spacing": "trailing", "beta_schedule": "squaredcos_cap_v2"},
    {"timestep_spacing": "linspace", "set_alpha_to_one": True},
]
ZERO_SNR = {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True, "beta_schedule": "squaredcos_cap_v2"}
CASES = [("epsilon", options) for options in SPACINGS] + [("v_prediction", o) for o in [*SPACINGS, ZERO_SNR]]
STEPS = [1, 2, 7, 14, 15, 40]


def predictions(steps: int, shape: Sequence[int] = (2, 4, 4, 4)) -> Tensor:
    return torch.randn(steps + 1, *shape, generator=torch.Generator().manual_seed(steps))


def walk(table: StepTable, draws: Tensor, latents: Tensor) -> Tensor:
    """Run all steps for rows of one table; `draws` are the predictions."""
    clean = torch.zeros_like(latents)
    for step in range(len(table)):
        columns_BK = table.columns_SK[step].expand(len(latents), -1)
        latents, clean = advance(latents, draws[step], clean, columns_BK)
    return latents


def walk_diffusers(scheduler: Any, draws: Tensor, noise: Tensor) -> Tensor:
    """Run a scheduler as a pipeline does; returns its last latents."""
    if hasattr(scheduler, "set_begin_index"):
        # It looks for its step by timestep otherwise, and Karras' spacing holds some twice.
        scheduler.set_begin_index(0)
    latents = noise * scheduler.init_noise_sigma
    for step, timestep in enumerate(scheduler.timesteps):
        scheduler.scale_model_input(latents, timestep)
        latents = scheduler.step(draws[step], timestep, latents).prev_sample
    return latents


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize(("prediction", "options"), CASES)
def test_ddim_equals_the_scheduler(prediction: str, options: dict[str, Any], steps: int) -> None:
    scheduler = DDIMScheduler(prediction_type=prediction, clip_sample=False, **options)
    table = diffusion_table(scheduler, prediction, steps, "ddim")
    scheduler.set_timesteps(steps)
    draws = predictions(steps)
    assert table.columns_SK[:, TIMESTEP].tolist() == scheduler.timesteps.tolist()
    torch.testing.assert_close(walk(table, draws, draws[-1]), walk_diffusers(scheduler, draws, draws[-1]), **CLOSE)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize(("prediction", "options"), CASES)
def test_euler_equals_the_scheduler(prediction: str, options: dict[str, Any], steps: int) -> None:
    config = DDIMScheduler(prediction_type=prediction, **options).config
    scheduler = EulerDiscreteScheduler.from_config(config)
    table = diffusion_table(DDIMScheduler.from_config(config), prediction, steps, "euler")
    scheduler.set_timesteps(steps)
    draws = predictions(steps)
    assert table.columns_SK[:, TIMESTEP].tolist() == pytest.approx(scheduler.timesteps.tolist())
    # The scheduler ends at sigma 0, where its scale and ours are the same.
    ours = walk(table, draws, table.noise_scale * draws[-1])
    # Its fp32 latents are sigma times ours, up to 20,000 at first, and lose that many roundings by cancellation.
    atol = 1e-4 + 2**-22 * float(scheduler.sigmas[0])
    torch.testing.assert_close(ours, walk_diffusers(scheduler, draws, draws[-1]), rtol=1e-4, atol=atol)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("extra", [{}, {"use_karras_sigmas": True}, {"final_sigmas_type": "sigma_min"}], ids=str)
@pytest.mark.parametrize(("prediction", "options"), CASES)
def test_second_order_solver_equals_the_scheduler(
    prediction: str, options: dict[str, Any], extra: dict[str, Any], steps: int
) -> None:
    config = {**DDIMScheduler(prediction_type=prediction, **options).config, **extra}
    scheduler = DPMSolverMultistepScheduler.from_config(config)
    table = diffusion_table(DDIMScheduler.from_config(config), prediction, steps, "dpm++2m")
    scheduler.set_timesteps(steps)
    draws = predictions(steps)
    assert table.columns_SK[:, TIMESTEP].tolist() == scheduler.timesteps.tolist()
    theirs = walk_diffusers(scheduler, draws, draws[-1])
    # Random predictions at sigma 20,000 point to clean pictures as large; roundings of those remain.
    atol = 1e-4 + 2**-22 * float(scheduler.sigmas[0])
    torch.testing.assert_close(walk(table, draws, draws[-1]), theirs, rtol=2e-4, atol=atol)


def flow_sigmas(steps: int, **options: Any) -> tuple[Any, Tensor]:
    scheduler = FlowMatchEulerDiscreteScheduler(**options)
    scheduler.set_timesteps(sigmas=torch.linspace(1.0, 1 / steps, steps).tolist(), mu=0.8)
    return scheduler, scheduler.sigmas


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("options", [{"shift": 3.0}, {"use_dynamic_shifting": True}], ids=str)
def test_flow_euler_equals_the_scheduler(options: dict[str, Any], steps: int) -> None:
    scheduler, sigmas = flow_sigmas(steps, **options)
    table, draws = flow_table(sigmas, "euler"), predictions(steps)
    assert table.columns_SK[:, TIMESTEP].tolist() == pytest.approx(scheduler.timesteps.tolist())
    ours, theirs = walk(table, draws, draws[-1]), draws[-1]
    for step, timestep in enumerate(scheduler.timesteps):
        theirs = scheduler.step(draws[step], timestep, theirs).prev_sample
    torch.testing.assert_close(ours, theirs, **CLOSE)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("options", [{"shift": 1.0}, {"shift": 3.0}], ids=str)
def test_flow_second_order_equals_the_scheduler_on_the_same_noise_levels(options: dict[str, Any], steps: int) -> None:
    """Diffusers' multistep scheduler makes other flow sigmas than its Euler; ours keep the model's own."""
    _, sigmas = flow_sigmas(steps, **options)
    scheduler = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    scheduler.set_timesteps(steps)
    scheduler.sigmas = sigmas
    draws = predictions(steps)
    ours = walk(flow_table(sigmas, "dpm++2m"), draws, draws[-1])
    torch.testing.assert_close(ours, walk_diffusers(scheduler, draws, draws[-1]), **CLOSE)


def test_rows_of_any_solver_step_count_and_step_advance_together_as_alone() -> None:
    sd = DDIMScheduler(**SPACINGS[0])
    tables = [
        diffusion_table(sd, "epsilon", 5, "ddim"),
        diffusion_table(sd, "v_prediction", 20, "dpm++2m"),
        diffusion_table(sd, "epsilon", 9, "euler"),
        flow_table(flow_sigmas(8, shift=3.0)[1], "dpm++2m"),
        flow_table(flow_sigmas(16, shift=3.0)[1], "euler"),
    ]
    draws = [predictions(len(table), (1, 4, 4, 4)) for table in tables]
    alone = [walk(table, own, own[-1]) for table, own in zip(tables, draws, strict=True)]
    longest = max(len(table) for table in tables)
    columns_BSK = torch.zeros(len(tables), longest, 8)
    for row, table in enumerate(tables):
        columns_BSK[row, : len(table)] = table.columns_SK
    latents, clean = torch.cat([own[-1] for own in draws]), torch.zeros(len(tables), 4, 4, 4)
    # Row i joins at tick 2 i, so no two rows stand at the same step; the others hold still.
    for tick in range(longest + 2 * len(tables)):
        steps = [tick - 2 * row for row in range(len(tables))]
        alive = [row for row, step in enumerate(steps) if 0 <= step < len(tables[row])]
        if not alive:
            continue
        now_BK = columns_at(columns_BSK[alive], torch.tensor([steps[row] for row in alive]))
        prediction = torch.cat([draws[row][steps[row]] for row in alive])
        latents[alive], clean[alive] = advance(latents[alive], prediction, clean[alive], now_BK)
    # The same arithmetic elementwise: not one bit may differ.
    assert torch.equal(latents, torch.cat(alone))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "flow"])
def test_clean_estimate_is_exact_for_a_perfect_prediction(prediction: str) -> None:
    if prediction == "flow":
        table = flow_table(flow_sigmas(6, shift=3.0)[1], None)
    else:
        table = diffusion_table(DDIMScheduler(**SPACINGS[0]), prediction, 6, None)
    picture, noise = torch.randn(2, 1, 4, 4, 4, generator=torch.Generator().manual_seed(1)).double()
    signal, spread = table.start_signal, table.start_spread
    target = {"epsilon": noise, "v_prediction": signal * noise - spread * picture, "flow": noise - picture}[prediction]
    columns = table.columns_SK[0].double()
    clean = columns[CLEAN_KEEP] * (signal * picture + spread * noise) + columns[CLEAN_MOVE] * target
    # Columns are fp32, and at high noise the epsilon form divides by a signal of 0.07.
    torch.testing.assert_close(clean, picture, rtol=1e-5, atol=1e-5)


def test_a_later_start_has_no_history_and_the_later_steps_unchanged() -> None:
    scheduler = DDIMScheduler(**SPACINGS[0])
    whole = diffusion_table(scheduler, "epsilon", 20, "dpm++2m")
    late = diffusion_table(scheduler, "epsilon", 20, "dpm++2m", start=8)
    reference = DPMSolverMultistepScheduler.from_config(scheduler.config)
    reference.set_timesteps(20)
    reference.set_begin_index(8)
    assert torch.equal(late.columns_SK[1:], whole.columns_SK[9:])
    draws = predictions(20)
    theirs = draws[-1]
    for step, timestep in enumerate(reference.timesteps[8:]):
        theirs = reference.step(draws[step], timestep, theirs).prev_sample
    torch.testing.assert_close(walk(late, draws, draws[-1]), theirs, **CLOSE)


def test_making_a_table_leaves_the_scheduler_alone() -> None:
    scheduler = DDIMScheduler(**SPACINGS[0])
    before = scheduler.timesteps.clone()
    for solver in ("ddim", "euler", "dpm++2m"):
        diffusion_table(scheduler, "epsilon", 4, solver)
    assert torch.equal(scheduler.timesteps, before) and scheduler.num_inference_steps is None


def test_unknown_solvers_and_impossible_schedules_are_refused() -> None:
    with pytest.raises(InputError, match=r"one of ddim, euler, dpm\+\+2m .* found 'heun'"):
        diffusion_table(DDIMScheduler(), "epsilon", 4, "heun")
    with pytest.raises(InputError, match=r"one of euler, dpm\+\+2m .* found 'ddim'"):
        flow_table(flow_sigmas(4)[1], "ddim")
    with pytest.raises(InputError, match="zero terminal SNR predicts v"):
        diffusion_table(DDIMScheduler(**ZERO_SNR), "epsilon", 4, "ddim")
