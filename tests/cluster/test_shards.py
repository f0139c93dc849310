"""Blocks mapped on real Ray Data actors in a session of two logical CPUs."""

import errno
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest

from cluster.errors import PlacementError, StorageError, WorkerError
from cluster.shards import ActorPool, map_blocks

BLOCKS = [pa.table({"number": [first, first + 1]}) for first in range(0, 10, 2)]


def make_multiplier(factor: int) -> Callable[[pa.Table], pa.Table]:
    return lambda block: pa.table(
        {"product": [factor * number for number in block["number"].to_pylist()], "pid": [os.getpid()] * len(block)}
    )


def make_failing(error: Exception) -> Callable[[pa.Table], pa.Table]:
    def fail(block: pa.Table) -> pa.Table:
        raise error

    return fail


def make_dying(_: Any) -> Callable[[pa.Table], pa.Table]:
    def die(block: pa.Table) -> pa.Table:
        os.kill(os.getpid(), signal.SIGKILL)
        return block

    return die


def test_every_block_is_mapped_once_in_other_processes(ray_session: Any, capfd: pytest.CaptureFixture[str]) -> None:
    results = list(map_blocks(BLOCKS, make_multiplier, 3, ActorPool(actors=2)))
    assert sorted(number for table in results for number in table["product"].to_pylist()) == [3 * n for n in range(10)]
    assert os.getpid() not in {pid for table in results for pid in table["pid"].to_pylist()}
    assert capfd.readouterr().err == ""


def test_more_actors_than_fit_still_finish(ray_session: Any) -> None:
    results = list(map_blocks(BLOCKS, make_multiplier, 1, ActorPool(actors=50)))
    assert sum(len(table) for table in results) == 10


def test_no_blocks_need_no_session() -> None:
    assert list(map_blocks([], make_multiplier, 1, ActorPool(actors=1))) == []


def test_an_actor_that_can_never_be_placed_is_refused_at_once(ray_session: Any) -> None:
    with pytest.raises(PlacementError, match=r"needs 1000 CPU, the Ray session has .* lower placement.cpus_per_worker"):
        list(map_blocks(BLOCKS, make_multiplier, 1, ActorPool(actors=1, cpus=1000)))


@pytest.mark.parametrize(
    ("error", "expected", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "x.parquet"), StorageError, r"No space left.*\(x\.parquet\)"),
        (StorageError("expected a bucket, found none"), StorageError, r"^expected a bucket, found none$"),
        (ArithmeticError("odd"), WorkerError, r"^a data worker failed with ArithmeticError: odd; finished shards"),
    ],
)
def test_a_worker_error_arrives_in_its_own_class_with_its_own_words(
    ray_session: Any, error: Exception, expected: type[Exception], message: str
) -> None:
    with pytest.raises(expected, match=message):
        list(map_blocks(BLOCKS[:1], make_failing, error, ActorPool(actors=1)))


def test_a_killed_worker_on_one_machine_is_told_instead_of_started_for_ever(ray_session: Any) -> None:
    with pytest.raises(WorkerError, match=r"^a data worker failed with .*finished shards are kept"):
        list(map_blocks(BLOCKS[:1], make_dying, None, ActorPool(actors=1)))


def test_after_a_failure_its_actors_give_their_cpus_back(ray_session: Any) -> None:
    import ray

    with pytest.raises(StorageError) as held:
        list(map_blocks(BLOCKS, make_failing, StorageError("full"), ActorPool(actors=2)))
    deadline = time.monotonic() + 30
    while ray.available_resources().get("CPU", 0) < ray.cluster_resources()["CPU"]:
        assert time.monotonic() < deadline, f"actors still there while {held.value!r} is held"
        time.sleep(0.1)
