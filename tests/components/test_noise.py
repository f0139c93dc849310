"""The counter-based draws: no rank, worker count or history can change them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from components.noise import draws_at, epoch_order, sample_indexes, validation_draws

SHAPE = (2, 3, 3)
FIELDS = ("noise_BCHW", "latent_noise_BCHW", "level_B", "dropped_B")


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**63 - 1), step=st.integers(0, 2**40), workers=st.sampled_from([1, 2, 3, 4, 6]), data=st.data()
)
def test_draws_dealt_to_workers_and_micro_batches_are_the_draws_of_the_whole_batch(
    seed: int, step: int, workers: int, data: st.DataObject
) -> None:
    batch = 12
    whole = draws_at(seed, step, range(batch), batch, SHAPE)
    share = batch // workers
    micro = data.draw(st.sampled_from([size for size in range(1, share + 1) if share % size == 0]))
    parts = [draws_at(seed, step, range(at, at + micro), batch, SHAPE) for at in range(0, batch, micro)]
    for field in FIELDS:
        dealt = torch.cat([getattr(part, field) for part in parts])
        assert torch.equal(dealt, getattr(whole, field)), field


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32), step=st.integers(0, 10**6), batch=st.integers(1, 40))
def test_levels_fall_one_into_each_stratum_of_the_global_batch(seed: int, step: int, batch: int) -> None:
    level = draws_at(seed, step, range(batch), batch, SHAPE).level_B
    assert level.dtype == torch.float64
    assert torch.equal((level * batch).floor().long(), torch.arange(batch))


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    num_samples=st.integers(1, 25),
    batch=st.integers(1, 30),
    epochs=st.integers(1, 4),
)
def test_every_epoch_is_a_permutation_whatever_the_batch_size(
    seed: int, num_samples: int, batch: int, epochs: int
) -> None:
    steps = -(-epochs * num_samples // batch)
    order = np.concatenate([sample_indexes(seed, step, range(batch), batch, num_samples) for step in range(steps)])
    for epoch in range(epochs):
        part = order[epoch * num_samples : (epoch + 1) * num_samples]
        assert sorted(part.tolist()) == list(range(num_samples))


def test_sample_indexes_of_one_position_are_those_of_the_whole_batch_across_an_epoch_border() -> None:
    whole = sample_indexes(3, 4, range(8), 8, 5)
    alone = [sample_indexes(3, 4, [position], 8, 5)[0] for position in range(8)]
    assert whole.tolist() == alone


def test_epochs_of_one_run_and_of_two_seeds_are_in_different_orders() -> None:
    orders = [epoch_order(seed, epoch, 50).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4


@pytest.mark.parametrize("other", [(1, 0, 0), (0, 1, 0), (0, 0, 1)], ids=["seed", "step", "position"])
def test_draws_differ_in_seed_step_and_position_alone(other: tuple[int, int, int]) -> None:
    first = draws_at(0, 0, [0], 4, SHAPE)
    again = draws_at(0, 0, [0], 4, SHAPE)
    second = draws_at(other[0], other[1], [other[2]], 4, SHAPE)
    for field in FIELDS:
        assert torch.equal(getattr(first, field), getattr(again, field))
        assert not torch.equal(getattr(first, field), getattr(second, field)), field


def test_noise_is_standard_normal_and_uniforms_are_uniform() -> None:
    draws = draws_at(0, 0, range(2000), 2000, SHAPE)
    # 36,000 values: the mean's standard error is 0.005, the deviation's 0.004.
    for noise in (draws.noise_BCHW, draws.latent_noise_BCHW):
        assert abs(noise.mean().item()) < 0.025
        assert abs(noise.std().item() - 1) < 0.02
    together = torch.stack([draws.noise_BCHW.flatten(), draws.latent_noise_BCHW.flatten()])
    assert abs(torch.corrcoef(together)[0, 1].item()) < 0.025
    # 2,000 values: standard error 0.0065.
    assert abs(draws.dropped_B.mean().item() - 0.5) < 0.03


def test_validation_draws_depend_on_the_picture_alone_and_cover_every_band() -> None:
    noise, level = validation_draws("ab" * 32, 4, SHAPE)
    again, same = validation_draws("ab" * 32, 4, SHAPE)
    other, _ = validation_draws("ac" * 32, 4, SHAPE)
    assert torch.equal(noise, again) and torch.equal(level, same)
    assert not torch.equal(noise, other)
    assert (level * 4).floor().tolist() == [0, 1, 2, 3]
    assert noise.shape == (4, *SHAPE)


def test_large_keys_keep_their_low_bits() -> None:
    _, highest = validation_draws("f" * 16, 4, SHAPE)
    _, neighbour = validation_draws("f" * 15 + "e", 4, SHAPE)
    assert not torch.equal(highest, neighbour)
    first, second = (draws_at(seed, 0, [0], 1, SHAPE).noise_BCHW for seed in (2**63 - 1, 2**63 - 2))
    assert not torch.equal(first, second)
