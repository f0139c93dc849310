"""What one forward pass is fed: latents, noise, timesteps and captions of given positions of the global batch.

Everything random comes from `noise.py` by (seed, step, position), everything else from tables in memory maps; so any
worker can make any part of any batch. Captions are cached text states, or token ids when the text encoder trains;
either way row 0 is the empty caption that caption dropout chooses.

Shape letters: B samples, C channels, H, W latent height and width, L tokens, D width, N pictures, U distinct captions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from components.encode import EMPTY_CAPTION, EMPTY_ROW, LatentsTable, TextTable
from components.models import Parts, TextStates, family_named
from components.noise import draws_at, sample_indexes
from components.objective import Objective, loss_weights, noised, timesteps_of
from components.recipe import TrainSection
from components.replay import OldAndNew, replayed_indexes


@dataclass(frozen=True)
class Captions:
    """Captions of one split: `values` are states (U, L, D) or token ids (U, L)."""

    values: Any
    mask_UL: Any
    rows_N: np.ndarray

    def at(self, indexes: Sequence[int] | np.ndarray, dropped_B: np.ndarray | None = None) -> TextStates:
        """Return the captions of these pictures, the empty one where `dropped_B` is true."""
        rows = self.rows_N[np.asarray(indexes)]
        if dropped_B is not None:
            rows = np.where(dropped_B, EMPTY_ROW, rows)
        return TextStates(torch.from_numpy(np.array(self.values[rows])), torch.from_numpy(np.array(self.mask_UL[rows])))


@dataclass(frozen=True)
class SplitData:
    """One split in memory maps; row i belongs to picture keys[i] (sha256)."""

    keys: list[str]
    latents: LatentsTable
    captions: Captions
    parts: OldAndNew | None = None
    """Which rows are replayed and which are new; None: all are alike."""


@dataclass(frozen=True)
class Batch:
    """Inputs and targets of one forward pass."""

    noisy_BCHW: Tensor
    timestep_B: Tensor
    text: TextStates
    target_BCHW: Tensor
    weight_B: Tensor
    indexes: np.ndarray


def cached_captions(table: TextTable) -> Captions:
    """Captions whose states were computed by `prepare`."""
    return Captions(table.states, table.mask, table.rows)


def live_captions(parts: Parts, captions: Sequence[str]) -> Captions:
    """Captions as token ids, for a text encoder that trains."""
    distinct = [EMPTY_CAPTION, *sorted(set(captions) - {EMPTY_CAPTION})]
    row_of = {caption: row for row, caption in enumerate(distinct)}
    ids_UL, mask_UL = family_named(parts.family).tokenize(parts.tokenizer, distinct)
    rows = np.array([row_of[caption] for caption in captions], dtype=np.int64)
    return Captions(ids_UL.numpy(), mask_UL.numpy(), rows)


def training_batch(
    data: SplitData, objective: Objective, train: TrainSection, step: int, positions: Sequence[int]
) -> Batch:
    """Make the samples at `positions` of the global batch of one step."""
    indexes = _rows_at(data, train, step, positions)
    shape = tuple(data.latents.mean.shape[1:])
    draws = draws_at(train.seed, step, positions, train.global_batch, shape)
    mean_BCHW = torch.from_numpy(np.array(data.latents.mean[indexes]))
    spread_BCHW = torch.from_numpy(np.array(data.latents.spread[indexes]))
    latents_BCHW = mean_BCHW + spread_BCHW * draws.latent_noise_BCHW
    timestep_B = timesteps_of(objective, draws.level_B)
    noisy_BCHW, target_BCHW = noised(objective, latents_BCHW, draws.noise_BCHW, timestep_B)
    text = data.captions.at(indexes, draws.dropped_B.numpy() < train.caption_dropout)
    return Batch(noisy_BCHW, timestep_B, text, target_BCHW, loss_weights(objective, timestep_B), indexes)


def _rows_at(data: SplitData, train: TrainSection, step: int, positions: Sequence[int]) -> np.ndarray:
    if data.parts is None:
        return sample_indexes(train.seed, step, positions, train.global_batch, len(data.keys))
    return replayed_indexes(train.seed, step, positions, train.global_batch, data.parts, train.replay_fraction)
