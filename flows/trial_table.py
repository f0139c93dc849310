"""Show a search: a live table on a terminal, one line for each report and end elsewhere.

Evaluations come from the search's record; between them the steps are read from the runs' own logs.
"""

import math
import sys
import threading
import time
from pathlib import Path
from typing import Any

from cluster.workers import read_lines
from components.search_space import expected_steps
from flows.config import Config
from flows.console import say
from flows.search_record import RUNNING, SearchRecord, TrialRecord

POLL_S = 1.0


class TrialTable:
    """Context manager: follows a search's record until the block ends."""

    def __init__(self, record: SearchRecord, runs: Path, config: Config) -> None:
        self.record, self.runs, self.config = record, runs, config
        self._known = record.total_steps
        self._began = time.monotonic()
        self._said: dict[int, tuple[str, int]] = {trial.number: (trial.state, trial.steps) for trial in record.trials}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._live: Any = None

    def __enter__(self) -> "TrialTable":
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.live import Live

            self._live = Live(self.draw(), console=Console(stderr=True), auto_refresh=False, transient=False)
            self._live.start()
        self._thread.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stop.set()
        self._thread.join()
        self._show()
        if self._live is not None:
            self._live.stop()

    def _follow(self) -> None:
        while not self._stop.wait(POLL_S):
            self._show()

    def _show(self) -> None:
        if self._live is not None:
            self._live.update(self.draw(), refresh=True)
            return
        for trial in list(self.record.trials):
            now = (trial.state, trial.steps)
            if trial.reports and self._said.get(trial.number) != now:
                self._said[trial.number] = now
                say(self.line(trial))

    def line(self, trial: TrialRecord) -> str:
        """One trial as it stands, for a log."""
        return (
            f"trial {trial.number:>3}  {trial.state:<10}  step {self._step(trial):>6}/{self.config.train.steps}"
            f"  loss {_loss(trial)}  {short(trial.overrides)}{self._eta_text()}"
        )

    def draw(self) -> Any:
        """The table, best trial marked."""
        from rich.table import Table

        best = self.record.best()
        title = f"{len(self.record.trials)}/{self.config.search.trials} trials{self._eta_text()}"
        table = Table("trial", "recipe", "step", "loss", "state", title=title, title_justify="left")
        for trial in list(self.record.trials):
            style = "bold" if trial is best else "dim" if trial.state != RUNNING else ""
            step = f"{self._step(trial)}/{self.config.train.steps}"
            table.add_row(str(trial.number), short(trial.overrides), step, _loss(trial), trial.state, style=style)
        return table

    def _step(self, trial: TrialRecord) -> int:
        if trial.state != RUNNING:
            return trial.steps
        lines = read_lines(self.runs / trial.run_id / "metrics.jsonl")[-1:]
        return max([trial.steps, *(int(line["step"]) for line in lines)])

    def _eta_text(self) -> str:
        """Time left if the trials at work run to their end and those to come are as long as the scheduler lets them."""
        done = self.record.total_steps - self._known
        if done <= 0:
            return ""
        search, train = self.config.search, self.config.train
        running = sum(train.steps - trial.steps for trial in self.record.trials if trial.state == RUNNING)
        each = expected_steps(search, train.steps, train.eval_every_steps)
        left = running + (search.trials - len(self.record.trials)) * each
        if search.budget_steps:
            left = min(left, max(0, search.budget_steps - self.record.total_steps))
        return f"  about {(time.monotonic() - self._began) / done * left:.0f} s left"


def short(overrides: dict[str, Any]) -> str:
    """Overrides in as few letters as tell them apart."""
    named = {path.removeprefix("train.").replace("learning_rate", "rate"): value for path, value in overrides.items()}
    return " ".join(f"{name}={value}" for name, value in named.items())


def _loss(trial: TrialRecord) -> str:
    return f"{trial.loss:.5f}" if math.isfinite(trial.loss) else "-"
