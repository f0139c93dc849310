"""Which versions are judged now: told while the judge lives, whoever it is, and not a moment longer."""

import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from cluster.artifacts import Workspace, open_workspace
from cluster.errors import StorageError
from cluster.judging import judged_now, judging
from cluster.registry import Registry


def judge_and_die(root: str) -> None:
    with judging(Registry(open_workspace(root)), "fresco", 7):
        assert judged_now(Registry(open_workspace(root)), "fresco") == [7]
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(open_workspace(str(tmp_path)))


def test_versions_are_told_while_they_are_judged(registry: Registry) -> None:
    with judging(registry, "fresco", 12), judging(registry, "fresco", 3), judging(registry, "other", 5):
        assert judged_now(registry, "fresco") == [3, 12]
    assert judged_now(registry, "fresco") == []


def test_workspace_where_nothing_was_judged_is_left_alone(tmp_path: Path) -> None:
    assert judged_now(Registry(Workspace(tmp_path)), "fresco") == [] and list(tmp_path.iterdir()) == []


def test_judge_that_was_killed_judges_no_more_and_another_takes_over_at_once(registry: Registry) -> None:
    process = multiprocessing.get_context("spawn").Process(target=judge_and_die, args=(str(registry.workspace.root),))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL and judged_now(registry, "fresco") == []
    with judging(registry, "fresco", 7):
        assert judged_now(registry, "fresco") == [7]


def test_version_is_judged_by_one_at_a_time(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.judging.WAIT_S", 0.0)
    with (
        judging(registry, "fresco", 7),
        pytest.raises(StorageError, match="found held by judging of version 7"),
        judging(registry, "fresco", 7),
    ):
        raise AssertionError("unreachable")
