"""What does `make chaos` compare? What a workspace holds but moments, and who was seen to hold the loop's lease."""

import json
import threading
from collections import Counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cluster.artifacts import Workspace

LOOK_S = 0.5
TOLD = ("event", "cycle", "stage", "state", "decision", "dataset", "run_id", "version", "champion", "previous")
"""What is compared of a line in the journal; of looks that wait, and of the monitor's, nothing is claimed."""
Holders = dict[int, set[tuple[int, str]]]
"""Process and mark of every holder that was seen, by token of the lease."""


class watched_lease:  # noqa: N801, reads as a statement
    """Note every holder of the loop's lease that shows while the block runs."""

    def __init__(self, workspace: str, holders: Holders) -> None:
        self.workspace, self.holders, self.ended = workspace, holders, threading.Event()
        self.thread = threading.Thread(target=self.look, daemon=True)

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()

    def look(self) -> None:
        from cluster import storage
        from cluster.errors import StorageError

        place = storage.join(self.workspace, "retrain", "lease.epochs")
        while not self.ended.wait(LOOK_S):
            try:
                for entry in storage.iter_files(place):
                    lease = json.loads(storage.read_bytes(entry.uri))
                    self.holders.setdefault(lease["token"], set()).add((lease["pid"], lease["nonce"]))
            except (FileNotFoundError, ValueError, StorageError):
                continue  # taken away or away at the moment: looked at again


def two_holders(seen: Holders) -> list[str]:
    if not seen:
        return ["nobody was ever seen to hold the lease"]
    several = {token: holders for token, holders in seen.items() if len(holders) > 1}
    return [f"token {token} of the lease was held by {sorted(holders)}" for token, holders in several.items()]


def facts(place: str, tracking_uri: str) -> dict[str, Any]:
    """What must be the same wherever the loop was killed."""
    from cluster import stage
    from cluster.artifacts import finished, open_workspace, read_journal
    from cluster.registry import CHALLENGER, CHAMPION, PREVIOUS, TAG_DECISION, TAG_MODEL_FINGERPRINT, Registry
    from components.models import model_fingerprint

    workspace = open_workspace(place)
    registry = Registry(workspace, tracking_uri)
    aliases = {alias: registry.by_alias("loop", alias) for alias in (CHAMPION, PREVIOUS, CHALLENGER)}
    versions = registry.versions("loop")
    weights = {alias: model_fingerprint(registry.directory_of(one)) for alias, one in aliases.items() if one}
    lines = [line for line in read_journal(workspace) if line["event"] != "monitor" and line.get("decision") != "wait"]
    return {
        "dataset versions": sorted(path.name for path in finished(workspace.data)),
        "finished runs": sorted(path.name for path in finished(workspace.runs)),
        "aliases": {alias: one.number if one else None for alias, one in aliases.items()},
        "registered weights": {version.number: version.tags[TAG_MODEL_FINGERPRINT] for version in versions},
        "tags of versions": {version.number: sorted(version.tags) for version in versions},
        "decisions in tags": {version.number: version.tags.get(TAG_DECISION) for version in versions},
        "weights of the aliases": weights,
        "unfinished moves": sorted(path.name for path in stage.files(workspace.root / "locks", ".intent.json")),
        "state of the loop": state_of(workspace),
        "journal": [json.dumps({key: line[key] for key in TOLD if key in line}, sort_keys=True) for line in lines],
    }


def state_of(workspace: "Workspace") -> dict[str, Any]:
    """What the loop remembers, without moments and hours."""
    from cluster.fencing import peek_fenced
    from flows.ledger import state_uri

    state = peek_fenced(state_uri(workspace))
    assert state is not None
    kept = {key: state[key] for key in ("cycles", "turns", "cycle", "recipe", "searched", "refused")}
    steps: Counter[str] = Counter()
    for spent in state["spent"]:
        steps[spent["cycle"]] += spent["steps"]
    return {**kept, "steps": dict(steps)}


def compare(calm: dict[str, Any], killed: dict[str, Any]) -> list[str]:
    found = []
    for name, expected in calm.items():
        if name == "journal":
            found += compare_lines(expected, killed[name])
        elif expected != killed[name]:
            found.append(f"{name}: {expected} in peace, {killed[name]} killed")
    return found


def compare_lines(calm: list[str], killed: list[str]) -> list[str]:
    there = Counter(calm), Counter(killed)
    lines = sorted(line for line in there[0] | there[1] if there[0][line] != there[1][line])
    found = [f"journal line {line}: {there[0][line]} in peace, {there[1][line]} killed" for line in lines]
    if not found and calm != killed:
        first = next(place for place, pair in enumerate(zip(calm, killed, strict=True)) if len(set(pair)) > 1)
        found.append(f"order of the journal: {calm[first]} in peace, {killed[first]} killed")
    return found
