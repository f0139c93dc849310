"""Train a small KL autoencoder from nothing: the part of the embedded base that turns pictures into latents and back.

Reconstruction is L1 on pixels and on their horizontal and vertical differences (edges are what small flat pictures are
made of), with a slight pull of the posterior towards the standard normal (Kingma & Welling 2014). Used once, by
`fresco pretrain`; users bring the autoencoder of their base.

Shape letters: B batch, C channels, H, W pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from components.errors import NonFiniteError

KL_WEIGHT = 1e-7
EDGE_WEIGHT = 1.0


@dataclass(frozen=True)
class AutoencoderPlan:
    steps: int
    batch: int
    learning_rate: float = 2e-3
    warmup_steps: int = 50


def make_autoencoder(seed: int, size_px: int) -> Any:
    """Make an AutoencoderKL of 1 M parameters, factor 8, 8 latent channels, with random weights."""
    from diffusers import AutoencoderKL

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(16, 32, 64, 64),
            layers_per_block=1,
            norm_num_groups=8,
            latent_channels=8,
            sample_size=size_px,
        )


def train_autoencoder(
    vae: Any, batch_at: Callable[[int], Tensor], plan: AutoencoderPlan, on_step: Callable[[int, float], None]
) -> None:
    """Train `vae` in place on `batch_at(step)` -> pixels_BCHW in [-1, 1]; `on_step(step, reconstruction_l1)`."""
    vae.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=plan.learning_rate, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, plan.learning_rate, total_steps=plan.steps, pct_start=plan.warmup_steps / plan.steps
    )
    noise = torch.Generator().manual_seed(0)
    for step in range(plan.steps):
        pixels_BCHW = batch_at(step)
        posterior = vae.encode(pixels_BCHW).latent_dist
        latents_BCHW = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=noise)
        drawn_BCHW = vae.decode(latents_BCHW, return_dict=False)[0]
        l1, edges = reconstruction_loss(drawn_BCHW, pixels_BCHW)
        loss = l1 + EDGE_WEIGHT * edges + KL_WEIGHT * posterior.kl().mean()
        if not torch.isfinite(loss):
            raise NonFiniteError(f"autoencoder loss expected to be finite, found {loss.item()} at step {step}")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        on_step(step, l1.item())
    vae.eval().requires_grad_(False)


def reconstruction_loss(drawn_BCHW: Tensor, pixels_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean absolute difference of the pixels and of their neighbour differences."""
    difference = drawn_BCHW - pixels_BCHW
    edges = (difference[..., 1:] - difference[..., :-1]).abs().mean()
    edges = edges + (difference[..., 1:, :] - difference[..., :-1, :]).abs().mean()
    return difference.abs().mean(), edges


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
