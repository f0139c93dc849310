"""Rows stacked: joins keep each row, buckets fix the shapes, image to image and repair equal diffusers'."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline
from torch import Tensor

from components.draw_requests import DrawRequest, StartPicture
from components.errors import InputError
from components.models import Parts, TextStates, family_named, make_tiny
from components.row_batch import RowBatch, fitting_bucket, join, make_plan, step_rows
from components.sampler import PictureRequest
from components.side_by_side import SideBySide
from components.versions import Version

SIDE = {"width_px": 16, "height_px": 16}


@pytest.fixture(scope="module", params=["stable_diffusion", "z_image"])
def version(request: pytest.FixtureRequest) -> Version:
    return Version("v1", make_tiny(request.param), max_prompts=8)


def rows_of(version: Version, *rows: PictureRequest, **options: Any) -> list[RowBatch]:
    return version.prepare(DrawRequest("r", rows, **options))


def run(version: Version, batch: RowBatch, steps: int, buckets: tuple[int, ...] = ()) -> RowBatch:
    plan = make_plan(batch, buckets)
    with torch.inference_mode():
        for _ in range(steps):
            batch = step_rows(batch, plan, version.predict, version.family.guide)
    return batch


def test_parts_of_a_call_side_by_side_are_the_whole_call(version: Version) -> None:
    scales = [0.0, 3.0, 7.0] * 7
    rows = [PictureRequest("a red circle", seed, 3 + seed % 4, scale, **SIDE) for seed, scale in enumerate(scales)]
    batch = join(rows_of(version, *rows))
    calls = SideBySide(3)
    plan = make_plan(batch, parts=calls.parts)
    sizes = [len(call.text.mask_BL) for call in plan.calls]
    assert len(sizes) == 3 and sum(sizes) == batch.call_rows and max(sizes) - min(sizes) <= 1
    with torch.inference_mode():
        whole = step_rows(batch, make_plan(batch), version.predict, version.family.guide)
        cut = step_rows(batch, plan, version.predict, version.family.guide, calls)
    calls.close()
    torch.testing.assert_close(cut.latents_BCHW, whole.latents_BCHW, atol=1e-4, rtol=1e-4)
    assert len({tuple(row.flatten().tolist()) for row in cut.latents_BCHW}) == len(rows), "every row is its own"


def tensors(batch: RowBatch) -> list[Tensor]:
    found = [batch.latents_BCHW, batch.clean_BCHW, batch.step_B, batch.scale_B111, batch.text.states_BLD]
    if batch.repair is not None:
        found += [batch.repair.mask_B1HW, batch.repair.picture_BCHW, batch.repair.noise_BCHW]
    return [*found, batch.negative.states_BLD]


def test_selected_rows_of_a_join_are_the_rows_that_joined(version: Version) -> None:
    mask = torch.ones(1, 1, 4, 4)
    start = StartPicture(torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0)), 0.5, mask)
    rows = [
        *rows_of(version, PictureRequest("a red circle", 1, 3, **SIDE), PictureRequest("a blue square", 2, 9, **SIDE)),
        *rows_of(version, PictureRequest("a red circle", 3, 6, 0.0, **SIDE), start=start),
    ]
    together = join(rows)
    assert together.guided == (True, True, False) and together.call_rows == 5
    for place, row in enumerate(rows):
        chosen = together.select([place])
        if row.repair is None:
            assert chosen.repair is not None and bool((chosen.repair.mask_B1HW == 1).all()), "drawn anew everywhere"
            chosen = replace(chosen, repair=None)
        assert all(torch.equal(left, right) for left, right in zip(tensors(chosen), tensors(row), strict=True))
        assert torch.equal(chosen.columns_BSK[:, : row.columns_BSK.shape[1]], row.columns_BSK)
        assert chosen.text.num_tokens == row.text.num_tokens and chosen.guided == row.guided
    back = together.select([2, 0])
    assert torch.equal(back.latents_BCHW, torch.cat([rows[2].latents_BCHW, rows[0].latents_BCHW]))


def test_a_batch_is_a_value_that_a_step_leaves_alone(version: Version) -> None:
    batch = join(rows_of(version, *[PictureRequest("a red circle", seed, 3, **SIDE) for seed in range(2)]))
    before = [tensor.clone() for tensor in tensors(batch)]
    after = run(version, batch, 1)
    assert all(torch.equal(left, right) for left, right in zip(tensors(batch), before, strict=True))
    assert after.step_B.tolist() == [1, 1] and not torch.equal(after.latents_BCHW, batch.latents_BCHW)


ASKED = [
    PictureRequest("a red circle", 1, 3, **SIDE),
    PictureRequest("word " * 40, 2, 3, **SIDE),
    PictureRequest("a blue square", 3, 3, 0.0, **SIDE),
    PictureRequest("a red circle", 4, 3, **SIDE),
]
"""Seven denoiser rows, guided and not, of one text length class or two."""


@pytest.mark.parametrize("buckets", [(1, 2, 4, 8), (3, 5), (4,), (16,)])
def test_calls_have_the_size_of_a_bucket_and_one_text_length_and_pictures_do_not_feel_it(
    version: Version, buckets: tuple[int, ...]
) -> None:
    shapes = set()

    def watched(latents_BCHW: Tensor, timestep_B: Tensor, text: TextStates) -> Tensor:
        counts = text.num_tokens or (0,)
        shapes.add((len(latents_BCHW), len({-(-count // 32) for count in counts})))
        assert len(timestep_B) == len(text.states_BLD) == len(text.mask_BL) == len(latents_BCHW)
        return version.predict(latents_BCHW, timestep_B, text)

    padded = plain = join(rows_of(version, *ASKED))
    plan = make_plan(padded, buckets)
    with torch.inference_mode():
        for _ in range(3):
            padded = step_rows(padded, plan, watched, version.family.guide)
    assert {rows for rows, _ in shapes} <= set(buckets) and {lengths for _, lengths in shapes} == {1}
    # Other batch sizes move latents of size 1 by about 1e-6; a row in another's place would move them by about 1.
    torch.testing.assert_close(padded.latents_BCHW, run(version, plain, 3).latents_BCHW, rtol=1e-4, atol=1e-4)


def test_rows_fill_the_smallest_bucket_that_holds_them() -> None:
    assert [fitting_bucket((2, 4, 16), rows) for rows in (1, 2, 3, 4, 5, 16)] == [2, 2, 4, 4, 16, 16]


def test_one_bucket_gives_the_same_bits_for_any_neighbours(version: Version) -> None:
    together = run(version, join(rows_of(version, *ASKED)), 3, (4,))
    for place, row in enumerate(ASKED):
        alone = run(version, rows_of(version, row)[0], 3, (4,))
        assert torch.equal(alone.latents_BCHW[0], together.latents_BCHW[place])


@pytest.mark.parametrize("family", ["stable_diffusion", "z_image"])
def test_a_bf16_denoiser_leaves_latents_and_solver_in_fp32(family: str) -> None:
    parts = make_tiny(family)
    for module in (parts.text_encoder, parts.denoiser):
        module.to(torch.bfloat16)
    version = Version("v1", parts, max_prompts=8)
    rows = rows_of(version, *ASKED[:3])
    after = run(version, join(rows), 2)
    assert all(row.text.states_BLD.dtype == torch.bfloat16 for row in rows)
    kept = (after.latents_BCHW, after.clean_BCHW, after.columns_BSK, after.scale_B111)
    assert [tensor.dtype for tensor in kept] == [torch.float32] * 4
    assert bool(torch.isfinite(after.latents_BCHW).all())
    # A bf16 number has 8 bits: latents that passed through one would all be equal to their rounding.
    assert not torch.equal(after.latents_BCHW, after.latents_BCHW.bfloat16().float())


@pytest.mark.parametrize("solver", ["euler", "dpm++2m"])
def test_other_solvers_end_near_the_default_with_many_steps(version: Version, solver: str) -> None:
    """They solve one equation: 30 steps bring them together, and the seeds stay apart."""
    ends = []
    for name in (None, solver):
        batch = join(rows_of(version, *[PictureRequest("a red circle", s, 30, **SIDE) for s in (1, 2)], solver=name))
        ends.append(run(version, batch, 30).latents_BCHW)
    apart = (ends[0][0] - ends[0][1]).abs().mean()
    assert (ends[0] - ends[1]).abs().mean() < 0.2 * apart


@pytest.fixture(scope="module")
def started() -> tuple[Version, Parts, Tensor]:
    parts = make_tiny("stable_diffusion")
    latents_1CHW = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(5))
    return Version("v1", parts, 8), parts, latents_1CHW


def pipeline_options(parts: Parts, seed: int, strength: float, steps: int) -> tuple[dict[str, Any], dict[str, Any]]:
    pipeline = family_named(parts.family).make_pipeline(parts)
    pipeline.set_progress_bar_config(disable=True)
    call = {
        "prompt": "a red circle",
        "negative_prompt": "",
        "num_inference_steps": steps,
        "guidance_scale": 3.0,
        "strength": strength,
        "generator": torch.Generator().manual_seed(seed),
        "output_type": "latent",
    }
    return {**pipeline.components, "requires_safety_checker": False}, call


@pytest.mark.parametrize("strength", [0.3, 0.75, 1.0])
def test_image_to_image_equals_the_diffusers_pipeline(started: tuple[Version, Parts, Tensor], strength: float) -> None:
    version, parts, latents_1CHW = started
    components, call = pipeline_options(parts, 3, strength, 8)
    pipeline = StableDiffusionImg2ImgPipeline(**components)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(image=latents_1CHW, **call).images
    start = StartPicture(latents_1CHW, strength)
    row = rows_of(version, PictureRequest("a red circle", 3, 8, **SIDE), start=start)[0]
    ours = run(version, row, 8 - start.first_step(8)).latents_BCHW
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_repair_equals_the_diffusers_pipeline_and_keeps_the_rest(
    started: tuple[Version, Parts, Tensor], strength: float
) -> None:
    version, parts, latents_1CHW = started
    mask_px = torch.zeros(1, 1, 16, 16)
    mask_px[..., 8:] = 1
    components, call = pipeline_options(parts, 3, strength, 8)
    pipeline = StableDiffusionInpaintPipeline(**components)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        image=latents_1CHW, mask_image=mask_px, masked_image_latents=latents_1CHW, height=16, width=16, **call
    ).images
    start = StartPicture(latents_1CHW, strength, mask_px[..., ::4, ::4])
    rows = rows_of(version, PictureRequest("a red circle", 3, 8, **SIDE), start=start)
    # Beside a row without a mask, which must not feel it.
    other = rows_of(version, PictureRequest("a red circle", 4, 8, **SIDE))
    together = run(version, join([*rows, *other]), 8 - start.first_step(8))
    ours = together.latents_BCHW[:1]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert torch.equal(ours[..., :2], latents_1CHW[..., :2]) and not torch.equal(ours[..., 2:], latents_1CHW[..., 2:])
    alone = run(version, other[0], 8 - start.first_step(8)).latents_BCHW
    torch.testing.assert_close(together.latents_BCHW[1:], alone, rtol=1e-4, atol=1e-4)


def test_a_start_of_another_size_is_refused_with_both_sizes(version: Version) -> None:
    start = StartPicture(torch.zeros(1, 4, 8, 8))
    with pytest.raises(InputError, match=r"latents \(1, 4, 4, 4\) .* found \(1, 4, 8, 8\)"):
        rows_of(version, PictureRequest("a red circle", **SIDE), start=start)
