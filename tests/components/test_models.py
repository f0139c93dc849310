"""Models as parts: load, save, fingerprint, encode, decode; and directories that need no Fresco."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from components.errors import InputError
from components.models import (
    Parts,
    component_fingerprint,
    decode_latents,
    encode_images,
    encode_text,
    family_of,
    latent_factor,
    load_parts,
    make_tiny,
    model_fingerprint,
    save_parts,
)
from components.sampler import PictureRequest, draw

COMPONENTS = ("vae", "text_encoder", "denoiser")
# Opens a pipeline and draws, in a Python where no package of this repository can be imported.
OPEN_WITHOUT_FRESCO = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("components", "flows", "cluster"):
            raise ImportError(f"{name} is not to be had here")
sys.meta_path.insert(0, Refuse())
try:
    import components
except ImportError:
    pass
else:
    raise SystemExit("components could be imported")
import torch
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained(sys.argv[1])
pipeline.set_progress_bar_config(disable=True)
options = {"max_sequence_length": 48} if "ZImage" in type(pipeline).__name__ else {}
generator = torch.Generator("cpu").manual_seed(11)
pipeline("a red circle", negative_prompt="", num_inference_steps=3, guidance_scale=3.0, width=16, height=16,
         generator=generator, **options).images[0].save(sys.argv[2])
"""


@pytest.fixture(params=["tiny_base", "tiny_z_image"])
def directory(request: pytest.FixtureRequest) -> Path:
    found: Path = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def copy(directory: Path, tmp_path: Path) -> Path:
    """A copy of the directory that a test may change."""
    return Path(shutil.copytree(directory, tmp_path / "copy"))


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def fingerprints(directory: Path) -> dict[str, str]:
    return {name: component_fingerprint(directory, name) for name in COMPONENTS} | {
        "model": model_fingerprint(directory)
    }


def config_of(directory: Path, component: str) -> Path:
    folder = family_of(directory).DENOISER_FOLDER if component == "denoiser" else component
    return directory / folder / "config.json"


def test_saved_parts_load_as_they_were(directory: Path) -> None:
    family = family_of(directory).NAME
    made, loaded = make_tiny(family, seed=0), load_parts(directory)
    assert (loaded.family, loaded.prediction) == (made.family, made.prediction)
    for component in COMPONENTS:
        left, right = (dict(getattr(parts, component).state_dict()) for parts in (made, loaded))
        assert set(left) == set(right)
        assert all(torch.equal(left[name], right[name]) for name in left), component
        module = getattr(loaded, component)
        assert not module.training and not any(p.requires_grad for p in module.parameters())
    caption = "a red circle in the rain"
    assert torch.equal(encode_text(made, [caption]).states_BLD, encode_text(loaded, [caption]).states_BLD)
    assert not list(directory.rglob("*.bin")) and list(directory.rglob("*.safetensors"))


def test_loading_asked_parts_leaves_the_others_out(directory: Path) -> None:
    parts = load_parts(directory, only={"vae"})
    assert parts.vae is not None and parts.scheduler is not None
    assert parts.denoiser is None and parts.text_encoder is None and parts.tokenizer is None


def test_loading_casts_to_the_asked_dtype(directory: Path) -> None:
    parts = load_parts(directory, dtype=torch.bfloat16, only={"denoiser"})
    assert parts.denoiser.dtype == torch.bfloat16


def test_saving_rounded_keeps_the_parts_and_halves_the_weights(tiny_base: Path, tmp_path: Path) -> None:
    parts = load_parts(tiny_base)
    save_parts(parts, tmp_path / "half", dtype=torch.float16)
    assert parts.denoiser.dtype == torch.float32
    name = "unet/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "half" / name).stat().st_size < 0.6 * (tiny_base / name).stat().st_size
    again = load_parts(tmp_path / "half").denoiser.conv_in.weight
    assert torch.equal(again, parts.denoiser.conv_in.weight.half().float())


@pytest.mark.parametrize(
    ("found", "make"),
    [
        ("nothing", lambda path: None),
        ("a folder without model_index.json", lambda path: path.mkdir()),
        ("nothing", lambda path: path.write_text("not a folder")),
    ],
    ids=["missing", "empty folder", "file"],
)
def test_not_a_diffusers_directory_is_refused(found: str, make, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "model"
    make(path)
    with pytest.raises(InputError, match=f"diffusers directory .*{path}.*found {found};.*model.base empty"):
        load_parts(path)


def test_unknown_pipeline_is_refused_with_the_known_ones(copy: Path) -> None:
    edit_json(copy / "model_index.json", _class_name="FluxPipeline")
    with pytest.raises(InputError, match=r"StableDiffusionPipeline, ZImagePipeline.*found 'FluxPipeline'"):
        load_parts(copy)


@pytest.mark.parametrize("damage", ["no weights", "cut weights", "no config", "pickle only"])
def test_incomplete_directories_are_refused_by_name(copy: Path, damage: str) -> None:
    weights = next((copy / "vae").glob("*.safetensors"))
    if damage == "no weights":
        weights.unlink()
    elif damage == "cut weights":
        weights.write_bytes(weights.read_bytes()[:100])
    elif damage == "no config":
        config_of(copy, "denoiser").unlink()
    else:
        # Only safetensors are ever read: a pickle could run code.
        weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(InputError, match=f"{copy}"):
        load_parts(copy)


def test_broken_model_index_is_refused(copy: Path) -> None:
    (copy / "model_index.json").write_text("{")
    with pytest.raises(InputError, match=r"model_index\.json"):
        load_parts(copy)


def test_scheduler_of_another_prediction_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(tiny_base, tmp_path / "copy"))
    edit_json(copied / "scheduler" / "scheduler_config.json", prediction_type="sample")
    with pytest.raises(InputError, match="epsilon or v_prediction"):
        load_parts(copied, only=set())


def test_fingerprints_of_two_savings_of_the_same_weights_are_equal(directory: Path, tmp_path: Path) -> None:
    save_parts(load_parts(directory), tmp_path / "again")
    assert fingerprints(tmp_path / "again") == fingerprints(directory)
    assert all(len(value) == 12 and int(value, 16) >= 0 for value in fingerprints(directory).values())


def test_fingerprints_ignore_where_a_config_came_from(directory: Path, copy: Path) -> None:
    for component in COMPONENTS:
        edit_json(
            config_of(copy, component), _name_or_path="/elsewhere", _diffusers_version="9", transformers_version="9"
        )
    edit_json(copy / "model_index.json", _name_or_path="/elsewhere", _diffusers_version="9")
    assert fingerprints(copy) == fingerprints(directory)


@pytest.mark.parametrize("component", COMPONENTS)
def test_fingerprint_of_a_part_follows_its_weights_and_no_others(directory: Path, copy: Path, component: str) -> None:
    weights = next(config_of(copy, component).parent.glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    before, after = fingerprints(directory), fingerprints(copy)
    assert {name for name in before if before[name] != after[name]} == {component, "model"}


def test_fingerprint_of_a_part_follows_its_config(directory: Path, copy: Path) -> None:
    edit_json(config_of(copy, "vae"), scaling_factor=0.123)
    before, after = fingerprints(directory), fingerprints(copy)
    assert {name for name in before if before[name] != after[name]} == {"vae", "model"}


def test_fingerprint_of_the_text_encoder_follows_its_tokenizer(directory: Path, copy: Path) -> None:
    path = copy / "tokenizer" / "tokenizer.json"
    path.write_text(path.read_text().replace('"merges"', '"merges" ', 1))
    before, after = fingerprints(directory), fingerprints(copy)
    assert {name for name in before if before[name] != after[name]} == {"text_encoder", "model"}


def test_fingerprint_of_the_model_follows_its_scheduler_alone(directory: Path, copy: Path) -> None:
    edit_json(copy / "scheduler" / "scheduler_config.json", num_train_timesteps=500)
    before, after = fingerprints(directory), fingerprints(copy)
    assert {name for name in before if before[name] != after[name]} == {"model"}


def test_make_tiny_is_a_function_of_its_seed_and_leaves_the_generator_alone() -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    weights = [make_tiny("stable_diffusion", seed=seed).denoiser.conv_in.weight for seed in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    with pytest.raises(InputError, match="stable_diffusion, z_image, found 'flux'"):
        make_tiny("flux")


def test_latents_are_scaled_as_the_pipelines_do_and_decode_back() -> None:
    parts = make_tiny("z_image")  # its autoencoder has a shift and a scale
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, spread = encode_images(parts.vae, pixels)
    posterior = parts.vae.encode(pixels).latent_dist
    torch.testing.assert_close(mean, (posterior.mean - 0.1) * 0.4)
    torch.testing.assert_close(spread, posterior.std * 0.4)
    torch.testing.assert_close(decode_latents(parts.vae, mean), parts.vae.decode(posterior.mean).sample)
    assert latent_factor(parts) == 4 and mean.shape == (2, 4, 4, 4)


def test_with_modules_replaces_parts_in_a_copy() -> None:
    parts = Parts("stable_diffusion", "epsilon")
    assert parts.with_modules(vae=torch.nn.Identity()).vae is not None and parts.vae is None


def test_directory_opens_and_draws_the_same_picture_where_fresco_is_not_installed(
    directory: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", OPEN_WITHOUT_FRESCO, str(directory), str(tmp_path / "theirs.png")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    request = PictureRequest("a red circle", seed=11, steps=3, guidance_scale=3.0, width_px=16, height_px=16)
    ours = np.asarray(draw(load_parts(directory), [request])[0]).astype(int)
    theirs = np.asarray(Image.open(tmp_path / "theirs.png")).astype(int)
    # fp32 rounding may tip a value over the edge between two of 256 levels.
    assert np.abs(ours - theirs).max() <= 1
