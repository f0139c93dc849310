"""Alias moves: two promoters at once, a promoter killed at every point, roll-back, retention and the history of it."""

import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from cluster import champion, storage
from cluster.artifacts import Workspace, append_journal, open_workspace, read_journal
from cluster.canary import Trial, read_trial
from cluster.champion import drop_challenger, move_champion, retire, roll_back, set_challenger, settle, trying
from cluster.errors import ChampionMovedError, LeaseLostError, RegistryError
from cluster.judging import judging
from cluster.lease import hold_lease, read_lease
from cluster.registry import (
    CHALLENGER,
    CHAMPION,
    PREVIOUS,
    TAG_MODEL_FINGERPRINT,
    TAG_RETIRED,
    TAG_RUN,
    TAG_SINCE,
    Registry,
)
from cluster.reigns import reigns, was_rolled_back

KILL_LIMIT_S = 120


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with six versions of `fresco`, made once."""
    workspace = open_workspace(str(tmp_path_factory.mktemp("registry")))
    registry = Registry(workspace)
    for number in range(1, 7):
        pipeline = workspace.run_dir(f"run-{number}") / "pipeline"
        pipeline.mkdir(parents=True)
        tags = {TAG_RUN: f"run-{number}", TAG_MODEL_FINGERPRINT: f"weights {number}"}
        registry.register("fresco", pipeline, tags)
    # Moved away, so that versions are found in the copies only.
    return workspace.root.rename(workspace.root.with_name("moved"))


@pytest.fixture
def workspace(store: Path, tmp_path: Path) -> Workspace:
    shutil.copytree(store, tmp_path / "workspace")
    return open_workspace(str(tmp_path / "workspace"))


@pytest.fixture
def registry(workspace: Workspace) -> Registry:
    return Registry(workspace)


def aliases(registry: Registry) -> tuple[int | None, int | None]:
    found = (registry.by_alias("fresco", alias) for alias in (CHAMPION, PREVIOUS))
    first, second = (version.number if version else None for version in found)
    return first, second


def in_processes(*calls: tuple[Callable[..., None], tuple[Any, ...]]) -> list[int | None]:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=target, args=arguments) for target, arguments in calls]
    for process in processes:
        process.start()
    for process in processes:
        process.join(KILL_LIMIT_S)
    return [process.exitcode for process in processes]


def promote(root: str, number: int) -> None:
    move_champion(Registry(open_workspace(root)), "fresco", number)


def promote_against(root: str, number: int, expected: int) -> None:
    try:
        move_champion(Registry(open_workspace(root)), "fresco", number, expected=expected)
    except ChampionMovedError:
        os._exit(7)


def promote_and_die(root: str, number: int, where: str) -> None:
    """Kill this process, as the kernel would, at the point named by `where`."""
    die_at(where)
    move_champion(Registry(open_workspace(root)), "fresco", number, {"reasons": ["better"]})


def refuse_and_die(root: str, number: int, where: str) -> None:
    die_at(where)
    drop_challenger(Registry(open_workspace(root)), "fresco", number, ["rejected"])


def die_at(where: str) -> None:
    def die(*arguments: Any, **names: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if where == "journal":
        champion.append_journal = die
    elif where == "intent":
        champion.write_json_atomic = die
    else:
        real = Registry.set_alias

        def set_alias(self: Registry, name: str, alias: str, to: int | None) -> None:
            if alias == where:
                die()
            real(self, name, alias, to)

        Registry.set_alias = set_alias  # type: ignore[method-assign]


def test_move_keeps_the_old_champion_as_previous_and_journals_it(registry: Registry, workspace: Workspace) -> None:
    first = move_champion(registry, "fresco", 1, {"reasons": ["first"]})
    assert first.changed and first.champion.number == 1 and first.previous is None
    second = move_champion(registry, "fresco", 2, {"reasons": ["better"], "forced": True})
    assert second.previous is not None and (second.champion.number, second.previous.number) == (2, 1)
    assert aliases(Registry(workspace)) == (2, 1)
    assert second.champion.tags[TAG_SINCE].endswith("Z")
    lines = read_journal(workspace)
    assert [(line["champion"], line["previous"], line["reasons"]) for line in lines] == [
        (1, None, ["first"]),
        (2, 1, ["better"]),
    ]
    assert lines[1]["forced"] and lines[1]["event"] == "promote" and lines[0]["move"] != lines[1]["move"]
    assert settle(registry, "fresco") == [] and len(read_journal(workspace)) == 2


def test_move_to_the_champion_changes_nothing(registry: Registry, workspace: Workspace) -> None:
    for number in (1, 2):
        move_champion(registry, "fresco", number)
    again = move_champion(registry, "fresco", 2)
    assert not again.changed and again.previous is not None and again.previous.number == 1
    assert len(read_journal(workspace)) == 2


def test_move_to_a_missing_version_lists_those_there_are(registry: Registry) -> None:
    move_champion(registry, "fresco", 1)
    with pytest.raises(RegistryError, match=r"models:/fresco/9 expected .*found versions: 1, 2, 3, 4, 5, 6;"):
        move_champion(registry, "fresco", 9)
    assert aliases(registry) == (1, None)


@pytest.mark.parametrize(("expected", "moves"), [(None, True), (1, True), (3, False), (0, False)])
def test_move_decided_against_another_champion_does_not_happen(registry: Registry, expected, moves) -> None:
    move_champion(registry, "fresco", 1)
    if moves:
        assert move_champion(registry, "fresco", 2, expected=expected).changed
        return
    with pytest.raises(ChampionMovedError, match="found 1: another promotion came first"):
        move_champion(registry, "fresco", 2, expected=expected)
    assert aliases(registry) == (1, None)


def test_of_two_promoters_at_once_none_is_lost(registry: Registry, workspace: Workspace) -> None:
    move_champion(registry, "fresco", 1)
    root = str(workspace.root)
    assert in_processes((promote, (root, 2)), (promote, (root, 3))) == [0, 0]
    assert aliases(registry) in {(2, 3), (3, 2)}
    order = [line["champion"] for line in read_journal(workspace)]
    assert order in ([1, 2, 3], [1, 3, 2]) and order[-1] == aliases(registry)[0]
    assert [line["previous"] for line in read_journal(workspace)] == [None, *order[:-1]]


def test_of_two_promoters_that_were_compared_with_one_champion_one_is_told(
    registry: Registry, workspace: Workspace
) -> None:
    move_champion(registry, "fresco", 1)
    root = str(workspace.root)
    codes = in_processes((promote_against, (root, 2, 1)), (promote_against, (root, 3, 1)))
    assert sorted(code or 0 for code in codes) == [0, 7]
    winner = 2 if codes[0] == 0 else 3
    assert aliases(registry) == (winner, 1)


@pytest.mark.parametrize(
    ("repairer", "where"),
    [
        *(("settle", where) for where in ("intent", PREVIOUS, CHAMPION, "journal")),
        # The other commands begin with the same repair: once before the champion moved, once after.
        *((command, where) for command in ("promote", "rollback") for where in (CHAMPION, "journal")),
    ],
)
def test_promoter_killed_anywhere_is_repaired_by_the_next_command(
    registry: Registry, workspace: Workspace, where: str, repairer: str
) -> None:
    for number in (1, 2):
        move_champion(registry, "fresco", number)
    assert in_processes((promote_and_die, (str(workspace.root), 3, where))) == [-signal.SIGKILL]
    reached = where == "journal"
    assert registry.by_alias("fresco", CHAMPION).number == (3 if reached else 2)  # type: ignore[union-attr]
    assert [line["champion"] for line in read_journal(workspace)] == [1, 2], "the line is missing"
    if repairer == "settle":
        said = settle(registry, "fresco")
        assert len(said) == (0 if where == "intent" else 1)
        assert aliases(registry) == ((3, 2) if reached else (2, 1))
    elif repairer == "promote":
        move_champion(registry, "fresco", 4)
        assert aliases(registry) == (4, 3 if reached else 2)
    else:
        roll_back(registry, "fresco", {"reasons": ["test"]})
        assert aliases(registry) == ((2, 3) if reached else (1, 2))
    lines = read_journal(workspace)
    repaired = [line for line in lines if line.get("repaired")]
    assert [(line["champion"], line["reasons"]) for line in repaired] == ([(3, ["better"])] if reached else [])
    assert lines[-1]["champion"] == aliases(registry)[0]
    assert settle(registry, "fresco") == [] and read_journal(workspace) == lines


def test_promoter_killed_after_its_line_leaves_nothing_to_repair(registry: Registry, workspace: Workspace) -> None:
    move_champion(registry, "fresco", 1)
    intent = champion._intent_path(registry, "fresco")
    champion.write_json_atomic(intent, {"line": read_journal(workspace)[0], "previous_before": None})
    assert settle(registry, "fresco") == []
    assert not intent.exists() and len(read_journal(workspace)) == 1


def test_alias_moved_by_others_is_journaled_as_found(registry: Registry, workspace: Workspace) -> None:
    move_champion(registry, "fresco", 1)
    registry.set_alias("fresco", CHAMPION, 5)
    assert "which no line told" in settle(registry, "fresco")[0]
    line = read_journal(workspace)[-1]
    assert (line["event"], line["champion"]) == ("champion_found", 5)
    assert settle(registry, "fresco") == []


def test_repair_leaves_a_command_at_work_alone_and_an_empty_workspace_untouched(
    registry: Registry, workspace: Workspace, tmp_path: Path
) -> None:
    registry.set_alias("fresco", CHAMPION, 5)
    with hold_lease(registry.lock_path("fresco"), "another promoter"):
        assert settle(registry, "fresco") == [] and read_journal(workspace) == []
    empty = tmp_path / "empty"
    empty.mkdir()
    assert settle(Registry(Workspace(empty)), "fresco") == [] and list(empty.iterdir()) == []


def test_roll_back_swaps_in_one_step_and_a_second_one_undoes_it(registry: Registry, workspace: Workspace) -> None:
    for number in (1, 2):
        move_champion(registry, "fresco", number)
    move = roll_back(registry, "fresco", {"reasons": ["worse on prompts of users"]})
    assert move.previous is not None and (move.champion.number, move.previous.number) == (1, 2)
    assert aliases(registry) == (1, 2)
    line = read_journal(workspace)[-1]
    assert (line["event"], line["champion"], line["reasons"]) == ("rollback", 1, ["worse on prompts of users"])
    roll_back(registry, "fresco", {"reasons": []})
    assert aliases(registry) == (2, 1)


def test_roll_back_of_a_version_that_is_not_the_champion_any_more_changes_nothing(registry: Registry) -> None:
    for number in (1, 2):
        move_champion(registry, "fresco", number)
    with pytest.raises(ChampionMovedError, match="nothing was changed"):
        roll_back(registry, "fresco", {"reasons": ["test"]}, expected=1)
    assert aliases(registry) == (2, 1)
    roll_back(registry, "fresco", {"reasons": ["test"]}, expected=2)
    assert aliases(registry) == (1, 2)


@pytest.mark.parametrize("asked", [1, 2])
@pytest.mark.parametrize("move", ["promote", "rollback"])
def test_who_lost_the_right_to_move_before_or_after_the_intent_moves_nothing(
    registry: Registry, workspace: Workspace, move: str, asked: int
) -> None:
    for number in (1, 2):
        move_champion(registry, "fresco", number)
    calls = []

    def proof() -> None:
        calls.append(read_journal(workspace))
        if len(calls) == asked:
            raise LeaseLostError("an heir works here")

    with pytest.raises(LeaseLostError, match="an heir"):
        if move == "promote":
            move_champion(registry, "fresco", 3, proof=proof)
        else:
            roll_back(registry, "fresco", {}, proof=proof)
    settle(registry, "fresco")
    assert aliases(registry) == (2, 1) and len(read_journal(workspace)) == 2


@pytest.mark.parametrize(
    ("moves", "expected"),
    [
        ("2", False),
        ("2 back", True),
        ("2 back back", False),
        ("2 back back back", True),
        ("2 back 3", True),
        ("2 back 2", False),
        ("2 3", False),
        ("2 3 back", False),
        ("2 3 back back", False),
    ],
)
def test_version_counts_as_rolled_back_until_that_is_undone(
    registry: Registry, workspace: Workspace, moves: str, expected: bool
) -> None:
    move_champion(registry, "fresco", 1)
    for move in moves.split():
        if move == "back":
            roll_back(registry, "fresco", {})
        else:
            move_champion(registry, "fresco", int(move))
    assert was_rolled_back(read_journal(workspace), "fresco", 2) is expected


def test_roll_back_without_a_previous_or_its_files_changes_nothing(registry: Registry, workspace: Workspace) -> None:
    with pytest.raises(RegistryError, match="found no champion"):
        roll_back(registry, "fresco", {})
    move_champion(registry, "fresco", 1)
    with pytest.raises(RegistryError, match="found champion 1 without a previous one"):
        roll_back(registry, "fresco", {})
    move_champion(registry, "fresco", 2)
    shutil.rmtree(workspace.run_dir("run-1"))
    with pytest.raises(RegistryError, match="found nothing there"):
        roll_back(registry, "fresco", {})
    assert aliases(registry) == (2, 1) and len(read_journal(workspace)) == 2


@pytest.mark.parametrize(
    ("keep", "also", "retired"), [(0, [], [1, 3, 4]), (1, [], [1, 3]), (9, [], []), (0, [3], [1, 4]), (1, [4], [1])]
)
def test_retention_marks_what_is_neither_aliased_nor_recent(registry: Registry, keep, also, retired) -> None:
    move_champion(registry, "fresco", 2)
    move_champion(registry, "fresco", 6)
    set_challenger(registry, "fresco", 5)
    assert [version.number for version in retire(registry, "fresco", keep, also)] == retired
    marked = [version.number for version in registry.versions("fresco") if version.tags.get(TAG_RETIRED)]
    assert marked == retired
    assert len(registry.versions("fresco")) == 6, "nothing is removed from the registry"


def test_retired_version_that_is_promoted_again_is_marked_no_longer(registry: Registry) -> None:
    move_champion(registry, "fresco", 6)
    retire(registry, "fresco", 0)
    move_champion(registry, "fresco", 1)
    assert not registry.by_number("fresco", 1).tags.get(TAG_RETIRED)


def challenger_of(registry: Registry) -> int | None:
    found = registry.by_alias("fresco", CHALLENGER)
    return found.number if found else None


def test_challenger_is_set_and_removed_and_both_are_journaled(registry: Registry, workspace: Workspace) -> None:
    move_champion(registry, "fresco", 1)
    assert set_challenger(registry, "fresco", 3, ["tried on request"]) is None and challenger_of(registry) == 3
    before = set_challenger(registry, "fresco", 4)
    assert before is not None and before.number == 3
    for _ in range(2):
        set_challenger(registry, "fresco", None, ["enough"])
        assert challenger_of(registry) is None
    lines = [line for line in read_journal(workspace) if line["event"] == "challenger"]
    assert [(line["version"], line["reasons"]) for line in lines] == [
        (3, ["tried on request"]),
        (4, []),
        (None, ["enough"]),
    ]
    assert settle(registry, "fresco") == [], "the champion's own history has no such lines"


def test_champion_and_a_missing_version_are_no_challengers(registry: Registry) -> None:
    move_champion(registry, "fresco", 1)
    set_challenger(registry, "fresco", 3)
    with pytest.raises(RegistryError, match="found 1, which serves already"):
        set_challenger(registry, "fresco", 1)
    with pytest.raises(RegistryError, match="models:/fresco/9 expected"):
        set_challenger(registry, "fresco", 9)
    assert challenger_of(registry) == 3


@pytest.mark.parametrize("by", ["promote", "rollback", "other tools"])
def test_challenger_that_becomes_champion_is_one_no_more(registry: Registry, by: str) -> None:
    move_champion(registry, "fresco", 1)
    move_champion(registry, "fresco", 2)
    set_challenger(registry, "fresco", 1)
    if by == "promote":
        move_champion(registry, "fresco", 1)
    elif by == "rollback":
        roll_back(registry, "fresco", {"reasons": []})
    else:
        registry.set_alias("fresco", CHALLENGER, 2)
        assert settle(registry, "fresco") == ["repaired: version 2 is the champion, and the challenger no more"]
    assert challenger_of(registry) is None and settle(registry, "fresco") == []


def test_other_challenger_stays_when_champions_move_or_somebody_is_refused(registry: Registry) -> None:
    set_challenger(registry, "fresco", 3)
    move_champion(registry, "fresco", 1)
    move_champion(registry, "fresco", 2)
    roll_back(registry, "fresco", {"reasons": []})
    assert not drop_challenger(registry, "fresco", 4, ["rejected"])
    assert challenger_of(registry) == 3
    assert drop_challenger(registry, "fresco", 3, ["rejected"]) and challenger_of(registry) is None


def test_promoter_killed_before_its_challenger_is_one_no_more_is_repaired(
    registry: Registry, workspace: Workspace
) -> None:
    move_champion(registry, "fresco", 1)
    set_challenger(registry, "fresco", 3)
    assert in_processes((promote_and_die, (str(workspace.root), 3, CHALLENGER))) == [-signal.SIGKILL]
    assert aliases(registry) == (3, 1) and challenger_of(registry) == 3
    assert len(settle(registry, "fresco")) == 2, "the journal's line and the alias"
    assert aliases(registry) == (3, 1) and challenger_of(registry) is None
    line = read_journal(workspace)[-1]
    assert (line["event"], line["champion"], line["repaired"]) == ("promote", 3, True)
    assert settle(registry, "fresco") == []


def test_late_holder_leaves_the_trial_of_its_heir_alone(registry: Registry, workspace: Workspace) -> None:
    """It stood still for longer than its time-to-live, and the heir tries the same version again."""
    place = workspace.place("locks", "trial-fresco.lock")
    move_champion(registry, "fresco", 1)
    late = trying(registry, "fresco", 3, 0.2)
    with pytest.raises(LeaseLostError, match=r"held by trial of version 3 \(token 1\), found token 2"), late:
        own = read_lease(place)
        assert own is not None
        heir = replace(own, owner="heir", machine="other/1", nonce="other", token=2)
        storage.write_bytes_atomic(f"{place}.epochs/{heir.token:012}.json", json.dumps(asdict(heir)).encode())
    assert read_trial(registry, "fresco") == Trial(3, 0.2) and challenger_of(registry) == 3
    assert read_journal(workspace)[-1]["reasons"] == ["canary"], "no line says that the trial ended"
    assert read_lease(place) == heir


@pytest.mark.parametrize(("where", "left"), [(CHALLENGER, 3), ("journal", None)])
def test_refusal_killed_on_its_way_leaves_nothing_half_done(
    registry: Registry, workspace: Workspace, where: str, left: int | None
) -> None:
    """Either nothing has happened, or the alias is gone: what was refused is never tried on."""
    move_champion(registry, "fresco", 1)
    set_challenger(registry, "fresco", 3)
    assert in_processes((refuse_and_die, (str(workspace.root), 3, where))) == [-signal.SIGKILL]
    assert challenger_of(registry) == left and settle(registry, "fresco") == []
    assert drop_challenger(registry, "fresco", 3, ["rejected"]) == (left is not None)


def test_what_is_judged_is_not_retired(registry: Registry) -> None:
    move_champion(registry, "fresco", 6)
    with judging(registry, "fresco", 2):
        assert [version.number for version in retire(registry, "fresco", 0)] == [1, 3, 4, 5]
    assert [version.number for version in retire(registry, "fresco", 0)] == [1, 2, 3, 4, 5]


def test_history_has_every_reign_with_its_end_and_no_refusals(registry: Registry, workspace: Workspace) -> None:
    move_champion(registry, "fresco", 1, {"reasons": ["first"]})
    append_journal(workspace, "promote", name="fresco", decision="hold", champion=1, version=2)
    append_journal(workspace, "promote", name="other", decision="promote", champion=9, move="x")
    move_champion(registry, "fresco", 3)
    roll_back(registry, "fresco", {"reasons": []})
    told = reigns(read_journal(workspace), "fresco")
    assert [(line["event"], line["champion"]) for line in told] == [("promote", 1), ("promote", 3), ("rollback", 1)]
    assert [line["until"] for line in told] == [told[1]["since"], told[2]["since"], None]
