"""Make a base from nothing on the built-in pictures: autoencoder, tokenizer, CLIP, and an untrained denoiser.

`fresco pretrain` makes what `fresco train` then trains (docs/base-model.md has both commands and what they measured).
It is how the embedded base was made; users who have a diffusers directory never need it.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from components.errors import InputError
from components.models import Parts, save_parts
from flows.config import Config
from flows.console import live, say, step

if TYPE_CHECKING:
    from components.autoencoder import AutoencoderPlan

WORLDS = ("base", "drifted", "collage", "collage")
"""What the autoencoder sees in turn: half free collages, so that it can show pictures it was not made for."""
DECODER_WORLDS = ("base", "drifted", "base", "collage")
"""What the decoder sees in turn while it is sharpened, with the encoder as it is."""
MODULES = ("text_encoder", "denoiser", "vae")
VOCABULARY = 1400
MAX_TOKENS = 32


@dataclass(frozen=True)
class PretrainPlan:
    """How long each part trains."""

    autoencoder_steps: int = 5000
    decoder_steps: int = 4000
    autoencoder_batch: int = 8
    clip_steps: int = 1500
    clip_batch: int = 64


def run(config: Config, out: Path, plan: PretrainPlan | None = None) -> dict[str, Any]:
    """Write `out`/pipeline and `out`/clip; parts that are there already are kept."""
    plan = plan or PretrainPlan()
    out = Path(out)
    if out.is_file():
        raise InputError(f"--out expected a folder, found the file {str(out)!r}")
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = _make_tokenizer()
    vae, l1 = _autoencoder(config, out, plan)
    step("writing the pipeline with an untrained denoiser")
    parts = make_untrained(tokenizer, vae, config.train.seed)
    save_parts(parts, out / "pipeline")
    counts = {name: sum(p.numel() for p in getattr(parts, name).parameters()) for name in MODULES}
    say(f"parameters: {counts}")
    clip_accuracy = _clip(out, tokenizer, plan)
    return {
        "pipeline": str(out / "pipeline"),
        "clip": str(out / "clip"),
        "reconstruction_l1": l1,
        "clip_accuracy": clip_accuracy,
        "parameters": counts,
    }


def _make_tokenizer() -> Any:
    from components.emblems import caption_of, emblem_at, rng_at
    from components.models import ASSETS
    from components.tokenizer import make_clip_tokenizer

    # Common English words become one token each, so that a fine-tune on other captions need not spell them.
    words = (ASSETS / "words.txt").read_text().split()
    captions = [caption_of(emblem_at(world, 3, i), rng_at(3, i)) for world in ("base", "drifted") for i in range(2000)]
    return make_clip_tokenizer([*captions, *words * 20], VOCABULARY, MAX_TOKENS)


def pictures_at(worlds: tuple[str, ...], seed: int, start: int, count: int, size_px: int) -> tuple[Tensor, list[str]]:
    """Return `count` drawn pictures as pixels_BCHW in [-1, 1] with their captions, worlds in turn."""
    from components.emblems import example

    pairs = [
        example(world, seed, index, size_px)
        for index, world in zip(range(start, start + count), itertools.cycle(worlds), strict=False)
    ]
    pixels = np.stack([np.asarray(picture, dtype=np.float32) for picture, _ in pairs])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1, [caption for _, caption in pairs]


def _autoencoder(config: Config, out: Path, plan: PretrainPlan) -> tuple[Any, float]:
    """Train the whole autoencoder, then its decoder alone for sharper pictures; each stage is kept when it is there."""
    from components.autoencoder import AutoencoderPlan, make_autoencoder, set_latent_scale

    size_px, batch = config.data.resolution_px, plan.autoencoder_batch
    vae = _stage(
        out / "autoencoder",
        lambda: make_autoencoder(config.train.seed, size_px),
        AutoencoderPlan(plan.autoencoder_steps, batch),
        lambda index: pictures_at(WORLDS, 0, index * batch, batch, size_px)[0],
        lambda made: set_latent_scale(made, pictures_at(("base",), 1, 0, 256, size_px)[0]),
    )
    vae = _stage(
        out / "decoder",
        lambda: vae,
        AutoencoderPlan(plan.decoder_steps, batch, learning_rate=1e-3, decoder_only=True),
        lambda index: pictures_at(DECODER_WORLDS, 4, index * batch, batch, size_px)[0],
        lambda made: None,
    )
    l1 = _reconstruction_l1(vae, pictures_at(WORLDS, 1, 0, 128, size_px)[0])
    say(f"held-out reconstruction: mean absolute error {l1:.4f} of 2.0; latent scale {vae.config.scaling_factor:.3f}")
    return vae, l1


def _stage(
    folder: Path,
    make: Callable[[], Any],
    plan: "AutoencoderPlan",
    batch_at: Callable[[int], Tensor],
    finish: Callable[[Any], Any],
) -> Any:
    """Return the autoencoder in `folder`, or train it and save it there."""
    from diffusers import AutoencoderKL

    from components.autoencoder import train_autoencoder

    if (folder / "config.json").exists():
        say(f"{folder.name}: found in {folder}, kept")
        kept: Any = AutoencoderKL.from_pretrained(folder)
        return kept.eval().requires_grad_(False)
    step(f"{folder.name}: {plan.steps} steps of {plan.batch} pictures, drawn as they are needed")

    def on_step(index: int, loss: float) -> None:
        live(f"{folder.name} step {index + 1}/{plan.steps} l1 {loss:.4f}")
        if index % 250 == 249:
            say(f"{folder.name} step {index + 1}/{plan.steps} l1 {loss:.4f}")

    vae = make()
    train_autoencoder(vae, batch_at, plan, on_step)
    finish(vae)
    vae.save_pretrained(folder)
    return vae


@torch.no_grad()
def _reconstruction_l1(vae: Any, pixels_BCHW: Tensor) -> float:
    from components.models import decode_latents, encode_images

    mean_BCHW, _ = encode_images(vae, pixels_BCHW)
    return float((decode_latents(vae, mean_BCHW).clamp(-1, 1) - pixels_BCHW).abs().mean())


def _clip(out: Path, tokenizer: Any, plan: PretrainPlan) -> float:
    from components.contrastive import pretrain_clip, sibling_pairs

    folder = out / "clip"
    if (folder / "config.json").exists():
        say(f"CLIP: found in {folder}, kept")
        return float("nan")
    step(f"CLIP: {plan.clip_steps} steps of {plan.clip_batch} picture-caption pairs")

    def pairs_at(index: int) -> tuple[Tensor, list[str]]:
        return sibling_pairs(("base", "drifted"), 2, index, plan.clip_batch, 64)

    return pretrain_clip(tokenizer, pairs_at, plan.clip_steps, folder, say)


def make_untrained(tokenizer: Any, vae: Any, seed: int) -> Parts:
    """Make the embedded base's architecture around a trained autoencoder: CLIP text encoder + UNet, v prediction."""
    from diffusers import DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=128,
                intermediate_size=384,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=MAX_TOKENS,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        unet: Any = UNet2DConditionModel(
            sample_size=8,
            in_channels=vae.config.latent_channels,
            out_channels=vae.config.latent_channels,
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            block_out_channels=(56, 88),
            layers_per_block=1,
            cross_attention_dim=128,
            attention_head_dim=8,
            norm_num_groups=8,
        )
    scheduler = DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        steps_offset=1,
        clip_sample=False,
    )
    unet.eval().requires_grad_(False)
    text_encoder.eval().requires_grad_(False)
    return Parts("stable_diffusion", "v_prediction", tokenizer, text_encoder, unet, vae, scheduler)


def package(config: Config, model: str, out: str) -> dict[str, Any]:
    """Copy a model as a diffusers folder whose weights are stored in fp16; readers get fp32 again. Never overwrites."""
    from components.models import load_parts, model_fingerprint
    from flows.models import resolve_model

    target = Path(out)
    if target.exists():
        raise InputError(f"--out expected a new folder, found {out!r} there already; choose another name")
    found = resolve_model(config, model)
    save_parts(load_parts(found.directory), target, dtype=torch.float16)
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    say(f"{target}: {size / 1e6:.2f} MB, fingerprint {model_fingerprint(target)}")
    return {"pipeline": str(target), "bytes": size, "fingerprint": model_fingerprint(target)}
