"""A cycle that dies at every one of its side effects, before and after it, ends as an undisturbed one.

The stages are stood for by quick ones here, so that each of some fifty deaths takes milliseconds; test_retrain.py runs
the real stages. Lease, fenced state and journal are real.
"""

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster import champion, lease, storage
from cluster.artifacts import open_workspace, read_journal, write_record
from cluster.errors import LeaseLostError, StorageError, TrackingError, WorkerError
from cluster.lease import hold_lease
from cluster.registry import CHAMPION, PREVIOUS, Registry
from components.dataset import TEST, split_of
from components.emblems import example
from components.errors import DataError
from components.images import to_png
from components.standing import RetrainSection
from components.triggers import Evidence, Reason, decide
from flows import arrivals, cycle, ledger, monitor, prepare, retrain, stages
from flows.config import Config, load_config, with_overrides
from flows.findings import Findings
from flows.ledger import Ledger, lease_place, look_at
from flows.snapshot import key_of, thaw
from tests.loop_world import arrive, crown, loop_config
from tests.servers import free_port


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


@pytest.mark.parametrize("stage", ["gate", "deploy", "watch"])
def test_tracking_server_that_is_away_leaves_the_cycle_open(
    config: Config, world: World, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    nobody, quick = f"http://127.0.0.1:{free_port()}", cycle.STAGES[stage]
    with monkeypatch.context() as away, pytest.raises(TrackingError, match="found: nothing answers there"):
        away.setitem(cycle.STAGES, stage, lambda desk: Registry(desk.workspace, nobody).by_alias("loop", CHAMPION))
        go_on(config)
    assert cycle.STAGES[stage] is quick and told(config)[-1] == ("stage", "cycle-0001", stage, "began", None)
    line = go_on(config)
    assert line is not None and line["decision"] == "promoted" and told(config) == expected()


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


# ---------------------------------------------------------------- real arrivals, datasets, aliases; only models are not


@pytest.fixture
def loop(
    tmp_path: Path,
    tiny_pipelines: dict[int, Path],
    empty_registry: Path,
    examined_here: None,
    monkeypatch: pytest.MonkeyPatch,
) -> Config:
    """A champion of 40 emblems, 12 that arrived since, and a cycle that makes version 2 the champion.

    Nothing is trained or measured: the gate's stage registers another pipeline and moves the alias.
    """
    (tmp_path / "workspace").mkdir()
    (tmp_path / "workspace" / "mlflow.db").write_bytes(empty_registry.read_bytes())
    arrive(tmp_path / "source", "base", 0, 40)
    config = loop_config(tmp_path, tiny_pipelines[0])
    crown(config, tiny_pipelines[0], "run-0", prepare.ensure_dataset(config).id)
    arrive(tmp_path / "source", "drifted", 0, 12)

    def gate(desk: Any) -> dict[str, Any]:
        number = crown(config, tiny_pipelines[1], desk.cycle.run_id, desk.dataset().id)
        return {"decision": "promote", "version": number, "reasons": ["better"]}

    def quick(desk: Any) -> dict[str, Any]:
        return {}

    monkeypatch.setattr(cycle, "local_session", lambda placement: nullcontext())
    monkeypatch.setattr(stages.train, "run", lambda config: {"steps": config.train.steps})
    doubles = {"evaluate": quick, "gate": gate, "deploy": quick, "watch": quick}
    monkeypatch.setattr(cycle, "STAGES", {**stages.STAGES, **doubles})
    return config


def told_of(config: Config, event: str) -> list[dict[str, Any]]:
    return [line for line in read_journal(open_workspace(config.workspace)) if line["event"] == event]


def aliases(config: Config) -> list[int | None]:
    registry = Registry(open_workspace(config.workspace))
    found = (registry.by_alias(config.name, alias) for alias in (CHAMPION, PREVIOUS))
    return [version.number if version else None for version in found]


def refused_once(config: Config, why: str) -> None:
    """The state remembers what cycle-0001 made; its arrivals are no reason again, and by hand nothing is trained."""
    (attempt,) = look_at(open_workspace(config.workspace)).refused
    (looked,) = [line for line in told_of(config, "stage") if line["stage"] == "snapshot" and line["state"] == "done"]
    (ended,) = told_of(config, "cycle")
    assert {key: attempt[key] for key in ("cycle", "parent", "new", "run_id", "reasons")} == {
        "cycle": "cycle-0001",
        "parent": looked["numbers"]["parent"],
        "new": 12,
        "run_id": ended["run_id"],
        "reasons": [why],
    }
    assert attempt["dataset"].startswith("loop@") and attempt["dataset"] != attempt["parent"]
    waits = retrain.run(config, once=True)
    assert waits["decision"] == "wait" and "0 new pictures (12 more were in a refused attempt)" in str(waits["trigger"])
    forced = retrain.run(config, once=True, force=True)
    assert (forced["decision"], forced["stages"][-1]["stage"]) == ("refused", "train")
    assert forced["reasons"] == [f"the same recipe and data were refused in cycle-0001: {why}"]


@pytest.mark.parametrize(("stage", "dies"), [("deploy", None), ("watch", None), ("watch", False), ("watch", True)])
def test_a_champion_that_must_not_stay_is_rolled_back_once_and_its_run_is_not_made_again(
    loop: Config, monkeypatch: pytest.MonkeyPatch, stage: str, dies: bool | None
) -> None:
    monkeypatch.setitem(cycle.STAGES, stage, lambda desk: {"watch": stages.ROLL_BACK, "why": "too many errors"})
    ending = World()
    ending.dies_at = None if dies is None else (1, dies)
    monkeypatch.setattr(cycle.rollback, "run", ending.deadly(cycle.rollback.run))
    if dies is not None:
        with pytest.raises(Killed):
            retrain.run(loop, once=True)
        assert aliases(loop) == ([1, 2] if dies else [2, 1]) and look_at(open_workspace(loop.workspace)).cycle
    result = retrain.run(loop, once=True)
    assert (result["decision"], result["reasons"]) == ("rolled_back", ["too many errors"])
    assert (result["champion_before"], result["champion_after"], aliases(loop)) == (1, 1, [1, 2])
    (line,) = told_of(loop, "rollback")
    assert (line["champion"], line["reasons"]) == (1, ["cycle-0001: too many errors"])
    assert [line["decision"] for line in told_of(loop, "cycle")] == ["rolled_back"]
    assert ("watch" in [one["stage"] for one in result["stages"]]) == (stage == "watch")
    refused_once(loop, "too many errors")


def test_an_heir_that_came_while_the_loop_waited_for_the_aliases_finds_them_as_they_were(
    loop: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = lease_place(open_workspace(loop.workspace))
    real, ready = champion.hold_lease, []

    def overtaken(*arguments: Any, **options: Any) -> Any:
        holder = lease.read_lease(place)
        if ready and holder is not None:
            assert lease._claim(f"{place}.epochs", "heir", 30.0, holder.token + 1)
        return real(*arguments, **options)

    def watch(desk: Any) -> dict[str, Any]:
        ready.append(True)
        return {"watch": stages.ROLL_BACK, "why": "too many errors"}

    monkeypatch.setattr(champion, "hold_lease", overtaken)
    monkeypatch.setitem(cycle.STAGES, "watch", watch)
    calm = with_overrides(loop, {"retrain.lease_ttl_s": 600})  # so that its guard does not look in this moment
    with pytest.raises(LeaseLostError, match="taken over"):
        retrain.run(calm, once=True)
    assert aliases(loop) == [2, 1] and not told_of(loop, "rollback")


def test_what_a_person_rolls_back_after_the_cycle_is_not_promoted_again(loop: Config) -> None:
    assert retrain.run(loop, once=True)["decision"] == "promoted"
    cycle.rollback.run(loop)
    cycle.rollback.run(loop)
    retrain.run(loop, once=True)
    assert aliases(loop) == [2, 1] and not look_at(open_workspace(loop.workspace)).refused, "it was undone"
    cycle.rollback.run(loop)
    retrain.run(loop, once=True)
    refused_once(loop, "version 2 was rolled back by hand")


def test_what_a_person_rolls_back_is_not_promoted_again_when_another_cycle_has_ended_since(
    loop: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(config: Config) -> dict[str, Any]:
        raise WorkerError("worker group expected to live, found it dead; look at its log")

    assert retrain.run(loop, once=True)["decision"] == "promoted"
    arrive(Path(loop.data.source), "drifted", 125, 5)  # two of them test pictures: enough for the gate
    with monkeypatch.context() as patch:
        patch.setattr(stages.train, "run", broken)
        assert retrain.run(loop, once=True, force=True)["decision"] == "failed"
    cycle.rollback.run(loop)
    for _ in range(2):  # it is noted once
        waits = retrain.run(loop, once=True)
        assert waits["decision"] == "wait" and aliases(loop) == [1, 2]
        assert "5 new pictures (12 more were in a refused attempt)" in str(waits["trigger"]["reasons"])
        (attempt,) = look_at(open_workspace(loop.workspace)).refused
    facts = {"cycle": "cycle-0001", "new": 12, "reasons": ["version 2 was rolled back by hand"]}
    assert facts.items() <= attempt.items()
    assert attempt["run_id"].startswith("loop-") and attempt["parent"] != attempt["dataset"]


def test_what_a_person_rolls_back_while_it_is_watched_is_not_promoted_again(
    loop: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def impatient(desk: Any) -> dict[str, Any]:
        cycle.rollback.run(loop)
        return {}

    monkeypatch.setitem(cycle.STAGES, "deploy", impatient)
    monkeypatch.setitem(cycle.STAGES, "watch", stages.watch)
    result = retrain.run(loop, once=True)
    assert (result["decision"], result["champion_after"], aliases(loop)) == ("rolled_back", 1, [1, 2])
    assert result["stages"][-1]["why"] == stages.REPLACED and len(told_of(loop, "rollback")) == 1
    refused_once(loop, "version 2 was rolled back by hand")


def noting(trained: list[Config]) -> Callable[[Config], dict[str, Any]]:
    """Stand for a training that only notes its config."""

    def train(config: Config) -> dict[str, Any]:
        trained.append(config)
        return {"steps": config.train.steps}

    return train


def test_too_few_test_pictures_wait_for_more_and_nothing_is_trained_or_refused(
    loop: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only `prepare` finds that some arrivals are too small to be used: the gate could not judge by what is left."""
    trained: list[Config] = []
    monkeypatch.setattr(stages.train, "run", noting(trained))
    small = Path(loop.data.source) / "small"
    for index in range(12):
        picture, caption = example("base", 9, index)
        storage.write_bytes_atomic(f"{small}-{index:02}.txt", caption.encode())
        storage.write_bytes_atomic(f"{small}-{index:02}.png", to_png(picture.resize((6, 6))))
    hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in Path(loop.data.source).glob("[ds]*.png")]
    tests = sum(split_of(one, 0.2, 0.2) == TEST for one in hashes)
    strict = with_overrides(loop, {"gate.min_test_pictures": tests, "data.max_rejected_fraction": 1.0})
    result = retrain.run(strict, once=True)
    assert (result["decision"], result["champion_after"]) == ("wait", 1)
    assert [one["stage"] for one in result["stages"]] == ["snapshot", "prepare"] and not trained
    assert result["reasons"][0].startswith(f"the gate expects {tests} new test pictures (gate.min_test_pictures)")
    state = look_at(open_workspace(loop.workspace))
    assert (state.refused, state.turns) == ([], 0)
    for _ in range(2):
        waits = retrain.run(strict, once=True)
        assert (waits["cycle"], waits["trigger"]["kinds"]) == (None, ["new_images", "too_few_pictures"])
        assert waits["trigger"]["reasons"][0] == f"no, because {result['reasons'][0]}"
    assert "asked for: 24 new pictures, 10 are enough" in waits["trigger"]["reasons"][1], "none is held against it"
    stricter = with_overrides(strict, {"gate.min_test_pictures": tests + 1})
    assert f"expects {tests + 1}" in retrain.run(stricter, once=True)["trigger"]["reasons"][0]
    forced = retrain.run(strict, once=True, force=True)
    assert (forced["decision"], forced["cycle"], trained) == ("wait", "cycle-0002", [])
    arrive(loop.data.source, "drifted", 100, 40)
    assert retrain.run(strict, once=True)["decision"] == "promoted" and len(trained) == 1


def test_more_arrivals_than_a_cycle_takes_are_all_tried_and_then_no_more(
    loop: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """12 arrivals, 9 a cycle; what a refused attempt had would fill every cycle, were places given by name."""
    look, trained = arrivals.look, list[Config]()
    monkeypatch.setattr(arrivals, "look", lambda *given, **named: look(*given, **named, limit=9))
    monkeypatch.setattr(stages.train, "run", noting(trained))
    refusal = {"decision": "reject", "version": 2, "reasons": ["worse"], "ends": stages.REFUSED}
    monkeypatch.setitem(cycle.STAGES, "gate", lambda desk: refusal)
    config = with_overrides(loop, {"retrain.min_new_images": 3})
    results = [retrain.run(config, once=True) for _ in range(4)]
    assert [one["decision"] for one in results] == ["refused", "refused", "wait", "wait"] and len(trained) == 2
    assert results[1]["trigger"]["reasons"] == ["3 new pictures (9 more were in a refused attempt), 3 are enough"]
    assert "0 new pictures (12 more were in a refused attempt)" in results[2]["trigger"]["reasons"][0]
    workspace = open_workspace(loop.workspace)
    tried = [{key_of(one) for one in thaw(workspace, f"cycle-000{number}").new} for number in (1, 2)]
    assert [len(one) for one in tried] == [9, 9] and len(tried[0] | tried[1]) == 12


def test_a_first_model_that_was_refused_is_made_again_of_other_pictures_or_by_another_recipe_only(
    tmp_path: Path,
    tiny_pipelines: dict[int, Path],
    empty_registry: Path,
    examined_here: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "workspace").mkdir()
    (tmp_path / "workspace" / "mlflow.db").write_bytes(empty_registry.read_bytes())
    arrive(tmp_path / "source", "base", 0, 40)
    config, trained = loop_config(tmp_path, tiny_pipelines[0]), list[Config]()
    slow = {"decision": "reject", "version": 1, "reasons": ["too slow"], "ends": stages.REFUSED}
    doubles = {"evaluate": lambda desk: {}, "gate": lambda desk: slow}
    monkeypatch.setattr(cycle, "STAGES", {**stages.STAGES, **doubles})
    monkeypatch.setattr(cycle, "local_session", lambda placement: nullcontext())
    monkeypatch.setattr(stages.train, "run", noting(trained))

    assert retrain.run(config, once=True)["decision"] == "refused"
    for _ in range(2):
        waits = retrain.run(config, once=True)
        assert (waits["decision"], waits["trigger"]["kinds"]) == ("wait", ["first_start", "refused_before"])
    assert "by the same recipe was refused in cycle-0001: too slow" in waits["trigger"]["reasons"][0]
    forced = retrain.run(config, once=True, force=True)
    assert (forced["decision"], forced["stages"][-1]["stage"], len(trained)) == ("refused", "train", 1)
    run_ids = [attempt["run_id"] for attempt in look_at(open_workspace(config.workspace)).refused]
    assert len(run_ids) == 2 and run_ids[0] and run_ids[0] == run_ids[1]
    longer = with_overrides(config, {"train.steps": 7})
    assert retrain.run(longer, once=True)["decision"] == "refused" and len(trained) == 2
    assert retrain.run(longer, once=True)["decision"] == "wait"
    arrive(tmp_path / "source", "base", 100, 1)
    assert retrain.run(longer, once=True)["decision"] == "refused" and len(trained) == 3


def test_measured_drift_is_a_reason_to_train_and_replays_more(loop: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[Config] = []
    measured = {"verdict": "drift", "drift": 0.6, "reasons": ["images: KID 0.2"], "report": None}
    monkeypatch.setattr(monitor, "run", lambda config, cursor: measured)
    monkeypatch.setattr(stages.train, "run", noting(trained))
    drifting = with_overrides(
        loop, {"retrain.on_drift": True, "retrain.min_new_images": 0, "retrain.most_replay_fraction": 0.6}
    )
    result = retrain.run(drifting, once=True)
    assert result["trigger"]["kinds"] == ["drift"] and "images: KID 0.2" in str(result["trigger"]["reasons"])
    assert [config.train.replay_fraction for config in trained] == [0.4], "0.1 + 0.6 * (0.6 - 0.1)"
    train = next(one for one in result["stages"] if one["stage"] == "train")
    assert (train["drift"], train["replay_fraction"]) == (0.6, 0.4)


def test_a_search_is_made_when_it_is_due_and_its_recipe_is_kept_until_the_next(
    loop: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    searched: list[Config] = []
    trained: list[Config] = []

    def search(config: Config) -> dict[str, Any]:
        searched.append(config)
        best = {"overrides": {"train.warmup_steps": len(searched)}, "run_id": "loop-0", "eval_loss": 0.5}
        return {"best": best, "steps": 30, "seconds": 3.0, "report": None}

    monkeypatch.setattr(stages.tune, "run", search)
    monkeypatch.setattr(stages.train, "run", noting(trained))
    often = with_overrides(loop, {"retrain.search_every": 2, "retrain.steps": 40, "retrain.anchor_every": 0})
    done = []
    for turn in range(3):
        arrive(Path(loop.data.source), "drifted", 100 + 20 * turn, 12)
        result = retrain.run(often, once=True)
        done.append(next(one for one in result["stages"] if one["stage"] == "search"))
    assert [one["searched"] for one in done] == [True, False, True]
    assert done[1]["why"] == "last searched in turn 1, every 2 turns" and done[0]["steps"] == 30
    assert [config.train.steps for config in searched] == [40, 40]
    assert [config.train.warmup_steps for config in trained] == [1, 1, 2]
    state = look_at(open_workspace(loop.workspace))
    assert (state.recipe, state.searched) == ({"train.warmup_steps": 2}, 3)
    spent = [(one["cycle"], one["steps"]) for one in state.spent if one["what"] == "search"]
    assert spent == [("cycle-0001", 30), ("cycle-0003", 30)]


@pytest.fixture
def metered(loop: Config, monkeypatch: pytest.MonkeyPatch) -> tuple[Config, Callable[[float], list[dict[str, Any]]]]:
    """The loop with two GPUs, and what lets so many hours pass and returns what is charged by then on the disk."""
    clock = [0.0]
    monkeypatch.setattr(ledger, "time", SimpleNamespace(time=time.time, monotonic=lambda: clock[0]))
    monkeypatch.setattr(ledger, "METER_S", 0.01)
    monkeypatch.setattr(retrain, "check_placement", lambda placement: None)  # there are none

    def after(hours: float) -> list[dict[str, Any]]:
        clock[0] += hours * 3600
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            spent = look_at(open_workspace(loop.workspace)).spent
            if spent and spent[-1]["gpu_hours"] >= 2 * hours:
                break
        return look_at(open_workspace(loop.workspace)).spent

    return with_overrides(loop, {"placement.gpus_per_worker": 2.0}), after


@pytest.mark.parametrize("complete", [False, True])
def test_the_hours_of_a_training_that_is_killed_are_charged_and_those_of_what_follows_beside_them(
    metered: tuple[Config, Callable[[float], list[dict[str, Any]]]], monkeypatch: pytest.MonkeyPatch, complete: bool
) -> None:
    (config, after), left = metered, {}
    state = Path(ledger.state_uri(open_workspace(config.workspace)))

    def killed(run: Config) -> dict[str, Any]:
        (entry,) = after(10.0)
        assert (entry["what"], entry["steps"]) == ("train", run.train.steps)
        assert entry["gpu_hours"] == pytest.approx(20.0, abs=0.001)
        left["state"] = state.read_bytes()
        raise Killed

    monkeypatch.setattr(stages.train, "run", killed)
    with pytest.raises(Killed):
        retrain.run(config, once=True)
    state.write_bytes(left["state"])  # as SIGKILL leaves it
    cut_short = look_at(open_workspace(config.workspace)).cycle
    assert cut_short is not None
    if complete:
        write_record(open_workspace(config.workspace).run_dir(cut_short.run_id), {"results": {}})

    def goes_on(run: Config) -> dict[str, Any]:
        if not complete:
            after(1.0)
        return {"steps": run.train.steps}

    monkeypatch.setattr(stages.train, "run", goes_on)
    assert retrain.run(config, once=True)["decision"] == "promoted"
    (entry,) = look_at(open_workspace(config.workspace)).spent
    assert entry["gpu_hours"] == pytest.approx(20.0 if complete else 22.0, abs=0.001)


def test_a_search_that_is_killed_has_been_charged_for_all_its_steps_and_its_hours(
    metered: tuple[Config, Callable[[float], list[dict[str, Any]]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, after = metered
    charged: list[dict[str, Any]] = []

    def search(run: Config) -> dict[str, Any]:
        charged.extend(after(3.0))
        best: dict[str, Any] = {"overrides": {}, "run_id": "loop-0", "eval_loss": 0.5}
        return {"best": best, "steps": 30, "seconds": 3.0, "report": None}

    monkeypatch.setattr(stages.tune, "run", search)
    retrain.run(with_overrides(config, {"retrain.search_every": 2, "search.trials": 7}), once=True)
    assert [(one["what"], one["steps"]) for one in charged] == [("search", 7 * config.train.steps)]
    assert charged[0]["gpu_hours"] == pytest.approx(6.0, abs=0.001)
    first, _ = look_at(open_workspace(config.workspace)).spent
    assert (first["what"], first["steps"]) == ("search", 30), "in the end, those that were made"
    assert first["gpu_hours"] == pytest.approx(6.0, abs=0.001)
