"""Solvers of the sampling equation, for rows that each stand at their own step of their own table.

Every step of every solver here has one form, with coefficients that depend on nothing but the schedule:

    clean   = clean_keep * x + clean_move * p                (the picture that the prediction p points to)
    x      <- keep * x + move * p + carry * clean_before     (carry is 0 for first-order steps)

so a step of many rows is a gather from their tables and three fused updates, without a look at any value on the host.
Latents are kept on the scale that the denoiser reads (x = signal * clean + spread * noise), also for Euler, whose paper
writes them divided by `signal`. First order: DDIM (Song et al. 2021, eq. 12, eta 0) and Euler (Karras et al. 2022),
which differ in their schedules alone; flow-matching Euler (Lipman et al. 2023). Second order: DPM-Solver++ 2M (Lu et
al. 2022, algorithm 2, midpoint). The schedules (spacing, shift, last step) are diffusers' own.

Shape letters: B rows, S steps, K columns of a table, C channels, H, W latent height and width.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from components.errors import InputError

TIMESTEP, KEEP, MOVE, CARRY, CLEAN_KEEP, CLEAN_MOVE, NEXT_SIGNAL, NEXT_SPREAD = range(8)
DDIM, EULER, DPM = "ddim", "euler", "dpm++2m"
DIFFUSION_SOLVERS = (DDIM, EULER, DPM)
FLOW_SOLVERS = (EULER, DPM)


@dataclass(frozen=True)
class Schedule:
    """What is left of picture and noise before and after each step; float64, length S."""

    timestep_S: Tensor
    signal_S: Tensor
    spread_S: Tensor
    next_signal_S: Tensor
    next_spread_S: Tensor
    noise_scale: float = 1.0
    """Spread of the latents a text-to-image row starts from."""

    def from_step(self, start: int) -> "Schedule":
        """Leave out the first steps; what begins there has no history, so its first step is of first order."""
        return Schedule(
            self.timestep_S[start:],
            self.signal_S[start:],
            self.spread_S[start:],
            self.next_signal_S[start:],
            self.next_spread_S[start:],
            self.noise_scale,
        )


@dataclass(frozen=True)
class StepTable:
    """The coefficients of one row's steps, columns_SK (fp32), and how the row's first latents are made."""

    columns_SK: Tensor
    noise_scale: float
    """Text to image: latents = noise_scale * noise."""
    start_signal: float
    start_spread: float
    """Image to image: latents = start_signal * picture's latents + start_spread * noise."""

    def __len__(self) -> int:
        return len(self.columns_SK)


def columns_at(columns_BSK: Tensor, step_B: Tensor) -> Tensor:
    """Return each row's coefficients at its own step, columns_BK."""
    return columns_BSK.gather(1, step_B.view(-1, 1, 1).expand(-1, 1, columns_BSK.shape[-1])).squeeze(1)


def advance(
    latents_BCHW: Tensor, prediction_BCHW: Tensor, clean_BCHW: Tensor, columns_BK: Tensor
) -> tuple[Tensor, Tensor]:
    """Return (latents, clean pictures' latents) after one step; `clean_BCHW` is what the step before returned."""

    def column(index: int) -> Tensor:
        return columns_BK[:, index].view(-1, 1, 1, 1)

    clean = column(CLEAN_KEEP) * latents_BCHW + column(CLEAN_MOVE) * prediction_BCHW
    moved = column(KEEP) * latents_BCHW + column(MOVE) * prediction_BCHW + column(CARRY) * clean_BCHW
    return moved, clean


def diffusion_table(scheduler: Any, prediction: str, steps: int, solver: str | None, start: int = 0) -> StepTable:
    """Return the table of an epsilon or v model whose noise schedule a diffusers scheduler describes.

    The scheduler is read, never changed. `start` leaves out the first steps (image to image).
    """
    solver = checked(solver or DDIM, DIFFUSION_SOLVERS)
    schedule, last_is_first_order = diffusion_schedule(scheduler.config, steps, solver)
    return make_table(schedule.from_step(start), prediction, solver == DPM, last_is_first_order)


def checked(solver: str, known: tuple[str, ...]) -> str:
    """Return the solver's name; InputError lists the names that this prediction has."""
    if solver not in known:
        raise InputError(f"solver expected one of {', '.join(known)} for this model, found {solver!r}; choose one")
    return solver


def diffusion_schedule(config: Any, steps: int, solver: str) -> tuple[Schedule, bool]:
    """Return the schedule of a scheduler's config and whether its last step must be of first order."""
    from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler

    most = config.num_train_timesteps - config.get("steps_offset", 0)
    if steps > most:
        raise InputError(f"steps expected at most {most}, the timesteps this model was trained with, found {steps}")
    if solver == DDIM:
        return ddim_schedule(config, steps), False
    if solver == EULER:
        euler = EulerDiscreteScheduler.from_config(config, timestep_type="discrete")
        euler.set_timesteps(steps)
        scale = float(euler.init_noise_sigma) / (float(euler.sigmas[0]) ** 2 + 1) ** 0.5
        return _sigma_schedule(euler.timesteps, euler.sigmas, scale), False
    fixed = {"algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint", "use_flow_sigmas": False}
    dpm = DPMSolverMultistepScheduler.from_config(config, **fixed)
    dpm.set_timesteps(steps)
    few = dpm.config.lower_order_final and len(dpm.timesteps) < 15
    last_is_first_order = bool(dpm.config.euler_at_final or few or dpm.config.final_sigmas_type == "zero")
    return _sigma_schedule(dpm.timesteps, dpm.sigmas, 1.0), last_is_first_order


def ddim_schedule(config: Any, steps: int) -> Schedule:
    """Return DDIM's schedule; a step's end need not be the next one's start where the spacing was rounded."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler.from_config(config)
    scheduler.set_timesteps(steps)
    timestep_S = scheduler.timesteps
    previous_S = timestep_S - scheduler.config.num_train_timesteps // steps
    alphas = scheduler.alphas_cumprod.double()
    now_S = alphas[timestep_S]
    next_S = torch.where(previous_S >= 0, alphas[previous_S.clamp(min=0)], scheduler.final_alpha_cumprod.double())
    return Schedule(timestep_S.double(), now_S.sqrt(), (1 - now_S).sqrt(), next_S.sqrt(), (1 - next_S).sqrt())


def _sigma_schedule(timestep_S: Tensor, sigmas: Tensor, noise_scale: float) -> Schedule:
    """Return the schedule of noise levels as Karras et al. write them: sigma = spread / signal, S + 1 of them."""
    sigmas = sigmas.double()
    signal = (sigmas.square() + 1).rsqrt()
    spread = sigmas * signal
    return Schedule(timestep_S.double(), signal[:-1], spread[:-1], signal[1:], spread[1:], noise_scale)


def flow_table(sigmas: Tensor, solver: str | None, start: int = 0) -> StepTable:
    """Return the table of a flow-matching model from its S + 1 noise levels, from noise to 0 (timestep = 1000 * sigma).

    `start` leaves out the first steps (image to image).
    """
    solver = checked(solver or EULER, FLOW_SOLVERS)
    sigmas = sigmas.double()
    schedule = Schedule(1000 * sigmas[:-1], 1 - sigmas[:-1], sigmas[:-1], 1 - sigmas[1:], sigmas[1:])
    return make_table(schedule.from_step(start), "flow", solver == DPM, last_is_first_order=True)


def make_table(schedule: Schedule, prediction: str, second_order: bool, last_is_first_order: bool) -> StepTable:
    """Turn a schedule into coefficients; InputError where a step divides by a signal of zero.

    In the words of Lu et al.: keep is sigma_t / sigma_s, `push` is -alpha_t (exp(-h) - 1), and 1 / (2 r) of it is bent
    towards the difference of the last two clean pictures.
    """
    signal_S, spread_S = schedule.signal_S, schedule.spread_S
    keep_S = schedule.next_spread_S / spread_S
    push_S = schedule.next_signal_S - signal_S * keep_S
    bend_S = torch.zeros_like(push_S)
    if second_order and len(push_S) > 1:
        now_S = signal_S.log() - spread_S.log()
        h_S = (schedule.next_signal_S.log() - schedule.next_spread_S.log()) - now_S
        bend_S[1:] = push_S[1:] * h_S[1:] / (2 * (now_S[1:] - now_S[:-1]))
        if last_is_first_order:
            bend_S[-1] = 0
    clean_keep_S, clean_move_S = _clean_columns(prediction, signal_S, spread_S)
    columns = torch.empty(len(push_S), 8, dtype=torch.float64)
    columns[:, TIMESTEP] = schedule.timestep_S
    columns[:, KEEP] = keep_S + (push_S + bend_S) * clean_keep_S
    columns[:, MOVE] = (push_S + bend_S) * clean_move_S
    columns[:, CARRY] = -bend_S
    columns[:, CLEAN_KEEP], columns[:, CLEAN_MOVE] = clean_keep_S, clean_move_S
    # As noisy as the next step begins, and not at all after the last: what repair puts back.
    columns[:-1, NEXT_SIGNAL], columns[:-1, NEXT_SPREAD] = signal_S[1:], spread_S[1:]
    columns[-1:, NEXT_SIGNAL], columns[-1:, NEXT_SPREAD] = 1, 0
    if not torch.isfinite(columns).all():
        raise InputError(
            f"solver expected a schedule with some signal at every step of a model that predicts {prediction},"
            " found a step without; a model trained to zero terminal SNR predicts v"
        )
    first = (float(signal_S[0]), float(spread_S[0])) if len(signal_S) else (1.0, 0.0)
    return StepTable(columns.float(), schedule.noise_scale, *first)


def _clean_columns(prediction: str, signal_S: Tensor, spread_S: Tensor) -> tuple[Tensor, Tensor]:
    """Return (factor of x, factor of the prediction) that make the clean picture's latents."""
    if prediction == "epsilon":
        return 1 / signal_S, -spread_S / signal_S
    if prediction == "v_prediction":
        return signal_S, -spread_S
    if prediction == "flow":
        return torch.ones_like(signal_S), -spread_S
    raise InputError(f"prediction expected to be epsilon, v_prediction or flow, found {prediction!r}")
