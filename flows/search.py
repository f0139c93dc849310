"""The search that Ray Tune directs: makes trials, keeps their record, knows the budget, tells MLflow.

`cluster/trials.py` asks for the next trial and tells what trials report; here a proposal becomes a run. A trial that
cannot be trained (a non-finite loss, no memory, workers that keep dying, an impossible recipe) is recorded and counts
as the worst; any other error ends the search, which the same command continues.
"""

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from cluster import stage, telemetry, workers
from cluster.artifacts import read_json, read_record, write_json_atomic
from cluster.crew import Crew, report_of
from cluster.errors import TrackingError, WorkerError
from cluster.exchange import FAILURE, FATAL, STEP
from cluster.proposals import COMPLETE, FAILED, STOPPED, Proposer
from cluster.trials import Rules
from cluster.workers import Task
from components.errors import InputError, NonFiniteError
from components.models import family_of
from components.recipe import trains_text
from components.search_results import OWN
from components.search_space import Dimension, default_grace, draw, own_recipe
from flows.config import AFTER_A_RUN, Config, with_overrides
from flows.console import say
from flows.encode import EncodedPaths, ensure_encoded
from flows.job import Job
from flows.search_record import RANDOM, UNFINISHED, SearchRecord, TrialRecord, earlier_trials
from flows.train import Inputs, open_job
from flows.train_loop import train_worker
from flows.watch import FIRST_PICTURES

TRIES = 100  # proposals that were tried already before a space counts as used up
TRACKING_WAIT_S, TRACKING_POLL_S = 120, 3
BAD_TRIAL = (NonFiniteError, WorkerError, InputError)  # what says something of the recipe; others end the search
Answer = TypeVar("Answer")


class Search:
    """What Tune asks and tells: offers runs, keeps the record, knows the budget. See `cluster.trials.Director`."""

    def __init__(self, config: Config, space: list[Dimension], inputs: Inputs, directory: Path) -> None:
        self.config, self.inputs, self.directory = config, inputs, directory
        self.record = SearchRecord(directory)
        self.error: Exception | None = None
        self.crew: Crew | None = None
        self.jobs: dict[int, Job] = {}
        self._data = {with_text: self._encoded(with_text) for with_text in sorted(self._plans_with_text(space))}
        self._next = 0
        recipe = telemetry.flatten(config.model_dump(include={"train"}))
        family = str(family_of(inputs.base).__name__).rpartition(".")[2]
        search = config.search
        self.own = self._own_recipe(space, recipe)
        first_learned = search.random_trials + bool(self.own)
        self.proposer = Proposer(
            search.sampler, search.seed, first_learned, lambda suggest: draw(space, recipe, suggest)
        )
        if search.warm_start and search.sampler != "random":
            told = [self.proposer.tell_earlier(one) for one in self._earlier(family)]
            if any(told):
                say(f"warm start: {sum(told)} trials of earlier searches on {family} are known to the sampler")
        self.record.begin(family=family, steps=config.train.steps, config=config.model_dump(exclude={*AFTER_A_RUN}))
        self.uri = config.placement.tracking_uri or inputs.workspace.mlflow_uri
        self.parent = self._open_parent()

    def _earlier(self, family: str) -> Iterator[Any]:
        return earlier_trials(self.inputs.workspace.searches, family, self.directory)

    def _plans_with_text(self, space: list[Dimension]) -> set[bool]:
        """Whether some plan of the search reads stored text states, and whether some plan does not."""
        searched = next((one.choices for one in space if one.path == "train.freezing"), ())
        return {not trains_text(plan) for plan in [*searched, self.config.train.freezing]}

    def _encoded(self, with_text: bool) -> EncodedPaths:
        """Encodings that trials share, made before worker groups take the CPUs that making them needs."""
        return ensure_encoded(self.config, self.inputs.dataset, self.inputs.base, with_text)

    def _own_recipe(self, space: list[Dimension], recipe: dict[str, Any]) -> dict[str, Any]:
        """The first trial's overrides; empty when there is to be none, or the space does not hold it."""
        if not self.config.search.own_recipe:
            return {}
        try:
            return own_recipe(space, recipe)
        except InputError as error:
            say(f"no trial of the config's own recipe: {error}")
            return {}

    def _open_parent(self) -> str:
        known = read_json(self.directory / "mlflow.json")
        # A server that was never there is told at once; one that goes away in mid-search is waited for.
        if known is not None and telemetry.run_exists(self.uri, known["run_id"]):
            return str(known["run_id"])
        params = {"dataset": self.inputs.dataset.id, **self.config.model_dump(exclude={*AFTER_A_RUN, "workspace"})}
        artifacts = self.inputs.workspace.root / "mlartifacts"
        params = stage.portable(params, self.inputs.workspace.root)
        name = f"search {self.directory.name}"
        run_id = telemetry.start_run(self.uri, self.config.name, name, params, artifacts)
        write_json_atomic(self.directory / "mlflow.json", {"run_id": run_id})
        return run_id

    def rules(self, concurrent: int) -> Rules:
        search, train_section = self.config.search, self.config.train
        grace = search.grace_steps or default_grace(train_section.steps, train_section.eval_every_steps)
        return Rules(
            trials=search.trials,
            concurrent=concurrent,
            scheduler=search.scheduler,
            steps=train_section.steps,
            grace_steps=min(grace, train_section.steps),
            reduction_factor=search.reduction_factor,
        )

    # What Tune calls.

    def spent(self) -> bool:
        """Whether an error or the budget ends the search."""
        search = self.config.search
        steps_gone = search.budget_steps and self.record.total_steps >= search.budget_steps
        time_gone = search.budget_minutes and self.record.elapsed_s >= 60 * search.budget_minutes
        return self.error is not None or bool(steps_gone or time_gone)

    def next_trial(self) -> tuple[int, str] | None:
        """Offer the next trial: a known one with what it has reported, else a new proposal."""
        try:
            while self._next < self.config.search.trials:
                number = self._next
                trial = self._known(number) if number < len(self.record.trials) else self._propose(number)
                if trial is None:
                    say("every recipe of the space has been tried")
                    return None
                self._next += 1
                if self._offer(trial):
                    return number, trial.run_id
        except Exception as error:  # raised where the search ends, after the groups were sent home
            self.error = error
        return None

    def reported(self, number: int, report: dict[str, Any]) -> None:
        trial = self.record.trials[number]
        if FAILURE in report:
            failure = report[FAILURE]
            error = workers.rebuild(failure)
            if failure.get(FATAL) or not isinstance(error, BAD_TRIAL):
                self.error = error
            elif not trial.ended:
                trial.reason = f"{type(error).__name__}: {error}"
        elif telemetry.EVAL_LOSS in report:
            self.record.report(trial, int(report[STEP]), float(report[telemetry.EVAL_LOSS]))

    def ended(self, number: int, stopped: bool) -> None:
        trial = self.record.trials[number]
        if trial.ended:
            self.proposer.tell(number, trial.told(self.config.train.steps))
            return
        if trial.reason:
            reason, trial.reason = trial.reason, ""
            self.record.end(trial, FAILED, reason)
        elif not stopped:
            self.record.end(trial, COMPLETE)
        else:
            self.record.end(trial, UNFINISHED if self.spent() else STOPPED)
        if trial.ended:
            self.proposer.tell(number, trial.told(self.config.train.steps))
            if trial.state == FAILED:
                say(f"trial {number} failed and counts as the worst: {trial.reason.splitlines()[0][:300]}")
        self.track(trial)

    # How a trial is made.

    def _known(self, number: int) -> TrialRecord:
        trial = self.record.trials[number]
        self.proposer.repeat(number, trial.overrides)
        return trial

    def _propose(self, number: int) -> TrialRecord | None:
        if number == 0 and self.own:
            self.proposer.repeat(number, self.own)
            return self.record.start(self.inputs.run_id(with_overrides(self.config, self.own)), self.own, OWN)
        tried = {trial.run_id for trial in self.record.trials}
        for attempt in range(TRIES):
            overrides = self.proposer.propose(number, attempt)
            run_id = self.inputs.run_id(with_overrides(self.config, overrides))
            if run_id not in tried:
                learned = number >= self.proposer.random_trials
                return self.record.start(run_id, overrides, self.config.search.sampler if learned else RANDOM)
            self.proposer.discard(number)
        return None

    def _offer(self, trial: TrialRecord) -> bool:
        """Hand the run to the crew with its past; one that failed has nothing to hand and is told at once."""
        assert self.crew is not None
        if trial.state == FAILED:
            self.proposer.tell(trial.number, trial.told(self.config.train.steps))
            return False
        job = self._open_job(trial)
        past = self._past(trial, job)
        finished = trial.ended or read_record(job.directory) is not None
        over = finished and trial.state != STOPPED
        reports = [report_of(step, loss, over and step == past[-1][0]) for step, loss in past]
        self.crew.offer(trial.run_id, Task.of(train_worker, job, job.directory), reports, finished)
        return True

    def _open_job(self, trial: TrialRecord) -> Job:
        config = with_overrides(self.config, trial.overrides)
        data = self._data[not trains_text(config.train.freezing)]
        job = tracked(lambda: open_job(config, self.inputs, data, self.parent, pictures_at_end=True))
        # The base draws the same pictures in every trial: the first trial's serve all.
        target = job.directory / "samples" / FIRST_PICTURES
        for other in self.jobs.values():
            drawn = other.directory / "samples" / FIRST_PICTURES
            if not stage.fetch(target) and stage.fetch(drawn):
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(drawn, target)
                stage.keep(target)
        self.jobs[trial.number] = job
        return job

    def _past(self, trial: TrialRecord, job: Job) -> list[tuple[int, float]]:
        """What the trial has reported; of a run that `fresco train` finished, what its log says."""
        if trial.reports or read_record(job.directory) is None:
            return trial.reports
        lines = workers.read_lines(job.directory / "metrics.jsonl")
        return [(line["step"], line[telemetry.EVAL_LOSS]) for line in lines if telemetry.EVAL_LOSS in line]

    def track(self, trial: TrialRecord) -> bool:
        """Tell MLflow how the trial stands; False when the server is away."""
        job = self.jobs[trial.number]
        status = {FAILED: "FAILED", UNFINISHED: "KILLED"}.get(trial.state, "FINISHED")
        tags = {"fresco.state": trial.state, "fresco.search": self.directory.name, "fresco.reason": trial.reason}
        overrides = {f"override.{path}": str(value) for path, value in trial.overrides.items()}
        telemetry.send_again(job.directory, job.mlflow_uri, job.mlflow_run_id)
        return telemetry.try_end_run(self.uri, job.mlflow_run_id, status, {**tags, **overrides}, {})


def tracked(call: Callable[[], Answer]) -> Answer:
    """Call what needs the tracking server, waiting for a while for one that is away."""
    deadline = time.monotonic() + TRACKING_WAIT_S
    while True:
        try:
            return call()
        except TrackingError as error:
            if time.monotonic() > deadline:
                raise
            left = deadline - time.monotonic()
            say(f"waiting up to {left:.0f} s more for the tracking server: {str(error).partition(';')[0][:160]}")
            time.sleep(TRACKING_POLL_S)
