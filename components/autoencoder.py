"""Train a small KL autoencoder from nothing: the part of the embedded base that turns pictures into latents and back.

Reconstruction is squared error with some L1 for sharp edges, and a very slight pull of the posterior towards the
standard normal (Kingma & Welling 2014). Used once, by `fresco pretrain`; users bring the autoencoder of their base.

Shape letters: B batch, C channels, H, W pixels.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from components.errors import NonFiniteError

KL_WEIGHT = 1e-7
L1_WEIGHT = 0.2
FIRST_LOG_VARIANCE = -5.0
"""Where the posterior's spread starts: at the usual 0 its noise drowns the means for the first thousand steps."""


@dataclass(frozen=True)
class AutoencoderPlan:
    steps: int
    batch: int
    learning_rate: float = 1.5e-3
    warmup_steps: int = 100
    decoder_only: bool = False
    """Leave the encoder, and so the latents, as they are: sharpens pictures without outdating a trained denoiser."""


def make_autoencoder(seed: int, size_px: int) -> Any:
    """Make an AutoencoderKL of 1 M parameters, factor 8, 8 latent channels, with random weights."""
    from diffusers import AutoencoderKL

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae: Any = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(16, 32, 64, 64),
            layers_per_block=1,
            norm_num_groups=8,
            latent_channels=8,
            sample_size=size_px,
        )
    with torch.no_grad():
        vae.quant_conv.weight[vae.config.latent_channels :].zero_()
        vae.quant_conv.bias[vae.config.latent_channels :].fill_(FIRST_LOG_VARIANCE)
    return vae


def train_autoencoder(
    vae: Any, batch_at: Callable[[int], Tensor], plan: AutoencoderPlan, on_step: Callable[[int, float], None]
) -> None:
    """Train `vae` in place on `batch_at(step)` -> pixels_BCHW in [-1, 1]; `on_step(step, reconstruction_l1)`."""
    vae.train().requires_grad_(not plan.decoder_only)
    for module in (vae.decoder, vae.post_quant_conv):
        module.requires_grad_(True)
    trained = [parameter for parameter in vae.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=plan.learning_rate, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, plan))
    noise = torch.Generator().manual_seed(0)
    for step in range(plan.steps):
        pixels_BCHW = batch_at(step)
        posterior = vae.encode(pixels_BCHW).latent_dist
        latents_BCHW = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=noise)
        drawn_BCHW = vae.decode(latents_BCHW, return_dict=False)[0]
        difference_BCHW = drawn_BCHW - pixels_BCHW
        l1 = difference_BCHW.abs().mean()
        loss = difference_BCHW.square().mean() + L1_WEIGHT * l1 + KL_WEIGHT * posterior.kl().mean()
        if not torch.isfinite(loss):
            raise NonFiniteError(f"autoencoder loss expected to be finite, found {loss.item()} at step {step}")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        on_step(step, l1.item())
    vae.eval().requires_grad_(False)


def _rate(step: int, plan: AutoencoderPlan) -> float:
    """Share of the peak rate: linear warm-up, then cosine to zero."""
    warm = min(1.0, (step + 1) / plan.warmup_steps)
    return warm * (1 + math.cos(math.pi * step / plan.steps)) / 2


@torch.no_grad()
def set_latent_scale(vae: Any, pixels_BCHW: Tensor) -> float:
    """Set the scaling factor so that these pictures' latents have unit variance; return it."""
    posterior = vae.encode(pixels_BCHW).latent_dist
    sampled = posterior.mean + posterior.std * torch.randn(
        posterior.mean.shape, generator=torch.Generator().manual_seed(0)
    )
    scale = float(1 / sampled.std())
    vae.register_to_config(scaling_factor=scale)
    return scale
