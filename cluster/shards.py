"""How is one pure function run over many rows on Ray Data actors, without deadlock and without noise?

Rows go in as Arrow blocks (one block is one call, so one shard that the function may write), small result tables come
out as they finish, in any order. What is computed is the caller's business: this file knows no pictures and no text.
It refuses to wait for ever for a CPU or GPU that never comes free.
"""

import errno
import gc
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from cluster.carry import NOTHING, Carry
from cluster.errors import PlacementError, StorageError, WorkerError

ACTOR_WAIT_LIMIT_S = 300
RESTARTS = 3
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)
RAY_DATA_ADDS = re.compile(r"(\n|\\n)Failed to apply UDF transform")  # advice on its settings, put after our message

Work = Callable[[pa.Table], pa.Table]


@dataclass(frozen=True)
class ActorPool:
    """How many actors compute, and what each reserves."""

    actors: int
    cpus: float = 1
    gpus: float = 0


def map_blocks(
    blocks: Sequence[pa.Table],
    make_work: Callable[[Any], Work],
    argument: Any,
    pool: ActorPool,
    carry: Carry = NOTHING,
) -> Iterator[pa.Table]:
    """Yield `make_work(argument)(block)` for every block, as each finishes (order is not kept).

    `make_work` is an importable function; it is called once in each actor. An error in it or in the work is raised
    here in its own class, StorageError when the disk is full. A Ray session must be running. What the work reads and
    writes in a workspace on S3 is in `carry`.
    """
    if not blocks:
        return
    import ray.data
    from ray.exceptions import RayError

    actors = _actors_that_fit(pool, len(blocks))
    _make_quiet()
    with warnings.catch_warnings():
        # Deprecated in Ray 2.60 for 2.64 without a successor, and the only way to bound restarts.
        warnings.simplefilter("ignore", DeprecationWarning)
        results = ray.data.from_arrow(list(blocks)).map_batches(
            _Actor,
            fn_constructor_args=(make_work, argument, carry),
            batch_size=None,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=actors, initial_size=actors),
            num_cpus=pool.cpus,
            num_gpus=pool.gpus,
            ray_remote_args_fn=_restarts,
        )
    failure = None
    try:
        yield from results.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
    except RayError as error:
        failure = _own_error(error)
    if failure is not None:
        # Ray Data's executor keeps its actors, and their CPUs, until the garbage collector meets it. Raised out here
        # without the cause, because the cause's traceback would hold the executor as well.
        del results
        gc.collect()
        raise failure


class _Actor:
    """Holds one worker's state (a loaded encoder, an open connection) between blocks."""

    def __init__(self, make_work: Callable[[Any], Work], argument: Any, carry: Carry) -> None:
        self.carry = carry
        carry.before()
        self.work = make_work(argument)

    def __call__(self, block: pa.Table) -> pa.Table:
        try:
            done = self.work(block)
            self.carry.after()
            return done
        except OSError as error:
            if error.errno in DISK_ERRORS:
                raise StorageError(_disk_message(error)) from error
            raise


def _disk_message(error: OSError) -> str:
    return (
        f"could not write a shard: {error.strerror} ({error.filename or 'workspace'}); free some space or choose"
        " another --workspace, then run the same command again: finished shards are kept"
    )


def _actors_that_fit(pool: ActorPool, num_blocks: int) -> int:
    """Return how many actors the session has room for, at least 1; PlacementError when it can never place one.

    Counted over the whole session, not what is free now: actors that have just ended still count as busy for a
    second, and one actor is enough to go on.
    """
    import ray

    total = ray.cluster_resources()
    room = pool.actors
    for resource, each in (("CPU", pool.cpus), ("GPU", pool.gpus)):
        if each > total.get(resource, 0):
            raise PlacementError(
                f"an encoding worker needs {each:g} {resource}, the Ray session has {total.get(resource, 0):g} in all;"
                f" lower placement.{resource.lower()}s_per_worker"
            )
        if each > 0:
            room = min(room, int(total[resource] / each))
    return max(1, min(room, num_blocks))


def _restarts() -> dict[str, int]:
    """Return how often an actor that died, and its task, are started again.

    Among several machines one may be lost, and another takes its place. On one machine an actor dies for want of
    memory, and would again, for ever by Ray's default.
    """
    import ray

    times = RESTARTS if len(ray.nodes()) > 1 else 0
    return {"max_restarts": times, "max_task_retries": times}


def _make_quiet() -> None:
    """Turn off Ray Data's bars and banners, and bound its wait for a first actor."""
    from ray.data import DataContext

    with warnings.catch_warnings():  # Ray 2.60 sets fields of its own that it has deprecated
        warnings.simplefilter("ignore", DeprecationWarning)
        context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True
    context.wait_for_min_actors_s = ACTOR_WAIT_LIMIT_S
    # What it logs as an error is raised here as well.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)


def _own_error(error: BaseException) -> BaseException:
    """Return the exception that our own function raised, found under Ray's wrappers; WorkerError when there is none."""
    seen: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in seen:
        seen.append(current)
        current = getattr(current, "cause", None) or current.__cause__
    for wrapped in reversed(seen):
        if hasattr(wrapped, "exit_code"):
            return type(wrapped)(RAY_DATA_ADDS.split(str(wrapped))[0])
    innermost = seen[-1]
    unexpected = WorkerError(
        f"a data worker failed with {type(innermost).__name__}: {RAY_DATA_ADDS.split(str(innermost))[0]};"
        " finished shards are kept, so the same command goes on from there"
    )
    unexpected.add_note(str(error))  # with the worker's traceback
    return unexpected
