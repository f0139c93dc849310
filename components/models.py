"""A text-to-image model as parts, whatever its architecture: load, make, fingerprint, save.

Architectures live in `families/`, one file each; this file finds the right one from a diffusers directory. Weights are
safetensors only. The central signature is `predict_noise`-like: (latents, timestep, text) -> prediction, where
`timestep` runs over [0, 1000] in every family (for flow matching it is 1000 * sigma).

Shape letters: B batch, C channels, H, W latent height and width, L tokens, D width.
"""

import hashlib
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from components.errors import InputError

ASSETS = Path(__file__).parent / "assets"
SAMPLE_BATCH = 32


@dataclass(frozen=True)
class Parts:
    """One model in memory. A part that was not asked for is None."""

    family: str
    prediction: str
    """epsilon, v_prediction or flow."""
    tokenizer: Any = None
    text_encoder: Any = None
    denoiser: Any = None
    vae: Any = None
    scheduler: Any = None
    compiled: Any = None
    """The denoiser compiled for some shapes of calls (`components.compiled`), beside the plain one."""

    def with_modules(self, **modules: Any) -> "Parts":
        return replace(self, **modules)


@dataclass(frozen=True)
class TextStates:
    """Encoded captions: states_BLD and which tokens count, mask_BL (bool)."""

    states_BLD: Tensor
    mask_BL: Tensor
    num_tokens: tuple[int, ...] | None = None
    """Tokens that count in each row, where they come first and the host knows it: no look at the mask is needed."""

    def rows(self, rows: Sequence[int]) -> "TextStates":
        """Return the rows at these places, in this order."""
        chosen, known = places_on(self.states_BLD.device, rows), self.num_tokens
        num_tokens = None if known is None else tuple(known[row] for row in rows)
        return TextStates(self.states_BLD[chosen], self.mask_BL[chosen], num_tokens)

    def cat(self, other: "TextStates") -> "TextStates":
        unknown = self.num_tokens is None or other.num_tokens is None
        num_tokens = None if unknown else (self.num_tokens or ()) + (other.num_tokens or ())
        states_BLD = torch.cat([self.states_BLD, other.states_BLD])
        return TextStates(states_BLD, torch.cat([self.mask_BL, other.mask_BL]), num_tokens)

    def to(self, device: Any, dtype: Any) -> "TextStates":
        return TextStates(self.states_BLD.to(device, dtype), self.mask_BL.to(device), self.num_tokens)

    def counted(self) -> "TextStates":
        """Return the same with `num_tokens`, where the tokens that count come first; reads the mask on the host."""
        count_B = self.mask_BL.sum(1)
        first_BL = torch.arange(self.mask_BL.shape[1], device=count_B.device) < count_B.unsqueeze(1)
        if not torch.equal(first_BL, self.mask_BL):
            return self
        return TextStates(self.states_BLD, self.mask_BL, tuple(count_B.tolist()))


def places_on(device: torch.device, rows: Sequence[int]) -> Tensor:
    """Return int64 indexes on a device without waiting for it: a plain copy would wait for all steps under way."""
    places = torch.tensor(rows, dtype=torch.int64)
    return places.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else places


def embedded_base() -> Path:
    """The base pipeline that ships with Fresco."""
    return ASSETS / "fresco-tiny"


def embedded_clip() -> Path:
    """The CLIP that ships with Fresco."""
    return ASSETS / "clip-tiny"


def family_of(directory: Path) -> ModuleType:
    """Return the family module of a diffusers directory; InputError lists the families when none fits."""
    from components.families import FAMILIES

    index_path = directory / "model_index.json"
    if not index_path.is_file():
        found = "a folder without model_index.json" if directory.is_dir() else "nothing"
        raise InputError(
            f"model expected a diffusers directory (with model_index.json) at {str(directory)!r}, found {found};"
            " pass a folder written by `pipeline.save_pretrained`, or leave model.base empty for the embedded base"
        )
    try:
        index = json.loads(index_path.read_text())
    except ValueError as error:
        raise InputError(
            f"model expected JSON in {str(index_path)!r}, found: {error}; copy the folder again"
        ) from error
    for family in FAMILIES.values():
        if index.get("_class_name") in family.PIPELINES:
            return family
    known = ", ".join(name for family in FAMILIES.values() for name in family.PIPELINES)
    raise InputError(
        f"model expected one of the pipelines {known} in {str(index_path)!r}, found {index.get('_class_name')!r};"
        " docs/families.md shows how to add an architecture"
    )


def load_parts(
    directory: Path | str,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    only: Collection[str] | None = None,
) -> Parts:
    """Load a diffusers directory in evaluation mode, without gradients; `only` names the parts to load.

    Part names: tokenizer, text_encoder, denoiser, vae, scheduler. The scheduler is always loaded: it says what the
    denoiser predicts. Raises InputError for anything that is not a complete directory of a known family.
    """
    directory = Path(directory)
    family = family_of(directory)
    _quiet_libraries()
    wanted = set(only) if only is not None else {"tokenizer", "text_encoder", "denoiser", "vae"}
    try:
        parts = family.load(directory, wanted, dtype)
    except (OSError, ValueError) as error:
        raise InputError(
            f"model expected readable safetensors weights of a {family.NAME} pipeline in {str(directory)!r}, found:"
            f" {error}; check that the folder is complete"
        ) from error
    for module in (parts.text_encoder, parts.denoiser, parts.vae):
        if module is not None:
            module.to(device).eval().requires_grad_(False)
    return parts


def make_tiny(family: str, seed: int = 0, **options: Any) -> Parts:
    """Make a model of real classes with random weights, small enough for tests; the caller's generator is untouched."""
    from components.families import FAMILIES

    if family not in FAMILIES:
        raise InputError(f"family expected one of {', '.join(FAMILIES)}, found {family!r}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = FAMILIES[family].make_tiny(**options)
    for module in (parts.text_encoder, parts.denoiser, parts.vae):
        module.eval().requires_grad_(False)
    return parts


def save_parts(parts: Parts, directory: Path | str, dtype: torch.dtype | None = None) -> None:
    """Write a diffusers directory that `DiffusionPipeline.from_pretrained` opens without Fresco (safetensors).

    `dtype` stores the weights rounded to it and leaves `parts` as they are.
    """
    _quiet_libraries()
    pipeline = family_named(parts.family).make_pipeline(parts)
    if dtype is not None:
        pipeline = family_named(parts.family).make_pipeline(_rounded(parts, dtype))
    pipeline.save_pretrained(str(directory), safe_serialization=True)
    for path in Path(directory).glob("*/config.json"):
        # Where a part was loaded from is this machine's business.
        config = {key: value for key, value in json.loads(path.read_text()).items() if key != "_name_or_path"}
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _quiet_libraries() -> None:
    """Turn off progress bars for files that load in milliseconds, and advice about image processors."""
    import diffusers.utils.logging
    import transformers.utils.logging

    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.disable_progress_bar()
        library.set_verbosity_error()


def _rounded(parts: Parts, dtype: torch.dtype) -> Parts:
    import copy

    names = ("text_encoder", "denoiser", "vae")
    return replace(parts, **{name: copy.deepcopy(getattr(parts, name)).to(dtype) for name in names})


def family_named(name: str) -> ModuleType:
    from components.families import FAMILIES

    return FAMILIES[name]


@torch.no_grad()
def encode_text(parts: Parts, captions: list[str]) -> TextStates:
    """Encode captions with the text encoder, as the family's diffusers pipeline does."""
    family = family_named(parts.family)
    ids_BL, mask_BL = family.tokenize(parts.tokenizer, captions)
    device = next(parts.text_encoder.parameters()).device
    ids_BL, mask_BL = ids_BL.to(device), mask_BL.to(device)
    return TextStates(family.encode_ids(parts.text_encoder, ids_BL, mask_BL), mask_BL)


@torch.no_grad()
def encode_images(vae: Any, pixels_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Encode pixels in [-1, 1] to the mean and spread (standard deviation) of the latents the denoiser sees."""
    posterior = vae.encode(pixels_BCHW).latent_dist
    shift = vae.config.shift_factor or 0.0
    scale = vae.config.scaling_factor
    return (posterior.mean - shift) * scale, posterior.std * scale


@torch.no_grad()
def decode_latents(vae: Any, latents_BCHW: Tensor) -> Tensor:
    """Decode the denoiser's latents to pixels, about [-1, 1] (not clipped)."""
    shift = vae.config.shift_factor or 0.0
    pixels_BCHW: Tensor = vae.decode(latents_BCHW / vae.config.scaling_factor + shift, return_dict=False)[0]
    return pixels_BCHW


def latent_factor(parts: Parts) -> int:
    """Pixels per latent cell along one side."""
    factor: int = 2 ** (len(parts.vae.config.block_out_channels) - 1)
    return factor


def size_multiple_px(parts: Parts) -> int:
    """Widths and heights that the model draws are multiples of it."""
    return latent_factor(parts) * int(family_named(parts.family).PATCH_CELLS)


def component_fingerprint(directory: Path | str, component: str) -> str:
    """12 hex digits over one part's config and weights (`vae`, `text_encoder` with its tokenizer, or `denoiser`)."""
    directory = Path(directory)
    family = family_of(directory)
    folders = {"denoiser": [family.DENOISER_FOLDER], "text_encoder": ["text_encoder", "tokenizer"]}
    return _hash_folders(directory, folders.get(component, [component]))


def model_fingerprint(directory: Path | str) -> str:
    """12 hex digits over everything in a diffusers directory that decides what it draws."""
    directory = Path(directory)
    family = family_of(directory)
    return _hash_folders(directory, [family.DENOISER_FOLDER, "scheduler", "text_encoder", "tokenizer", "vae"])


def _hash_folders(directory: Path, folders: list[str]) -> str:
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted((directory / folder).glob("*")):
            if path.suffix not in (".json", ".safetensors", ".txt", ".model"):
                continue
            digest.update(f"{folder}/{path.name}\0".encode())
            if path.name in ("config.json", "scheduler_config.json", "tokenizer_config.json"):
                digest.update(_stable_config(path))
            else:
                with path.open("rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:12]


def _stable_config(path: Path) -> bytes:
    """A config's meaning without where it came from and which library version wrote it."""
    volatile = ("_name_or_path", "_diffusers_version", "transformers_version", "is_local", "local_files_only")
    config = {key: value for key, value in json.loads(path.read_text()).items() if key not in volatile}
    return json.dumps(config, sort_keys=True).encode()
