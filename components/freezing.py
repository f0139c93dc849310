"""What trains: named plans that pick parameters, put them into learning-rate groups, and wrap them in one module.

The wrapper holds the denoiser, and the text encoder only when the plan trains it; a frozen text encoder never enters
the engine, its states come from the cache. A plan is fixed for a run: sharded engines cannot unfreeze later.
LoRA: Hu et al. 2022, adapters on the denoiser's attention.

Shape letters: B samples, C channels, H, W latent height and width, L tokens, D width.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from components.errors import InputError
from components.models import Parts, TextStates, family_named
from components.recipe import check_plan_name, trains_text


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a learning rate and a weight decay."""

    component: str
    """denoiser or text_encoder: which learning rate of the recipe applies."""
    decayed: bool
    names: tuple[str, ...]
    """Names in the wrapper module."""


class TrainedModel(nn.Module):
    """Exactly what the engine shards: the denoiser, and the text encoder when the plan trains it."""

    def __init__(self, family: str, denoiser: nn.Module, text_encoder: nn.Module | None) -> None:
        super().__init__()
        self.family = family
        self.denoiser = denoiser
        self.text_encoder = text_encoder

    def forward(self, latents_BCHW: Tensor, timestep_B: Tensor, text_BL: Tensor, mask_BL: Tensor) -> Tensor:
        """Return the prediction. `text_BL` holds token ids when the text encoder is inside, else states_BLD."""
        family = family_named(self.family)
        states_BLD = text_BL
        if self.text_encoder is not None:
            states_BLD = family.encode_ids(self.text_encoder, text_BL, mask_BL)
        prediction_BCHW: Tensor = family.call_denoiser(
            self.denoiser, latents_BCHW, timestep_B, TextStates(states_BLD, mask_BL)
        )
        return prediction_BCHW


def apply_plan(parts: Parts, plan: str, seed: int) -> TrainedModel:
    """Set requires_grad of `parts` (in place, adding adapters for lora:R) and return the wrapper."""
    name, number = check_plan_name(plan)
    family = family_named(parts.family)
    for module in (parts.denoiser, parts.text_encoder):
        if module is not None:
            module.requires_grad_(False)
    if name in ("denoiser", "all"):
        parts.denoiser.requires_grad_(True)
    if name == "denoiser_attention":
        for path, parameter in parts.denoiser.named_parameters():
            parameter.requires_grad_(any(part in family.ATTENTION_MODULES for part in path.split(".")))
    if name in ("text_encoder", "all"):
        unused = family.unused_text_prefixes(parts.text_encoder)
        for path, parameter in parts.text_encoder.named_parameters():
            parameter.requires_grad_(not path.startswith(unused))
    if name == "text_encoder_top":
        _unfreeze_top(parts, number or 0)
    if name == "lora":
        _add_adapters(parts, number or 0, seed)
    return TrainedModel(parts.family, parts.denoiser, parts.text_encoder if trains_text(plan) else None)


def _unfreeze_top(parts: Parts, count: int) -> None:
    family = family_named(parts.family)
    layers = list(family.text_layers(parts.text_encoder))
    if count > len(layers):
        raise InputError(
            f"train.freezing=text_encoder_top:{count} expected at most {len(layers)} layers, the depth of this text"
            f" encoder; use text_encoder_top:{len(layers)} or text_encoder"
        )
    for module in (*layers[len(layers) - count :], family.text_final_norm(parts.text_encoder)):
        if module is not None:
            module.requires_grad_(True)


def _add_adapters(parts: Parts, rank: int, seed: int) -> None:
    from peft import LoraConfig

    targets = family_named(parts.family).LORA_TARGETS
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, init_lora_weights="gaussian")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts.denoiser.add_adapter(config)


def parameter_groups(model: nn.Module) -> list[ParameterGroup]:
    """Group what trains by component and by whether weight decay applies; empty groups are left out."""
    kinds: dict[tuple[str, bool], list[str]] = {}
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for name, parameter in trainable(model):
        # Vectors (biases, norms, padding tokens stored as (1, D)) and embeddings are not pulled to zero.
        decayed = sum(size > 1 for size in parameter.shape) >= 2 and id(parameter) not in embeddings
        kinds.setdefault((name.split(".")[0], decayed), []).append(name)
    return [ParameterGroup(component, decayed, tuple(names)) for (component, decayed), names in sorted(kinds.items())]


def trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield (name, parameter) of everything that trains, in the module's order."""
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def export(parts: Parts, weights: Iterator[tuple[str, Tensor]], plan: str, directory: Path) -> None:
    """Put trained weights (by wrapper name) into fresh `parts` and write the diffusers directory.

    For lora:R the directory holds the merged weights and, beside the pipeline, `lora/` in diffusers' LoRA format.
    """
    from components.models import save_parts

    name, number = check_plan_name(plan)
    if name == "lora":
        _add_adapters(parts, number or 0, seed=0)
    targets = dict(TrainedModel(parts.family, parts.denoiser, parts.text_encoder).named_parameters())
    with torch.no_grad():
        for path, weight in weights:
            targets[path].copy_(weight)
    if name == "lora":
        parts = _merged(parts, directory)
    save_parts(parts, directory)


def _merged(parts: Parts, directory: Path) -> Parts:
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import get_peft_model_state_dict

    denoiser: Any = parts.denoiser
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(denoiser))
    family_named(parts.family).save_lora(directory / "lora", {key: value.clone() for key, value in layers.items()})
    denoiser.fuse_lora()
    denoiser.unload_lora()
    return replace(parts, denoiser=denoiser)
