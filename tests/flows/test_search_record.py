"""The record of a search: what was appended is what a later command finds, whatever cut it short."""

import math
from pathlib import Path

from cluster.proposals import COMPLETE, FAILED, STOPPED
from flows.search_record import RUNNING, TRIALS, SearchRecord, earlier_trials


def fill(directory: Path) -> SearchRecord:
    record = SearchRecord(directory)
    record.begin(family="stable_diffusion", steps=30)
    for rate in (1e-3, 1e-2, 1e-1, 1e-4):
        record.start(f"run-{rate}", {"train.learning_rate.denoiser": rate}, origin="random")
    for step, loss in [(0, 0.4), (10, 0.3), (30, 0.2)]:
        record.report(record.trials[0], step, loss)
    record.end(record.trials[0], COMPLETE)
    record.report(record.trials[1], 0, 0.4)
    record.report(record.trials[1], 10, 0.1)
    record.end(record.trials[1], STOPPED)
    record.report(record.trials[2], 0, 0.4)
    record.end(record.trials[2], FAILED, "NonFiniteError: found nan")
    record.report(record.trials[3], 0, 0.4)
    return record


def test_later_command_finds_every_trial_as_it_was(tmp_path: Path) -> None:
    record = fill(tmp_path / "one")
    with (tmp_path / "one" / TRIALS).open("a") as file:
        file.write('{"event": "report", "number": 3, "st')  # killed while writing
    again = SearchRecord(tmp_path / "one")
    assert again.trials == record.trials and again.continued
    assert [trial.state for trial in again.trials] == [COMPLETE, STOPPED, FAILED, RUNNING]
    assert again.total_steps == 40
    again.report(again.trials[3], 0, 0.4)
    again.report(again.trials[3], 10, 0.35)
    assert SearchRecord(tmp_path / "one").trials[3].reports == [(0, 0.4), (10, 0.35)], "no report twice"


def test_best_is_the_lowest_finite_loss_of_a_trial_that_did_not_fail(tmp_path: Path) -> None:
    record = fill(tmp_path / "one")
    best = record.best()
    assert best is record.trials[1] and best.loss == 0.1
    assert record.trials[2].loss == math.inf
    assert SearchRecord(tmp_path / "none").best() is None


def test_time_adds_up_over_commands(tmp_path: Path) -> None:
    for session, seconds in (("a", 5.0), ("a", 60.0), ("b", 30.0)):
        line = f'{{"event": "search", "session": "{session}", "elapsed_s": {seconds}, "family": "f", "steps": 1}}\n'
        with (tmp_path / TRIALS).open("a") as file:
            file.write(line)
    assert 90 <= SearchRecord(tmp_path).elapsed_s < 100


def test_other_searches_of_the_family_are_told_relative_to_their_start(tmp_path: Path) -> None:
    fill(tmp_path / "one")
    told = list(earlier_trials(tmp_path, "stable_diffusion", tmp_path / "two"))
    assert [one.state for one in told] == [COMPLETE, STOPPED, FAILED]
    assert told[0].curve == [(0.0, 1.0), (10 / 30, 0.3 / 0.4), (1.0, 0.5)]
    assert told[2].curve == []
    assert not list(earlier_trials(tmp_path, "z_image", tmp_path / "two"))
    assert not list(earlier_trials(tmp_path, "stable_diffusion", tmp_path / "one"))
