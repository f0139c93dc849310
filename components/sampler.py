"""Draw pictures: from prompts and seeds to PNG-ready images, as a pure function of rows.

The family makes a table of steps and `solvers` advances all rows by it; rows are independent of each other. For the
same seed the result equals the family's diffusers pipeline. Noise comes from a CPU generator per row: the picture does
not depend on the batch or the device.

Shape letters: B rows, C channels, H, W latent height and width, S steps.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from PIL import Image
from torch import Tensor

from components.errors import NonFiniteError
from components.models import (
    SAMPLE_BATCH,
    Parts,
    TextStates,
    decode_latents,
    encode_text,
    family_named,
    latent_factor,
)
from components.solvers import TIMESTEP, advance

Predict = Callable[[Tensor, Tensor, TextStates], Tensor]
"""(latents_BCHW, timestep_B, text) -> prediction_BCHW."""


@dataclass(frozen=True)
class PictureRequest:
    """One picture to draw."""

    prompt: str
    seed: int = 0
    steps: int = 20
    guidance_scale: float = 3.0
    """How hard the prompt pulls; the family says from which value on guidance costs a second row."""
    negative_prompt: str = ""
    width_px: int = 64
    height_px: int = 64


def draw(parts: Parts, requests: Sequence[PictureRequest]) -> list[Image.Image]:
    """Draw one picture for each request, in order; requests of one size and step count share batches."""
    pictures: dict[int, Image.Image] = {}

    def bucket(index: int) -> tuple[int, int, int, bool]:
        request = requests[index]
        guided = family_named(parts.family).uses_guidance(request.guidance_scale)
        return request.width_px, request.height_px, request.steps, guided

    for _, group in groupby(sorted(range(len(requests)), key=bucket), key=bucket):
        indexes = list(group)
        for start in range(0, len(indexes), SAMPLE_BATCH):
            chosen = indexes[start : start + SAMPLE_BATCH]
            pictures.update(zip(chosen, _draw_batch(parts, [requests[i] for i in chosen]), strict=True))
    return [pictures[index] for index in range(len(requests))]


def _draw_batch(parts: Parts, requests: list[PictureRequest]) -> list[Image.Image]:
    family = family_named(parts.family)
    device = next(parts.denoiser.parameters()).device

    def predict(latents_BCHW: Tensor, timestep_B: Tensor, text: TextStates) -> Tensor:
        prediction_BCHW: Tensor = family.call_denoiser(
            parts.denoiser, latents_BCHW.to(parts.denoiser.dtype), timestep_B, text
        )
        return prediction_BCHW

    text = encode_text(parts, [request.prompt for request in requests])
    empty = encode_text(parts, [request.negative_prompt for request in requests])
    latents_BCHW = sample_latents(parts, predict, requests, text, empty).to(device)
    pixels_BCHW = decode_latents(parts.vae, latents_BCHW.to(parts.vae.dtype))
    if not torch.isfinite(pixels_BCHW).all():
        raise NonFiniteError(
            f"expected finite pixels, found NaN or infinity for the prompts {[r.prompt for r in requests]}; check the"
            " weights of the model (half-precision autoencoders are known to overflow)"
        )
    return to_images(pixels_BCHW)


@torch.no_grad()
def sample_latents(
    parts: Parts, predict: Predict, requests: Sequence[PictureRequest], text: TextStates, negative: TextStates
) -> Tensor:
    """Run every row's steps and return final latents_BCHW (fp32); the requests share size, steps and guidance use.

    `predict` stands for the denoiser, so that a sharded one can be used; `text` and `negative` hold a row each.
    """
    family = family_named(parts.family)
    first = requests[0]
    x_BCHW = initial_latents(parts, requests).to(text.states_BLD.device)
    cells = x_BCHW.shape[-1] * x_BCHW.shape[-2]
    table = family.step_table(parts, first.steps, cells)
    x_BCHW = table.noise_scale * x_BCHW
    guided = family.uses_guidance(first.guidance_scale)
    scale_B111 = torch.tensor([r.guidance_scale for r in requests], device=x_BCHW.device).view(-1, 1, 1, 1)
    states = text.cat(negative) if guided else text
    clean_BCHW = torch.zeros_like(x_BCHW)
    for columns_K in table.columns_SK.to(x_BCHW.device):
        rows_BCHW = torch.cat([x_BCHW, x_BCHW]) if guided else x_BCHW
        prediction = predict(rows_BCHW, columns_K[TIMESTEP].expand(len(rows_BCHW)), states).float()
        if guided:
            prediction = family.guide(*prediction.chunk(2), scale_B111)
        x_BCHW, clean_BCHW = advance(x_BCHW, prediction, clean_BCHW, columns_K.expand(len(x_BCHW), -1))
    return x_BCHW


def initial_latents(parts: Parts, requests: Sequence[PictureRequest]) -> Tensor:
    """Return standard normal latents_BCHW, row i from a CPU generator seeded with request i's seed."""
    factor, channels = latent_factor(parts), parts.vae.config.latent_channels
    rows = []
    for request in requests:
        generator = torch.Generator("cpu").manual_seed(request.seed)
        shape = (1, channels, request.height_px // factor, request.width_px // factor)
        rows.append(torch.randn(shape, generator=generator))
    return torch.cat(rows)


def to_images(pixels_BCHW: Tensor) -> list[Image.Image]:
    """Turn pixels in [-1, 1] (clipped) into RGB pictures, rounded as diffusers does."""
    values = (pixels_BCHW.float() / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(picture) for picture in (values * 255).round().astype("uint8")]
