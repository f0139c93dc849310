"""One CLIP as (pictures or texts) -> rows of unit length, from a local directory: nothing is downloaded.

Every number that depends on an encoder is comparable only under that encoder, so its identity travels with the number.
Preprocessing is Pillow's, read from preprocessor_config.json: torchvision is not needed.
Shape letters: N items, D feature width, B batch, C channels, H height, W width.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from components.errors import InputError, NonFiniteError

if TYPE_CHECKING:
    import torch

FINGERPRINTED_SUFFIXES = (".json", ".txt", ".safetensors")


class ClipEncoder:
    """Pictures and texts as L2-normalised rows, by any local `transformers` CLIP directory (CLIPModel, CLIPTokenizer).

    `identity` (12 hex digits) changes with the weights, the tokenizer and the preprocessing; it belongs into the
    fingerprint of what was measured. `logit_scale` is the factor on cosines that the model was trained with.
    """

    def __init__(self, directory: Path | str, batch_size: int = 64):
        import torch
        from transformers import CLIPModel, CLIPTokenizer

        self.directory = Path(directory)
        if not (self.directory / "config.json").is_file():
            raise InputError(
                f"expected a CLIP directory with a config.json, found none in {directory}; check model.clip"
            )
        settings = json.loads((self.directory / "config.json").read_text())
        if settings.get("model_type") != "clip":
            raise InputError(
                f"expected a CLIP directory, found model_type {settings.get('model_type')!r} in"
                f" {directory}/config.json; set model.clip to a directory saved from transformers' CLIPModel"
            )
        self.identity = directory_identity(self.directory)
        self.batch_size = batch_size
        # fp32 whatever was stored: half precision is slow on CPU and rounds the cosines that are compared
        self.model = CLIPModel.from_pretrained(self.directory, dtype=torch.float32, local_files_only=True).eval()
        self.logit_scale = float(self.model.logit_scale.detach().exp())
        self.tokenizer = CLIPTokenizer.from_pretrained(self.directory, local_files_only=True)
        self.preprocessing = _read_preprocessing(self.directory)
        end = self.model.config.text_config.eos_token_id
        # 2 is the value of old configs, for which transformers pools at the highest token id instead
        if end != 2 and end != self.tokenizer.eos_token_id:
            raise InputError(
                f"expected text_config.eos_token_id {self.tokenizer.eos_token_id} (the tokenizer's), found {end} in "
                f"{directory}/config.json; texts would be read at the wrong token"
            )

    def images(self, pictures: list[Image.Image]) -> NDArray[np.float32]:
        """Features (N, D) of the pictures, in order."""
        import torch

        rows = []
        for i in range(0, len(pictures), self.batch_size):
            pixels_BCHW = np.stack([self.preprocessing(picture) for picture in pictures[i : i + self.batch_size]])
            with torch.inference_mode():
                rows.append(self.model.get_image_features(torch.from_numpy(pixels_BCHW)).pooler_output)
        return self._normalised(rows)

    def texts(self, texts: list[str]) -> NDArray[np.float32]:
        """Features (N, D) of the texts, in order; what exceeds the model's context is cut off."""
        import torch

        rows = []
        context = self.model.config.text_config.max_position_embeddings
        for i in range(0, len(texts), self.batch_size):
            batch = texts[i : i + self.batch_size]
            tokens = self.tokenizer(batch, padding=True, truncation=True, max_length=context, return_tensors="pt")
            with torch.inference_mode():
                rows.append(self.model.get_text_features(tokens.input_ids, tokens.attention_mask).pooler_output)
        return self._normalised(rows)

    def _normalised(self, rows: "list[torch.Tensor]") -> NDArray[np.float32]:
        import torch

        if not rows:
            return np.zeros((0, self.model.config.projection_dim), np.float32)
        features = torch.nn.functional.normalize(torch.cat(rows), dim=1).numpy()
        if not np.isfinite(features).all():
            raise NonFiniteError(
                f"expected finite features, found NaN or infinity; the weights in {self.directory} are broken"
            )
        return np.asarray(features, np.float32)


@dataclass(frozen=True)
class Preprocessing:
    """Picture -> array (C, H, W): shorter side to `resize_px`, centre crop to `crop_px`, then (x - mean) / std."""

    resize_px: int
    crop_px: int
    resample: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, picture: Image.Image) -> NDArray[np.float32]:
        picture = picture.convert("RGB")
        short = min(picture.size)
        width, height = (side * self.resize_px // short for side in picture.size)
        if (width, height) != picture.size:
            picture = picture.resize((width, height), Image.Resampling(self.resample))
        left, top = (width - self.crop_px) // 2, (height - self.crop_px) // 2
        picture = picture.crop((left, top, left + self.crop_px, top + self.crop_px))
        pixels_HWC = (np.asarray(picture, np.float32) / 255 - np.array(self.mean)) / np.array(self.std)
        return np.ascontiguousarray(pixels_HWC.transpose(2, 0, 1), dtype=np.float32)


def _read_preprocessing(directory: Path) -> Preprocessing:
    path = directory / "preprocessor_config.json"
    if not path.is_file():
        raise InputError(
            f"expected {path} (how pictures are prepared), found none; save the processor beside the model"
        )
    settings = json.loads(path.read_text())
    crop_px = _side(settings["crop_size"])
    return Preprocessing(
        _side(settings["size"]),
        crop_px,
        settings["resample"],
        tuple(settings["image_mean"]),
        tuple(settings["image_std"]),
    )


def _side(size: int | dict[str, int]) -> int:
    """The files in the wild say 224, {"shortest_edge": 224} or {"height": 224, "width": 224}."""
    return size if isinstance(size, int) else next(iter(size.values()))


def directory_identity(directory: Path) -> str:
    """`ClipEncoder.identity` of a directory, without loading it."""
    digest = hashlib.sha256()
    for path in sorted(directory.iterdir()):
        if path.suffix in FINGERPRINTED_SUFFIXES:
            with path.open("rb") as file:
                digest.update(path.name.encode() + b"\0" + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:12]
