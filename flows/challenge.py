"""Try a version on real traffic beside the champion: `promote MODEL --challenger`, ended by `rollback --challenger`.

Nothing is decided here. The endpoint gives it the shares of requests that `serve.challenger_share` (answered by it)
and `serve.shadow_share` (drawn for the metrics alone) say; /metrics compares the roles.
"""

from typing import Any

from cluster.champion import set_challenger, settle
from cluster.registry import CHAMPION, Registry
from components.errors import InputError
from flows.config import Config
from flows.console import program, say, step
from flows.models import open_registry, register_version, resolve_model


def run(config: Config, model: str, force: bool = False) -> dict[str, Any]:
    """Register `model` if it is not yet, and make it the challenger; the one before is told."""
    if force:
        raise InputError("--challenger expected without --force, found both: nothing is decided, so nothing is forced")
    registry = open_registry(config)
    for repair in settle(registry, config.name):
        say(repair)
    found = resolve_model(config, model)
    step(f"try {found.name} (weights {found.fingerprint}) beside the champion")
    version = register_version(config, registry, found)
    before = set_challenger(registry, config.name, version.number, ["tried on request"], notify=say)
    say(f"challenger of {config.name}: version {version.number} (before: {before.number if before else 'none'})")
    serve = config.serve
    if serve.challenger_share or serve.shadow_share:
        say(f"it answers {serve.challenger_share:.0%} of requests and repeats {serve.shadow_share:.0%} for the metrics")
    else:
        say("it draws nothing: serve.challenger_share and serve.shadow_share are 0 where this command looked")
    say(f"end it with: {program()} rollback --challenger --workspace {config.workspace}")
    return _result(config, registry, version.number)


def plan(config: Config) -> list[str]:
    """Say what `run` and `stop` would do."""
    return [
        f"move the alias challenger of {config.name}: to the model that was named (registered first), or away",
        "write the journal; champion and previous stay",
    ]


def stop(config: Config, reason: str = "") -> dict[str, Any]:
    """Take the alias away; nothing else moves."""
    registry = open_registry(config)
    before = set_challenger(registry, config.name, None, [reason or "ended on request"], notify=say)
    if before is None:
        say(f"no challenger of {config.name}: nothing changed")
    else:
        say(f"version {before.number} is the challenger no more")
    return _result(config, registry, None)


def _result(config: Config, registry: Registry, challenger: int | None) -> dict[str, Any]:
    champion = registry.by_alias(config.name, CHAMPION)
    return {"challenger": challenger, "champion": champion.number if champion else None}
