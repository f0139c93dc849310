"""Who asked for a picture, which version drew it, and who let that version serve? Look-ups for `fresco trace`.

Each function returns what the workspace knows of one step, and appends to `missing` what it does not know and why. What
is found must agree with what was signed: version 3 of another workspace is another model.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.artifacts import Workspace
from cluster.errors import RegistryError, TrackingError
from cluster.registry import TAG_COMMIT, TAG_DATASET, TAG_MODEL_FINGERPRINT, TAG_PARENT, TAG_RUN, Registry
from cluster.reigns import PROMOTE, reigns
from flows.config import Config

Facts = Mapping[str, Any]
DRAWN_AS = ("seed", "steps", "guidance_scale", "postprocess")
SECONDS = len("2026-01-01T00:00:00")
"""Of a time as text: journal and request log agree up to here."""
LOGGED = ("seconds", "route", "status", "rows", "key")


def request_of(workspace: Workspace, facts: Facts, missing: list[str]) -> dict[str, Any]:
    """What was signed about the request, and its time from the request log, if that still has it."""
    request_id = facts.get("request_id")
    found = {"id": request_id, "time": None, **{key: facts[key] for key in DRAWN_AS if key in facts}}
    if not request_id:
        missing.append("the record names no request, so when it was asked for is not known")
        return found
    drawn_by = facts.get("model_version")  # an unfinished picture names none
    lines = [
        line
        for line in _logged(workspace, str(request_id))
        if None in (drawn_by, line.get("version")) or str(line["version"]) == str(drawn_by)
    ]
    if not lines:
        missing.append(f"no request log here has {request_id}, so when it was asked for is not known")
    elif len(lines) > 1:
        times = ", ".join(str(line.get("time")) for line in lines)
        missing.append(f"{len(lines)} requests called themselves {request_id} ({times}): which one it was is not known")
    else:
        found |= {"time": lines[0].get("time"), **{key: lines[0][key] for key in LOGGED if key in lines[0]}}
    return found


def _logged(workspace: Workspace, request_id: str) -> Iterator[dict[str, Any]]:
    """Yield the lines of a request from the logs of all replicas, rotated ones too."""
    wanted = request_id.encode()
    for path in sorted((workspace.root / "serving").glob("*/requests-*.jsonl*")):
        try:
            with path.open("rb") as file:
                for line in file:
                    if wanted in line:
                        yield from _parsed(line, request_id)
        except OSError:
            continue  # rotated away meanwhile


def _parsed(line: bytes, request_id: str) -> Iterator[dict[str, Any]]:
    try:
        entry = json.loads(line)
    except ValueError:
        return
    if isinstance(entry, dict) and entry.get("request_id") == request_id:
        yield entry


def version_of(
    config: Config, workspace: Workspace, journal: Sequence[dict[str, Any]], facts: Facts, missing: list[str]
) -> dict[str, Any]:
    """The version that was signed, with its name here where the registry has it and it is the same model."""
    number, run_id, dataset = facts["model_version"], facts.get("run_id"), facts.get("dataset")
    found: dict[str, Any] = {"number": number, "name": None, "run_id": run_id, "dataset": dataset, "served": []}
    registry, odd = Registry(workspace, config.placement.tracking_uri), []
    for name in _names(config.name, journal, number):
        try:
            tags = registry.by_number(name, number).tags
        except (RegistryError, TrackingError) as error:
            odd.append(str(error))
            continue
        if (tags.get(TAG_RUN), tags.get(TAG_DATASET)) != (run_id, dataset):
            made = f"run {tags.get(TAG_RUN)} from {tags.get(TAG_DATASET)}"
            odd.append(
                f"version {number} of {name} here was made by {made}, the picture's by run {run_id} from {dataset}: it"
                " was drawn in another workspace, or the registry was replaced since"
            )
            continue
        moves = [reign for reign in reigns(journal, name) if reign["champion"] == number]
        served = [{key: reign.get(key) for key in ("since", "until", "event")} for reign in moves]
        known = {"weights": TAG_MODEL_FINGERPRINT, "parent": TAG_PARENT, "commit": TAG_COMMIT}
        return {**found, "name": name, "served": served, **{key: tags.get(tag) for key, tag in known.items()}}
    missing += odd
    return found


def _names(name: str, journal: Sequence[dict[str, Any]], number: int) -> list[str]:
    """The configured name, then others under which the journal knows a version of this number."""
    others = [line.get("name") for line in journal if number in (line.get("version"), line.get("champion"))]
    return list(dict.fromkeys([name, *(other for other in others if isinstance(other, str))]))


def decision_of(
    journal: Sequence[dict[str, Any]], version: Mapping[str, Any], at: str | None, missing: list[str]
) -> dict[str, Any] | None:
    """The gate's decision about a version: the promotion it served under at the time, else the last one about it."""
    if version["name"] is None:
        return None  # said already: whose decisions these would be is not known
    about = [line for line in journal if _is_about(line, version)]
    moved = [line for line in about if "move" in line]
    before = [line for line in moved if at is None or str(line.get("time"))[:SECONDS] <= at[:SECONDS]]
    line = next(iter([*before[-1:], *moved[:1], *about[-1:]]), None)
    if line is None:
        missing.append(
            f"the journal has no decision of the gate about version {version['number']} of {version['name']}"
        )
        return None
    if at is not None and not _served_at(version["served"], at):
        missing.append(
            f"version {version['number']} was not champion at {at}: it answered as challenger, or while the endpoint"
            " was still following the registry"
        )
    kept = {key: line.get(key) for key in ("time", "decision", "reasons", "report")}
    reasons = [str(reason) for reason in line.get("reasons") or []]
    return {**kept, "reasons": reasons, "forced": bool(line.get("forced")), "checks": line.get("checks", [])}


def _is_about(line: Mapping[str, Any], version: Mapping[str, Any]) -> bool:
    judged = line["event"] == PROMOTE and "decision" in line and line.get("name") == version["name"]
    return judged and line.get("version", line.get("champion")) == version["number"]


def _served_at(served: Sequence[Mapping[str, Any]], at: str) -> bool:
    """Times of one form compare as texts; the log has milliseconds, the journal has not."""
    moment = at[:SECONDS]
    return any(str(one["since"])[:SECONDS] <= moment <= str(one["until"] or "9")[:SECONDS] for one in served)


def is_name(text: object) -> bool:
    """Tell whether a text can name a folder of the workspace, and nothing else."""
    return isinstance(text, str) and text not in ("", ".", "..") and Path(text).name == text
