"""Every random draw of a run, from a counter instead of a state: noise, timesteps, caption dropout, data order.

Each sample's draws come from its own Philox generator (Salmon et al. 2011) keyed by the run's seed and counted by
(step, position in the global batch). Rank, worker count, micro batch and interruptions cannot change them: this is
why two placements train the same model and a resumed run continues exactly.

Shape letters: B samples, C channels, H, W latent height and width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

SAMPLE_STREAM, ORDER_STREAM, VALIDATION_STREAM, OLD_ORDER_STREAM, OLD_PLACE_STREAM = range(5)


@dataclass(frozen=True)
class Draws:
    """What chance decides about some samples of one step."""

    noise_BCHW: Tensor
    latent_noise_BCHW: Tensor
    """Where in the posterior of the autoencoder the latents are taken."""
    level_B: Tensor
    """Uniform in [0, 1), one stratum of the global batch each: the timestep before any density is applied."""
    dropped_B: Tensor
    """Uniform in [0, 1), compared with the caption dropout."""


def generator_at(seed: int, stream: int, step: int, position: int) -> np.random.Generator:
    """Return the generator of one sample; counters of different (step, position) are 2^128 draws apart."""
    # Unsigned on purpose: a list with a number above 2^63 would go through float64 and lose its low bits.
    key = np.array([seed, stream], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, position, step]))


def draws_at(seed: int, step: int, positions: Sequence[int], global_batch: int, shape: tuple[int, ...]) -> Draws:
    """Return the draws of the samples at `positions` of the global batch; `shape` is (C, H, W).

    Levels are stratified over the global batch (position p falls into [p/G, (p+1)/G)): the samples' order is random
    already, and an even spread of timesteps makes the loss less noisy.
    """
    noise = np.empty((2, len(positions), *shape), dtype=np.float32)
    uniform = np.empty((2, len(positions)), dtype=np.float64)
    for row, position in enumerate(positions):
        generator = generator_at(seed, SAMPLE_STREAM, step, position)
        uniform[:, row] = generator.random(2)
        noise[:, row] = generator.standard_normal((2, *shape), dtype=np.float32)
    levels = (np.asarray(positions) + uniform[0]) / global_batch
    return Draws(
        noise_BCHW=torch.from_numpy(noise[0]),
        latent_noise_BCHW=torch.from_numpy(noise[1]),
        level_B=torch.from_numpy(levels),
        dropped_B=torch.from_numpy(uniform[1]),
    )


def sample_indexes(seed: int, step: int, positions: Sequence[int], global_batch: int, num_samples: int) -> np.ndarray:
    """Return which samples stand at `positions` of step `step`: every epoch is its own permutation, without gaps."""
    return samples_at(seed, step * global_batch + np.asarray(positions, dtype=np.int64), num_samples)


def samples_at(seed: int, places: np.ndarray, num_samples: int, stream: int = ORDER_STREAM) -> np.ndarray:
    """Return which samples stand at these places (counted over the whole run) of a stream's epochs."""
    epochs = places // num_samples
    indexes = np.empty(len(places), dtype=np.int64)
    for epoch in np.unique(epochs):
        order = epoch_order(seed, int(epoch), num_samples, stream)
        indexes[epochs == epoch] = order[places[epochs == epoch] % num_samples]
    return indexes


_last_orders: dict[tuple[int, int, int, int], np.ndarray] = {}
KEPT_ORDERS = 4
"""A batch may span the border of two epochs, of new and of old pictures."""


def epoch_order(seed: int, epoch: int, num_samples: int, stream: int = ORDER_STREAM) -> np.ndarray:
    """Return the permutation of one epoch; the last ones are kept."""
    key = (seed, epoch, num_samples, stream)
    if key not in _last_orders:
        while len(_last_orders) >= KEPT_ORDERS:
            _last_orders.pop(next(iter(_last_orders)))
        _last_orders[key] = generator_at(seed, stream, epoch, 0).permutation(num_samples)
    return _last_orders[key]


def validation_draws(sha256: str, num_bands: int, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return (noise (bands, C, H, W), level (bands,)) of one validation picture: a function of its bytes alone.

    Band k's level is uniform in [k/bands, (k+1)/bands), so every picture is measured in every band.
    """
    key = np.array([int(sha256[:16], 16), VALIDATION_STREAM], dtype=np.uint64)
    generator = np.random.Generator(np.random.Philox(key=key))
    level = (np.arange(num_bands) + generator.random(num_bands)) / num_bands
    noise = generator.standard_normal((num_bands, *shape), dtype=np.float32)
    return torch.from_numpy(noise), torch.from_numpy(level)
