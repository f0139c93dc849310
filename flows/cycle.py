"""One retraining, told in order: announce why, run the stages that are not done, end with a decision.

Everything is kept in the ledger before the journal is told, so the same command goes on wherever this process ends. A
stage that fails on purpose ends the cycle as `failed`; where the storage or the tracking server is away, the cycle
stays open and goes on when they are back.
"""

import time
from contextlib import ExitStack
from typing import Any

from cluster.artifacts import read_journal
from cluster.champion import settle
from cluster.errors import ChampionMovedError, EndpointError, RegistryError, WorkerError
from cluster.registry import CHAMPION
from cluster.reigns import was_rolled_back
from cluster.session import local_session
from components.errors import DataError, InputError, NonFiniteError
from components.triggers import RETRAIN, WAIT, Decision
from flows import rollback
from flows.config import Config
from flows.console import say, step
from flows.findings import Findings, first_attempt
from flows.ledger import BY_HAND, PROMOTED, Cycle, Ledger
from flows.stages import NEED_RAY, ROLL_BACK, STAGES, Desk, is_champion

ROLLED_BACK, FAILED = "rolled_back", "failed"
ENDS_A_CYCLE = (InputError, DataError, NonFiniteError, WorkerError, EndpointError, RegistryError)
FOR_GOOD = (DataError, NonFiniteError)
"""What the same recipe and data would come to again."""


def begin(ledger: Ledger, findings: Findings, decision: Decision) -> None:
    """Open a cycle in the state; the journal is told by `run`."""
    state = ledger.state
    # Not the state's own count alone: who removed a damaged state must not get the numbers of old cycles again.
    told = [str(line.get("cycle", "")).rpartition("-")[2] for line in read_journal(ledger.workspace)]
    state.cycles = max([state.cycles, *(int(number) for number in told if number.isdecimal())]) + 1
    trigger = {"kinds": [reason.kind for reason in decision.triggers], "reasons": decision.reasons}
    state.cycle = Cycle(
        id=f"cycle-{state.cycles:04d}",
        turn=state.turns + 1,
        began=time.time(),
        trigger={**trigger, "numbers": decision.numbers},
        champion_before=findings.evidence.champion,
        drift=findings.drift,
    )
    state.told = decision.kinds
    state.heeded = findings.request or state.heeded
    ledger.save()


def run(config: Config, ledger: Ledger) -> dict[str, Any]:
    """Bring the open cycle to its end; return its line of the journal. Raises what keeps it from going on now."""
    cycle = ledger.state.cycle
    assert cycle is not None
    desk = Desk(config, ledger, cycle)
    ledger.tell("trigger", {"cycle": cycle.id}, decision=RETRAIN, **cycle.trigger)
    step(f"{cycle.id}: {'; '.join(cycle.trigger['reasons'])}")
    for repair in settle(desk.registry, config.name):
        say(repair)
    with ExitStack() as session:
        for name in STAGES:
            if name in cycle.stages:
                _tell_done(ledger, cycle, name)
            else:
                if name in NEED_RAY:
                    session.enter_context(local_session(config.placement))
                else:
                    session.close()
                try:
                    _run_stage(desk, name)
                except ENDS_A_CYCLE as error:
                    return _fail(desk, name, error)
            if "ends" in cycle.stages[name] or cycle.stages[name].get("watch") == ROLL_BACK:
                break
    return _end(desk)


def close_books(ledger: Ledger) -> None:
    """Tell the journal of a cycle that ended just before its process did."""
    if ledger.state.last is not None:
        _tell_end(ledger)


def _run_stage(desk: Desk, name: str) -> None:
    cycle, ledger = desk.cycle, desk.ledger
    ledger.tell("stage", {"cycle": cycle.id, "stage": name, "state": "began"})
    step(f"{cycle.id}: {name}")
    began = time.monotonic()
    result = STAGES[name](desk)
    cycle.stages[name] = {**result, "seconds": round(time.monotonic() - began, 1)}
    ledger.save()
    _tell_done(ledger, cycle, name)


def _tell_done(ledger: Ledger, cycle: Cycle, name: str) -> None:
    result = {key: value for key, value in cycle.stages[name].items() if key != "seconds"}
    key = {"cycle": cycle.id, "stage": name, "state": "done"}
    ledger.tell("stage", key, numbers=result, seconds=cycle.stages[name]["seconds"])


def _fail(desk: Desk, name: str, error: Exception) -> dict[str, Any]:
    """End the cycle because a stage cannot be done; data and losses that are to blame are not tried again."""
    say(f"{desk.cycle.id}: {name} failed: {error}")
    key = {"cycle": desk.cycle.id, "stage": name, "state": "failed"}
    desk.ledger.tell("stage", key, error=f"{type(error).__name__}: {error}")
    return _finish(desk, FAILED, [f"{name}: {error}"], again=not isinstance(error, FOR_GOOD))


def _end(desk: Desk) -> dict[str, Any]:
    """Decide from what the stages returned; a new champion that must not stay is rolled back here, once."""
    ended = next((result for result in desk.cycle.stages.values() if "ends" in result), None)
    if ended is not None:
        return _finish(desk, ended["ends"], ended["reasons"], again=ended["ends"] == WAIT)
    version = desk.result("gate")["version"]
    verdict = next((r for r in reversed(desk.cycle.stages.values()) if r.get("watch") == ROLL_BACK), None)
    if verdict is None and was_rolled_back(read_journal(desk.workspace), desk.config.name, version):
        return _finish(desk, ROLLED_BACK, [BY_HAND.format(version)], again=False)
    if verdict is None:
        return _finish(desk, PROMOTED, desk.result("gate")["reasons"], again=True)
    why = verdict["why"]
    if is_champion(desk, version):  # else it was rolled back already, before we were killed
        confirm = desk.ledger.confirm
        confirm()
        try:
            rollback.run(desk.config, f"{desk.cycle.id}: {why}", expected=version, confirm=confirm)
        except ChampionMovedError:
            pass  # by hand, a moment ago: it serves no more all the same
        except RegistryError as error:
            return _finish(desk, FAILED, [f"{why}; it stays, there is nothing to go back to: {error}"], again=False)
    return _finish(desk, ROLLED_BACK, [why], again=False)


def _finish(desk: Desk, decision: str, reasons: list[str], again: bool) -> dict[str, Any]:
    """Close the cycle: what must not be tried again is remembered, then state, then journal."""
    cycle, state = desk.cycle, desk.ledger.state
    champion = desk.registry.by_alias(desk.config.name, CHAMPION)
    done = cycle.stages
    dataset = done.get("prepare", {}).get("dataset")
    if not again:
        arrived = {key: done.get("snapshot", {}).get(key) for key in ("parent", "new")}
        made = {"run_id": cycle.run_id, "dataset": dataset}
        source = done.get("snapshot", {}).get("snapshot")
        if source is not None:
            made |= {"first": first_attempt(desk.config, state, source)}
        desk.ledger.refuse({"cycle": cycle.id, **arrived, **made, "reasons": reasons[:3]})
    state.last = {
        "cycle": cycle.id,
        "decision": decision,
        "reasons": reasons,
        "champion_before": cycle.champion_before,
        "champion_after": champion.number if champion else None,
        "dataset": dataset,
        "run_id": cycle.run_id or None,
        "seconds": round(max(0.0, time.time() - cycle.began), 1),
        "trigger": {key: cycle.trigger[key] for key in ("kinds", "reasons")},
        "report": done.get("gate", {}).get("report") or done.get("evaluate", {}).get("report"),
        "stages": [{"stage": name, **result} for name, result in done.items()],
    }
    trained = "train" in done and not done["train"].get("repeated")
    state.turns += trained and decision != FAILED
    state.cycle, state.ended = None, time.time()
    desk.ledger.save()
    return _tell_end(desk.ledger)


def _tell_end(ledger: Ledger) -> dict[str, Any]:
    last = ledger.state.last or {}
    rest = {key: value for key, value in last.items() if key not in ("cycle", "stages")}
    line = ledger.tell("cycle", {"cycle": last["cycle"], "id": last["cycle"]}, **rest)
    return {**line, "stages": last["stages"]}
