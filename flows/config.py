"""Recipe + placement = Config: YAML and dotted overrides in, one frozen and checked tree out, and its fingerprint.

The recipe sections change the result and are fingerprinted; placement, serving and locations never are.
No torch, no ray: a wrong key is answered in well under a second.
"""

import difflib
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError, field_validator, model_validator

from cluster.artifacts import NEEDS_TRACKING
from cluster.notify import check_form, named
from cluster.placement import PlacementSection, ServeSection
from cluster.redaction import holds_credentials, redacted
from components.errors import InputError
from components.recipe import DataSection, EvaluateSection, GateSection, ModelSection, Section, TrainSection
from components.search_space import SearchSection
from components.standing import MonitorSection, RetrainSection

DEFAULT_PRESET = "tiny_cpu"
AFTER_A_RUN = ("serve", "monitor", "retrain")
"""Sections that say nothing about a run."""
ADDED = ("replay_of", "replay_fraction", "average_with_base")
"""Fields of `train` that came later: at their defaults they are left out of fingerprints, so older runs are found."""


class Config(Section):
    workspace: str = "./fresco-workspace"
    """Folder, or s3://bucket/prefix, that holds everything Fresco writes. On S3 it needs placement.tracking_uri."""
    name: str = "fresco"
    """Name of the dataset, the runs and the registered model."""
    data: DataSection = DataSection()
    model: ModelSection = ModelSection()
    train: TrainSection = TrainSection()
    search: SearchSection = SearchSection()
    evaluate: EvaluateSection = EvaluateSection()
    gate: GateSection = GateSection()
    serve: ServeSection = ServeSection()
    monitor: MonitorSection = MonitorSection()
    retrain: RetrainSection = RetrainSection()
    placement: PlacementSection = PlacementSection()

    @field_validator("retrain")
    @classmethod
    def _tells_whom_it_may(cls, section: RetrainSection) -> RetrainSection:
        check_form(section)
        return section

    @model_validator(mode="after")
    def _tracked(self) -> "Config":
        if self.workspace.startswith("s3://") and not self.placement.tracking_uri:
            raise ValueError(NEEDS_TRACKING.format(uri=redacted(self.workspace)))
        return self


def load_config(
    config_file: str | None = None,
    preset: str | None = None,
    overrides: list[str] | None = None,
    workspace: str | None = None,
) -> Config:
    """Compose preset or file, then `path=value` overrides, then the workspace; InputError says which key is wrong."""
    from flows.presets import PRESETS

    if config_file and preset:
        raise InputError("--config and --preset expected one at a time, found both; drop one")
    if config_file:
        tree = _read_yaml(Path(config_file))
    else:
        name = preset or DEFAULT_PRESET
        if name not in PRESETS:
            raise InputError(f"--preset expected one of {', '.join(PRESETS)}, found {name!r}")
        tree = PRESETS[name]().model_dump()
    for override in overrides or []:
        _set(tree, override)
    if workspace is not None:
        tree["workspace"] = workspace
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise InputError(_explain(error)) from None  # its text quotes what it was given


def with_overrides(config: Config, overrides: dict[str, Any]) -> Config:
    """Return the config with values by dotted path, checked as if they came from --set."""
    tree = config.model_dump()
    for path, value in overrides.items():
        *sections, key = path.split(".")
        node = tree
        for section in sections:
            node = node[section]
        node[key] = value
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise InputError(_explain(error)) from None  # its text quotes what it was given


def told_config(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return a dumped config as records, pages and terminals may tell it: whom the loop notifies, and not where.

    It is a config as well, of everything but the loop's notifications.
    """
    section = tree.get("retrain") or {}
    names = named(section.get("webhook", ""), section.get("command", "")) if section else {}
    return {**tree, "retrain": {**section, **names}} if section else dict(tree)


def recipe_fingerprint(config: Config, dataset_id: str, base_fingerprint: str) -> str:
    """12 hex digits over everything that changes a run's result; placement and locations cannot change it."""
    train = config.train.model_dump()
    for name in ADDED:
        if train[name] == TrainSection.model_fields[name].default:
            del train[name]
    if "replay_of" in train:
        train["replay_of"] = train["replay_of"].rpartition("@")[2]
    recipe = {
        "dataset": dataset_id.rpartition("@")[2],
        "base": base_fingerprint,
        "resolution_px": config.data.resolution_px,
        "train": train,
    }
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise InputError(f"--config expected a YAML file, found nothing at {str(path)!r}") from None
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise InputError(f"--config expected YAML in {str(path)!r}, found: {error}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise InputError(f"--config expected a mapping of sections in {str(path)!r}, found a {type(tree).__name__}")
    return tree


def _set(tree: dict[str, Any], override: str) -> None:
    """Apply `a.b.c=value` (value read as YAML) to the tree in place."""
    path, equals, text = override.partition("=")
    if not equals or not path.strip():
        raise InputError(f"--set expected path=value (for example train.steps=600), found {override!r}")
    keys = path.strip().split(".")
    node = tree
    for key in keys[:-1]:
        child = node.setdefault(key, {})
        if not isinstance(child, dict):
            raise InputError(f"--set {override!r}: {key!r} is a value, not a section")
        node = child
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"--set {override!r}: the value is not readable as YAML: {error}") from error
    # YAML 1.1 reads 1e-4 (no dot) as text; people write it all the time. In quotes it stays text.
    if isinstance(value, str) and value == text.strip():
        try:
            value = float(value)
        except ValueError:
            pass
    node[keys[-1]] = "" if value is None else value


def known_keys() -> list[str]:
    """Return every dotted key of the config tree."""

    def walk(model: type[Section], prefix: str) -> list[str]:
        keys = []
        for name, field in model.model_fields.items():
            kind = field.annotation
            keys.append(prefix + name)
            if isinstance(kind, type) and hasattr(kind, "model_fields"):
                keys += walk(kind, f"{prefix}{name}.")
        return keys

    return walk(Config, "")


def _explain(error: ValidationError) -> str:
    """Turn pydantic's report into one line a problem, with the nearest key for an unknown one."""
    lines = []
    for problem in error.errors():
        path = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            near = difflib.get_close_matches(path, known_keys(), n=1, cutoff=0.0)
            lines.append(f"config key {path!r} is unknown; nearest key: {near[0]!r}")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            unshown = isinstance(problem["input"], dict) or holds_credentials(str(problem["input"]))
            found = "" if unshown else f" (found {redacted(repr(problem['input']))})"
            lines.append(f"config {path}: {message}{found}" if path else message)
    return "\n".join(lines)
