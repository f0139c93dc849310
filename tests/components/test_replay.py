"""Replay: the share is met exactly, no placement changes a batch, and no new picture is left out of an epoch."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.replay import OldAndNew, num_old, replayed_indexes, tell_apart

SHARES = st.integers(0, 999).map(lambda thousandths: thousandths / 1000)
PARTS = OldAndNew(old_rows=np.array([0, 3, 4, 7, 9]), new_rows=np.array([1, 2, 5, 6, 8, 10, 11]))


def rows_of(step: int, share: float, global_batch: int = 8, seed: int = 1) -> np.ndarray:
    return replayed_indexes(seed, step, range(global_batch), global_batch, PARTS, share)


@settings(max_examples=60, deadline=None)
@given(share=SHARES, global_batch=st.integers(1, 40), seed=st.integers(0, 2**63 - 1), first=st.integers(0, 10**9))
def test_share_is_met_within_one_picture_in_every_batch_and_exactly_over_the_run(
    share: float, global_batch: int, seed: int, first: int
) -> None:
    counts = []
    for step in range(first, first + 6):
        rows = replayed_indexes(seed, step, range(global_batch), global_batch, PARTS, share)
        counts.append(int(np.isin(rows, PARTS.old_rows).sum()))
    assert all(abs(count - share * global_batch) < 1 for count in counts)
    thousandths = round(share * 1000)
    expected = [step * global_batch * thousandths // 1000 for step in (first, first + 6)]
    assert sum(counts) == expected[1] - expected[0]


def test_whole_numbers_do_not_drift_where_floats_would() -> None:
    assert num_old(10 * 3, 0.1) == 3
    assert num_old(10**15, 0.1) == 10**14
    assert num_old(10**17 * 3 + 10, 0.3) == 10**16 * 9 + 3


@settings(max_examples=60, deadline=None)
@given(share=SHARES, step=st.integers(0, 10**6), workers=st.sampled_from([1, 2, 3, 4, 6]), data=st.data())
def test_rows_dealt_to_workers_and_micro_batches_are_the_rows_of_the_whole_batch(
    share: float, step: int, workers: int, data: st.DataObject
) -> None:
    batch = 12
    per_worker = batch // workers
    micro = data.draw(st.sampled_from([size for size in range(1, per_worker + 1) if per_worker % size == 0]))
    whole = replayed_indexes(3, step, range(batch), batch, PARTS, share)
    dealt = [replayed_indexes(3, step, range(at, at + micro), batch, PARTS, share) for at in range(0, batch, micro)]
    assert np.concatenate(dealt).tolist() == whole.tolist()


@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 0.5, 0.9])
def test_every_epoch_visits_each_new_picture_once_and_each_old_one_once(share: float) -> None:
    order = np.concatenate([rows_of(step, share) for step in range(400)])
    for rows in (PARTS.old_rows, PARTS.new_rows):
        seen = order[np.isin(order, rows)]
        epochs = len(seen) // len(rows)
        assert epochs >= 3 or (share == 0 and rows is PARTS.old_rows)
        whole = seen[: epochs * len(rows)].reshape(epochs, len(rows))
        assert all(sorted(epoch) == sorted(rows) for epoch in whole.tolist())
        assert len({tuple(epoch) for epoch in whole.tolist()}) >= min(epochs, 20), "each epoch has its own order"


@pytest.mark.parametrize(("share", "global_batch"), [(0.25, 8), (0.5, 6), (0.3, 10), (0.07, 5)])
def test_every_position_holds_old_pictures_equally_often(share: float, global_batch: int) -> None:
    # A position is a stratum of the timestep: old pictures must see every noise level, and so must new ones.
    steps = 4000
    old = sum(np.isin(rows_of(step, share, global_batch), PARTS.old_rows) for step in range(steps))
    deviation = (steps * share * (1 - share)) ** 0.5
    assert np.abs(old - steps * share).max() < 5 * deviation
    assert old.sum() == num_old(steps * global_batch, share)


def test_old_pictures_stand_spread_over_the_batch() -> None:
    for step in range(50):
        places = np.flatnonzero(np.isin(rows_of(step, 0.25, 16), PARTS.old_rows))
        assert (np.diff(places) == 4).all()


def test_seed_and_step_change_the_batch() -> None:
    batches = {tuple(rows_of(step, 0.5, seed=seed)) for seed in range(5) for step in range(5)}
    assert len(batches) == 25


def test_rows_are_told_apart_by_their_pictures() -> None:
    parts = tell_apart(["a", "b", "c", "d"], {"c", "a", "elsewhere"})
    assert (parts.old_rows.tolist(), parts.new_rows.tolist()) == ([0, 2], [1, 3])
