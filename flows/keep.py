"""What stays with a version after the gate: its evidence as tags, a model card, the monitor's reference, disk space.

Deleting is asked for (gate.delete_retired) and takes only weights and checkpoints that Fresco wrote into its workspace:
records, samples, reports and the registry's entry stay.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster import stage
from cluster.artifacts import Workspace, append_journal, read_record, write_bytes_atomic
from cluster.champion import RETIRE, retire
from cluster.errors import RegistryError, StorageError, TrackingError, WorkerError
from cluster.registry import (
    TAG_BASE,
    TAG_COMMIT,
    TAG_DATASET,
    TAG_DECISION,
    TAG_FINGERPRINT,
    TAG_MODEL_FINGERPRINT,
    TAG_PARENT,
    TAG_PATH,
    TAG_RETIRED,
    TAG_RUN,
    TAG_SCORECARD,
    Registry,
    Version,
)
from cluster.whole_folders import remove_whole
from components.errors import DataError, InputError, NonFiniteError
from components.model_card import CARD, PICTURE, CardFacts, make_card
from flows import reference
from flows.config import Config
from flows.console import say

LINEAGE = {
    "dataset": TAG_DATASET,
    "run": TAG_RUN,
    "recipe fingerprint": TAG_FINGERPRINT,
    "base weights": TAG_BASE,
    "parent version": TAG_PARENT,
    "weights": TAG_MODEL_FINGERPRINT,
    "code commit": TAG_COMMIT,
}
WEIGHTS = ("pipeline", "checkpoints")


def keep_with_champion(
    config: Config, registry: Registry, version: Version, evaluated: dict[str, Any], line: dict[str, Any]
) -> None:
    """Leave everything that belongs to a new champion; done again after a crash it comes to the same.

    The evidence is last: where `has_evidence`, nothing is missing.
    """
    write_card(config, registry, version, evaluated, line["reasons"])
    pin_reference(config, version.number)
    retire_older(config, registry)
    write_evidence(registry, version, line)


def write_evidence(registry: Registry, version: Version, line: dict[str, Any]) -> None:
    """Tag a version with what was decided about it and with its scorecard."""
    registry.tag(version, _evidence(line))


def has_evidence(version: Version, line: dict[str, Any]) -> bool:
    """Whether a version has the tags of this decision, and not of an earlier one or none."""
    return all(version.tags.get(tag) == text for tag, text in _evidence(line).items())


def _evidence(line: dict[str, Any]) -> dict[str, str]:
    scorecard = {metric: round(value, 6) for metric, value in line["scorecard"].items()}
    return {TAG_SCORECARD: json.dumps(scorecard), TAG_DECISION: "forced" if line["forced"] else line["decision"]}


def write_card(
    config: Config, registry: Registry, version: Version, evaluated: dict[str, Any], reasons: Sequence[str]
) -> Path:
    """Write README.md and its picture into the pipeline directory of a version."""
    directory = registry.directory_of(version)
    grid = evaluated.get("grid")
    if grid and Path(grid).is_file():
        write_bytes_atomic(directory / PICTURE, Path(grid).read_bytes())
    record = read_record(directory.parent) or {}
    settings = record.get("config", {})
    facts = CardFacts(
        name=config.name,
        version=version.number,
        dataset=evaluated["dataset"],
        resolution_px=settings.get("data", {}).get("resolution_px", config.data.resolution_px),
        scorecard=evaluated["scorecard"],
        reasons=reasons,
        lineage={words: version.tags[tag] for words, tag in LINEAGE.items() if tag in version.tags},
        recipe=settings.get("train", {}),
        has_picture=stage.fetch(directory / PICTURE),
    )
    write_bytes_atomic(directory / CARD, make_card(facts).encode())
    return directory / CARD


def pin_reference(config: Config, number: int) -> None:
    """Pin what the monitor compares arrivals with; where that cannot be now, it is told, and the monitor does so."""
    away = (StorageError, TrackingError, OSError)
    try:
        reference.pin(config, number)
    except (InputError, DataError, NonFiniteError, RegistryError, WorkerError, *away) as error:
        say(f"the reference of version {number} is not pinned yet, the monitor will try again: {error}")


def has_card(registry: Registry, version: Version) -> bool:
    return stage.fetch(registry.directory_of(version) / CARD)


def retire_older(config: Config, registry: Registry) -> None:
    """Mark what retention keeps no longer; weights are deleted only where gate.delete_retired asks for it."""
    from flows.serve import endpoint_of

    workspace = registry.workspace
    running = endpoint_of(workspace)
    served = [running["model_version"]] if running and running["model_version"] else []
    retired = retire(registry, config.name, config.gate.keep_versions, served)
    new = [version for version in retired if not version.tags.get(TAG_RETIRED)]
    deleted = delete_weights(workspace, registry, config.name, retired) if config.gate.delete_retired else {}
    if new or deleted:
        numbers = [version.number for version in new]
        append_journal(workspace, RETIRE, name=config.name, versions=numbers, deleted=deleted)
        say(f"retired versions {numbers or 'none'}: beyond gate.keep_versions={config.gate.keep_versions}")
        for path, freed_bytes in deleted.items():
            say(f"  deleted {path} ({freed_bytes / 2**20:.1f} MiB)")
        if not deleted:
            say("  their files stay; --set gate.delete_retired=true deletes their weights")


def delete_weights(workspace: Workspace, registry: Registry, name: str, retired: Sequence[Version]) -> dict[str, int]:
    """Delete the weights of retired versions, unless another version points to them; returns bytes freed by path."""
    gone = {version.number for version in retired}
    needed = {_inside(workspace, version) for version in registry.versions(name) if version.number not in gone}
    freed: dict[str, int] = {}
    for version in retired:
        pipeline = _inside(workspace, version)
        if pipeline is None or pipeline in needed:
            continue
        run = pipeline.parent.parent == workspace.runs
        for folder in [pipeline.parent / part for part in WEIGHTS] if run else [pipeline]:
            size = stage.size_bytes(folder)
            if size is not None:
                freed[str(folder)] = size
                remove_whole(folder)
    return freed


def _inside(workspace: Workspace, version: Version) -> Path | None:
    """Where a version's weights lie, if that is a place Fresco itself writes to."""
    path = workspace.root / version.tags.get(TAG_PATH, "..")
    ours = (workspace.runs, workspace.root / "models")
    return path if ".." not in path.parts and any(path.is_relative_to(folder) for folder in ours) else None
