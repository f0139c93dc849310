"""Worker groups that outlive their runs: processes, imports and process groups are paid for once in a search.

A crew is `count` Ray Train groups of `placement.workers` workers each, fed by one exchange (`cluster/exchange.py`). A
run that cannot go on leaves its group alive when all ranks raised the same error at the same place (a non-finite loss);
any other error restarts that group alone. `execute` runs one task to its end, with the signature of
`workers.run_group`.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from cluster import workers
from cluster.errors import WorkerError
from cluster.exchange import ENDED, FAILURE, OVER, STEP, Exchange
from cluster.placement import PlacementSection
from cluster.telemetry import EVAL_LOSS
from cluster.workers import Task

END_LIMIT_S = 60
CALLS_AT_ONCE = 1000  # every waiting run and group is one


@dataclass
class CrewFeed:
    """The feed of a group of a crew: rank 0 talks to the exchange, the others hear from rank 0."""

    exchange: Any
    group: int

    def take(self) -> Task | None:
        while True:
            found = self._ask("take")
            if found == ENDED:
                return None
            if found is not None:
                task: Task = found
                return task

    def go_on(self, metrics: dict[str, float]) -> bool:
        return bool(self._ask("report", metrics))

    def done(self) -> None:
        self._ask("done")

    def failed(self, task: Task, error: Exception) -> bool:
        import ray

        if getattr(type(error), "on_all_ranks", False):
            self._ask("failed", workers.named(error))
            return True
        # Each rank for itself: the others may be waiting in a collective, or be the reason for this error.
        if hasattr(type(error), "exit_code"):
            ray.get(self.exchange.failed.remote(self.group, workers.named(error)))
        elif is_out_of_memory(error):
            ray.get(self.exchange.failed.remote(self.group, _as_worker_error(f"out of memory: {error}")))
        else:
            ray.get(self.exchange.note.remote(self.group, f"{type(error).__name__}: {error}"[-1000:]))
        return False

    def _ask(self, method: str, *arguments: Any) -> Any:
        import ray

        answer = None
        if workers.context().rank == 0:
            answer = ray.get(getattr(self.exchange, method).remote(self.group, *arguments))
        return workers.gather(answer)[0]


class Crew:
    """Context manager: `count` groups that start at once and stay until the block ends."""

    def __init__(self, placement: PlacementSection, count: int, directory: Path, max_restarts: int) -> None:
        self.placement, self.count, self.directory, self.max_restarts = placement, count, directory, max_restarts
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> "Crew":
        import ray
        import ray.train
        import ray.tune  # here: two threads cannot import them at the same time

        self.exchange: Any = ray.remote(Exchange).options(num_cpus=0, max_concurrency=CALLS_AT_ONCE).remote()
        for group in range(self.count):
            thread = threading.Thread(target=self._hold, args=(group,), daemon=True, name=f"group-{group}")
            thread.start()
            self._threads.append(thread)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        import ray

        ray.get(self.exchange.close.remote())
        for thread in self._threads:
            thread.join(END_LIMIT_S if kind is None else 1)
        if not any(thread.is_alive() for thread in self._threads):
            ray.kill(self.exchange)

    def _hold(self, group: int) -> None:
        """Keep one group alive until the exchange sends it home."""
        import ray

        error: Exception | None = WorkerError("its thread died")
        try:
            feed = CrewFeed(self.exchange, group)
            error = workers.fit(feed, self.placement, self.directory / f"group-{group}", self.max_restarts)
        finally:
            if error is not None:
                reason = f"worker group {group} cannot be kept alive; the last error was: {str(error).strip()[-2000:]}"
                ray.get(self.exchange.break_down.remote(reason))

    def offer(self, run_id: str, task: Task, past: list[dict[str, float]], finished: bool) -> None:
        """Make a run known to the exchange; groups compute it when the search advances it."""
        import ray

        ray.get(self.exchange.offer.remote(run_id, task, past, finished, self.placement.max_failures))

    def execute(self, worker: Callable[[Any], None], job: Any, placement: PlacementSection, directory: Path) -> None:
        """Run `worker(job)` to its end on one of the groups; raises what `workers.run_group` raises."""
        import ray

        run_id = str(directory)
        self.offer(run_id, Task.of(worker, job, directory), [], finished=False)
        event: dict[str, Any] = {}
        while FAILURE not in event and not event.get(OVER):
            event = ray.get(self.exchange.advance.remote(run_id))
        if FAILURE not in event:
            event = ray.get(self.exchange.conclude.remote(run_id))
        if FAILURE in event:
            raise workers.rebuild(event[FAILURE])


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of Python, torch or CUDA says that memory is used up."""
    text = str(error).lower()
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in text


def _as_worker_error(message: str) -> dict[str, str]:
    return {"module": "cluster.errors", "name": "WorkerError", "message": message}


def report_of(step: float, loss: float, over: bool) -> dict[str, float]:
    """Return a report as the loop makes them, for telling a run's past again."""
    return {STEP: float(step), EVAL_LOSS: loss, OVER: float(over)}
