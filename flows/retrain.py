"""`fresco retrain`: the standing loop. Look, decide, bring the cycle that follows to its end; safe to kill anywhere.

One lease over all triggers and machines: whoever holds it works, the others wait (or, with `once`, leave and say so).
A loop that was replaced while it slept stops with one clear word and changes nothing more. What was begun is gone on
with by the same command, on this machine or another.
"""

import _thread
import json
import math
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from cluster import notify, storage
from cluster.artifacts import Workspace, open_workspace
from cluster.champion import settle
from cluster.errors import LeaseLostError, PlacementError, StorageError, TrackingError
from cluster.lease import Lease, describe, hold_lease, read_lease
from cluster.placement import check_placement
from cluster.registry import Registry
from cluster.signals import ended_by_signals
from components.triggers import RETRAIN, WAIT, Decision, decide
from flows import cycle, findings
from flows.config import Config
from flows.console import program, say
from flows.ledger import Ledger, asked_uri, lease_place

OWNER = "fresco retrain"
TOLD = ("trigger", "cycle")
"""Lines that webhook and command hear of."""
ONCE_WAIT_S = 5.0
POLL_S, S3_POLL_S = 1.0, 10.0
AWAY = (StorageError, TrackingError, PlacementError, OSError)
"""Storage, tracking server or cluster do not answer: a standing loop goes on when they do."""


def run(config: Config, once: bool = False, force: bool = False) -> dict[str, Any]:
    """Look and decide, once or for ever; `force` is a trigger by hand. Returns what the last look came to.

    LeaseLostError when another loop took over while this process did not answer.
    """
    check_placement(config.placement)
    notify.check(config.retrain)
    workspace = open_workspace(config.workspace)
    with ended_by_signals():
        try:
            return _hold_and_work(config, workspace, once, force)
        except _BusyError as error:
            say(str(error))
            if force:
                request = _ask(workspace)
                say(f"it was asked to retrain now (request {request})")
            return _result(WAIT, {"kinds": ["busy"], "reasons": [str(error)]}, None)


def plan(config: Config) -> list[str]:
    """Say what `run` would do; touches nothing."""
    section = config.retrain
    steps = section.steps or config.train.steps
    triggers = [
        f"schedule {section.schedule!r} in {section.time_zone}" if section.schedule else "",
        f"{section.min_new_images} new pictures" if section.min_new_images else "",
        "drift" if section.on_drift else "",
        f"the champion's loss on arrivals {section.max_decay:.0%} above that on its own" if section.max_decay else "",
    ]
    return [
        f"hold the lease {config.workspace}/retrain/lease (taken over {section.lease_ttl_s:g} s after its holder died)",
        f"look every {section.look_every_s:g} s at {config.data.source}; reasons to train: "
        f"{', '.join(filter(None, triggers)) or 'by hand only'}, or no champion yet",
        f"wait {section.cooldown_s:g} s between cycles; budget {section.budget_steps_per_week or 'any number of'} steps"
        f" and {section.budget_gpu_hours_per_week or 'any number of'} GPU hours a week",
        f"snapshot what arrived, grow the champion's dataset, train {steps} steps from the champion, evaluate",
        "let the gate decide; wait until the endpoint draws with the new champion",
    ]


class _BusyError(RuntimeError):
    """Another loop holds the lease, and it was not waited for."""


def _hold_and_work(config: Config, workspace: Workspace, once: bool, force: bool) -> dict[str, Any]:
    place, section = lease_place(workspace), config.retrain
    wait_s = ONCE_WAIT_S if once else math.inf

    def tell(_: str) -> None:
        holder = read_lease(place)
        say(f"another loop works here: {describe(holder) if holder else 'its heartbeat is watched'}; waiting")

    try:
        with hold_lease(place, OWNER, section.lease_ttl_s, wait_s, tell) as confirm, _guarded(confirm, section):
            return _work(config, Ledger(workspace, confirm, _teller(config)), once, force)
    except LeaseLostError:
        raise
    except StorageError as error:
        if once and str(error).startswith(f"{place}.epochs expected to be free"):
            holder = read_lease(place)  # None where its machine's clock is far from ours
            raise _BusyError(f"another loop works here: {describe(holder) if holder else error}") from error
        raise


def _work(config: Config, ledger: Ledger, once: bool, force: bool) -> dict[str, Any]:
    """Turn after turn; a standing loop ends by a signal."""
    result = _result(WAIT, {"kinds": [], "reasons": ["ended before it looked"]}, None)
    while True:
        went_on, begun, away = ledger.state.cycle is not None, ledger.state.cycles, False
        try:
            result = _turn(config, ledger, once, force)
            force = force and went_on  # a cycle that was under way is not what was asked for
        except LeaseLostError:
            raise
        except AWAY as error:
            if once:
                raise
            say(f"{error}\nthe loop goes on in {config.retrain.look_every_s:g} s")
            away = True
            force = force and ledger.state.cycles == begun  # else what was asked for is under way
        if force and not away:
            continue
        if once:
            return result
        try:
            _sleep(config, ledger)
        except KeyboardInterrupt:
            ledger.confirm()
            say(f"ended while nothing was under way; the same command goes on: {program()} retrain")
            return result


def _turn(config: Config, ledger: Ledger, once: bool, force: bool) -> dict[str, Any]:
    """One look and what follows from it; a cycle that was under way comes first."""
    cycle.close_books(ledger)
    state = ledger.state
    if state.cycle is None:
        for repair in settle(Registry(ledger.workspace, config.placement.tracking_uri), config.name):
            say(repair)
        found = findings.look(config, ledger, force, patient=once)
        decision = decide(found.evidence, config.retrain)
        if decision.heed_tick:
            state.last_tick = found.evidence.now
        if decision.verdict == WAIT:
            return _wait(config, ledger, found, decision, always=once)
        cycle.begin(ledger, found, decision)
    else:
        say(f"{state.cycle.id} goes on after {', '.join(state.cycle.stages) or 'its begin'}")
    line = cycle.run(config, ledger)
    say(f"{line['cycle']} {line['decision']}: {'; '.join(line['reasons'])}")
    return _result(line["decision"], line["trigger"], line)


def _wait(config: Config, ledger: Ledger, found: findings.Findings, decision: Decision, always: bool) -> dict[str, Any]:
    """Nothing is done, and that is told: the journal hears it once for every set of reasons, or `always`."""
    state, champion = ledger.state, found.evidence.champion
    trigger = {"kinds": decision.kinds[1:], "reasons": decision.reasons}
    new = state.told != decision.kinds
    if new or always:
        say("\n".join(decision.reasons))
        ledger.add("trigger", decision=WAIT, **trigger, numbers=decision.numbers)
    state.told = decision.kinds  # after the line: a death between them tells it twice, not never
    ledger.save()
    facts: dict[str, Any] = {"champion_before": champion, "champion_after": champion, "stages": []}
    dataset = found.parent.id if found.parent else None
    return _result(WAIT, trigger, {**facts, "dataset": dataset})


def _result(decision: str, trigger: dict[str, Any], line: dict[str, Any] | None) -> dict[str, Any]:
    """The verb's JSON object."""
    line = line or {}
    keys = ("cycle", "champion_before", "champion_after", "dataset", "run_id", "reasons")
    known = {key: line.get(key) for key in keys}
    told = {"decision": WAIT if decision == WAIT else RETRAIN, **trigger}
    return {"trigger": told, "decision": decision, **known, "stages": line.get("stages", [])}


def _sleep(config: Config, ledger: Ledger) -> None:
    """Until the next look is due, or somebody asks for a retraining by hand."""
    deadline = time.monotonic() + config.retrain.look_every_s
    known = findings.asked(ledger.workspace)
    poll_s = POLL_S if not storage.is_s3(ledger.workspace.uri) else S3_POLL_S
    while time.monotonic() < deadline:
        time.sleep(min(poll_s, config.retrain.look_every_s))
        if findings.asked(ledger.workspace) not in ("", known):
            return


def _teller(config: Config) -> Callable[[dict[str, Any]], None]:
    """Return what tells webhook and command of a new line about decisions; what goes wrong there is only said."""

    def tell(line: dict[str, Any]) -> None:
        if line["event"] in TOLD:
            for problem in notify.send(config.retrain, notify.message_of(line, config.workspace)):
                say(f"notification: {problem}")

    return tell


def _ask(workspace: Workspace) -> str:
    """Leave a request for the loop that works."""
    request = uuid.uuid4().hex[:12]
    storage.write_bytes_atomic(asked_uri(workspace), json.dumps({"request": request}).encode())
    return request


@contextmanager
def _guarded(confirm: Callable[[], Lease], section: Any) -> Iterator[None]:
    """Interrupt the block soon after its lease is lost, also in the middle of a long stage."""
    ended, lost = threading.Event(), []

    def watch() -> None:
        while not ended.wait(section.lease_ttl_s / 3):
            try:
                confirm()
            except LeaseLostError as error:
                lost.append(error)
                _thread.interrupt_main(signal.SIGTERM)  # SIGINT is Ray Train's while it trains
                return
            except StorageError:
                continue

    guard = threading.Thread(target=watch, name="watch over the lease", daemon=True)
    if threading.current_thread() is threading.main_thread():
        guard.start()
    try:
        yield
    except KeyboardInterrupt:
        if lost:
            raise LeaseLostError(str(lost[0])) from None
        raise
    finally:
        ended.set()
        if guard.is_alive():
            guard.join()
