"""Let one model denoise the test pictures and draw the test prompts; keep what it did, so that it is done once.

What is kept is named by the model's weights and by what it was given, never by the name of a model or of a dataset
version: the same model under another name, or as the base of another run, is not measured twice. Nothing is averaged
here. Shape letters: N test pictures, K timestep bands, P prompts, Q prompts drawn from S seeds, D feature width,
B batch, C channels, H, W height and width.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from cluster import stage
from cluster.artifacts import Workspace, write_bytes_atomic
from components import objective
from components.clip_encoder import ClipEncoder
from components.dataset import TEST, DatasetVersion, Item
from components.emblem_reader import shows
from components.emblems import parse_caption
from components.encode import pixels_name, table_name
from components.errors import InputError, NonFiniteError
from components.images import PREPROCESSING_VERSION, to_pixels
from components.models import Parts, TextStates, encode_images, encode_text, family_named, load_parts
from components.sampler import PictureRequest
from components.store import KEY, ShardStore
from flows.config import Config
from flows.console import say
from flows.drawing import ensure_drawn, fingerprint_of
from flows.encode import progress_of

VERSION = 2
"""Raise it when the same model and data would be measured differently."""
MAX_LOSS_PICTURES = 2000
"""The first by hash; beyond that the interval is narrow and only the wait grows."""
LOSS_BATCH = 16
FEATURE_BATCH = 64
SEED_STRIDE = 1_000_003
"""Between a prompt's first seed and its next. Not a power of two: torch's generator reads the low 32 bits only."""


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
    """What one model did: losses_NK for each picture and band, a drawn picture for each prompt.

    `by_seed` holds, for the first Q prompts, their pictures from S seeds; the first is the one in `drawn`.
    """

    losses_NK: np.ndarray
    drawn: list[Image.Image]
    by_seed: list[list[Image.Image]] = field(default_factory=list)


def held_out(config: Config, workspace: Workspace, dataset: DatasetVersion) -> HeldOut:
    """The test pictures and, of those, the first captions by hash as prompts; InputError when there are none."""
    items = dataset.split(TEST)
    if not items:
        raise InputError(
            f"data.test_fraction expected to leave pictures for the scorecard, found none among {len(dataset.items)} of"
            f" {dataset.id}; add pictures or raise data.test_fraction"
        )
    pixels = workspace.encoded / pixels_name(config.data.resolution_px)
    stage.fetch_tree(pixels)
    return HeldOut(dataset, items[:MAX_LOSS_PICTURES], items[: config.evaluate.prompts], pixels)


def measure(config: Config, workspace: Workspace, directory: Path, fingerprint: str, data: HeldOut) -> Performance:
    """Let the model in `directory` denoise and draw, or read what it did before; NonFiniteError for broken weights."""
    losses_NK = _ensure_losses(workspace, directory, fingerprint, data)
    requests = [_request(config, caption, config.evaluate.seed + row) for row, caption in enumerate(data.captions)]
    return Performance(losses_NK, ensure_drawn(config.placement, workspace, directory, fingerprint, requests))


def draw_seeds(
    config: Config, workspace: Workspace, directory: Path, fingerprint: str, drawn: list[Image.Image], data: HeldOut
) -> list[list[Image.Image]]:
    """The pictures of the first few prompts from several seeds, the one in `drawn` first; none where one is asked."""
    plan = config.evaluate
    if plan.seeds_per_prompt == 1 or plan.diversity_prompts == 0:
        return []
    extra = plan.seeds_per_prompt - 1
    captions = data.captions[: plan.diversity_prompts]
    requests = [
        _request(config, caption, plan.seed + row + number * SEED_STRIDE)
        for row, caption in enumerate(captions)
        for number in range(1, plan.seeds_per_prompt)
    ]
    more = ensure_drawn(config.placement, workspace, directory, fingerprint, requests)
    return [[drawn[row], *more[row * extra : (row + 1) * extra]] for row in range(len(captions))]


def _request(config: Config, caption: str, seed: int) -> PictureRequest:
    plan, side_px = config.evaluate, config.data.resolution_px
    return PictureRequest(caption, seed, plan.sampling_steps, plan.guidance_scale, width_px=side_px, height_px=side_px)


def _ensure_losses(workspace: Workspace, directory: Path, fingerprint: str, data: HeldOut) -> np.ndarray:
    """The losses (N, K) of the test pictures, from an earlier call where there was one."""
    if not data.pictures:
        return np.empty((0, objective.NUM_BANDS))
    given = [data.pixels.name, PREPROCESSING_VERSION, [(item.sha256, item.caption) for item in data.pictures]]
    path = workspace.reports / "measured" / f"losses-{fingerprint_of([VERSION, fingerprint, given])}.npy"
    if stage.fetch(path):
        losses_NK: np.ndarray = np.load(path, allow_pickle=False)
        return losses_NK
    say(f"  {directory}: {len(data.pictures)} pictures to denoise")
    parts = load_parts(directory, device="cuda" if torch.cuda.is_available() else "cpu")
    losses_NK = denoising_losses(parts, data.pictures, data.pixels)
    if not np.isfinite(losses_NK).all():
        raise NonFiniteError(f"expected finite losses, found NaN or infinity from {directory}; its weights are broken")
    write_bytes_atomic(path, npy_bytes(losses_NK))
    return losses_NK


def features_of(workspace: Workspace, encoder: ClipEncoder, pixels: Path, keys: Sequence[str]) -> np.ndarray:
    """Features (N, D) of stored pictures, row i for keys[i], computed once for an encoder and a list of pictures."""
    path = workspace.encoded / f"features-{encoder.identity}-{pixels.name}" / f"{table_name('pictures', keys)}.npy"
    if stage.fetch(path):
        kept: np.ndarray = np.load(path, allow_pickle=False)
        return kept
    row_of = {key: row for row, key in enumerate(keys)}
    features_ND = np.empty((len(keys), encoder.images([]).shape[1]), np.float32)
    progress, done = progress_of("encoded", len(keys)), 0
    for table in ShardStore(pixels).read(list(row_of), ["png"]):
        for chunk in table.to_batches(max_chunksize=FEATURE_BATCH):
            rows = [row_of[key] for key in chunk[KEY].to_pylist()]
            features_ND[rows] = encoder.images([Image.open(io.BytesIO(png)) for png in chunk["png"].to_pylist()])
            done += len(rows)
            progress(done)
    write_bytes_atomic(path, npy_bytes(features_ND))
    return features_ND


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


def npy_bytes(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, values, allow_pickle=False)
    return file.getvalue()
