"""Named plans: exactly which parameters train, in which group, and adapters that survive their export."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from torch import nn

from components.errors import InputError
from components.freezing import TrainedModel, apply_plan, export, parameter_groups, trainable
from components.models import Parts, TextStates, encode_text, family_named, load_parts, make_tiny, model_fingerprint
from components.recipe import TrainSection, check_plan_name, trains_text
from components.sampler import PictureRequest, draw

FAMILIES = ("stable_diffusion", "z_image")
LAST_LAYER = {"stable_diffusion": "encoder.layers.1.", "z_image": "layers.1."}


@pytest.fixture(params=FAMILIES)
def parts(request: pytest.FixtureRequest) -> Parts:
    return make_tiny(request.param)


def trained_names(parts: Parts, plan: str) -> tuple[TrainedModel, set[str]]:
    model = apply_plan(parts, plan, seed=0)
    return model, {name for name, _ in trainable(model)}


def names_of(module: nn.Module, prefix: str) -> set[str]:
    return {f"{prefix}.{name}" for name, _ in module.named_parameters()}


def reaching(parts: Parts) -> set[str]:
    """Names of the text encoder's parameters with a gradient when only its states are looked at."""
    parts.text_encoder.requires_grad_(True)
    family = family_named(parts.family)
    ids_BL, mask_BL = family.tokenize(parts.tokenizer, ["a red circle", "a blue square"])
    family.encode_ids(parts.text_encoder, ids_BL, mask_BL)[mask_BL].square().sum().backward()
    found = {f"text_encoder.{n}" for n, p in parts.text_encoder.named_parameters() if p.grad is not None}
    parts.text_encoder.zero_grad(set_to_none=True)
    return found


def test_plan_denoiser_trains_all_of_the_denoiser_and_keeps_the_text_encoder_out(parts: Parts) -> None:
    model, names = trained_names(parts, "denoiser")
    assert names == names_of(parts.denoiser, "denoiser")
    assert model.text_encoder is None
    assert not any(p.requires_grad for p in parts.text_encoder.parameters())


def test_plan_denoiser_attention_trains_the_attention_blocks_alone(parts: Parts) -> None:
    model, names = trained_names(parts, "denoiser_attention")
    kinds = {"stable_diffusion": (".attn1.", ".attn2."), "z_image": (".attention.",)}[parts.family]
    assert names == {n for n in names_of(parts.denoiser, "denoiser") if any(kind in n for kind in kinds)}
    assert names and names != names_of(parts.denoiser, "denoiser")
    assert model.text_encoder is None


def test_plan_text_encoder_trains_exactly_what_reaches_the_denoiser(parts: Parts) -> None:
    expected = reaching(parts)
    model, names = trained_names(parts, "text_encoder")
    assert names == expected
    assert model.text_encoder is parts.text_encoder


def test_plan_all_trains_both(parts: Parts) -> None:
    expected = reaching(parts) | names_of(parts.denoiser, "denoiser")
    assert trained_names(parts, "all")[1] == expected


def test_plan_text_encoder_top_trains_the_last_layers_that_reach_the_denoiser(parts: Parts) -> None:
    expected = reaching(parts)
    _, names = trained_names(parts, "text_encoder_top:1")
    last = LAST_LAYER[parts.family]
    assert names == {n for n in expected if n.startswith((f"text_encoder.{last}", "text_encoder.final_layer_norm"))}
    assert any(last in name for name in names)
    _, both = trained_names(parts, "text_encoder_top:2")
    assert names < both < expected


def test_plan_text_encoder_top_deeper_than_the_encoder_is_refused_with_its_depth(parts: Parts) -> None:
    with pytest.raises(InputError, match=r"text_encoder_top:3 expected at most 2 layers.*text_encoder_top:2"):
        apply_plan(parts, "text_encoder_top:3", seed=0)


def test_plan_lora_trains_adapters_alone_and_changes_nothing_yet(parts: Parts) -> None:
    before = draw(parts, [PictureRequest("a red circle", steps=2, width_px=16, height_px=16)])[0]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    model, names = trained_names(parts, "lora:2")
    assert torch.equal(torch.get_rng_state(), state)
    assert names and all(".lora_A." in name or ".lora_B." in name for name in names)
    assert all(2 in parameter.shape for _, parameter in trainable(model))
    after = draw(parts, [PictureRequest("a red circle", steps=2, width_px=16, height_px=16)])[0]
    assert np.array_equal(np.asarray(before), np.asarray(after))


def test_plan_lora_draws_its_adapters_from_the_seed() -> None:
    def first_adapter(seed: int) -> torch.Tensor:
        model = apply_plan(make_tiny("stable_diffusion"), "lora:2", seed)
        return next(parameter for name, parameter in trainable(model) if ".lora_A." in name)

    assert torch.equal(first_adapter(1), first_adapter(1))
    assert not torch.equal(first_adapter(1), first_adapter(2))


def test_applying_a_second_plan_forgets_the_first(parts: Parts) -> None:
    apply_plan(parts, "all", seed=0)
    _, names = trained_names(parts, "denoiser_attention")
    assert not any(p.requires_grad for p in parts.text_encoder.parameters())
    assert names != names_of(parts.denoiser, "denoiser")


@pytest.mark.parametrize(
    "plan", ["everything", "denoiser:2", "lora", "lora:0", "lora:-1", "lora:x", "text_encoder_top", ""]
)
def test_unknown_plans_are_errors_that_list_the_known_ones(plan: str) -> None:
    with pytest.raises(ValueError, match=r"denoiser, denoiser_attention, .*lora:R"):
        TrainSection(freezing=plan)


def test_check_plan_name_splits_name_and_number() -> None:
    assert [check_plan_name(plan) for plan in ("all", "lora:16", "text_encoder_top:2")] == [
        ("all", None),
        ("lora", 16),
        ("text_encoder_top", 2),
    ]


@pytest.mark.parametrize(
    ("plan", "expected"),
    [
        ("denoiser", False),
        ("denoiser_attention", False),
        ("lora:4", False),
        ("text_encoder", True),
        ("text_encoder_top:1", True),
        ("all", True),
    ],
)
def test_trains_text_says_which_plans_may_not_read_cached_states(plan: str, expected: bool) -> None:
    assert trains_text(plan) is expected


def test_groups_cover_what_trains_once_and_decay_spares_norms_biases_and_embeddings(parts: Parts) -> None:
    model = apply_plan(parts, "all", seed=0)
    groups = parameter_groups(model)
    listed = [name for group in groups for name in group.names]
    assert sorted(listed) == sorted(name for name, _ in trainable(model))
    assert {(group.component, group.decayed) for group in groups} == {
        (component, decayed) for component in ("denoiser", "text_encoder") for decayed in (True, False)
    }
    for group in groups:
        for name in group.names:
            owner, _, leaf = name.rpartition(".")
            kind = type(model.get_submodule(owner)).__name__
            assert name.startswith(group.component + ".")
            # Z-Image's learned pad tokens, vectors of shape 1 x D, belong to no layer.
            spared = leaf == "bias" or "Norm" in kind or kind == "Embedding" or owner == "denoiser"
            assert group.decayed is not spared, (name, kind)


def test_groups_of_a_denoiser_plan_have_no_text_encoder_group(parts: Parts) -> None:
    assert {group.component for group in parameter_groups(apply_plan(parts, "denoiser", 0))} == {"denoiser"}


def test_wrapper_gives_the_same_prediction_from_token_ids_and_from_states(parts: Parts) -> None:
    family = family_named(parts.family)
    captions = ["a red circle", "a blue square"]
    ids_BL, mask_BL = family.tokenize(parts.tokenizer, captions)
    latents = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    timestep_B = torch.tensor([100.0, 900.0])
    text = encode_text(parts, captions)
    with torch.no_grad():
        live = apply_plan(parts, "all", 0)(latents, timestep_B, ids_BL, mask_BL)
        cached = apply_plan(parts, "denoiser", 0)(latents, timestep_B, text.states_BLD, text.mask_BL)
    assert torch.equal(live, cached)


def test_export_writes_trained_weights_by_name_and_keeps_the_rest(parts: Parts, tmp_path: Path) -> None:
    base = make_tiny(parts.family)
    model = apply_plan(parts, "denoiser_attention", 0)
    with torch.no_grad():
        for _, parameter in trainable(model):
            parameter.add_(0.1)
    weights = [(name, parameter.detach()) for name, parameter in trainable(model)]
    export(base, iter(weights), "denoiser_attention", tmp_path / "pipeline")
    loaded = load_parts(tmp_path / "pipeline")
    for kind in ("denoiser", "text_encoder", "vae"):
        found = dict(getattr(loaded, kind).named_parameters())
        for name, parameter in getattr(parts, kind).named_parameters():
            assert torch.equal(found[name], parameter), (kind, name)


def predictions(parts: Parts, text: TextStates) -> torch.Tensor:
    latents = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found: torch.Tensor = family_named(parts.family).call_denoiser(
            parts.denoiser, latents, torch.tensor([100.0, 900.0]), text
        )
    return found


def test_lora_export_merged_equals_the_adapters_and_lora_loads_with_diffusers(parts: Parts, tmp_path: Path) -> None:
    text = encode_text(parts, ["a red circle", "a blue square"])
    untrained = predictions(parts, text)
    model = apply_plan(parts, "lora:2", seed=3)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in trainable(model):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    adapted = predictions(parts, text)
    assert (adapted - untrained).abs().max() > 1e-3
    weights = [(name, parameter.detach().clone()) for name, parameter in trainable(model)]
    export(make_tiny(parts.family), iter(weights), "lora:2", tmp_path / "pipeline")

    merged = load_parts(tmp_path / "pipeline")
    # W x + B A x against (W + B A) x: fp32 rounding.
    torch.testing.assert_close(predictions(merged, text), adapted, rtol=1e-4, atol=1e-5)
    assert not [name for name, _ in merged.denoiser.named_parameters() if "lora" in name]

    base: Any = family_named(parts.family).make_pipeline(make_tiny(parts.family))
    base.load_lora_weights(str(tmp_path / "pipeline" / "lora"))
    denoiser = base.transformer if parts.family == "z_image" else base.unet
    torch.testing.assert_close(
        predictions(parts.with_modules(denoiser=denoiser.eval()), text), adapted, rtol=1e-4, atol=1e-5
    )
    opened = DiffusionPipeline.from_pretrained(tmp_path / "pipeline", local_files_only=True)
    assert type(opened) is type(base)
    assert len(model_fingerprint(tmp_path / "pipeline")) == 12
