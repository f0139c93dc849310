"""fresco promote: register a model with its lineage, check that it draws, and make it the champion.

In order: find it, load it and draw one picture, have a scorecard (evaluate when there is none), register, move the
aliases, write the journal. A model that draws nothing finite is rejected and the champion stays. Whether it is *better*
is not decided here yet; the reasons say so.
"""

from typing import Any

from cluster.artifacts import Workspace, append_journal, open_workspace, read_journal
from cluster.registry import (
    CHAMPION,
    PREVIOUS,
    TAG_BASE,
    TAG_MODEL_FINGERPRINT,
    TAG_PARENT,
    Move,
    Registry,
    Version,
)
from components.errors import NonFiniteError
from flows import evaluate
from flows.config import Config
from flows.console import program, say, step
from flows.models import ResolvedModel, keep_in_workspace, resolve_model

EVENT = "promote"
NO_GATE = "the statistical gate is not part of this version: promoted on request, not because it measured better"


def run(config: Config, model: str) -> dict[str, Any]:
    """Make `model` the champion, or say why not; promoting the champion again changes nothing."""
    workspace = open_workspace(config.workspace)
    registry = Registry(workspace, config.placement.tracking_uri)
    found = resolve_model(config, model)
    step(f"promote {found.name} (weights {found.fingerprint})")
    try:
        check_drawing(found, config)
        evaluated = evaluate.run(config, model)
    except NonFiniteError as error:
        return _reject(workspace, registry, config, found, f"the model does not draw: {error}")
    directory = keep_in_workspace(workspace, found)
    version = registry.register(config.name, directory, _tags(registry, config, found), found.mlflow_run_id)
    move = registry.move_champion(config.name, version.number, f"promote {found.name}", notify=say)
    result = _result("promote", _reasons(move), move.champion, move.champion, move.previous)
    result["report"] = evaluated["report"]
    if move.changed or not _journaled(workspace, version.number):
        append_journal(workspace, EVENT, name=config.name, model=found.name, **_numbers(result, evaluated))
    _tell(config, result, move)
    return result


def plan(config: Config) -> list[str]:
    """Say what `run` would do."""
    return [
        "find the model, load it and draw one picture",
        "evaluate it, unless its scorecard is there",
        f"register it as a version of {config.name} with its lineage",
        f"move {CHAMPION} to it and {PREVIOUS} to what serves now; write the journal",
    ]


def check_drawing(model: ResolvedModel, config: Config) -> None:
    """Load the pipeline and draw one picture; NonFiniteError when a pixel is not finite."""
    import torch

    from components.models import load_parts
    from components.sampler import PictureRequest, draw

    side_px = config.data.resolution_px
    parts = load_parts(model.directory, device="cuda" if torch.cuda.is_available() else "cpu")
    draw(parts, [PictureRequest("a picture", steps=config.serve.default_steps, width_px=side_px, height_px=side_px)])


def _tags(registry: Registry, config: Config, model: ResolvedModel) -> dict[str, str]:
    """Lineage of a model: what its run recorded, its weights, and the version it was trained from, if registered."""
    tags = {**model.lineage, TAG_MODEL_FINGERPRINT: model.fingerprint}
    base = tags.get(TAG_BASE)
    parents = [v for v in registry.versions(config.name) if base and v.tags.get(TAG_MODEL_FINGERPRINT) == base]
    return {**tags, TAG_PARENT: parents[-1].uri} if parents else tags


def _reasons(move: Move) -> list[str]:
    if not move.changed:
        return [f"version {move.champion.number} is the champion already: nothing changed"]
    first = [] if move.previous else ["there was no champion before"]
    return [*first, "the pipeline loads and draws a finite picture", NO_GATE]


def _reject(
    workspace: Workspace, registry: Registry, config: Config, model: ResolvedModel, reason: str
) -> dict[str, Any]:
    champion, previous = (registry.by_alias(config.name, alias) for alias in (CHAMPION, PREVIOUS))
    result = _result("reject", [reason], None, champion, previous)
    append_journal(workspace, EVENT, name=config.name, model=model.name, **result)
    say(f"rejected: {reason}; the champion stays {result['champion'] or 'unset'}")
    return result


def _result(
    decision: str,
    reasons: list[str],
    version: Version | None,
    champion: Version | None,
    previous: Version | None,
) -> dict[str, Any]:
    numbers = {"version": version, "champion": champion, "previous": previous}
    return {
        "decision": decision,
        "reasons": reasons,
        **{key: entry.number if entry else None for key, entry in numbers.items()},
        "report": None,
    }


def _numbers(result: dict[str, Any], evaluated: dict[str, Any]) -> dict[str, Any]:
    values = {metric: entry["value"] for metric, entry in evaluated["scorecard"].items()}
    return {**result, "dataset": evaluated["dataset"], "scorecard": values}


def _journaled(workspace: Workspace, number: int) -> bool:
    """Say whether the last promotion in the journal is this one: a crash may have come between alias and journal."""
    moves = [line for line in read_journal(workspace) if line["event"] == EVENT and line.get("decision") == "promote"]
    return bool(moves) and moves[-1].get("champion") == number


def _tell(config: Config, result: dict[str, Any], move: Move) -> None:
    say(f"champion of {config.name}: version {result['champion']}; previous: {result['previous'] or 'none'}")
    for reason in result["reasons"]:
        say(f"  - {reason}")
    say(f"next: {program()} serve --detach --workspace {config.workspace}")
