"""Put a loaded model behind one small object: rows in, PNG files out, each carrying what made it.

Used by the endpoint's replica (cluster names it `flows.paint:make_painter`) and by `generate --model`.
"""

import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL.PngImagePlugin import PngInfo

from cluster.artifacts import read_record
from flows.config import Config
from flows.models import ResolvedModel

if TYPE_CHECKING:
    from PIL.Image import Image

    from components.models import Parts

FACTORY = "flows.paint:make_painter"
SIZE_MULTIPLE_PX = 8
MIN_SIDE_PX = 16
ROW_TEXTS = ("prompt", "negative_prompt", "seed", "steps", "guidance_scale")
MODEL_TEXTS = ("model_version", "dataset", "run_id")


@dataclass(frozen=True)
class ModelPainter:
    """A model in memory and what is known about it."""

    parts: "Parts"
    facts: Mapping[str, Any]

    def info(self) -> dict[str, Any]:
        return dict(self.facts)

    def draw(self, rows: Sequence[Mapping[str, Any]]) -> list[bytes]:
        """Draw one PNG file a row: prompt, negative_prompt, seed, steps, guidance_scale, width_px, height_px."""
        from components.sampler import PictureRequest, draw

        pictures = draw(self.parts, [PictureRequest(**row) for row in rows])
        return [self._png(picture, row) for picture, row in zip(pictures, rows, strict=True)]

    def _png(self, picture: "Image", row: Mapping[str, Any]) -> bytes:
        texts = PngInfo()
        for key in ROW_TEXTS:
            texts.add_text(key, str(row[key]))
        for key in MODEL_TEXTS:
            texts.add_text(key, str("" if self.facts[key] is None else self.facts[key]))
        file = io.BytesIO()
        picture.save(file, format="PNG", pnginfo=texts)
        return file.getvalue()


def painter_arguments(config: Config, model: ResolvedModel, device: str) -> dict[str, Any]:
    """Return what `make_painter` needs, as plain values that travel to another process."""
    record = read_record(model.directory.parent) if model.run_id else None
    trained_px = ((record or {}).get("config", {}).get("data") or {}).get("resolution_px", 0)
    return {
        "directory": str(model.directory),
        "device": device,
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


def make_painter(
    directory: str, device: str, resolution_px: int, fallback_px: int, facts: Mapping[str, Any]
) -> ModelPainter:
    """Load a diffusers directory; `resolution_px` 0 takes the size its denoiser was made for, if it says one."""
    import torch

    from components.models import latent_factor, load_parts

    # Ray gives a process that reserves a fraction of a CPU one thread; a waiting core may as well draw.
    torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    parts = load_parts(Path(directory), dtype=torch.float32 if device == "cpu" else torch.bfloat16, device=device)
    made_for = getattr(parts.denoiser.config, "sample_size", None)
    made_for_px = made_for * latent_factor(parts) if isinstance(made_for, int) else fallback_px
    side_px = resolution_px or made_for_px
    warm_up = {"prompt": "warm up", "negative_prompt": "", "seed": 0, "steps": 1, "guidance_scale": 3.0}
    shape = {"width_px": side_px, "height_px": side_px}
    sizes = {"size_multiple_px": SIZE_MULTIPLE_PX, "min_side_px": MIN_SIDE_PX, "warm_up": {**warm_up, **shape}}
    return ModelPainter(parts, {**facts, **shape, **sizes})
