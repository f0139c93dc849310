"""The engine's benchmark runs, its large part too, with a tiny model on the CPU."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.engine_large import TINY, Plan, make_parts, measure, operations_of_a_row, seconds_of
from components.versions import Version

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_tiny_run_of_the_whole_benchmark_says_all_it_measures() -> None:
    command = [sys.executable, "benchmarks/engine.py", "--tiny", "--threads", "1"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert ran.returncode == 0, ran.stderr
    assert "times the images/s" in ran.stdout and "picture steps/s" in ran.stdout
    assert "tiny model: shows that it runs, no speed" in ran.stdout
    rows = re.findall(r"^ +(\d+) rows: +\S+ ms a step, +\S+% of the peak; \S+ guided pictures/s", ran.stdout, re.M)
    assert [int(number) for number in rows] == list(TINY.row_counts)


def test_operations_of_a_row_grow_with_the_picture() -> None:
    version = Version("tiny", make_parts(TINY), 8)
    assert version.parts.denoiser.dtype == torch.bfloat16 and version.parts.vae.dtype == torch.float32
    small, large = operations_of_a_row(version, 16), operations_of_a_row(version, 32)
    assert 3 * small < large < 17 * small, "four times the pixels; attention takes up to their square"


def test_a_share_of_the_peak_is_what_the_rows_took(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that says 1 ms for everything, all shares follow from the counted operations."""
    monkeypatch.setattr("benchmarks.engine_large.seconds_of", lambda work, calls, device: 1e-3)
    said: list[str] = []
    plan = Plan("cpu", 16, 64, (2, 4), 1)
    measure(plan, False, said.append)
    version = Version("tiny", make_parts(plan), 8)
    peak = 2 * 64**3 / 1e-3
    for num_rows, line in zip((2, 4), said[1:], strict=True):
        share = num_rows * operations_of_a_row(version, 16) / 1e-3 / peak
        assert f"{share:6.1%} of the peak" in line and f"{num_rows / 2 / (20 * 1e-3):.3g} guided pictures/s" in line


def test_seconds_are_those_of_one_call_after_a_first_one() -> None:
    calls: list[int] = []
    seconds_of(lambda: calls.append(1), 3, "cpu")
    assert len(calls) == 1 + 5 * 3
