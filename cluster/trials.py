"""A search on Ray Tune: its controller, schedulers and early stopping around trials that warm worker groups execute.

Tune sees a trial as a relay, an actor without a CPU that hands on reports from the exchange (`cluster/exchange.py`);
relays are reused, and the work is the crew's (`cluster/crew.py`). What a trial is, is the director's business. Nothing
that Tune writes is read again: a search continues from the director's own record, whose trials are told to Tune once
more, so that every scheduler is in the state it would be in.
"""

import logging
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from cluster.exchange import FAILURE, OVER, STEP
from cluster.telemetry import EVAL_LOSS

QUIET_TUNE = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a failed trial has no loss
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000000",  # its snapshots are never read
    "TUNE_WARN_INSUFFICENT_RESOURCE_THRESHOLD_S": "1000000000",
    "RAY_AIR_NEW_OUTPUT": "0",
}
# The trial's actor: no CPU, so that relays and the groups they wait for never compete.
RELAY_RESOURCES = {"CPU": 0, "node:__internal_head__": 0.0001}


class Unpickled:
    """Tune pickles what it is given into snapshots that are never read: stay out of them, with all that we refer to."""

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return object, ()


@dataclass(frozen=True)
class Rules:
    """How Tune runs the trials."""

    trials: int
    concurrent: int
    scheduler: str
    steps: int
    grace_steps: int
    reduction_factor: float


class Director(Protocol):
    """Who knows what the trials are; called by Tune's controller in this process, never by two threads at once."""

    def next_trial(self) -> tuple[int, str] | None:
        """Offer the next run to the exchange; return its number and id, None when there is none."""

    def reported(self, number: int, report: dict[str, Any]) -> None: ...

    def ended(self, number: int, stopped: bool) -> None:
        """The trial got no further; `stopped` says that its last report was not the end of its run."""

    def spent(self) -> bool:
        """Whether the search must stop now."""


def run_trials(rules: Rules, director: Director, exchange: Any, directory: Path) -> None:
    """Run trials until the director has no more or the budget is spent. What Tune writes goes to `directory`."""
    os.environ.update(QUIET_TUNE)
    from ray import tune

    for name in ("ray.tune", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        tune.run(
            tune.with_resources(tune.with_parameters(make_relay(), exchange=exchange), RELAY_RESOURCES),
            search_alg=make_searcher(director),
            scheduler=make_scheduler(rules),
            stop=make_stopper(director),
            callbacks=[make_callback(director, exchange)],
            num_samples=rules.trials,
            max_concurrent_trials=rules.concurrent,
            metric=EVAL_LOSS,
            mode="min",
            reuse_actors=True,
            storage_path=str(directory),
            name="tune",
            verbose=0,
            raise_on_failed_trial=False,
        )
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def make_scheduler(rules: Rules) -> Any:
    """Return Tune's scheduler of that name; steps are its unit of time."""
    from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler

    class Median(MedianStoppingRule):
        """Passes over reports of failed trials, which have no loss."""

        def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
            known = EVAL_LOSS in result
            return str(super().on_trial_result(tune_controller, trial, result)) if known else TrialScheduler.CONTINUE

        def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
            if EVAL_LOSS in result:
                super().on_trial_complete(tune_controller, trial, result)

    if rules.scheduler == "asha":
        return ASHAScheduler(
            time_attr=STEP,
            max_t=rules.steps,
            grace_period=rules.grace_steps,
            reduction_factor=rules.reduction_factor,
            # What is left after the last rung is cheap beside knowing a full-length loss.
            stop_last_trials=False,
        )
    if rules.scheduler == "median":
        return Median(time_attr=STEP, grace_period=rules.grace_steps, min_samples_required=2)
    return FIFOScheduler()


def make_relay() -> type:
    """Return the trainable: every step is one report of a run."""
    import ray
    from ray import tune

    class Relay(tune.Trainable):
        def setup(self, config: dict[str, Any], exchange: Any = None) -> None:
            self.exchange, self.run_id = exchange, config["run_id"]

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            self.run_id = new_config["run_id"]
            return True

        def step(self) -> dict[str, Any]:
            report: dict[str, Any] = ray.get(self.exchange.advance.remote(self.run_id))
            if not math.isfinite(report.get(EVAL_LOSS, 0.0)):
                message = f"expected a finite validation loss, found {report.pop(EVAL_LOSS)} at step {report[STEP]:.0f}"
                report[FAILURE] = {"module": "components.errors", "name": "NonFiniteError", "message": message}
            return {**report, "done": bool(report.get(OVER)) or FAILURE in report}

        def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
            ray.get(self.exchange.release.remote(self.run_id))  # the run keeps its own checkpoint
            return {"run_id": self.run_id}

        def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
            """The run finds its own checkpoint."""

    return Relay


def make_searcher(director: Director) -> Any:
    """Return what Tune asks for trials."""
    from ray.tune.search import Searcher

    class Ask(Unpickled, Searcher):
        def __init__(self) -> None:
            super().__init__(metric=EVAL_LOSS, mode="min")

        def suggest(self, trial_id: str) -> Any:
            found = None if director.spent() else director.next_trial()
            return Searcher.FINISHED if found is None else {"number": found[0], "run_id": found[1]}

        def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
            """The director hears it from the callback."""

        def save(self, checkpoint_path: str) -> None:
            """The director keeps its own record."""

        def restore(self, checkpoint_path: str) -> None:
            """Nothing that Tune wrote is read."""

    return Ask()


def make_stopper(director: Director) -> Any:
    from ray import tune

    class Spent(Unpickled, tune.Stopper):
        def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
            return director.spent()

        def stop_all(self) -> bool:
            # Each trial ends at its next report, with a checkpoint; a relay that waits for one cannot be interrupted.
            return False

    return Spent()


def make_callback(director: Director, exchange: Any) -> Any:
    """Return what Tune tells of reports and ends."""
    import ray
    from ray import tune

    class Tell(Unpickled, tune.Callback):
        def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any) -> None:
            director.reported(trial.config["number"], result)

        def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            result = trial.last_result or {}
            # The group leaves a checkpoint and is free; a run that failed has left already.
            ray.get(exchange.release.remote(trial.config["run_id"]))
            director.ended(trial.config["number"], stopped=not result.get("done") or not result.get(OVER))

        def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            ray.get(exchange.release.remote(trial.config["run_id"]))
            director.ended(trial.config["number"], stopped=True)

    return Tell()
