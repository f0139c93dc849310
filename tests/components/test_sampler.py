"""Pictures against diffusers' own pipelines and schedulers, and rows that do not know their neighbours."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image

from components.families import z_image
from components.models import Parts, encode_text, family_named, make_tiny
from components.sampler import PictureRequest, draw, initial_latents, sample_latents, to_images
from components.solvers import TIMESTEP

MODELS = ("epsilon", "v_prediction", "z_image")
SIDE = {"width_px": 16, "height_px": 16}


def make(kind: str) -> Parts:
    if kind == "z_image":
        return make_tiny("z_image")
    return make_tiny("stable_diffusion", prediction=kind)


@pytest.fixture(scope="module", params=MODELS)
def parts(request: pytest.FixtureRequest) -> Iterator[Parts]:
    yield make(request.param)


def pipeline_picture(parts: Parts, request: PictureRequest) -> Image.Image:
    pipeline = family_named(parts.family).make_pipeline(parts)
    pipeline.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {"max_sequence_length": 48} if parts.family == "z_image" else {}
    picture: Image.Image = pipeline(
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        num_inference_steps=request.steps,
        guidance_scale=request.guidance_scale,
        width=request.width_px,
        height=request.height_px,
        generator=torch.Generator("cpu").manual_seed(request.seed),
        **options,
    ).images[0]
    return picture


def largest_difference(left: Image.Image, right: Image.Image) -> int:
    return int(np.abs(np.asarray(left).astype(int) - np.asarray(right).astype(int)).max())


@pytest.mark.parametrize(
    "request_",
    [
        PictureRequest("a red circle", seed=3, steps=4, guidance_scale=3.0, **SIDE),
        PictureRequest("a blue square", seed=4, steps=7, guidance_scale=2.0, negative_prompt="a red circle", **SIDE),
        PictureRequest("a red circle", seed=5, steps=3, guidance_scale=0.0, **SIDE),
        PictureRequest("a red circle", seed=6, steps=3, guidance_scale=3.0, width_px=32, height_px=16),
    ],
    ids=["guided", "negative prompt", "unguided", "wide"],
)
def test_picture_equals_the_diffusers_pipeline_for_the_same_seed(parts: Parts, request_: PictureRequest) -> None:
    ours = draw(parts, [request_])[0]
    theirs = pipeline_picture(parts, request_)
    assert ours.size == theirs.size == (request_.width_px, request_.height_px)
    # Ours folds each step into two factors: fp32 rounding may tip a value over the edge between two of 256 levels.
    assert largest_difference(ours, theirs) <= 1
    assert np.asarray(ours).std() > 1


def test_picture_does_not_depend_on_its_batch(parts: Parts) -> None:
    requests = [
        PictureRequest("a red circle", seed=0, steps=4, **SIDE),
        PictureRequest("a blue square", seed=1, steps=4, guidance_scale=5.0, **SIDE),
        PictureRequest("a red circle", seed=2, steps=2, **SIDE),
        PictureRequest("a red circle", seed=3, steps=4, width_px=32, height_px=16),
        PictureRequest("a blue square", seed=4, steps=4, guidance_scale=0.0, **SIDE),
        PictureRequest("a blue square", seed=5, steps=4, negative_prompt="a red circle", **SIDE),
    ]
    together = draw(parts, requests)
    for request, picture in zip(requests, together, strict=True):
        # Kernels of other batch sizes move fp32 latents by about 1e-6: one level at an edge.
        assert largest_difference(draw(parts, [request])[0], picture) <= 1


def test_rows_of_latents_agree_alone_and_together_within_rounding(parts: Parts) -> None:
    requests = [PictureRequest("a red circle", seed=seed, steps=4, **SIDE) for seed in range(5)]
    family = family_named(parts.family)

    def run(chosen: list[PictureRequest]) -> torch.Tensor:
        text = encode_text(parts, [request.prompt for request in chosen])
        empty = encode_text(parts, [""] * len(chosen))
        return sample_latents(
            parts, lambda x, t, states: family.call_denoiser(parts.denoiser, x, t, states), chosen, text, empty
        )

    together = run(requests)
    alone = torch.cat([run([request]) for request in requests])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_more_requests_than_a_batch_come_back_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("components.sampler.SAMPLE_BATCH", 2)
    parts = make("epsilon")
    requests = [PictureRequest("a red circle", seed=seed, steps=1 + seed % 2, **SIDE) for seed in range(5)]
    pictures = draw(parts, requests)
    for request, picture in zip(requests, pictures, strict=True):
        assert largest_difference(draw(parts, [request])[0], picture) <= 1
    assert draw(parts, []) == []


def test_sampling_leaves_the_callers_generator_alone(parts: Parts) -> None:
    torch.manual_seed(7)
    state = torch.get_rng_state()
    draw(parts, [PictureRequest("a red circle", steps=2, **SIDE)])
    assert torch.equal(torch.get_rng_state(), state)


def test_initial_latents_are_what_a_cpu_generator_of_the_seed_gives() -> None:
    parts = make("epsilon")
    requests = [PictureRequest("x", seed=seed, width_px=24, height_px=16) for seed in (5, 6)]
    latents = initial_latents(parts, requests)
    assert latents.shape == (2, 4, 4, 6)
    expected = torch.randn((1, 4, 4, 6), generator=torch.Generator().manual_seed(6))
    assert torch.equal(latents[1:], expected)


@pytest.mark.parametrize("options", [{"shift": 3.0}, {"use_dynamic_shifting": True}], ids=["shift", "dynamic"])
def test_step_table_of_flow_has_the_pipelines_noise_levels(options: dict[str, Any]) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(**options)
    table = z_image.step_table(Parts("z_image", "flow", scheduler=scheduler), 8, 64 * 64)
    # The pipeline's own shift for 1024 tokens, where it asks for one.
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / 8, 8), mu=0.63)
    assert table.columns_SK[:, TIMESTEP].tolist() == pytest.approx(scheduler.timesteps.tolist(), rel=1e-4)


def test_to_images_clips_and_rounds_to_the_nearest_level() -> None:
    values = torch.tensor([-3.0, -1.0, 0.0, 1.0, 3.0, 2 * 100.4 / 255 - 1]).view(1, 1, 1, 6).expand(1, 3, 1, 6)
    assert np.asarray(to_images(values)[0])[0, :, 0].tolist() == [0, 0, 128, 255, 255, 100]
