"""What a search has done so far: an append-only file that a killed search continues from.

    searches/NAME-FINGERPRINT/trials.jsonl    search, trial, report, end: one JSON line each
                              record.json     written last: the result

A trial's reports and its end are here, so a command that continues can tell the samplers and schedulers everything
again without computing it. Times are added up over the commands that worked on the search.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster import stage
from cluster.artifacts import append_line, read_events
from cluster.proposals import COMPLETE, FAILED, STOPPED, Told
from components.search_results import OWN

RUNNING, UNFINISHED = "running", "unfinished"  # UNFINISHED: the budget ended first; a larger one continues it
RANDOM = "random"
TRIALS = "trials.jsonl"


@dataclass
class TrialRecord:
    """One trial as far as it is known."""

    number: int
    run_id: str
    overrides: dict[str, Any]
    state: str = RUNNING
    reports: list[tuple[int, float]] = field(default_factory=list)
    """(step, validation loss), by step."""
    reason: str = ""
    origin: str = ""
    """Where the recipe comes from: the config itself (OWN), a random draw (RANDOM), or the sampler by its name."""

    @property
    def steps(self) -> int:
        return self.reports[-1][0] if self.reports else 0

    @property
    def loss(self) -> float:
        """The newest validation loss; infinite for a trial that failed or has none yet."""
        return self.reports[-1][1] if self.reports and self.state != FAILED else math.inf

    @property
    def ended(self) -> bool:
        return self.state in (COMPLETE, STOPPED, FAILED)

    def told(self, total_steps: int) -> Told:
        """Return the trial in the proposer's terms."""
        first = self.reports[0][1] if self.reports else 1.0
        curve = [(step / total_steps, loss / first) for step, loss in self.reports]
        return Told(self.state, self.overrides, [] if self.state == FAILED else curve)

    def row(self) -> dict[str, Any]:
        """Return the trial for the verb's JSON object."""
        loss = self.loss if math.isfinite(self.loss) else None
        row = {"run_id": self.run_id, "overrides": self.overrides, "eval_loss": loss, "steps": self.steps}
        return {**row, "state": self.state, "origin": self.origin, **({"reason": self.reason} if self.reason else {})}


class SearchRecord:
    """The trials of one search, in memory and on disk; every change is appended before it counts."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.trials: list[TrialRecord] = []
        self._began = time.monotonic()
        self._earlier_s = 0.0
        self._session = f"{time.time():.3f}"
        for event in read_events(directory / TRIALS):
            self._replay(event)
        self.continued = bool(self.trials)

    def _replay(self, event: dict[str, Any]) -> None:
        self._clocks = getattr(self, "_clocks", {})
        self._clocks[event["session"]] = event["elapsed_s"]
        self._earlier_s = sum(self._clocks.values())
        if event["event"] == "trial":
            trial = TrialRecord(event["number"], event["run_id"], event["overrides"], origin=event["origin"])
            self.trials.append(trial)
        elif event["event"] == "report":
            self._take_report(self.trials[event["number"]], event["step"], event["loss"])
        elif event["event"] == "end":
            trial = self.trials[event["number"]]
            trial.state, trial.reason = event["state"], event["reason"]

    @property
    def elapsed_s(self) -> float:
        """Seconds that commands have worked on this search."""
        return self._earlier_s + time.monotonic() - self._began

    @property
    def total_steps(self) -> int:
        return sum(trial.steps for trial in self.trials)

    def begin(self, **facts: Any) -> None:
        """Write what the search is, once a command."""
        self._append("search", **facts)

    def start(self, run_id: str, overrides: dict[str, Any], origin: str) -> TrialRecord:
        """Add the next trial."""
        trial = TrialRecord(len(self.trials), run_id, overrides, origin=origin)
        self._append("trial", number=trial.number, run_id=run_id, overrides=overrides, origin=origin)
        self.trials.append(trial)
        return trial

    def report(self, trial: TrialRecord, step: int, loss: float) -> None:
        """Add an evaluation; one that is known already is left as it is."""
        if step > trial.steps or not trial.reports:
            self._append("report", number=trial.number, step=step, loss=loss)
            self._take_report(trial, step, loss)

    def end(self, trial: TrialRecord, state: str, reason: str = "") -> None:
        """Say how a trial ended."""
        if (state, reason) != (trial.state, trial.reason):
            self._append("end", number=trial.number, state=state, reason=reason)
            trial.state, trial.reason = state, reason

    def best(self) -> TrialRecord | None:
        """Return the trial with the lowest validation loss, wherever it stopped."""
        finite = [trial for trial in self.trials if math.isfinite(trial.loss)]
        return min(finite, key=lambda trial: (trial.loss, trial.number), default=None)

    def own(self) -> TrialRecord | None:
        """Return the trial of the config's own recipe, where there is one."""
        return next((trial for trial in self.trials if trial.origin == OWN), None)

    def _take_report(self, trial: TrialRecord, step: int, loss: float) -> None:
        if step > trial.steps or not trial.reports:
            trial.reports.append((step, loss))

    def _append(self, event: str, **facts: Any) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        elapsed_s = round(time.monotonic() - self._began, 3)
        append_line(self.directory / TRIALS, event, session=self._session, elapsed_s=elapsed_s, **facts)


def earlier_trials(searches: Path, family: str, except_for: Path) -> Iterator[Told]:
    """Yield the ended trials of the workspace's other searches on a family of models, oldest search first."""
    logs = [(read_events(folder / TRIALS), folder) for folder in stage.folders(searches) if folder != except_for]
    for events, folder in sorted((log for log in logs if log[0]), key=lambda log: str(log[0][-1]["time"])):
        facts = next((event for event in events if event["event"] == "search"), None)
        if facts is not None and facts["family"] == family:
            for trial in SearchRecord(folder).trials:
                if trial.ended:
                    yield trial.told(facts["steps"])
