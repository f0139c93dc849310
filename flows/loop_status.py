"""What does the standing loop do right now, and what did it decide last? For those who only look.

Reads the lease, the loop's own state and the journal; takes and seals nothing, and a loop that was never started leaves
nothing to read.
"""

import time
from collections.abc import Mapping, Sequence
from textwrap import shorten
from typing import Any

from cluster.artifacts import Workspace
from cluster.errors import StorageError
from cluster.fencing import peek_fenced
from cluster.lease import Lease, read_lease
from flows.ledger import lease_place, state_uri

MOST_CHARS = 240
Line = Mapping[str, Any]


def loop_of(workspace: Workspace, journal: Sequence[Line]) -> dict[str, Any] | None:
    """Who runs the loop, its cycle and stage, its last verdict, decision and cycle; None where there never was one."""
    problem, state, lease = "", None, None
    try:
        lease = read_lease(lease_place(workspace))
        state = peek_fenced(state_uri(workspace))
    except StorageError as error:
        problem = str(error)
    found: dict[str, Any] = {
        "lease": None if lease is None else _holder(lease),
        "cycle": _cycle(state, journal),
        "monitor": _last(journal, "monitor", ("time", "verdict", "reasons", "report")),
        "trigger": _last(journal, "trigger", ("time", "decision", "reasons", "cycle")),
        "last_cycle": _last(journal, "cycle", ("time", "id", "decision", "champion_after", "dataset", "run_id")),
        "problem": problem or None,
    }
    return found if any(found.values()) else None


def told_of_loop(loop: Mapping[str, Any] | None) -> list[str]:
    """The same as lines for people."""
    if loop is None:
        return []
    lease, cycle, last, told = loop["lease"], loop["cycle"], loop["last_cycle"], []
    if lease is None:
        told.append("loop       is not running")
    else:
        told.append(
            f"loop       held by {lease['owner']} (process {lease['pid']} on {lease['host']}) since {lease['since']}"
        )
    if cycle is not None:
        stage = f"at {cycle['stage']}" if cycle["stage"] else "between stages"
        goes_on = "" if lease is not None else "; the same command continues it"
        told.append(f"           {cycle['id']} {stage}, began {cycle['began']}{goes_on}")
    if last is not None:
        told.append(f"           last: {last['id']} {last['decision']} at {last['time']}")
    for name, key in (("trigger", "decision"), ("monitor", "verdict")):
        if loop[name] is not None:
            reasons = shorten("; ".join(map(str, loop[name]["reasons"] or [])), MOST_CHARS, placeholder=" ...")
            told.append(f"{name:<10} {loop[name][key]} at {loop[name]['time']}: {reasons}")
    return told + ([f"           {loop['problem']}"] if loop["problem"] else [])


def _cycle(state: Any, journal: Sequence[Line]) -> dict[str, Any] | None:
    """The open cycle by the loop's own state, with the stage that the journal saw begin and not end."""
    cycle = state.get("cycle") if isinstance(state, Mapping) else None
    if not isinstance(cycle, Mapping):
        return None
    lines = [line for line in journal if line.get("event") == "stage" and line.get("cycle") == cycle.get("id")]
    began = cycle.get("began")
    return {
        "id": cycle.get("id"),
        "began": _stamp(began) if isinstance(began, int | float) else None,
        "stage": lines[-1].get("stage") if lines and lines[-1].get("state") == "began" else None,
        "done": list(cycle.get("stages") or {}),
    }


def _holder(lease: Lease) -> dict[str, Any]:
    held_s = round(time.time() - lease.since, 1)
    who = {"owner": lease.owner, "host": lease.host, "pid": lease.pid}
    return {**who, "since": _stamp(lease.since), "held_s": held_s}


def _last(journal: Sequence[Line], event: str, keys: Sequence[str]) -> dict[str, Any] | None:
    line = next((line for line in reversed(journal) if line.get("event") == event), None)
    return None if line is None else {key: line.get(key) for key in keys}


def _stamp(moment: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(moment))
