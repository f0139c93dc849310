"""`fresco tune`: search a space of recipes; every trial is an ordinary run that may be stopped early.

A trial is the config with overrides: the same run id, folder and full schedule that `fresco train` would give it. So
the winner, stopped or not, is continued by train's own driver to its full length, and its checkpoint is the one that
`fresco train` with the same overrides makes. Trials share data, encodings, seed and warm worker groups; what they
reported is kept in `flows/search_record.py`, from which the same command continues.
"""

import hashlib
import json
import math
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

from cluster import stage, telemetry
from cluster.artifacts import Workspace, append_journal, read_journal, read_record, write_record
from cluster.crew import Crew
from cluster.errors import WorkerError
from cluster.placement import check_placement, plan_batch
from cluster.proposals import COMPLETE, FAILED
from cluster.session import groups_that_fit, local_session
from cluster.trials import run_trials
from cluster.workers import read_lines
from components.errors import InputError
from components.search_results import at_equal_steps
from components.search_space import Dimension, default_grace, parse_space
from flows.config import Config, known_keys, told_config, with_overrides
from flows.console import program, say, step
from flows.replay import old_version
from flows.search import BAD_TRIAL, Search, tracked
from flows.search_record import SearchRecord, TrialRecord
from flows.search_report import write_report
from flows.train import Inputs, open_inputs
from flows.train import run as train
from flows.trial_table import TrialTable


def run(config: Config) -> dict[str, Any]:
    """Search, continue the winner to its full length, report; return the verb's JSON object."""
    check_placement(config.placement)
    space = check_space(config)
    old_version(config)
    with local_session(config.placement):
        inputs = open_inputs(config)
        search_id = f"{config.name}-{search_fingerprint(config, inputs)}"
        directory = inputs.workspace.searches / search_id
        finished = read_record(directory)
        if finished is not None and finished["asked"] == _asked(config):
            _tell_once(inputs.workspace, finished["results"])
            say(f"search {search_id}: complete with the same fingerprint, nothing to do")
            return dict(finished["results"])
        search = Search(config, space, inputs, directory)
        count = min(config.search.concurrent or groups_that_fit(config.placement), config.search.trials)
        step(f"tune: search {search_id}, {config.search.trials} trials of at most {config.train.steps} steps")
        if search.record.continued:
            say(f"continues: {len(search.record.trials)} trials known, {search.record.total_steps} steps done")
        restarts = config.search.trials * (config.placement.max_failures + 1)
        with Crew(config.placement, count, directory / "groups", restarts) as crew:
            say(f"starting worker groups (20 to 40 s on two cores): {count}, kept for all trials")
            search.crew = crew
            with TrialTable(search.record, inputs.workspace.runs, config):
                run_trials(search.rules(count), search, crew.exchange, directory / "tune")
            if search.error is not None:
                raise search.error
            winner = _finish_winner(config, search, crew)
        results = _conclude(config, search, winner)
    say(f"best of {len(results['trials'])} trials: eval loss {results['best']['eval_loss']:.5f} with")
    for path, value in results["best"]["overrides"].items():
        say(f"  --set {path}={value}")
    own = results["own_recipe"]
    if own and own["run_id"] != results["best"]["run_id"]:
        told = f"{own['eval_loss']:.5f}, the best one's {own['best_eval_loss']:.5f}"
        say(f"the config's own recipe: eval loss at step {own['step']} {told}")
    say(f"report: {results['report']}")
    say(f"next: {program()} promote {results['best']['run_id']} --workspace {config.workspace}")
    return results


def plan(config: Config) -> list[str]:
    """Return what `run` would do; touches nothing."""
    check_placement(config.placement)
    space, search = check_space(config), config.search
    lines = [f"search {one.path}: {one.kind} {list(one.choices) or [one.low, one.high]}" for one in space]
    grace = search.grace_steps or default_grace(config.train.steps, config.train.eval_every_steps)
    limits = f"{search.budget_steps or 'any number of'} steps, {search.budget_minutes or 'any number of'} minutes"
    return [
        *lines,
        f"run up to {search.trials} trials of at most {config.train.steps} steps ({search.sampler}; {search.scheduler}"
        f" stops none before step {grace}); budget: {limits}",
        "continue the best to its full length as `fresco train` would, and export it",
        f"write {config.workspace}/searches and an HTML report",
    ]


def check_space(config: Config) -> list[Dimension]:
    """Return the dimensions of the search; InputError or PlacementError when some value could never run."""
    space = parse_space(config.search.space, known_keys())
    for one in space:
        for value in one.edges():
            try:
                changed = with_overrides(config, {one.path: value})
            except InputError as error:
                raise InputError(f"search.space {one.path}: {error}") from error
            plan_batch(changed.train.global_batch, config.placement.workers, config.placement.micro_batch)
    return space


def search_fingerprint(config: Config, inputs: Inputs) -> str:
    """12 hex digits over what decides the proposals; more trials or a larger budget continue the same search."""
    limits = {"trials", "budget_steps", "budget_minutes", "concurrent"}
    rules = config.search.model_dump(exclude=limits)
    text = json.dumps([inputs.run_id(config), rules], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _asked(config: Config) -> dict[str, Any]:
    return config.search.model_dump(include={"trials", "budget_steps", "budget_minutes"})


def _finish_winner(config: Config, search: Search, crew: Crew) -> dict[str, Any]:
    """Train the best trial to its full length with train's own driver; return its results.

    A stopped trial that turns out worse than a complete one gives way to it, one that fails to the next best.
    """
    record = search.record
    trained: dict[int, dict[str, Any]] = {}
    while True:
        best = record.best()
        if best is None:
            reasons = "; ".join(sorted({trial.reason.splitlines()[0][:200] for trial in record.trials if trial.reason}))
            raise WorkerError(
                f"search expected at least one trial with a finite validation loss, found {len(record.trials)} without:"
                f" {reasons or 'the budget ended before any was measured'}; change search.space or the budget"
            )
        if best.number in trained:
            return trained[best.number]
        continued_from = best.steps
        say(f"trial {best.number} is the best so far (eval loss {best.loss:.5f} at step {best.steps})")
        try:
            chosen = with_overrides(config, best.overrides)
            result = tracked(lambda: train(chosen, execute=crew.execute))  # noqa: B023, called at once
        except BAD_TRIAL as error:
            record.end(best, FAILED, f"{type(error).__name__}: {error}")
            continue
        trained[best.number] = {**result, "continued_from": continued_from}
        log = search.inputs.workspace.run_dir(best.run_id) / "metrics.jsonl"
        stage.fetch(log)
        for line in read_lines(log):
            if telemetry.EVAL_LOSS in line:
                record.report(best, line["step"], line[telemetry.EVAL_LOSS])
        record.end(best, COMPLETE)


def _conclude(config: Config, search: Search, winner: dict[str, Any]) -> dict[str, Any]:
    """Close the books: MLflow, report, record; checkpoints that nobody will continue are removed."""
    record, workspace = search.record, search.inputs.workspace
    best = next(trial for trial in record.trials if trial.run_id == winner["run_id"])
    for trial in record.trials:
        if read_record(workspace.run_dir(trial.run_id)) is None:
            for folder in ("checkpoints", "best"):
                stage.remove_tree(workspace.run_dir(trial.run_id) / folder)
    won = {"eval_loss": winner["eval_loss_last"], "checkpoint": winner["checkpoint"]}
    results: dict[str, Any] = {
        "search": search.directory.name,
        "trials": [trial.row() for trial in record.trials],
        "best": {**best.row(), **won, "continued_from": winner["continued_from"]},
        "own_recipe": _beside_own(record, best),
        "steps": record.total_steps,
        "seconds": round(record.elapsed_s, 1),
        "seconds_between_trials": gaps(record, workspace.runs),
    }
    report = write_report(config, search.inputs, record, results)
    results["report"] = str(report)
    _track_all(search, best, report)
    shutil.rmtree(search.directory / "groups", ignore_errors=True)
    asked = {"asked": _asked(config), "config": told_config(config.model_dump()), "results": results}
    write_record(search.directory, asked)
    _tell_once(workspace, results)
    return results


def _tell_once(workspace: Workspace, results: dict[str, Any]) -> None:
    """Journal a search, unless its line is there: who was killed after the record has not told it."""
    best = results["best"]
    key = {"search": results["search"], "trials": len(results["trials"]), "run_id": best["run_id"]}
    for line in read_journal(workspace):
        if line["event"] == "search" and all(line.get(name) == value for name, value in key.items()):
            return
    append_journal(workspace, "search", **key, overrides=best["overrides"], eval_loss=best["eval_loss"])


def _beside_own(record: SearchRecord, best: TrialRecord) -> dict[str, Any] | None:
    """The config's own recipe beside the best one, after as many steps; None where it was not tried or failed."""
    own = record.own()
    pair = at_equal_steps(own.reports, best.reports) if own is not None and math.isfinite(own.loss) else None
    if own is None or pair is None:
        return None
    step, own_loss, best_loss = pair
    return {"run_id": own.run_id, "step": step, "eval_loss": own_loss, "best_eval_loss": best_loss}


def _track_all(search: Search, best: TrialRecord, report: Path) -> None:
    """Bring MLflow up to date, waiting for a server that is away."""

    def send() -> None:
        for trial in search.record.trials:
            if trial.number in search.jobs and not search.track(trial):
                telemetry.check_tracking(search.uri)
        metrics = {telemetry.EVAL_LOSS: best.loss, "search/steps": float(search.record.total_steps)}
        tags = {"fresco.best": best.run_id, "fresco.search": search.directory.name}
        if not telemetry.try_end_run(search.uri, search.parent, "FINISHED", tags, metrics):
            telemetry.check_tracking(search.uri)
        telemetry.attach(search.uri, search.parent, report)

    tracked(send)


def gaps(record: SearchRecord, runs: Path) -> list[float]:
    """Seconds from each trial's last evaluation to the next one's first step, of trials in a row in one command."""
    times = []
    for trial in record.trials:
        stage.fetch(runs / trial.run_id / "metrics.jsonl")
        lines = read_lines(runs / trial.run_id / "metrics.jsonl")
        seen = [line["time_s"] for line in lines if telemetry.EVAL_LOSS in line and "time_s" in line]
        times.append((seen[0], seen[-1]) if seen else None)
    pairs = [(earlier, later) for earlier, later in pairwise(times) if earlier and later]
    found = [later[0] - earlier[1] for earlier, later in pairs if later[0] > earlier[1]]
    return [round(seconds, 2) for seconds in found]
