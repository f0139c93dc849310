"""Memory of a model: numbers counted from the files' headers are those in memory; the plan as a table."""

from pathlib import Path

import pytest
import torch

from components.errors import InputError
from components.model_memory import needed_bytes, num_values, plan_swap
from components.models import load_parts, make_tiny, save_parts

GIB = 2**30


@pytest.mark.parametrize("stored", [None, torch.bfloat16])
def test_numbers_in_the_files_are_those_in_memory_whatever_they_are_stored_in(
    tmp_path: Path, stored: torch.dtype | None
) -> None:
    save_parts(make_tiny("z_image", seed=0), tmp_path, stored)
    weights = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.with_name("diffusion_pytorch_model.fp16.safetensors").write_bytes(weights.read_bytes())
    parts = load_parts(tmp_path)
    modules = (parts.denoiser, parts.text_encoder, parts.vae)
    held = sum(tensor.numel() for module in modules for tensor in module.state_dict().values())
    # What two layers share is stored once, and stands twice in a state dict.
    assert 0.98 * held <= sum(num_values(tmp_path).values()) <= held
    assert num_values(tmp_path)["vae"] == sum(tensor.numel() for tensor in parts.vae.state_dict().values())


def test_damaged_file_is_named(tmp_path: Path) -> None:
    save_parts(make_tiny("stable_diffusion", seed=0), tmp_path)
    weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    for content in (b"", b"\xff" * 8, b"\x02\0\0\0\0\0\0\0[]", b'\x08\0\0\0\0\0\0\0{"a": 1}'):
        weights.write_bytes(content)
        with pytest.raises(InputError, match=r"unet/diffusion_pytorch_model\.safetensors"):
            num_values(tmp_path)


def test_precision_it_is_loaded_in_decides() -> None:
    assert needed_bytes({"denoiser": 1_000_000}, {"denoiser": 4}) == 4_800_000
    assert needed_bytes({"denoiser": 1_000_000, "vae": 500_000}, {"denoiser": 2, "vae": 4}) == 4_800_000


@pytest.mark.parametrize(
    ("needed", "free", "held", "headroom", "plan"),
    [
        (4, 5, 0, 1, "beside"),
        (4, 5, 9, 2, "drain"),
        (4, 4, 4, 0, "beside"),
        (4, 3, 4, 0, "drain"),
        (4, 3, 1, 0, "drain"),
        (4, 2, 1, 0, "refuse"),
        (4, 2, 1, 99, "refuse"),
        (4, 2, 2, 99, "drain"),
    ],
)
def test_plan_follows_from_what_is_needed_free_and_held(
    needed: int, free: int, held: int, headroom: int, plan: str
) -> None:
    assert plan_swap(needed * GIB, free * GIB, held * GIB, headroom * GIB) == plan
