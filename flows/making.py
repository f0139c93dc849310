"""Which run made a model, on which dataset version, and how did its pictures come? Look-ups for `fresco trace`.

Each function returns what the workspace knows of one step, and appends to `missing` what it does not know and why.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster import stage
from cluster.artifacts import Workspace, read_json, read_record
from components.dataset import CARD, MANIFEST
from components.timeline import tell
from components.timeline_words import stamp
from flows.origin import is_name

RECIPE = ("freezing", "learning_rate", "global_batch", "steps", "seed", "replay_fraction", "replay_of")
MOST_PARENTS = 1000


def run_of(workspace: Workspace, run_id: Any, missing: list[str]) -> dict[str, Any] | None:
    """The recipe of a run and what came of it."""
    if run_id is None:
        missing.append("no run is known: the model was registered from a directory that was made elsewhere")
        return None
    record = read_record(workspace.run_dir(run_id)) if is_name(run_id) else None
    if not isinstance(record, dict):
        missing.append(f"run {run_id} has no record in {workspace.runs}")
        return None
    results, inputs = record.get("results") or {}, record.get("inputs") or {}
    train = (record.get("config") or {}).get("train") or {}
    made = record.get("provenance") or {}
    numbers = ("steps", "eval_loss_first", "eval_loss_best", "eval_loss_last", "seconds", "workers")
    return {
        "id": run_id,
        "recipe": {key: train[key] for key in RECIPE if key in train},
        **{key: results.get(key) for key in numbers},
        "base": inputs.get("base"),
        "commit": made.get("commit"),
        "finished": made.get("finished"),
    }


def dataset_of(workspace: Workspace, dataset_id: Any, missing: list[str]) -> dict[str, Any] | None:
    """A dataset version and the versions that it grew from, nearest first."""
    card = _card(workspace, dataset_id)
    if card is None:
        missing.append(f"dataset version {dataset_id} is not in {workspace.data}")
        return None
    ancestors: list[str] = []
    parent = card.get("parent")
    while parent and parent not in ancestors and len(ancestors) < MOST_PARENTS:
        ancestors.append(parent)
        parent = (_card(workspace, parent) or {}).get("parent")
    kept = ("images", "splits", "created", "source", "rejected")
    first = {"parent": ancestors[0] if ancestors else None, "grown_from": ancestors}
    return {"id": dataset_id, **{key: card.get(key) for key in kept}, **first}


def arrivals_of(
    workspace: Workspace,
    journal: Sequence[dict[str, Any]],
    dataset: Mapping[str, Any] | None,
    version: Mapping[str, Any],
    missing: list[str],
) -> dict[str, Any] | None:
    """The pictures that a dataset version has and its parent has not (all, without a parent), and why they came in."""
    if dataset is None:
        return None
    found: dict[str, Any] = {"grown": dataset["parent"] is not None, "pictures": None, "sources": {}}
    found |= {"first": None, "last": None, "trigger": _trigger(journal, dataset["id"], version)}
    new = _new_rows(workspace, dataset["id"], dataset["parent"])
    if new is None:
        missing.append(
            f"the manifests of {dataset['id']} and its parent are not both here: which pictures are new is not known"
        )
        return found
    seen = sorted(time for time in new["first_seen"].to_pylist() if time)
    found["pictures"] = new.num_rows
    found["sources"] = dict(Counter(new["source"].to_pylist()).most_common())
    return found | {"first": seen[0] if seen else None, "last": seen[-1] if seen else None}


def _new_rows(workspace: Workspace, dataset_id: str, parent: str | None) -> pa.Table | None:
    tables = []
    for name in [dataset_id, *([parent] if parent else [])]:
        path = workspace.dataset_dir(name) / MANIFEST
        if not is_name(name) or not stage.fetch(path):
            return None
        tables.append(pq.read_table(path, columns=["sha256", "source", "first_seen"]))
    if parent is None:
        return tables[0]
    held = set(tables[1]["sha256"].to_pylist())
    return tables[0].filter(pa.array([sha256 not in held for sha256 in tables[0]["sha256"].to_pylist()], pa.bool_()))


def _trigger(journal: Sequence[dict[str, Any]], dataset_id: str, version: Mapping[str, Any]) -> dict[str, Any] | None:
    """The cycle of the loop that trained on the dataset, and why it began; None where a person did it."""
    story = tell(journal, version["name"] or dataset_id.rpartition("@")[0])
    made = [cycle for cycle in story.cycles if cycle.run_id and cycle.run_id == version["run_id"]]
    made = made or [cycle for cycle in story.cycles if cycle.dataset == dataset_id]
    if not made:
        return None
    cycle = made[-1]
    looks = [look for look in story.looks if look.time <= cycle.began]
    last = (
        {"time": stamp(looks[-1].time), "verdict": looks[-1].verdict, "reasons": list(looks[-1].reasons)}
        if looks
        else None
    )
    return {"cycle": cycle.id, "time": stamp(cycle.began), "reasons": list(cycle.trigger), "monitor": last}


def _card(workspace: Workspace, dataset_id: Any) -> dict[str, Any] | None:
    card = read_json(workspace.dataset_dir(dataset_id) / CARD) if is_name(dataset_id) else None
    return card if isinstance(card, dict) else None
