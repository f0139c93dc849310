"""A cycle that dies at every one of its side effects, before and after it, ends as an undisturbed one.

The stages are stood for by quick ones here, so that each of some fifty deaths takes milliseconds; test_retrain.py runs
the real stages. Lease, fenced state and journal are real.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from cluster.artifacts import open_workspace, read_journal
from cluster.errors import LeaseLostError, StorageError, WorkerError
from cluster.lease import hold_lease
from components.errors import DataError
from components.standing import RetrainSection
from components.triggers import Evidence, Reason, decide
from flows import cycle, ledger, stages
from flows.config import Config, load_config
from flows.findings import Findings
from flows.ledger import Ledger, lease_place, look_at


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


class World:
    """What quick stages did, and when this process dies."""

    def __init__(self) -> None:
        self.ran: Counter[str] = Counter()
        self.effects = 0
        self.dies_at: tuple[int, bool] | None = None
        self.results: dict[str, Any] = {}

    def stage(self, name: str) -> Callable[[Any], dict[str, Any]]:
        def run(desk: Any) -> dict[str, Any]:
            self.ran[name] += 1
            result = self.results.get(name, {"number": 1})
            if isinstance(result, Exception):
                raise result
            if name == "train":
                desk.cycle.run_id = "run-1"
            return dict(result)

        return run

    def deadly(self, effect: Callable[..., Any]) -> Callable[..., Any]:
        def act(*arguments: Any, **options: Any) -> Any:
            self.effects += 1
            if self.dies_at == (self.effects, False):
                raise Killed
            result = effect(*arguments, **options)
            if self.dies_at == (self.effects, True):
                raise Killed
            return result

        return act


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    world = World()
    world.results["snapshot"] = {"parent": "loop@1", "new": 5}
    world.results["prepare"] = {"dataset": "loop@2", "added": 5}
    world.results["gate"] = {"decision": "promote", "version": 2, "reasons": ["better"]}
    monkeypatch.setattr(cycle, "STAGES", {name: world.stage(name) for name in stages.STAGES})
    monkeypatch.setattr(cycle, "local_session", lambda placement: nullcontext())
    monkeypatch.setattr(ledger, "append_journal", world.deadly(ledger.append_journal))
    monkeypatch.setattr(ledger, "write_fenced", world.deadly(ledger.write_fenced))
    return world


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return load_config(overrides=["name=loop"], workspace=str(tmp_path / "workspace"))


def go_on(config: Config) -> dict[str, Any] | None:
    """What the loop does with its state: books first, then the open cycle, else a new one by hand."""
    workspace = open_workspace(config.workspace)
    with hold_lease(lease_place(workspace), "test", ttl_s=30, wait_s=5) as confirm:
        book = Ledger(workspace, confirm)
        cycle.close_books(book)
        if book.state.cycle is None:
            if book.state.last is not None:
                return None
            evidence = Evidence(now=1000.0, champion=1, manual="--force")
            decision = decide(evidence, RetrainSection())
            assert [reason.kind for reason in decision.triggers] == ["manual"] and isinstance(
                decision.triggers[0], Reason
            )
            cycle.begin(book, Findings(evidence, None, None, None), decision)
        return cycle.run(config, book)


def told(config: Config) -> list[tuple[Any, ...]]:
    keys = ("event", "cycle", "stage", "state", "decision")
    return [tuple(line.get(key) for key in keys) for line in read_journal(open_workspace(config.workspace))]


def state_of(config: Config) -> dict[str, Any]:
    state = look_at(open_workspace(config.workspace))
    return {"cycle": state.cycle, "cycles": state.cycles, "turns": state.turns, "refused": state.refused}


EXPECTED = [
    ("trigger", "cycle-0001", None, None, "retrain"),
    *[
        ("stage", "cycle-0001", name, state, None)
        for name in ("snapshot", "prepare", "search", "train", "evaluate", "gate", "deploy")
        for state in ("began", "done")
    ],
    ("cycle", "cycle-0001", None, None, "promoted"),
]


def expected() -> list[tuple[Any, ...]]:
    more = [
        ("stage", "cycle-0001", name, state, None) for name in list(stages.STAGES)[7:] for state in ("began", "done")
    ]
    return [*EXPECTED[:-1], *more, EXPECTED[-1]]


def test_undisturbed_cycle_tells_every_stage_once_and_ends_promoted(config: Config, world: World) -> None:
    line = go_on(config)
    assert line is not None and line["decision"] == "promoted" and line["dataset"] == "loop@2"
    assert told(config) == expected()
    assert set(world.ran.values()) == {1} and list(world.ran) == list(stages.STAGES)
    assert state_of(config) == {"cycle": None, "cycles": 1, "turns": 1, "refused": []}
    assert go_on(config) is None and told(config) == expected(), "a second look at closed books adds nothing"


def deaths() -> Iterator[tuple[int, bool]]:
    yield from ((number, after) for number in range(1, 2 * len(stages.STAGES) + 30) for after in (False, True))


def test_a_cycle_killed_at_any_effect_goes_on_and_ends_the_same(config: Config, world: World, tmp_path: Path) -> None:
    died = 0
    for number, after in deaths():
        here = config.model_copy(update={"workspace": str(tmp_path / f"workspace-{number}-{after}")})
        world.effects, world.dies_at = 0, (number, after)
        world.ran.clear()
        try:
            go_on(here)
            if world.effects >= number:
                raise AssertionError(f"effect {number} should have ended the process")
            continue
        except Killed:
            died += 1
        world.dies_at = None
        go_on(here)
        assert told(here) == expected(), f"killed {'after' if after else 'before'} effect {number}"
        assert state_of(here) == {"cycle": None, "cycles": 1, "turns": 1, "refused": []}
        assert max(world.ran.values()) <= 2 and sum(count - 1 for count in world.ran.values()) <= 1, world.ran
    assert died > 40


def test_a_stage_that_fails_ends_the_cycle_and_says_so_once(config: Config, world: World) -> None:
    world.results["train"] = WorkerError("worker group expected to live, found it dead; look at its log")
    line = go_on(config)
    assert line is not None and line["decision"] == "failed"
    assert line["reasons"] == ["train: worker group expected to live, found it dead; look at its log"]
    assert told(config)[-2:] == [
        ("stage", "cycle-0001", "train", "failed", None),
        ("cycle", "cycle-0001", None, None, "failed"),
    ]
    assert state_of(config) == {"cycle": None, "cycles": 1, "turns": 0, "refused": []}


def test_data_that_cannot_be_used_is_remembered(config: Config, world: World) -> None:
    world.results["prepare"] = DataError("data.max_rejected_fraction expected at most 10%")
    go_on(config)
    assert [attempt["parent"] for attempt in state_of(config)["refused"]] == ["loop@1"]


def test_storage_that_is_away_leaves_the_cycle_open(config: Config, world: World) -> None:
    world.results["prepare"] = StorageError("nothing answers")
    with pytest.raises(StorageError, match="nothing answers"):
        go_on(config)
    assert told(config)[-1] == ("stage", "cycle-0001", "prepare", "began", None)
    world.results["prepare"] = {"dataset": "loop@2", "added": 5}
    line = go_on(config)
    assert line is not None and line["decision"] == "promoted" and told(config) == expected()
    assert world.ran["snapshot"] == 1 and world.ran["prepare"] == 2


def test_what_the_gate_refuses_ends_there_and_is_remembered(config: Config, world: World) -> None:
    gate = {"decision": "reject", "version": 2, "reasons": ["worse"], "ends": stages.REFUSED}
    world.results["gate"] = gate
    line = go_on(config)
    assert line is not None and (line["decision"], line["reasons"]) == ("refused", ["worse"])
    assert "deploy" not in world.ran
    state = state_of(config)
    assert (state["turns"], state["refused"][0]["run_id"], state["refused"][0]["reasons"]) == (1, "run-1", ["worse"])


def test_late_holder_changes_nothing_more(config: Config, world: World) -> None:
    workspace = open_workspace(config.workspace)
    late: dict[str, Any] = {}

    def overtaken(desk: Any) -> dict[str, Any]:
        late["state"] = dict(desk.cycle.stages)
        desk.ledger._token -= 1  # an heir sealed the state with a newer token
        return {}

    cycle.STAGES["train"] = overtaken
    before = None
    with pytest.raises(LeaseLostError):
        try:
            go_on(config)
        finally:
            before = told(config)
    assert before is not None and before[-1] == ("stage", "cycle-0001", "train", "began", None)
    assert set(look_at(workspace).cycle.stages) == set(late["state"])  # type: ignore[union-attr]
