"""Let one model denoise the test pictures and draw the test prompts; keep what it did, so that it is done once.

What is kept is named by the model's weights, the test data and the sampling settings: the same model under another
name, or as the base of another run, is not measured twice. Nothing is averaged here.
Shape letters: N test pictures, K timestep bands, P prompts, B batch, C channels, H, W height and width.
"""

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from cluster.artifacts import Workspace, read_record, write_bytes_atomic, write_record
from components import objective
from components.dataset import TEST, DatasetVersion, Item
from components.emblem_reader import shows
from components.emblems import parse_caption
from components.encode import pixels_name
from components.errors import InputError, NonFiniteError
from components.images import to_pixels
from components.models import SAMPLE_BATCH, Parts, TextStates, encode_images, encode_text, family_named, load_parts
from components.sampler import PictureRequest, draw
from components.store import KEY, ShardStore
from flows.config import Config
from flows.console import say
from flows.encode import progress_of

VERSION = 1
"""Raise it when the same model and data would be measured differently."""
MAX_LOSS_PICTURES = 2000
"""The first by hash; beyond that the interval is narrow and only the wait grows."""
LOSS_BATCH = 16


@dataclass(frozen=True)
class HeldOut:
    """What every model is measured on."""

    dataset: DatasetVersion
    pictures: list[Item]
    prompts: list[Item]
    pixels: Path

    @property
    def captions(self) -> list[str]:
        return [item.caption for item in self.prompts]


@dataclass(frozen=True)
class Performance:
    """What one model did: losses_NK for each picture and band, a drawn picture for each prompt."""

    losses_NK: np.ndarray
    drawn: list[Image.Image]


def held_out(config: Config, workspace: Workspace, dataset: DatasetVersion) -> HeldOut:
    """The test pictures and, of those, the first captions by hash as prompts; InputError when there are none."""
    items = dataset.split(TEST)
    if not items:
        raise InputError(
            f"data.test_fraction expected to leave pictures for the scorecard, found none among {len(dataset.items)} of"
            f" {dataset.id}; add pictures or raise data.test_fraction"
        )
    pixels = workspace.encoded / pixels_name(config.data.resolution_px)
    return HeldOut(dataset, items[:MAX_LOSS_PICTURES], items[: config.evaluate.prompts], pixels)


def measure(config: Config, workspace: Workspace, directory: Path, fingerprint: str, data: HeldOut) -> Performance:
    """Let the model in `directory` denoise and draw, or read what it did before; NonFiniteError for broken weights."""
    settings = config.evaluate.model_dump(exclude={"bootstrap"})
    folder = workspace.reports / "measured" / fingerprint_of([VERSION, fingerprint, data.dataset.fingerprint, settings])
    names = [folder / f"{index:04d}.png" for index in range(len(data.prompts))]
    if read_record(folder) is not None:
        say(f"  {directory}: measured before")
        losses_NK = np.load(folder / "losses.npy", allow_pickle=False)
        return Performance(losses_NK, [Image.open(name).convert("RGB") for name in names])
    say(f"  {directory}: {len(data.pictures)} pictures to denoise, {len(data.prompts)} prompts to draw")
    parts = load_parts(directory, device="cuda" if torch.cuda.is_available() else "cpu")
    losses_NK = denoising_losses(parts, data.pictures, data.pixels)
    if not np.isfinite(losses_NK).all():
        raise NonFiniteError(f"expected finite losses, found NaN or infinity from {directory}; its weights are broken")
    drawn = _draw_prompts(config, parts, data.captions)
    losses_file = io.BytesIO()
    np.save(losses_file, losses_NK, allow_pickle=False)
    write_bytes_atomic(folder / "losses.npy", losses_file.getvalue())
    for name, picture in zip(names, drawn, strict=True):
        write_bytes_atomic(name, to_png(picture))
    write_record(folder, {"model": fingerprint, "dataset": data.dataset.id, "evaluate": settings})
    return Performance(losses_NK, drawn)


def denoising_losses(parts: Parts, items: Sequence[Item], pixels: Path) -> np.ndarray:
    """Deterministic loss (N, K) of the pictures, encoded by the model's own autoencoder; row i is items[i]."""
    row_of = {item.sha256: row for row, item in enumerate(items)}
    losses_NK = np.empty((len(items), objective.NUM_BANDS))
    progress, done = progress_of("denoised", len(items)), 0
    for table in ShardStore(pixels).read(list(row_of), ["png"]):  # each shard is opened once
        for chunk in table.to_batches(max_chunksize=LOSS_BATCH):
            rows = [row_of[key] for key in chunk[KEY].to_pylist()]
            pictures = [Image.open(io.BytesIO(png)) for png in chunk["png"].to_pylist()]
            losses_NK[rows] = _losses_of(parts, [items[row] for row in rows], pictures)
            done += len(rows)
            progress(done)
    return losses_NK


def _losses_of(parts: Parts, items: Sequence[Item], pictures: Sequence[Image.Image]) -> np.ndarray:
    """The losses (B, K) of one batch."""
    goal = objective.make_objective(parts.prediction, parts.scheduler)
    family = family_named(parts.family)
    device = next(parts.denoiser.parameters()).device
    mean_BCHW, _ = encode_images(parts.vae, torch.from_numpy(to_pixels(pictures)).to(device))
    text = encode_text(parts, [item.caption for item in items])

    def predict(latents_BCHW: torch.Tensor, timestep_B: torch.Tensor, states: TextStates) -> torch.Tensor:
        latents_BCHW, timestep_B = latents_BCHW.to(device), timestep_B.to(device)
        prediction_BCHW: torch.Tensor = family.call_denoiser(parts.denoiser, latents_BCHW, timestep_B, states)
        return prediction_BCHW

    def text_of(rows: Sequence[int]) -> TextStates:
        return text.rows(list(rows))

    keys = [item.sha256 for item in items]
    return objective.per_image_losses(goal, predict, mean_BCHW.cpu().numpy(), keys, text_of, LOSS_BATCH)


def shown(captions: Sequence[str], pictures: Sequence[Image.Image]) -> np.ndarray:
    """1 where a picture shows all its caption says, 0 where it does not, NaN where the caption is not an emblem's."""
    emblems = [parse_caption(caption) for caption in captions]
    pairs = zip(emblems, pictures, strict=True)
    return np.array([np.nan if emblem is None else float(shows(picture, emblem)) for emblem, picture in pairs])


def _draw_prompts(config: Config, parts: Parts, captions: Sequence[str]) -> list[Image.Image]:
    plan, side_px = config.evaluate, config.data.resolution_px
    requests = [
        PictureRequest(
            prompt=caption,
            seed=plan.seed + index,
            steps=plan.sampling_steps,
            guidance_scale=plan.guidance_scale,
            width_px=side_px,
            height_px=side_px,
        )
        for index, caption in enumerate(captions)
    ]
    progress = progress_of("drew", len(requests))
    pictures: list[Image.Image] = []
    for start in range(0, len(requests), SAMPLE_BATCH):
        pictures += draw(parts, requests[start : start + SAMPLE_BATCH])
        progress(len(pictures))
    return pictures


def fingerprint_of(facts: Any) -> str:
    """12 hex digits over anything JSON can hold."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


def to_png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()
