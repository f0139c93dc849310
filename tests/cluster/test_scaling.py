"""The number of replicas follows the work that waits, in pixel-steps, and never a count of requests."""

from types import SimpleNamespace
from typing import Any

import pytest

from cluster.placement import ServeSection
from cluster.scaling import BACKLOG, BUSY, RATE, BacklogPolicy, Load, LoadReport, replica_options, wanted_replicas

SPEED = 1000.0


def loads(*backlogs_s: float, busy: float = 1.0) -> list[Load]:
    return [Load(seconds * SPEED, SPEED, busy) for seconds in backlogs_s]


@pytest.mark.parametrize(
    ("found", "current", "wanted"),
    [
        (loads(0.0, busy=0.0), 1, 0),
        (loads(4.9), 1, 1),
        (loads(5.1), 1, 2),
        (loads(50.0), 1, 10),
        (loads(12.0, 1.0), 2, 3),
        # A single client keeps a replica busy: more of them would not help it.
        (loads(0.2, busy=1.0), 1, 1),
        # Two busy replicas keep up; one of them alone could not.
        (loads(0.5, 0.5, busy=0.9), 2, 2),
        (loads(0.5, 0.5, busy=0.3), 2, 1),
        ([Load(9e9, 0.0, 0.0)], 1, 1),
        ([], 3, 3),
        # One that has not drawn yet takes the speed of the others.
        ([Load(20 * SPEED, SPEED, 1.0), Load(0, 0.0, 0.0)], 2, 4),
    ],
)
def test_backlog_decides_how_many_replicas_are_wanted(found: list[Load], current: int, wanted: int) -> None:
    assert wanted_replicas(found, current, target_backlog_s=5.0) == wanted


def test_policy_reads_what_replicas_reported_and_waits_for_those_that_have_not() -> None:
    def context(replicas: int, reports: dict[str, Any]) -> Any:
        return SimpleNamespace(aggregated_metrics=reports, current_num_replicas=replicas, target_num_replicas=replicas)

    reports = {BACKLOG: {"a": 9000.0, "b": 3000.0}, RATE: {"a": SPEED, "b": SPEED}, BUSY: {"a": 1.0, "b": 1.0}}
    assert BacklogPolicy(4.0)(context(2, reports))[0] == 3
    assert BacklogPolicy(4.0)(context(3, reports))[0] == 3
    assert BacklogPolicy(0.1)(context(3, reports))[0] == 3
    assert BacklogPolicy(4.0)(context(1, {}))[0] == 1


def test_report_counts_busy_seconds_since_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 110.0, 112.0, 114.0])
    monkeypatch.setattr("cluster.scaling.time.monotonic", lambda: next(clock))
    report = LoadReport()
    first = report.of({"backlog_pixel_steps": 7, "rate": 3.0, "stepping_s": 5.0})
    assert first == {BACKLOG: 7.0, RATE: 3.0, BUSY: 0.5}
    assert report.of({"stepping_s": 7.0})[BUSY] == 1.0
    assert report.of({"rate": None, "stepping_s": 7.0}) == {BACKLOG: 0.0, RATE: 0.0, BUSY: 0.0}


def test_equal_bounds_need_no_policy_and_others_start_awake() -> None:
    assert replica_options(ServeSection()) == {"num_replicas": 1}
    config = replica_options(ServeSection(min_replicas=0, max_replicas=3))["autoscaling_config"]
    assert (config.min_replicas, config.initial_replicas, config.max_replicas) == (0, 1, 3)
    with pytest.raises(ValueError, match=r"min_replicas expected at most serve\.max_replicas \(1\), found 2"):
        ServeSection(min_replicas=2)
