"""Families: the same functions in each file, and what each says about its architecture."""

import inspect

import pytest
import torch
from torch import Tensor

from components.families import FAMILIES, stable_diffusion, z_image
from components.models import Parts, TextStates, encode_text, make_tiny

FUNCTIONS = (
    "load",
    "make_tiny",
    "make_pipeline",
    "tokenize",
    "encode_ids",
    "call_denoiser",
    "guide",
    "uses_guidance",
    "text_layers",
    "text_final_norm",
    "unused_text_prefixes",
    "save_lora",
    "step_table",
)
CAPTIONS = ["a red circle", "a blue square in the rain, painted"]


@pytest.fixture(params=list(FAMILIES))
def parts(request: pytest.FixtureRequest) -> Parts:
    return make_tiny(request.param)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_family_has_the_same_functions_with_the_same_parameters(function: str) -> None:
    signatures = {
        name: list(inspect.signature(getattr(family, function)).parameters) for name, family in FAMILIES.items()
    }
    if function == "make_tiny":
        assert all("captions" in parameters for parameters in signatures.values())
    else:
        assert len({tuple(parameters) for parameters in signatures.values()}) == 1, signatures


def test_families_are_registered_under_their_own_names() -> None:
    assert {name: family.NAME for name, family in FAMILIES.items()} == {name: name for name in FAMILIES}
    pipelines = [pipeline for family in FAMILIES.values() for pipeline in family.PIPELINES]
    assert len(pipelines) == len(set(pipelines))


def test_encoded_text_equals_the_diffusers_pipeline(parts: Parts) -> None:
    family = FAMILIES[parts.family]
    pipeline = family.make_pipeline(parts)
    ours = encode_text(parts, CAPTIONS)
    with torch.no_grad():
        if parts.family == "stable_diffusion":
            theirs = pipeline.encode_prompt(CAPTIONS, "cpu", 1, do_classifier_free_guidance=False)[0]
            assert ours.mask_BL.all()
            torch.testing.assert_close(ours.states_BLD, theirs, rtol=1e-5, atol=1e-6)
        else:
            listed = pipeline.encode_prompt(
                CAPTIONS, device="cpu", do_classifier_free_guidance=False, max_sequence_length=48
            )[0]
            for row, states_LD in enumerate(listed):
                found = ours.states_BLD[row][ours.mask_BL[row]]
                torch.testing.assert_close(found, states_LD, rtol=1e-5, atol=1e-6)


def call(parts: Parts, latents: Tensor, timestep_B: Tensor, text: TextStates) -> Tensor:
    with torch.no_grad():
        prediction: Tensor = FAMILIES[parts.family].call_denoiser(parts.denoiser, latents, timestep_B, text)
    return prediction


def test_denoiser_keeps_the_latents_shape_and_reads_each_row_alone(parts: Parts) -> None:
    latents = torch.randn(2, 4, 4, 8, generator=torch.Generator().manual_seed(0))
    timestep_B = torch.tensor([10.0, 990.0])
    text = encode_text(parts, CAPTIONS)
    together = call(parts, latents, timestep_B, text)
    assert together.shape == latents.shape
    alone = torch.cat([call(parts, latents[[i]], timestep_B[[i]], text.rows([i])) for i in range(2)])
    # Other batch sizes take other kernels.
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    other = call(parts, latents, timestep_B.flip(0), text)
    assert not torch.allclose(together, other, atol=1e-4)


def test_denoiser_of_z_image_ignores_padding_of_the_captions() -> None:
    parts = make_tiny("z_image")
    text = encode_text(parts, CAPTIONS)
    latents = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    timestep_B = torch.tensor([100.0, 500.0])
    changed = TextStates(text.states_BLD.masked_fill(~text.mask_BL.unsqueeze(-1), 7.0), text.mask_BL)
    assert torch.equal(call(parts, latents, timestep_B, text), call(parts, latents, timestep_B, changed))


def test_denoiser_of_z_image_reads_counted_tokens_as_it_reads_the_mask() -> None:
    parts = make_tiny("z_image")
    text = encode_text(parts, CAPTIONS)
    counted = text.counted()
    assert counted.num_tokens == tuple(text.mask_BL.sum(1).tolist())
    assert counted.cat(counted).rows([3, 0]).num_tokens == counted.rows([1, 0]).num_tokens
    latents = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    timestep_B = torch.tensor([100.0, 500.0])
    assert torch.equal(call(parts, latents, timestep_B, text), call(parts, latents, timestep_B, counted))
    scattered = TextStates(text.states_BLD, text.mask_BL.flip(1))
    assert scattered.counted().num_tokens is None, "tokens that do not come first cannot be counted off"


def test_prediction_of_z_image_is_noise_minus_data_at_a_thousand_sigma() -> None:
    parts = make_tiny("z_image")
    text = encode_text(parts, CAPTIONS[:1])
    latents = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        # The network is told how clean the latents are, in [0, 1], and answers data minus noise.
        raw = parts.denoiser([latents[0].unsqueeze(1)], torch.tensor([0.75]), [text.states_BLD[0][text.mask_BL[0]]])
    expected = -raw.sample[0].squeeze(1)
    torch.testing.assert_close(call(parts, latents, torch.tensor([250.0]), text)[0], expected)


def test_guidance_of_each_family_is_its_pipelines() -> None:
    conditional, unconditional = torch.tensor([2.0]), torch.tensor([1.0])
    assert stable_diffusion.guide(conditional, unconditional, torch.tensor(3.0)).tolist() == [4.0]
    assert z_image.guide(conditional, unconditional, torch.tensor(3.0)).tolist() == [5.0]
    assert [stable_diffusion.uses_guidance(scale) for scale in (0.0, 1.0, 1.5)] == [False, False, True]
    assert [z_image.uses_guidance(scale) for scale in (0.0, 1.0, 1.5)] == [False, True, True]


def test_gradients_reach_every_part_of_the_denoiser_and_the_latents(parts: Parts) -> None:
    """A parameter that a forward pass leaves out would stop data-parallel training."""
    parts.denoiser.requires_grad_(True)
    latents = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    text = encode_text(parts, CAPTIONS)
    prediction = FAMILIES[parts.family].call_denoiser(parts.denoiser, latents, torch.tensor([100.0, 900.0]), text)
    prediction.square().mean().backward()
    assert latents.grad is not None and latents.grad.abs().sum() > 0
    assert [name for name, parameter in parts.denoiser.named_parameters() if parameter.grad is None] == []


def test_captions_of_any_length_are_tokenized_to_one_length(parts: Parts) -> None:
    ids_BL, mask_BL = FAMILIES[parts.family].tokenize(parts.tokenizer, ["", "word " * 200])
    assert ids_BL.shape == mask_BL.shape == (2, parts.tokenizer.model_max_length)
    assert mask_BL.dtype == torch.bool and mask_BL[1].all()
