"""fresco history: which version served when, why it came, and what the gate knew then."""

from typing import Any

from cluster.artifacts import open_workspace, read_journal
from cluster.champion import settle
from cluster.registry import Registry
from cluster.reigns import PROMOTE, reigns
from flows.config import Config
from flows.console import program, say

KEPT = ("event", "champion", "previous", "since", "until", "forced", "run_id", "dataset", "reasons", "scorecard")
REFUSALS = ("hold", "reject")


def run(config: Config) -> dict[str, Any]:
    """Tell every champion, oldest first, and the candidates that were refused meanwhile."""
    workspace = open_workspace(config.workspace)
    for repair in settle(Registry(workspace, config.placement.tracking_uri), config.name):
        say(repair)
    journal = read_journal(workspace)
    entries = []
    known: dict[int, dict[str, Any]] = {}
    for reign in reigns(journal, config.name):
        number = reign["champion"]
        known[number] = known.get(number, {}) | {key: reign[key] for key in KEPT if key in reign}
        entries.append({**known[number], "checks": reign.get("checks", [])})
    refused = [
        {key: line.get(key) for key in ("time", "decision", "version", "run_id", "reasons")}
        for line in journal
        if line["event"] == PROMOTE and line.get("decision") in REFUSALS and line.get("name") == config.name
    ]
    _tell(config, entries, refused)
    return {"entries": entries, "refused": refused}


def _tell(config: Config, entries: list[dict[str, Any]], refused: list[dict[str, Any]]) -> None:
    if not entries:
        say(f"no champion of {config.name} so far; next: {program()} promote RUN_ID")
    for entry in entries:
        forced = ", forced" if entry.get("forced") else ""
        made = f"{entry['event']}{forced}; run {entry.get('run_id')}, dataset {entry.get('dataset')}"
        say(f"version {entry['champion']}  {entry['since']} to {entry['until'] or 'now'}  ({made})")
        for reason in entry["reasons"]:
            say(f"    {reason}")
    for line in refused:
        say(f"version {line['version']}  {line['decision']} at {line['time']}: {line['reasons'][0]}")
