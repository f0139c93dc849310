"""Batches: any worker makes any part of any batch, and caption dropout survives caching."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from diffusers import DDIMScheduler

from components.batches import Batch, Captions, SplitData, cached_captions, live_captions, training_batch
from components.encode import EMPTY_ROW, EncodeJob, LatentsTable, make_encoder, open_text, pack_text_table, text_work
from components.models import Parts, TextStates, encode_text, family_named, load_parts, make_tiny, save_parts
from components.noise import draws_at, sample_indexes
from components.objective import loss_weights, make_objective, timesteps_of
from components.recipe import TrainSection
from components.replay import OldAndNew, replayed_indexes
from components.store import ShardStore

CAPTIONS = ["a red circle", "a blue square", "", "a red circle", "a blue square on red", "rouge"]
SHAPE = (4, 4, 4)


def split_of(captions: Captions) -> SplitData:
    rng = np.random.default_rng(0)
    mean = rng.standard_normal((len(CAPTIONS), *SHAPE)).astype(np.float32)
    spread = rng.random((len(CAPTIONS), *SHAPE)).astype(np.float32)
    return SplitData([f"{i:064x}" for i in range(len(CAPTIONS))], LatentsTable(mean, spread), captions)


def objective_of(parts: Parts):  # type: ignore[no-untyped-def]
    return make_objective(parts.prediction, parts.scheduler)


@pytest.fixture(scope="module")
def plain() -> tuple[Parts, SplitData]:
    parts = make_tiny("stable_diffusion")
    return parts, split_of(live_captions(parts, CAPTIONS))


@pytest.fixture(scope="module", params=["stable_diffusion", "z_image"])
def cached(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Parts, Captions]:
    """Captions as `prepare` caches them: encoded in blocks, stored in shards, packed in a table."""
    directory = tmp_path_factory.mktemp(request.param)
    save_parts(make_tiny(request.param), directory / "base")
    job = EncodeJob(directory / "base", directory / "pixels", directory / "latents", directory / "text")
    encode = make_encoder(job)
    for block in text_work(CAPTIONS, rows=2):
        encode(block)
    store = ShardStore(job.text)
    assert isinstance(next(iter(store.read(store.keys(), ["num_tokens"]))), pa.Table)
    pack_text_table(store, CAPTIONS, directory / "table")
    return load_parts(directory / "base"), cached_captions(open_text(directory / "table"))


def concatenated(batches: list[Batch]) -> list[torch.Tensor]:
    fields = [
        (
            b.noisy_BCHW,
            b.timestep_B,
            b.text.states_BLD,
            b.text.mask_BL,
            b.target_BCHW,
            b.weight_B,
            torch.tensor(b.indexes),
        )
        for b in batches
    ]
    return [torch.cat(column) for column in zip(*fields, strict=True)]


@pytest.mark.parametrize("share", [1, 2, 4])
def test_batch_dealt_in_parts_is_the_whole_batch(plain: tuple[Parts, SplitData], share: int) -> None:
    parts, data = plain
    train = TrainSection(global_batch=8, caption_dropout=0.5)
    whole = concatenated([training_batch(data, objective_of(parts), train, 3, range(8))])
    dealt = concatenated(
        [training_batch(data, objective_of(parts), train, 3, range(at, at + share)) for at in range(0, 8, share)]
    )
    for left, right in zip(whole, dealt, strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("share", [1, 2, 4])
def test_batch_with_replay_dealt_in_parts_is_the_whole_batch(plain: tuple[Parts, SplitData], share: int) -> None:
    parts, data = plain
    told = OldAndNew(old_rows=np.array([1, 4]), new_rows=np.array([0, 2, 3, 5]))
    data = replace(data, parts=told)
    train = TrainSection(global_batch=8, caption_dropout=0.5, replay_of="emblems@0", replay_fraction=0.25)
    whole = concatenated([training_batch(data, objective_of(parts), train, 3, range(8))])
    dealt = concatenated(
        [training_batch(data, objective_of(parts), train, 3, range(at, at + share)) for at in range(0, 8, share)]
    )
    for left, right in zip(whole, dealt, strict=True):
        assert torch.equal(left, right)
    assert whole[-1].tolist() == replayed_indexes(train.seed, 3, range(8), 8, told, 0.25).tolist()
    assert np.isin(whole[-1].numpy(), told.old_rows).sum() == 2


def test_batch_is_made_of_the_draws_of_its_positions(plain: tuple[Parts, SplitData]) -> None:
    parts, data = plain
    train = TrainSection(global_batch=8, seed=5, weighting="min_snr", caption_dropout=0)
    objective = make_objective("v_prediction", parts.scheduler, "uniform", "min_snr", 2.0)
    batch = training_batch(data, objective, train, 2, [3, 6])
    draws = draws_at(5, 2, [3, 6], 8, SHAPE)
    assert batch.indexes.tolist() == sample_indexes(5, 2, [3, 6], 8, len(CAPTIONS)).tolist()
    mean, spread = (torch.from_numpy(t[batch.indexes]) for t in (data.latents.mean, data.latents.spread))
    latents = mean + spread * draws.latent_noise_BCHW
    assert torch.equal(batch.timestep_B, timesteps_of(objective, draws.level_B))
    scheduler = DDIMScheduler.from_config(parts.scheduler.config)
    expected = scheduler.add_noise(latents, draws.noise_BCHW, batch.timestep_B)
    torch.testing.assert_close(batch.noisy_BCHW, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        batch.target_BCHW, scheduler.get_velocity(latents, draws.noise_BCHW, batch.timestep_B), rtol=1e-5, atol=1e-5
    )
    assert torch.equal(batch.weight_B, loss_weights(objective, batch.timestep_B))


def test_tables_are_never_written_to(plain: tuple[Parts, SplitData]) -> None:
    parts, data = plain
    before = data.latents.mean.copy()
    batch = training_batch(data, objective_of(parts), TrainSection(global_batch=4), 0, range(4))
    batch.noisy_BCHW.zero_()
    batch.text.states_BLD.zero_()
    assert np.array_equal(data.latents.mean, before)
    assert np.asarray(data.captions.values).any()


@pytest.mark.parametrize("dropout", [0.0, 0.5, 1.0])
def test_caption_dropout_of_cached_states_and_of_live_captions_agree(
    cached: tuple[Parts, Captions], dropout: float
) -> None:
    parts, table = cached
    family = family_named(parts.family)
    train = TrainSection(global_batch=12, caption_dropout=dropout)
    from_cache = training_batch(split_of(table), objective_of(parts), train, 1, range(12))
    from_ids = training_batch(split_of(live_captions(parts, CAPTIONS)), objective_of(parts), train, 1, range(12))
    dropped = draws_at(0, 1, range(12), 12, SHAPE).dropped_B.numpy() < dropout
    assert dropped.sum() == {0.0: 0, 1.0: 12}.get(dropout, dropped.sum())

    expected = ["" if drop else CAPTIONS[i] for drop, i in zip(dropped, from_cache.indexes, strict=True)]
    text = encode_text(parts, expected)
    ids_BL, mask_BL = from_ids.text.states_BLD, from_ids.text.mask_BL
    with torch.no_grad():
        live = TextStates(family.encode_ids(parts.text_encoder, ids_BL, mask_BL), mask_BL)
        predictions = [
            family.call_denoiser(parts.denoiser, from_cache.noisy_BCHW, from_cache.timestep_B, states)
            for states in (from_cache.text, live, text)
        ]
    for row, mask_L in enumerate(from_cache.text.mask_BL):
        length = int(mask_L.sum())
        assert length == int(mask_BL[row].sum()) == int(text.mask_BL[row].sum())
        # Blocks of other sizes move fp32 states by about 1e-6.
        torch.testing.assert_close(
            from_cache.text.states_BLD[row, :length], live.states_BLD[row, :length], rtol=1e-4, atol=1e-5
        )
    for prediction in predictions[1:]:
        torch.testing.assert_close(predictions[0], prediction, rtol=1e-4, atol=1e-5)


def test_dropped_share_is_the_configured_one(plain: tuple[Parts, SplitData]) -> None:
    parts, data = plain
    train = TrainSection(global_batch=64, caption_dropout=0.25)
    empty = data.captions.values[EMPTY_ROW]
    named = [i for i, caption in enumerate(CAPTIONS) if caption]
    kept = total = 0
    for step in range(20):
        batch = training_batch(data, objective_of(parts), train, step, range(64))
        rows = np.isin(batch.indexes, named)
        total += rows.sum()
        kept += (batch.text.states_BLD.numpy()[rows] != empty).any(axis=1).sum()
    # About 1,070 samples: standard error 0.013.
    assert abs(1 - kept / total - 0.25) < 0.05


def test_live_captions_keep_one_row_for_each_distinct_caption_and_the_empty_one_first() -> None:
    parts = make_tiny("stable_diffusion")
    captions = live_captions(parts, ["b", "a", "b"])
    assert captions.rows_N.tolist() == [2, 1, 2]
    assert len(captions.values) == 3
    empty = family_named(parts.family).tokenize(parts.tokenizer, [""])[0]
    assert np.array_equal(captions.values[EMPTY_ROW], empty[0].numpy())
