"""Stable Diffusion 1 and 2: CLIP text encoder + UNet + KL autoencoder; epsilon or v prediction.

What `diffusers.StableDiffusionPipeline` does, as functions: the same tokens, the same timesteps, the same guidance
(Ho & Salimans 2022), so that both draw the same picture for the same seed. Samplers other than DDIM that a directory
may name are replaced by DDIM with the same noise schedule.

Shape letters: B batch, C channels, H, W latent height and width, L tokens, D width.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from components.models import Parts, TextStates
from components.solvers import StepTable, diffusion_table

NAME = "stable_diffusion"
PIPELINES = ("StableDiffusionPipeline",)
DENOISER_FOLDER = "unet"
PATCH_CELLS = 1
"""Side of what the denoiser takes as one, in latent cells: pictures are whole patches wide."""
ATTENTION_MODULES = ("attn1", "attn2")
"""Module names whose parameters the plan `denoiser_attention` trains."""
LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def load(directory: Path, wanted: Collection[str], dtype: torch.dtype) -> Parts:
    """Load the wanted parts; OSError or ValueError when the directory is incomplete."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    options: dict[str, Any] = {"torch_dtype": dtype, "use_safetensors": True, "local_files_only": True}
    scheduler = _load_scheduler(directory)
    return Parts(
        family=NAME,
        prediction=scheduler.config.prediction_type,
        scheduler=scheduler,
        tokenizer=CLIPTokenizer.from_pretrained(directory / "tokenizer") if "tokenizer" in wanted else None,
        text_encoder=CLIPTextModel.from_pretrained(directory / "text_encoder", dtype=dtype, use_safetensors=True)
        if "text_encoder" in wanted
        else None,
        denoiser=UNet2DConditionModel.from_pretrained(directory / "unet", **options) if "denoiser" in wanted else None,
        vae=AutoencoderKL.from_pretrained(directory / "vae", **options) if "vae" in wanted else None,
    )


def _load_scheduler(directory: Path) -> Any:
    from diffusers import DDIMScheduler

    # The updates in `solvers` have no clipping; latents are not bounded to [-1, 1] anyway.
    scheduler = DDIMScheduler.from_pretrained(directory / "scheduler", clip_sample=False)
    prediction = scheduler.config.prediction_type
    if prediction not in ("epsilon", "v_prediction") or scheduler.config.thresholding:
        raise ValueError(
            f"scheduler/scheduler_config.json: expected prediction_type epsilon or v_prediction without thresholding,"
            f" found {prediction!r}"
        )
    return scheduler


def make_tiny(prediction: str = "epsilon", captions: Collection[str] = ("a red circle", "a blue square")) -> Parts:
    """Make the real classes at width 8 to 32 with random weights; 16 px pictures have 4x4 latents."""
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from components.tokenizer import make_clip_tokenizer

    tokenizer = make_clip_tokenizer(captions, vocab_size=600, max_tokens=16)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=16,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=4,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(16, 32),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=16,
    )
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        prediction_type=prediction,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="leading" if prediction == "epsilon" else "trailing",
    )
    return Parts(NAME, prediction, tokenizer, text_encoder, unet, vae, scheduler)


def make_pipeline(parts: Parts) -> Any:
    """Wrap the parts in the diffusers pipeline."""
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline(
        vae=parts.vae,
        text_encoder=parts.text_encoder,
        tokenizer=parts.tokenizer,
        unet=parts.denoiser,
        scheduler=parts.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def tokenize(tokenizer: Any, captions: list[str]) -> tuple[Tensor, Tensor]:
    """Return ids_BL padded to the encoder's full length and a mask that is all true: SD attends to padding too."""
    batch = tokenizer(
        captions, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    )
    return batch.input_ids, torch.ones_like(batch.input_ids, dtype=torch.bool)


def encode_ids(text_encoder: Any, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
    """Return states_BLD; differentiable, so that training can go through it."""
    states_BLD: Tensor = text_encoder(ids_BL)[0]
    return states_BLD


def call_denoiser(denoiser: Any, latents_BCHW: Tensor, timestep_B: Tensor, text: TextStates) -> Tensor:
    """Return the prediction (epsilon or v), same shape as the latents. `timestep_B` in [0, 999]."""
    prediction_BCHW: Tensor = denoiser(
        latents_BCHW, timestep_B, encoder_hidden_states=text.states_BLD, return_dict=False
    )[0]
    return prediction_BCHW


def compile_denoiser(denoiser: Any, **options: Any) -> None:
    """Compile the denoiser in place, with the options of `torch.compile`."""
    denoiser.compile(**options)


def guide(conditional: Tensor, unconditional: Tensor, scale_B111: Tensor) -> Tensor:
    return unconditional + scale_B111 * (conditional - unconditional)


def uses_guidance(scale: float) -> bool:
    return scale > 1.0


def text_layers(text_encoder: Any) -> Any:
    """The transformer layers from input to output, for the plan `text_encoder_top:K`."""
    return (text_encoder.text_model if hasattr(text_encoder, "text_model") else text_encoder).encoder.layers


def text_final_norm(text_encoder: Any) -> Any:
    """The norm after the last layer, which trains with the top layers."""
    return (text_encoder.text_model if hasattr(text_encoder, "text_model") else text_encoder).final_layer_norm


def unused_text_prefixes(text_encoder: Any) -> tuple[str, ...]:
    """Names of text encoder parameters that do not reach the denoiser: none."""
    return ()


def save_lora(directory: Path, layers: dict[str, Tensor]) -> None:
    """Write denoiser adapters in the format of `StableDiffusionPipeline.load_lora_weights`."""
    from diffusers import StableDiffusionPipeline

    StableDiffusionPipeline.save_lora_weights(str(directory), unet_lora_layers=layers)


def step_table(parts: Parts, steps: int, latent_cells: int, solver: str | None = None, start: int = 0) -> StepTable:
    """Return the solver's table: ddim (default), euler or dpm++2m. `start` leaves out the first steps."""
    return diffusion_table(parts.scheduler, parts.prediction, steps, solver, start)
