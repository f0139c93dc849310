"""What a denoiser is asked to predict, how wrong it was, and the deterministic loss by which models are compared.

Variance-preserving diffusion (epsilon: Ho et al. 2020; v: Salimans & Ho 2022) with the scheduler's own table, and flow
matching (Lipman et al. 2023) with sigma = timestep / 1000. Losses are fp32 means over a sample's latents.

Shape letters: B samples, C channels, H, W latent height and width, N pictures, K timestep bands.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from components.errors import InputError
from components.models import TextStates
from components.noise import validation_draws

NUM_BANDS = 4
"""Equal parts of the timestep range, from nearly clean (0) to nearly noise (3)."""
TIMESTEPS = 1000


@dataclass(frozen=True)
class Objective:
    """The prediction target of one model; alphas_T is the cumulative signal share of its noise schedule, or None."""

    prediction: str
    alphas_T: Tensor | None
    sampling: str = "uniform"
    weighting: str = "none"
    min_snr_gamma: float = 5.0


def make_objective(
    prediction: str, scheduler: Any, sampling: str = "uniform", weighting: str = "none", gamma: float = 5.0
) -> Objective:
    """Take the noise schedule from a diffusers scheduler; InputError when the names do not go together."""
    if prediction not in ("epsilon", "v_prediction", "flow"):
        raise InputError(f"prediction expected to be epsilon, v_prediction or flow, found {prediction!r}")
    if weighting == "min_snr" and prediction == "flow":
        raise InputError(
            "train.weighting=min_snr expects an epsilon or v model, found one trained by flow matching;"
            " set train.weighting to none (and train.timestep_sampling to logit_normal to favour the middle)"
        )
    alphas = None if prediction == "flow" else scheduler.alphas_cumprod.clone().float()
    return Objective(prediction, alphas, sampling, weighting, gamma)


def timesteps_of(objective: Objective, level_B: Tensor) -> Tensor:
    """Turn uniform levels in [0, 1) into training timesteps: integers for epsilon and v, 1000 * sigma for flow."""
    if objective.sampling == "logit_normal":
        # Location 0, scale 1 (Esser et al. 2024, eq. 19), through the inverse of the normal distribution.
        level_B = torch.sigmoid(torch.special.ndtri(level_B.double().clamp(1e-6, 1 - 1e-6)))
    elif objective.sampling != "uniform":
        raise InputError(
            f"train.timestep_sampling expected to be uniform or logit_normal, found {objective.sampling!r}"
        )
    scaled_B = level_B.double() * TIMESTEPS
    return scaled_B.float() if objective.prediction == "flow" else scaled_B.long().clamp(max=TIMESTEPS - 1)


def noised(objective: Objective, latents_BCHW: Tensor, noise_BCHW: Tensor, timestep_B: Tensor) -> tuple[Tensor, Tensor]:
    """Return (noisy latents, target), both of the latents' shape."""
    if objective.alphas_T is None:
        sigma_B111 = (timestep_B / TIMESTEPS).view(-1, 1, 1, 1)
        return latents_BCHW + sigma_B111 * (noise_BCHW - latents_BCHW), noise_BCHW - latents_BCHW
    alpha_B111 = objective.alphas_T.to(latents_BCHW.device)[timestep_B].view(-1, 1, 1, 1)
    signal, spread = alpha_B111.sqrt(), (1 - alpha_B111).sqrt()
    noisy_BCHW = signal * latents_BCHW + spread * noise_BCHW
    if objective.prediction == "epsilon":
        return noisy_BCHW, noise_BCHW
    return noisy_BCHW, signal * noise_BCHW - spread * latents_BCHW


def loss_weights(objective: Objective, timestep_B: Tensor) -> Tensor:
    """Return the training weight of each sample: 1, or min-SNR (Hang et al. 2023, eq. 8 and its v form)."""
    if objective.weighting == "none" or objective.alphas_T is None:
        return torch.ones(len(timestep_B), device=timestep_B.device)
    alpha_B = objective.alphas_T.to(timestep_B.device)[timestep_B]
    snr_B = (alpha_B / (1 - alpha_B)).clamp(min=1e-8)
    capped_B = snr_B.clamp(max=objective.min_snr_gamma)
    return capped_B / snr_B if objective.prediction == "epsilon" else capped_B / (snr_B + 1)


def squared_error(prediction_BCHW: Tensor, target_BCHW: Tensor) -> Tensor:
    """Return the mean squared error of each sample, fp32."""
    return (prediction_BCHW.float() - target_BCHW.float()).square().flatten(1).mean(1)


@torch.no_grad()
def per_image_losses(
    objective: Objective,
    predict: Callable[[Tensor, Tensor, TextStates], Tensor],
    latents_NCHW: Any,
    keys: Sequence[str],
    text_of: Callable[[Sequence[int]], TextStates],
    batch: int = 16,
) -> np.ndarray:
    """Return the unweighted denoising loss (N, K) of every picture in every timestep band, float64.

    Deterministic: the noise and the timestep of a picture are functions of `keys` (its sha256), its latents are the
    posterior mean, and no generator state is read or changed. `text_of(rows)` gives the captions' states. Row i uses
    the same noise for every model, so two models' losses are paired.
    """
    losses = np.empty((len(keys), NUM_BANDS))
    shape = tuple(latents_NCHW.shape[1:])
    for start in range(0, len(keys), batch):
        rows = range(start, min(start + batch, len(keys)))
        draws = [validation_draws(keys[row], NUM_BANDS, shape) for row in rows]
        noise_BCHW = torch.cat([noise for noise, _ in draws])
        timestep_B = timesteps_of(Objective(objective.prediction, None), torch.cat([level for _, level in draws]))
        # np.array copies: the table is a read-only memory map.
        latents_BCHW = torch.from_numpy(np.array(latents_NCHW[rows.start : rows.stop])).repeat_interleave(NUM_BANDS, 0)
        noisy_BCHW, target_BCHW = noised(objective, latents_BCHW, noise_BCHW, timestep_B)
        text = text_of([row for row in rows for _ in range(NUM_BANDS)])
        prediction_BCHW = predict(noisy_BCHW, timestep_B, text)
        errors = squared_error(prediction_BCHW, target_BCHW.to(prediction_BCHW.device))
        losses[rows.start : rows.stop] = errors.cpu().double().view(-1, NUM_BANDS).numpy()
    return losses
