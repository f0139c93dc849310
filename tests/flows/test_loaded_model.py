"""A model and its info: the size it draws and the solvers it draws with."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from components.models import embedded_base, make_tiny, save_parts
from components.sampler import PictureRequest, draw
from flows.config import Config, with_overrides
from flows.loaded_model import load_model, load_serving_parts, model_arguments
from flows.models import resolve_model


def test_size_is_that_of_the_training_pictures_else_that_of_the_denoiser(
    config: Config, make_run, tiny_pipelines: dict[int, Path]
) -> None:
    make_run("fresco-aaa", 0)
    larger = config.model_copy(update={"data": config.data.model_copy(update={"resolution_px": 128})})
    trained = load_model(**model_arguments(larger, resolve_model(config, "fresco-aaa"), "cpu")).info
    assert (trained["width_px"], trained["height_px"]) == (16, 16)
    assert trained["dataset"] == "emblems@0123456789ab" and trained["run_id"] == "fresco-aaa"
    foreign = model_arguments(larger, resolve_model(config, str(tiny_pipelines[0])), "cpu")
    assert foreign["resolution_px"] == 0
    loaded = load_model(**foreign)
    assert loaded.info["width_px"] == loaded.parts.denoiser.config.sample_size * 4  # the tiny autoencoder's factor
    assert loaded.info["run_id"] is None


def test_solvers_are_those_of_the_models_prediction(config: Config, tiny_z_image: Path, tiny_base: Path) -> None:
    def solvers(directory: Path) -> list[str]:
        found: list[str] = load_model(**model_arguments(config, resolve_model(config, str(directory)), "cpu")).info[
            "schedulers"
        ]
        return found

    assert solvers(tiny_z_image) == ["euler", "dpm++2m"] and solvers(tiny_base)[0] == "ddim"


def test_every_size_of_the_stated_multiple_can_be_drawn(config: Config, tmp_path: Path) -> None:
    """With an autoencoder of four blocks, as real ones have, a cell is 8 px; Z-Image takes cells in patches of 2."""
    from diffusers import AutoencoderKL

    parts = make_tiny("z_image")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = AutoencoderKL.from_config(
            {
                **parts.vae.config,
                "block_out_channels": (8, 8, 8, 8),
                "down_block_types": ("DownEncoderBlock2D",) * 4,
                "up_block_types": ("UpDecoderBlock2D",) * 4,
            }
        )
    save_parts(parts.with_modules(vae=vae.eval()), tmp_path / "pipeline")
    model = load_model(**model_arguments(config, resolve_model(config, str(tmp_path / "pipeline")), "cpu"))
    multiple = model.info["size_multiple_px"]
    assert multiple == 16
    row = PictureRequest("a red circle", steps=1, width_px=2 * multiple, height_px=3 * multiple)
    assert draw(model.parts, [row])[0].size == (row.width_px, row.height_px)
    with pytest.raises(RuntimeError):
        draw(model.parts, [PictureRequest("a red circle", steps=1, width_px=40, height_px=48)])


def test_sizes_stay_multiples_of_8_where_the_model_could_draw_smaller_steps(config: Config, tiny_base: Path) -> None:
    model = load_model(**model_arguments(config, resolve_model(config, str(tiny_base)), "cpu"))
    assert model.info["size_multiple_px"] == 8


@pytest.mark.parametrize(("asked", "found"), [("auto", "float32"), ("fp32", "float32"), ("bf16", "bfloat16")])
def test_precision_is_that_of_the_config_and_the_autoencoders_is_always_fp32(
    config: Config, tiny_z_image: Path, asked: str, found: str
) -> None:
    asking = with_overrides(config, {"serve.precision": asked})
    parts = load_model(**model_arguments(asking, resolve_model(asking, str(tiny_z_image)), "cpu")).parts
    assert {part.dtype for part in (parts.denoiser, parts.text_encoder)} == {getattr(torch, found)}
    assert parts.vae.dtype == torch.float32


def pixels(precision: str, **options: Any) -> "np.ndarray[Any, Any]":
    row = PictureRequest("a large red circle on a white background", **{"seed": 3, **options})
    return np.asarray(draw(load_serving_parts(embedded_base(), "cpu", precision), [row])[0]).astype(float)


def test_bf16_draws_nearly_the_picture_of_fp32() -> None:
    """Measured: 0.1 levels of 255 in the mean, 5 at most; a guidance scale off by 0.5 makes 0.6 and 22."""
    right = pixels("fp32")
    close, off = np.abs(pixels("bf16") - right), np.abs(pixels("fp32", guidance_scale=2.5) - right)
    assert 0 < close.mean() < 0.3 and close.max() <= 12
    assert off.mean() > 0.3 and off.max() > 12, "the tolerance would not see a break"
