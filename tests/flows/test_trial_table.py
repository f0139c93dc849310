"""The live table of a search: every trial with its recipe, step, loss, state and the time that is left."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from cluster.proposals import COMPLETE, STOPPED
from flows.config import Config, load_config
from flows.search_record import SearchRecord
from flows.trial_table import TrialTable

RATE = "train.learning_rate.denoiser"


@pytest.fixture
def config(tmp_path: Path) -> Config:
    rules = ["train.steps=90", "train.eval_every_steps=10"]
    search = ["search.trials=4", "search.grace_steps=10", "search.reduction_factor=3"]
    return load_config(overrides=[*rules, *search], workspace=str(tmp_path))


@pytest.fixture
def table(config: Config, tmp_path: Path) -> TrialTable:
    """One trial complete, one stopped, one at work between two evaluations."""
    table = TrialTable(record := SearchRecord(tmp_path / "search"), tmp_path / "runs", config)
    for number, (state, last) in enumerate([(COMPLETE, 90), (STOPPED, 10), ("", 20)]):
        trial = record.start(f"run-{number}", {RATE: 10.0 ** -(number + 1), "train.freezing": "all"}, "tpe")
        for step in range(0, last + 1, 10):
            record.report(trial, step, 1 / (1 + step + number))
        if state:
            record.end(trial, state)
    log = tmp_path / "runs" / "run-2" / "metrics.jsonl"
    log.parent.mkdir(parents=True)
    log.write_text("".join(json.dumps({"step": step}) + "\n" for step in (21, 25)) + '{"step": 2')
    return table


def test_lines_tell_trial_state_step_loss_recipe_and_time(table: TrialTable) -> None:
    lines = [table.line(trial) for trial in table.record.trials]
    for line, told in zip(
        lines, ["complete    step     90/90", "stopped     step     10/90", "step     25/90"], strict=True
    ):
        assert told in line and "freezing=all" in line and "s left" in line
    assert "loss 0.08333" in lines[1] and "rate.denoiser=0.01" in lines[1]


def test_table_on_a_terminal_has_every_trial_and_fits_it(table: TrialTable) -> None:
    screen = io.StringIO()
    Console(file=screen, width=100).print(table.draw())
    shown = screen.getvalue()
    assert "3/4 trials" in shown and all(text in shown for text in ("90/90", "10/90", "25/90", "running", "stopped"))
    assert max(map(len, shown.splitlines())) <= 100


def test_time_left_counts_trials_to_come_as_long_as_the_scheduler_lets_them(
    table: TrialTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    table._began = 0.0
    monkeypatch.setattr("flows.trial_table.time.monotonic", lambda: 120.0)  # one second a step so far
    to_come = 10 + 20 / 3 + 60 / 9
    assert f"about {90 - 20 + to_come:.0f} s left" in table.line(table.record.trials[2])
