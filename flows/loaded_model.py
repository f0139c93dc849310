"""A model in memory with what is known about it, for the endpoint's replica and for `generate --model` alike.

What travels to a replica are plain values (`model_arguments`); `load_model` makes the model of them there.
"""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.artifacts import read_record
from flows.config import Config
from flows.models import ResolvedModel

if TYPE_CHECKING:
    from PIL import Image

    from components.clip_encoder import ClipEncoder
    from components.models import Parts

SIZE_MULTIPLE_PX = 8
"""Widths and heights are multiples of it at least, whatever smaller steps a model could draw."""
MIN_SIDE_PX = 16


@dataclass(frozen=True)
class LoadedModel:
    """A model and its info: name, model_version, dataset, run_id, created, the sizes and the solvers it draws with."""

    parts: "Parts"
    info: Mapping[str, Any]


@dataclass(frozen=True)
class LateEncoder:
    """A CLIP that is loaded by the thread that first uses it."""

    directory: str

    @cached_property
    def _clip(self) -> "ClipEncoder":
        from components.clip_encoder import ClipEncoder

        return ClipEncoder(self.directory)

    @property
    def identity(self) -> str:
        return self._clip.identity

    def images(self, pictures: "list[Image.Image]") -> Any:
        return self._clip.images(pictures)

    def texts(self, texts: list[str]) -> Any:
        return self._clip.texts(texts)


def model_arguments(config: Config, model: ResolvedModel, device: str) -> dict[str, Any]:
    """Return what `load_model` needs."""
    record = read_record(model.directory.parent) if model.run_id else None
    trained_px = ((record or {}).get("config", {}).get("data") or {}).get("resolution_px", 0)
    return {
        "directory": str(model.directory),
        "device": device,
        "precision": config.serve.precision,
        "threads": config.serve.threads,
        "resolution_px": trained_px,
        "fallback_px": config.data.resolution_px,
        "facts": {
            "name": config.name,
            "model_version": model.version,
            "dataset": model.dataset,
            "run_id": model.run_id,
            "fingerprint": model.fingerprint,
            "created": int((model.directory / "model_index.json").stat().st_mtime),
        },
    }


def load_serving_parts(directory: Path, device: str, precision: str) -> "Parts":
    """Load what draws: denoiser and text encoder in `precision` (auto: bf16 on a GPU), the autoencoder always in fp32.

    Autoencoders overflow in fp16 and lose the last levels of a picture in bf16, and one call of it, against the
    denoiser's twenty or more, is not where the time goes.
    """
    import torch

    from components.models import load_parts

    drawing = {"tokenizer", "text_encoder", "denoiser"}
    parts = load_parts(
        directory, dtype=torch.bfloat16 if _in_bf16(device, precision) else torch.float32, device=device, only=drawing
    )
    return parts.with_modules(vae=load_parts(directory, device=device, only={"vae"}).vae)


def load_model(
    directory: str,
    device: str,
    resolution_px: int,
    fallback_px: int,
    facts: Mapping[str, Any],
    precision: str = "auto",
    compile_rows: Sequence[int] = (),
    threads: int | None = None,
) -> LoadedModel:
    """Load a diffusers directory; `resolution_px` 0 takes the size its denoiser was made for, if it says one.

    Its denoiser is compiled for calls of `compile_rows` rows of that size, before this returns; none leaves it plain.
    On a CPU this process draws with `threads` from its first model on: 0 finds out how many are fastest, None takes
    all.
    """
    import torch

    from components.compiled import with_compiled
    from components.models import latent_factor, size_multiple_px
    from components.sampler import PictureRequest, draw
    from components.solvers import DIFFUSION_SOLVERS, FLOW_SOLVERS
    from components.threads import settle_once

    parts = load_serving_parts(Path(directory), device, precision)
    made_for = getattr(parts.denoiser.config, "sample_size", None)
    made_for_px = made_for * latent_factor(parts) if isinstance(made_for, int) else fallback_px
    side_px = resolution_px or made_for_px
    # Ray gives a process that reserves a fraction of a CPU one thread; a waiting core may as well draw.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if threads is None:
        torch.set_num_threads(cores)
    elif device == "cpu":
        picture = PictureRequest("threads", steps=2, width_px=side_px, height_px=side_px)
        settle_once(lambda: draw(parts, [picture]), cores, threads)
    if compile_rows:
        parts = with_compiled(parts, compile_rows, [(side_px, side_px)])
    sizes = {
        "width_px": side_px,
        "height_px": side_px,
        "size_multiple_px": math.lcm(SIZE_MULTIPLE_PX, size_multiple_px(parts)),
        "min_side_px": MIN_SIDE_PX,
    }
    solvers = FLOW_SOLVERS if parts.prediction == "flow" else DIFFUSION_SOLVERS
    return LoadedModel(parts, {**facts, **sizes, "schedulers": list(solvers)})


def value_bytes(arguments: Mapping[str, Any]) -> dict[str, int]:
    """Return the bytes that a number of each part takes once `load_model` has loaded it with these arguments."""
    drawing = 2 if _in_bf16(arguments["device"], arguments.get("precision", "auto")) else 4
    return {"denoiser": drawing, "text_encoder": drawing, "vae": 4}


def _in_bf16(device: str, precision: str) -> bool:
    return precision == "bf16" or (precision == "auto" and device != "cpu")
