"""Pictures a second of a Stable-Diffusion-1.5-sized model (random weights) by rows per step, beside the matrix peak.

The steps are the engine's own (`row_batch`): guided rows at 512 px in bf16, 20 steps a picture. The peak is a large
matrix product in the same precision, timed in the same run, so a row says how much of the machine a step uses. Called
by `engine.py`: on a GPU as said, with `--tiny` on the CPU with a tiny model, where only that it runs means something.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from components.compiled import with_compiled
from components.draw_requests import DrawRequest
from components.emblems import example
from components.models import Parts, decode_latents, make_tiny
from components.row_batch import join, make_plan, step_rows
from components.sampler import PictureRequest
from components.tokenizer import make_clip_tokenizer
from components.versions import Version

STEPS = 20
TRIES = 5


@dataclass(frozen=True)
class Plan:
    """What is measured: on which device, a product of `matrix_side`, rows a call, and calls timed together."""

    device: str
    size_px: int
    matrix_side: int
    row_counts: tuple[int, ...]
    calls: int


LARGE = Plan("cuda", 512, 8192, (2, 4, 8, 16, 32, 64), 5)
TINY = Plan("cpu", 16, 64, (2, 4), 1)


def make_sd15() -> Parts:
    """Make modules of the sizes of Stable Diffusion 1.5 on the default device, with random weights."""
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = make_clip_tokenizer([example("base", 0, number)[1] for number in range(50)], 700, 77)
    text_config = CLIPTextConfig(
        vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
    )
    unet = UNet2DConditionModel(
        sample_size=64,
        block_out_channels=(320, 640, 1280, 1280),
        layers_per_block=2,
        cross_attention_dim=768,
        attention_head_dim=8,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        sample_size=512,
    )
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
    return Parts("stable_diffusion", "epsilon", tokenizer, CLIPTextModel(text_config), unet, vae, scheduler)


def make_parts(plan: Plan) -> Parts:
    """Make the model in the precisions of a GPU replica: the autoencoder in fp32, the rest in bf16."""
    with torch.device(plan.device):
        parts = make_sd15() if plan is LARGE else make_tiny("stable_diffusion")
    for module in (parts.text_encoder, parts.denoiser):
        module.to(plan.device, torch.bfloat16).eval().requires_grad_(False)
    parts.vae.to(plan.device).eval().requires_grad_(False)
    return parts


def seconds_of(work: Callable[[], Any], calls: int, device: str) -> float:
    """Return the seconds of one call, the best of some tries of `calls` calls each, the device's work included."""

    def finish() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    work()
    tries = []
    for _ in range(TRIES):
        finish()
        start = time.perf_counter()
        for _ in range(calls):
            work()
        finish()
        tries.append((time.perf_counter() - start) / calls)
    return min(tries)


def matrix_peak(plan: Plan) -> float:
    """Return the measured operations a second of a bf16 matrix product."""
    side = plan.matrix_side
    left, right = (torch.randn(side, side, device=plan.device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * side**3 / seconds_of(lambda: left @ right, plan.calls, plan.device)


def operations_of_a_row(version: Version, size_px: int) -> float:
    """Count the operations of matrix products and convolutions of one denoiser row."""
    row = version.prepare(DrawRequest("r", (PictureRequest("x", 0, STEPS, 0.0, "", size_px, size_px),)))[0]
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        version.predict(row.latents_BCHW.clone(), row.columns_BSK[:, 0, 0].clone(), row.text)
    return float(counted.get_total_flops())


@torch.inference_mode()
def step_seconds(version: Version, num_rows: int, plan: Plan) -> float:
    """Return the seconds of one step of `num_rows` denoiser rows: half as many guided pictures."""
    asked = tuple(
        PictureRequest(f"picture {number}", number, STEPS, 3.0, width_px=plan.size_px, height_px=plan.size_px)
        for number in range(num_rows // 2)
    )
    batch = join(version.prepare(DrawRequest("r", asked)))
    calls = make_plan(batch, (num_rows,))
    return seconds_of(lambda: step_rows(batch, calls, version.predict, version.family.guide), plan.calls, plan.device)


@torch.inference_mode()
def decode_seconds(version: Version, plan: Plan) -> float:
    """Return the seconds to decode one picture, of the decoding thread's batches of 8."""
    row = version.prepare(DrawRequest("r", (PictureRequest("x", width_px=plan.size_px, height_px=plan.size_px),)))[0]
    latents_BCHW = row.latents_BCHW.repeat(8, 1, 1, 1)
    return seconds_of(lambda: decode_latents(version.parts.vae, latents_BCHW), plan.calls, plan.device) / 8


def measure(plan: Plan, compiled: bool, say: Callable[[str], None] = print) -> None:
    """Print the peak, then for each number of rows the step, its share of the peak, and pictures a second."""
    name = torch.cuda.get_device_name() if plan.device == "cuda" else "CPU, tiny model: shows that it runs, no speed"
    parts = make_parts(plan)
    version = Version("large", parts, 256)
    peak, row_operations = matrix_peak(plan), operations_of_a_row(version, plan.size_px)
    decode_s = decode_seconds(version, plan)
    say(
        f"{name}: bf16 matrix product of {plan.matrix_side}: {peak / 1e12:.3g} TFLOP/s; a denoiser row of"
        f" {plan.size_px} px takes {row_operations / 1e9:.4g} GFLOP; decoding (fp32) {1e3 * decode_s:.2f} ms a picture"
    )
    steps_by_rows(version, plan, peak, row_operations, decode_s, say)
    if compiled:
        start = time.perf_counter()
        faster = with_compiled(parts, plan.row_counts, [(plan.size_px, plan.size_px)])
        if faster.compiled is None:
            say("compiled: not measured, compiling failed")
            return
        say(f"compiled with torch.compile in {time.perf_counter() - start:.0f} s:")
        steps_by_rows(Version("compiled", faster, 256), plan, peak, row_operations, decode_s, say)


def steps_by_rows(
    version: Version, plan: Plan, peak: float, row_operations: float, decode_s: float, say: Callable[[str], None]
) -> None:
    for num_rows in plan.row_counts:
        step_s = step_seconds(version, num_rows, plan)
        drawn = num_rows / 2 / (STEPS * step_s)
        share = num_rows * row_operations / step_s / peak
        say(
            f"  {num_rows:3d} rows: {1e3 * step_s:8.2f} ms a step, {share:6.1%} of the peak; {drawn:.3g} guided"
            f" pictures/s of {STEPS} steps, {1 / (1 / drawn + decode_s):.3g} with decoding"
        )
