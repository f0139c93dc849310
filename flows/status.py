"""fresco status: what serves, why, since when, what served before, whether the endpoint answers, what the loop does.

It changes nothing but the journal, and that only where a crash left a line out.
"""

import time
from textwrap import shorten
from typing import Any

from cluster.artifacts import open_workspace, read_journal
from cluster.champion import settle
from cluster.judging import judged_now
from cluster.lease import Lease, read_lease
from cluster.registry import CHALLENGER, CHAMPION, PREVIOUS, TAG_DATASET, TAG_RUN, TAG_SINCE, Registry, Version
from cluster.reigns import reigns
from cluster.serving import readiness
from flows.config import Config
from flows.console import program, say
from flows.loop_status import MOST_CHARS, loop_of, told_of_loop
from flows.serve import endpoint_of

NUM_DECISIONS = 10
UNTOLD = (
    "time",
    "event",
    "reasons",
    "scorecard",
    "checks",
    "gate",
    "move",
    "streams",
    "statistics",
    "numbers",
    "cursor",
)
"""Too long for a line."""


def run(config: Config) -> dict[str, Any]:
    """Look at the registry, the lock, the endpoint and the journal."""
    workspace = open_workspace(config.workspace)
    registry = Registry(workspace, config.placement.tracking_uri)
    for repair in settle(registry, config.name):
        say(repair)
    journal = read_journal(workspace)
    endpoint = endpoint_of(workspace)
    found: dict[str, Any] = {
        **{alias: _version(registry.by_alias(config.name, alias)) for alias in (CHAMPION, PREVIOUS, CHALLENGER)},
        "judging": judged_now(registry, config.name),
        "lease": _lease(read_lease(registry.lock_path(config.name))),
        "endpoint": None if endpoint is None else {**endpoint, **_state(endpoint["url"])},
        "loop": loop_of(workspace, journal),
        "decisions": journal[-NUM_DECISIONS:],
    }
    if found["champion"] is not None:
        found["champion"]["evidence"] = _evidence(journal, config.name, found["champion"]["version"])
    _tell(config, found)
    return found


def _version(version: Version | None) -> dict[str, Any] | None:
    if version is None:
        return None
    known = {"dataset": TAG_DATASET, "run_id": TAG_RUN, "since": TAG_SINCE}
    return {"version": version.number, **{key: version.tags.get(tag) for key, tag in known.items()}}


def _evidence(journal: list[dict[str, Any]], name: str, number: int) -> dict[str, Any] | None:
    """Why a version became the champion: the newest line with reasons of the gate, else the newest of any kind."""
    lines = [line for line in reigns(journal, name) if line["champion"] == number]
    gated = [line for line in lines if "checks" in line] or lines
    keys = ("event", "since", "forced", "reasons", "checks", "scorecard", "report")
    return {key: gated[-1][key] for key in keys if key in gated[-1]} if gated else None


def _lease(lease: Lease | None) -> dict[str, Any] | None:
    if lease is None:
        return None
    return {"owner": lease.owner, "pid": lease.pid, "host": lease.host, "held_s": round(time.time() - lease.since, 1)}


def _state(url: str) -> dict[str, Any]:
    answer = readiness(url)
    return {"status": "not answering" if answer is None else answer["status"]}


def _tell(config: Config, found: dict[str, Any]) -> None:
    champion, previous, endpoint = found["champion"], found["previous"], found["endpoint"]
    if champion is None:
        say(f"no champion of {config.name} in {config.workspace}; next: {program()} promote RUN_ID")
    else:
        say(
            f"champion   version {champion['version']} since {champion['since']}"
            f" (run {champion['run_id']}, dataset {champion['dataset']})"
        )
        for reason in (champion["evidence"] or {}).get("reasons", []):
            say(f"           {reason}")
    if found["challenger"] is not None:
        say(f"challenger version {found['challenger']['version']} is being tried (run {found['challenger']['run_id']})")
    for number in found["judging"]:
        say(f"candidate  version {number} is being judged")
    if previous is not None:
        say(f"previous   version {previous['version']} (run {previous['run_id']}, dataset {previous['dataset']})")
    if found["lease"] is not None:
        say(f"lock       held by {found['lease']['owner']} for {found['lease']['held_s']} s")
    if endpoint is None:
        say(f"endpoint   none; next: {program()} serve --detach")
    else:
        say(f"endpoint   {endpoint['url']} {endpoint['status']}, version {endpoint['model_version']}")
        if champion is not None and endpoint["model_version"] != champion["version"]:
            say(f"           it does not serve the champion; next: {program()} serve --detach")
    for text in told_of_loop(found["loop"]):
        say(text)
    for line in found["decisions"]:
        numbers = {key: value for key, value in line.items() if key not in UNTOLD}
        told = " ".join(f"{key}={value}" for key, value in numbers.items())
        say(f"  {line['time']} {line['event']} {shorten(told, MOST_CHARS, placeholder=' ...')}")
