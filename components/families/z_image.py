"""Z-Image: Qwen3 language model as text encoder + single-stream transformer + KL autoencoder; flow matching.

What `diffusers.ZImagePipeline` does, as functions. Two signs differ from its transformer and are turned here, once:
the network is told 1 - sigma and returns data minus noise; Fresco's timestep is 1000 * sigma and the prediction is
noise minus data (Lipman et al. 2023; Esser et al. 2024).

Shape letters: B batch, C channels, H, W latent height and width, L tokens, D width.
"""

from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from components.models import Parts, TextStates
from components.solvers import StepTable, flow_table

NAME = "z_image"
PIPELINES = ("ZImagePipeline",)
DENOISER_FOLDER = "transformer"
PATCH_CELLS = 2
"""Side of what the denoiser takes as one, in latent cells: pictures are whole patches wide."""
ATTENTION_MODULES = ("attention",)
"""Module names whose parameters the plan `denoiser_attention` trains."""
LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
MAX_TOKENS = 512
"""Longest prompt, template included, of the diffusers pipeline; a smaller tokenizer limit wins."""


def load(directory: Path, wanted: Collection[str], dtype: torch.dtype) -> Parts:
    """Load the wanted parts; OSError or ValueError when the directory is incomplete."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImageTransformer2DModel
    from transformers import AutoModel, AutoTokenizer

    options: dict[str, Any] = {"torch_dtype": dtype, "use_safetensors": True, "local_files_only": True}
    return Parts(
        family=NAME,
        prediction="flow",
        scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(directory / "scheduler"),
        tokenizer=AutoTokenizer.from_pretrained(directory / "tokenizer") if "tokenizer" in wanted else None,
        text_encoder=AutoModel.from_pretrained(directory / "text_encoder", dtype=dtype, use_safetensors=True)
        if "text_encoder" in wanted
        else None,
        denoiser=ZImageTransformer2DModel.from_pretrained(directory / "transformer", **options)
        if "denoiser" in wanted
        else None,
        vae=AutoencoderKL.from_pretrained(directory / "vae", **options) if "vae" in wanted else None,
    )


def make_tiny(captions: Collection[str] = ("a red circle", "a blue square")) -> Parts:
    """Make the real classes at width 16 to 32 with random weights; 16 px pictures have 4x4 latents."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImageTransformer2DModel
    from transformers import Qwen3Config, Qwen3Model

    from components.tokenizer import make_qwen_tokenizer

    tokenizer = make_qwen_tokenizer(captions, vocab_size=400, max_tokens=48)
    text_encoder = Qwen3Model(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            max_position_embeddings=64,
        )
    )
    transformer: Any = ZImageTransformer2DModel(
        all_patch_size=(2,),
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[4, 6, 6],
        axes_lens=[128, 32, 32],
    )
    # The transformer's pad tokens are allocated without values; a random model must give them some.
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if name.endswith("pad_token"):
                parameter.normal_(std=0.02)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=16,
        shift_factor=0.1,
        scaling_factor=0.4,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return Parts(NAME, "flow", tokenizer, text_encoder, transformer, vae, scheduler)


def make_pipeline(parts: Parts) -> Any:
    """Wrap the parts in the diffusers pipeline."""
    from diffusers import ZImagePipeline

    return ZImagePipeline(
        scheduler=parts.scheduler,
        vae=parts.vae,
        text_encoder=parts.text_encoder,
        tokenizer=parts.tokenizer,
        transformer=parts.denoiser,
    )


def tokenize(tokenizer: Any, captions: list[str]) -> tuple[Tensor, Tensor]:
    """Return ids_BL of the chat-templated captions and the mask of their real tokens."""
    templated = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": caption}], tokenize=False, add_generation_prompt=True, enable_thinking=True
        )
        for caption in captions
    ]
    batch = tokenizer(
        templated,
        padding="max_length",
        max_length=min(MAX_TOKENS, tokenizer.model_max_length),
        truncation=True,
        return_tensors="pt",
    )
    return batch.input_ids, batch.attention_mask.bool()


def encode_ids(text_encoder: Any, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
    """Return the last layer but one's states_BLD; differentiable, so that training can go through it."""
    outputs = text_encoder(input_ids=ids_BL, attention_mask=mask_BL, output_hidden_states=True)
    states_BLD: Tensor = outputs.hidden_states[-2]
    return states_BLD


def call_denoiser(denoiser: Any, latents_BCHW: Tensor, timestep_B: Tensor, text: TextStates) -> Tensor:
    """Return noise minus data, same shape as the latents. `timestep_B` is 1000 * sigma."""
    if text.num_tokens is None:
        captions = [states_LD[mask_L] for states_LD, mask_L in zip(text.states_BLD, text.mask_BL, strict=True)]
    else:
        # The same without asking the device how many tokens count.
        captions = [states_LD[:length] for states_LD, length in zip(text.states_BLD, text.num_tokens, strict=True)]
    frames = list(latents_BCHW.unsqueeze(2).unbind(0))
    velocity = denoiser(frames, (1000 - timestep_B) / 1000, captions, return_dict=False)[0]
    return -torch.stack([frame.squeeze(1) for frame in velocity])


def compile_denoiser(denoiser: Any, **options: Any) -> None:
    """Compile the denoiser's blocks in place, with the options of `torch.compile`.

    The blocks alone: around them every caption has its own length, and code would be made for each set of lengths.
    """
    for block in (*denoiser.noise_refiner, *denoiser.context_refiner, *denoiser.layers):
        block.forward = partial(_call_packed, torch.compile(block.forward, **options))


def _call_packed(forward: Any, x_BLD: Tensor, mask_BL: Any, freqs_BLD: Tensor, *more: Any) -> Any:
    """Call a compiled block with its rotary frequencies packed.

    They come as the head of a tensor whose length depends on the longest caption, and strides are part of a shape.
    """
    return forward(x_BLD, mask_BL, freqs_BLD.reshape(-1).view(freqs_BLD.shape), *more)


def guide(conditional: Tensor, unconditional: Tensor, scale_B111: Tensor) -> Tensor:
    return conditional + scale_B111 * (conditional - unconditional)


def uses_guidance(scale: float) -> bool:
    return scale > 0.0


def text_layers(text_encoder: Any) -> Any:
    """The transformer layers whose output reaches the denoiser: it reads the states before the last one."""
    return text_encoder.layers[:-1]


def text_final_norm(text_encoder: Any) -> None:
    """Nothing: the states are read before the final norm."""


def unused_text_prefixes(text_encoder: Any) -> tuple[str, ...]:
    """Names of text encoder parameters that do not reach the denoiser: the last layer and what follows it."""
    return f"layers.{len(text_encoder.layers) - 1}.", "norm."


def save_lora(directory: Path, layers: dict[str, Tensor]) -> None:
    """Write denoiser adapters in the format of `ZImagePipeline.load_lora_weights`."""
    from diffusers import ZImagePipeline

    ZImagePipeline.save_lora_weights(str(directory), transformer_lora_layers=layers)


def step_table(parts: Parts, steps: int, latent_cells: int, solver: str | None = None, start: int = 0) -> StepTable:
    """Return the solver's table: euler (default) or dpm++2m. `start` leaves out the first steps.

    `latent_cells` is height x width of the latents: the sigma shift grows with the picture where the scheduler asks
    for it (Esser et al. 2024, section 5.3.2).
    """
    scheduler = type(parts.scheduler).from_config(parts.scheduler.config)
    config = scheduler.config
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    slope = (config.get("max_shift", 1.15) - config.get("base_shift", 0.5)) / (high - low)
    tokens = latent_cells // 4
    mu = config.get("base_shift", 0.5) + slope * (tokens - low)
    scheduler.set_timesteps(sigmas=torch.linspace(1.0, 1 / steps, steps).tolist(), mu=mu)
    return flow_table(scheduler.sigmas, solver, start)
