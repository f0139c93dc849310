"""The peer of `benchmarks/train.py`: one training step as diffusers' `train_text_to_image` example takes it.

Pictures are decoded, and pictures and captions encoded, in every step; DistributedDataParallel, unfused AdamW, gradient
clipping, an average over full weights.
"""

import io
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from PIL import Image


class Clock:
    """Adds up the seconds of named parts."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - began


Step = Callable[[int, Clock], None]


def decode(files: list[bytes]) -> torch.Tensor:
    from components.images import to_pixels

    return torch.from_numpy(to_pixels([Image.open(io.BytesIO(file)).convert("RGB") for file in files]))


def plain_loop(files: list[bytes], captions: list[str], rank: int, share: int) -> Step:
    """Return the step of one process of the group; `share` is its part of the global batch."""
    from diffusers import DDPMScheduler
    from diffusers.training_utils import EMAModel

    from components.models import embedded_base, load_parts

    parts = load_parts(embedded_base())
    unet = parts.denoiser.train().requires_grad_(True)
    scheduler = DDPMScheduler.from_config(parts.scheduler.config)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, weight_decay=1e-2)
    model = torch.nn.parallel.DistributedDataParallel(unet)
    ema = EMAModel(unet.parameters(), decay=0.999)

    def step(index: int, clock: Clock) -> None:
        first = (index * dist.get_world_size() + rank) * share % len(files)
        with clock.part("decode"):
            pixels = decode(files[first : first + share])
        with clock.part("encode pictures"), torch.no_grad():
            latents = parts.vae.encode(pixels).latent_dist.sample() * parts.vae.config.scaling_factor
        with clock.part("encode captions"), torch.no_grad():
            batch = parts.tokenizer(
                captions[first : first + share],
                padding="max_length",
                max_length=parts.tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            )
            states = parts.text_encoder(batch.input_ids)[0]
        with clock.part("forward"):
            noise = torch.randn_like(latents)
            timesteps = torch.randint(0, 1000, (len(latents),))
            noisy = scheduler.add_noise(latents, noise, timesteps)
            target = scheduler.get_velocity(latents, noise, timesteps)
            loss = torch.nn.functional.mse_loss(model(noisy, timesteps, states).sample, target)
        with clock.part("backward"):
            loss.backward()
        with clock.part("optimizer, clip, EMA"):
            torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            ema.step(unet.parameters())

    return step
