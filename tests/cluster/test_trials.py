"""Tune's part of a search, with a thread in the place of the worker group: stopping, failing, budgets, continuing."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import WorkerError
from cluster.exchange import ENDED, FAILURE, OVER, Exchange
from cluster.telemetry import EVAL_LOSS
from cluster.trials import Rules, run_trials
from cluster.workers import rebuild

pytestmark = pytest.mark.slow  # Ray Tune with real actors

STEPS, EVERY = 18, 2
# Trial by trial: how fast the loss falls. 99 fails, 0 reports a loss that is not a number.
SPEEDS = (3.0, 1.0, 99.0, 0.5, 0.0, 4.0, 2.0)


class Fixed:
    """A director whose trials are known beforehand."""

    def __init__(self, exchange: Any, budget: int = 10**9) -> None:
        self.exchange, self.budget = exchange, budget
        self.curves: dict[int, list[tuple[float, float]]] = {}
        self.ends: dict[int, str] = {}
        self.past: dict[int, tuple[list[dict[str, float]], bool]] = {}
        self._next = 0

    def next_trial(self) -> tuple[int, str] | None:
        import ray

        if self._next == len(SPEEDS):
            return None
        number, self._next = self._next, self._next + 1
        past, finished = self.past.get(number, ([], False))
        ray.get(self.exchange.offer.remote(f"run-{number}", number, past, finished, 3))
        return number, f"run-{number}"

    def reported(self, number: int, report: dict[str, Any]) -> None:
        if FAILURE in report:
            self.ends[number] = f"failed: {rebuild(report[FAILURE])}"
        elif EVAL_LOSS in report:
            self.curves.setdefault(number, []).append((report["step"], report[EVAL_LOSS]))

    def ended(self, number: int, stopped: bool) -> None:
        self.ends.setdefault(number, "stopped" if stopped else "complete")

    def spent(self) -> bool:
        return sum(curve[-1][0] for curve in self.curves.values()) >= self.budget


def pretend_to_train(exchange: Any, computed: list[int]) -> None:
    """What rank 0 of a group does."""
    import ray

    while (number := ray.get(exchange.take.remote(0))) != ENDED:
        if number is None:
            continue
        computed.append(number)
        if SPEEDS[number] == 99:
            failure = {"module": "cluster.errors", "name": "WorkerError", "message": "out of memory"}
            ray.get(exchange.failed.remote(0, failure))
            continue
        for step in range(0, STEPS + 1, EVERY):
            loss = 1 / (1 + SPEEDS[number] * step) if SPEEDS[number] else float("nan")
            report = {"step": float(step), EVAL_LOSS: loss, OVER: float(step == STEPS)}
            if not ray.get(exchange.report.remote(0, report)):
                break
        ray.get(exchange.done.remote(0))


@pytest.fixture
def group(ray_session: None) -> Iterator[tuple[Any, list[int]]]:
    import ray

    exchange = ray.remote(Exchange).options(num_cpus=0, max_concurrency=100).remote()
    computed: list[int] = []
    thread = threading.Thread(target=pretend_to_train, args=(exchange, computed))
    thread.start()
    yield exchange, computed
    ray.get(exchange.close.remote())
    thread.join(60)
    assert not thread.is_alive()
    ray.kill(exchange)


def rules(scheduler: str = "asha") -> Rules:
    return Rules(len(SPEEDS), 1, scheduler, STEPS, grace_steps=2, reduction_factor=3)


def test_asha_stops_the_slow_ones_and_bad_trials_do_not_end_the_search(
    group: tuple[Any, list[int]], tmp_path: Path
) -> None:
    exchange, computed = group
    director = Fixed(exchange)
    run_trials(rules(), director, exchange, tmp_path / "tune")
    assert computed == list(range(len(SPEEDS)))
    assert director.ends[0] == director.ends[5] == "complete"
    assert director.ends[1] == director.ends[3] == "stopped"
    assert director.ends[2] == f"failed: {WorkerError('out of memory')}"
    assert "finite validation loss, found nan at step 0" in director.ends[4]
    assert director.curves[3][-1][0] == 2, "stopped at the first rung"
    assert not (tmp_path / "tune").exists()

    # A later command is told everything again: nothing is computed, and everything ends as it did.
    again = Fixed(exchange)
    for number, curve in director.curves.items():
        over = director.ends[number] == "complete"
        past = [{"step": step, EVAL_LOSS: loss, OVER: float(over and step == STEPS)} for step, loss in curve]
        again.past[number] = past, True
    run_trials(rules(), again, exchange, tmp_path / "tune")
    assert [number for number in computed[len(SPEEDS) :] if number not in (2, 4)] == [], "only failed ones came again"
    assert again.ends == director.ends and again.curves == director.curves


@pytest.mark.parametrize("scheduler", ["median", "none"])
def test_other_schedulers_by_name(group: tuple[Any, list[int]], tmp_path: Path, scheduler: str) -> None:
    exchange, _ = group
    director = Fixed(exchange, budget=60)
    run_trials(rules(scheduler), director, exchange, tmp_path / "tune")
    spent = sum(curve[-1][0] for curve in director.curves.values())
    assert 60 <= spent <= 60 + EVERY, "the budget is kept to an evaluation"
    assert (director.curves[3][-1][0] < STEPS) == (scheduler == "median")
