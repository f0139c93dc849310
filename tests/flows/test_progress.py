"""What the driver shows of a run's log, while attempts come and go."""

import json
from pathlib import Path

import pytest

from cluster.artifacts import write_bytes_atomic
from flows.progress import RunProgress

START = {"event": "start", "resumed": False, "trained": 1, "frozen": 0, "device": "cpu", "memory": []}


def lines_of(*lines: dict) -> bytes:
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def evaluation(step: int, loss: float) -> dict:
    return {"step": step, "eval/loss": loss, **{f"eval/loss_band_{k}": loss for k in range(4)}}


def test_restarted_group_replaces_the_log_and_only_news_are_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "metrics.jsonl"
    old = [{**START, "step": 0, "pids": [1]}, evaluation(0, 0.9)]
    path.write_bytes(lines_of(*old))
    progress = RunProgress(tmp_path, total_steps=10)
    first = [*old, {**START, "step": 0, "pids": [2]}, evaluation(4, 0.7)]
    write_bytes_atomic(path, lines_of(*first) + b'{"step": 5, "tra')
    progress._read()
    shown = capsys.readouterr().err
    assert "0.70000" in shown and "0.90000" not in shown and "pids [2]" in shown
    second = [*first[:3], {**START, "step": 4, "pids": [3], "resumed": True}, evaluation(8, 0.5)]
    write_bytes_atomic(path, lines_of(*second))
    progress._read()
    shown = capsys.readouterr().err
    assert "resumed at step 4" in shown and "0.50000" in shown
    assert "0.70000" not in shown and "pids [2]" not in shown


def test_missing_log_is_waited_for(tmp_path: Path) -> None:
    RunProgress(tmp_path, total_steps=1)._read()
