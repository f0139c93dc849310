"""What does the loop know when it looks? Champion, arrivals, drift, decay, budget: the evidence of its decision.

Cheap things first: while the cool-down holds, nothing is measured. What cannot be had is named with its reason, and a
source or a dataset that is away makes the loop wait; it is never taken for an empty one.
"""

import json
import time
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from cluster import storage
from cluster.artifacts import Workspace, read_journal, read_record
from cluster.errors import DamagedError, LeaseLostError, RegistryError, StorageError, WorkerError
from cluster.registry import CHAMPION, TAG_DATASET, Registry, Version
from cluster.reigns import reigns, was_rolled_back
from components import arrivals as rules
from components.arrivals import Arrivals
from components.dataset import DatasetVersion, load_dataset
from components.errors import DataError, InputError, NonFiniteError
from components.schedule import FAR_AHEAD_S
from components.sources import EMBLEMS_SCHEME
from components.triggers import DRIFTED, WEEK_S, Decay, Drift, Evidence, cooldown
from flows import arrivals, snapshot
from flows.config import Config, recipe_fingerprint, with_overrides
from flows.console import say
from flows.enough import count_look
from flows.ledger import BY_HAND, PROMOTED, Ledger, State, asked_uri
from flows.prepare import source_snapshot

CANNOT_SAY = (InputError, DataError, NonFiniteError, RegistryError, WorkerError, DamagedError)
"""What keeps a measurement from saying anything, and the loop from nothing else.

Of a storage's errors those alone that no waiting mends, such as a reference that is not as it was pinned: one that does
not answer now answers later, and what was missed meanwhile is looked at then.
"""


@dataclass(frozen=True)
class Findings:
    """One look: the evidence, and what a cycle would start from."""

    evidence: Evidence
    champion: Version | None
    parent: DatasetVersion | None
    seen: Arrivals | None
    drift: float = 0.0
    request: str = ""
    """The request by hand that was found, to be heeded once."""


def look(config: Config, ledger: Ledger, force: bool, patient: bool) -> Findings:
    """Gather the evidence; moves the cursor over the source in the ledger's state, which the caller saves.

    With `patient`, files that seem to be written still are waited for, once and for monitor.settle_s seconds.
    """
    workspace, state = ledger.workspace, ledger.state
    settle_clock(state, time.time())
    champion = Registry(workspace, config.placement.tracking_uri).by_alias(config.name, CHAMPION)
    remember_rollback(config, ledger, champion)
    request = asked(workspace)
    by_hand = "--force" if force else (f"request {request}" if request and request != state.heeded else "")
    evidence = Evidence(
        now=time.time(),
        champion=champion.number if champion else None,
        last_tick=state.last_tick or 0.0,
        last_ended=state.ended,
        manual=by_hand,
        **budget(config, state, first=champion is None),
    )
    if champion is None:
        return Findings(replace(evidence, **refused_first(config, state)), None, None, None, request=request)
    try:
        parent = parent_of(config, workspace, champion)
        had = refused_before(workspace, state, parent)
        seen = look_at_source(config, ledger, parent, patient, had)
        enough = count_look(config, workspace, (champion, parent), seen, state.short) if seen is not None else None
    except (InputError, DataError, StorageError) as error:
        return Findings(replace(evidence, problem=str(error)), champion, None, None, request=request)
    if seen is None:
        return Findings(evidence, champion, parent, None, request=request)
    fresh = sum(one.pictures for one in seen.new if snapshot.key_of(one) not in had)
    fresh += seen.counts["later"] - seen.counts["unsure"]
    refused = seen.counts["refused"] + seen.counts["unsure"]
    evidence = replace(evidence, new_images=fresh + refused, refused_images=refused, enough=enough)
    evidence = replace(evidence, pending=seen.waiting, missing=seen.counts["missing"])
    if not evidence.fresh_images or (not by_hand and cooldown(evidence, config.retrain.cooldown_s)):
        return Findings(evidence, champion, parent, seen, request=request)  # it waits, whatever a measurement says
    drift = measure_drift(config, ledger, seen) if config.retrain.on_drift else None
    decay = _decay(config, workspace, champion, parent, seen) if config.retrain.max_decay else None
    evidence = replace(evidence, drift=drift, decay=decay)
    return Findings(evidence, champion, parent, seen, drift.effect if drift else 0.0, request)


def remember_rollback(config: Config, ledger: Ledger, champion: Version | None) -> None:
    """What a cycle promoted and a person rolled back is not made again: note it as refused. Not saved yet.

    A person may think longer than the loop waits: the journal knows the cycle, whatever others ended since.
    """
    journal = read_journal(ledger.workspace)
    moves, noted = reigns(journal, config.name), {one["cycle"] for one in ledger.state.refused}
    stages: dict[str, dict[str, Any]] = {}
    for line in journal:
        if line["event"] == "stage" and line["state"] == "done":
            stages.setdefault(line["cycle"], {})[line["stage"]] = line["numbers"]
    for line in journal:
        ours = line["event"] == "cycle" and str(line.get("run_id")).rpartition("-")[0] == config.name
        if not ours or line["decision"] != PROMOTED or line["cycle"] in noted:
            continue
        done = stages.get(line["cycle"], {})
        number = done.get("gate", {}).get("version")
        serves = champion is not None and champion.number == number
        if number is None or serves or not was_rolled_back(moves, config.name, number):
            continue
        arrived = {key: done.get("snapshot", {}).get(key) for key in ("parent", "new")}
        made = {"run_id": line["run_id"], "dataset": line["dataset"]}
        ledger.refuse({"cycle": line["cycle"], **arrived, **made, "reasons": [BY_HAND.format(number)]})
        say(f"{BY_HAND.format(number)}: {line['cycle']}'s run and arrivals are not tried again")


def measure_drift(config: Config, ledger: Ledger, seen: Arrivals) -> Drift:
    """Ask the monitor; what it cannot say now is said in its place, and is no reason to train.

    LeaseLostError where it is the loop's own lease that is lost; that the monitor lost its own ends only its look.
    """
    from flows import monitor

    try:
        found = monitor.run(config, cursor=seen.cursor)
    except LeaseLostError as error:
        ledger.confirm()
        return Drift("not_enough_data", 0.0, (str(error),))
    except CANNOT_SAY as error:
        return Drift("not_enough_data", 0.0, (str(error),))
    effect = float(found["drift"]) if found["verdict"] == DRIFTED else 0.0
    return Drift(found["verdict"], effect, tuple(found["reasons"]), str(found["report"] or ""))


def _decay(config: Config, workspace: Workspace, champion: Version, parent: DatasetVersion, seen: Arrivals) -> Decay:
    from flows.decay import measure_decay

    try:
        return measure_decay(config, workspace, champion, parent, seen)
    except CANNOT_SAY as error:
        return Decay(skipped=str(error))


def settle_clock(state: State, now: float) -> None:
    """A clock that was set back must not make the loop wait for a time that was already there."""
    if state.last_tick is None or state.last_tick > now + FAR_AHEAD_S:
        state.last_tick = now  # the first look: ticks before the loop existed are not owed
    if state.ended is not None:
        state.ended = min(state.ended, now)
    for entry in state.spent:
        entry["at"] = min(entry["at"], now)
    state.spent = [entry for entry in state.spent if now - entry["at"] < WEEK_S]


def budget(config: Config, state: State, first: bool) -> dict[str, Any]:
    """Steps and GPU hours of the last 7 days, and those that one more cycle would take by what the last one took.

    A search that is due in it counts with all its trials at full length: what it stops early is not known before.
    """
    from flows.continual import is_anchor, search_due

    turn = state.turns + 1
    whole = first or is_anchor(config.retrain, turn)
    steps = config.train.steps if whole else config.retrain.steps or config.train.steps
    if search_due(config.retrain, state.searched, turn):
        steps += search_steps(config, steps)
    trained = [entry for entry in state.spent if entry["what"] == "train" and entry["steps"]]
    hours = trained[-1]["gpu_hours"] * steps / trained[-1]["steps"] if trained else 0.0
    return {
        "planned_steps": steps,
        "planned_gpu_hours": hours,
        "spent_steps": sum(entry["steps"] for entry in state.spent),
        "spent_gpu_hours": sum(entry["gpu_hours"] for entry in state.spent),
    }


def search_steps(config: Config, steps: int) -> int:
    """Return the most that a search takes whose trials have at most `steps` steps."""
    trials = config.search.trials * steps
    return min(trials, config.search.budget_steps + steps) if config.search.budget_steps else trials


def parent_of(config: Config, workspace: Workspace, champion: Version) -> DatasetVersion:
    """Return the champion's dataset version, or the one it was measured on when it was promoted."""
    wanted = champion.tags.get(TAG_DATASET)
    if not wanted:
        told = [line for line in reigns(read_journal(workspace), config.name) if line["champion"] == champion.number]
        wanted = next((line["dataset"] for line in reversed(told) if line.get("dataset")), None)
    if not wanted:
        raise InputError(
            f"{champion.uri} expected to name the dataset version it was made from or measured on, found none; promote"
            " a run of this workspace with: fresco promote RUN_ID"
        )
    if read_record(workspace.dataset_dir(wanted)) is None:
        raise InputError(
            f"{champion.uri} expected its data {wanted} in {workspace.data}, found it gone; bring that folder back, or"
            " begin a new line of versions: fresco train, then fresco promote RUN_ID"
        )
    return load_dataset(workspace.dataset_dir(wanted))


def look_at_source(
    config: Config, ledger: Ledger, parent: DatasetVersion, patient: bool, refused: Collection[str] = ()
) -> Arrivals | None:
    """Look what arrived, `refused` last; None for built-in data, which does not grow."""
    if config.data.source.startswith(EMBLEMS_SCHEME):
        return None
    settle_s = config.monitor.settle_s
    found = arrivals.look(config, parent, ledger.state.cursor, settle_s=settle_s, refused=refused)
    if patient and settle_s and any(one.reason in (rules.CHANGING, rules.CAPTIONS_CHANGING) for one in found.pending):
        say(f"{found.counts['pending']} files arrived just now: looking again in {settle_s:g} s whether they are whole")
        ledger.state.cursor = found.cursor
        time.sleep(settle_s)
        found = arrivals.look(config, parent, found.cursor, settle_s=settle_s, refused=refused)
    ledger.state.cursor = found.cursor
    return found


def new_images(found: Arrivals) -> int:
    """Pictures that a cycle takes, and those beyond what one look reads."""
    return found.num_pictures + found.counts["later"]


def refused_before(workspace: Workspace, state: State, parent: DatasetVersion) -> set[str]:
    """Name the arrivals that refused attempts on this parent had."""
    had: set[str] = set()
    for attempt in state.refused:
        if attempt["parent"] == parent.id and attempt["new"]:
            had |= {snapshot.key_of(one) for one in snapshot.thaw(workspace, attempt["cycle"]).new}
    return had


def first_attempt(config: Config, state: State, source: str) -> str:
    """Name what a first champion is made of: the source's snapshot and the recipe, a searched one included."""
    return f"{source} {recipe_fingerprint(with_overrides(config, state.recipe), '', config.model.base)}"


def refused_first(config: Config, state: State) -> dict[str, Any]:
    """Say as evidence whether a first model of what the source holds was refused before; read only where one was."""
    refused = {one["first"]: f"{one['cycle']}: {one['reasons'][0]}" for one in state.refused if "first" in one}
    if not refused:
        return {}
    try:
        return {"refused_first": refused.get(first_attempt(config, state, source_snapshot(config)), "")}
    except (InputError, DataError, StorageError) as error:
        return {"problem": str(error)}


def asked(workspace: Workspace) -> str:
    """Return the newest request by hand, empty when there is none."""
    try:
        return str(json.loads(storage.read_bytes(asked_uri(workspace)))["request"])
    except (FileNotFoundError, StorageError, ValueError, KeyError):
        return ""
