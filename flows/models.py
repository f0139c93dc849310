"""Find the model a person means: a diffusers directory, a run, a registered version, or a folder on S3.

Whatever was named, the answer is a local diffusers directory with what is known about its making. A registered version
whose weights changed since it was registered is refused: what was promoted is what gets served.
"""

import difflib
import hashlib
import shutil
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster import stage
from cluster.artifacts import Workspace, disk_message, finished, open_workspace, read_record
from cluster.errors import RegistryError, StorageError
from cluster.registry import (
    TAG_BASE,
    TAG_COMMIT,
    TAG_DATASET,
    TAG_FINGERPRINT,
    TAG_MODEL_FINGERPRINT,
    TAG_PARENT,
    TAG_RUN,
    Registry,
    Version,
)
from cluster.storage import FileEntry, is_s3, list_files, open_input
from cluster.whole_folders import fetch_whole, keep_whole
from components.errors import InputError
from components.models import embedded_base, family_of, model_fingerprint
from flows.config import Config
from flows.console import say

REGISTERED = "models:/"
PIPELINE_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".safetensors")
"""What a diffusers directory needs; nothing that unpickles is ever copied."""
COPY_BYTES = 8 * 2**20


@dataclass(frozen=True)
class ResolvedModel:
    """A model on the local disk; `lineage` holds the registry's tags as far as they are known."""

    directory: Path
    run_id: str | None
    version: int | None
    fingerprint: str
    name: str
    lineage: dict[str, str] = field(default_factory=dict)
    mlflow_run_id: str | None = None

    @property
    def dataset(self) -> str | None:
        return self.lineage.get(TAG_DATASET)


def open_registry(config: Config) -> Registry:
    return Registry(open_workspace(config.workspace), config.placement.tracking_uri)


def resolve_model(config: Config, text: str) -> ResolvedModel:
    """Return the model named by `text`; InputError lists what was looked for when there is none."""
    workspace = open_workspace(config.workspace)
    if text.startswith(REGISTERED):
        return _registered(open_registry(config), text)
    text = stage.here(text, workspace.root)
    if is_s3(text):
        directory = _download(workspace, text)
        return ResolvedModel(directory, None, None, model_fingerprint(directory), text)
    directory = Path(text).expanduser().resolve()
    if stage.address_of(directory) is not None:
        fetch_whole(directory)
    if (directory / "model_index.json").is_file():
        return _directory(workspace, directory)
    names_a_run = text == Path(text).name != "" or directory.parent == workspace.runs
    if names_a_run and read_record(workspace.run_dir(directory.name)) is not None:
        return _run(workspace, directory.name)
    raise InputError(_not_found(workspace, text))


def base_of(config: Config, workspace: Workspace) -> Path:
    """Return the directory of the model that training starts from."""
    if not config.model.base:
        return embedded_base()
    base = Path(stage.here(config.model.base, workspace.root)).expanduser().resolve()
    if stage.address_of(base) is not None:
        fetch_whole(base)
    return base


def keep_in_workspace(workspace: Workspace, model: ResolvedModel) -> Path:
    """Return a directory with the model that lives as long as the workspace, copying it there when it is outside."""
    kept = model.directory.resolve()
    if not kept.is_relative_to(workspace.root):
        kept = workspace.root / "models" / model.fingerprint
        if not fetch_whole(kept):
            _copy(_pipeline_files(str(model.directory)), kept)
            say(f"copied the model into the workspace: {kept}")
    keep_whole(kept)
    return kept


def register_version(config: Config, registry: Registry, model: ResolvedModel) -> Version:
    """Return the registered version of a model, made now if there is none; its parent is the version it began from."""
    if model.version is not None:
        return registry.by_number(config.name, model.version)
    directory = keep_in_workspace(registry.workspace, model)
    tags = {**model.lineage, TAG_MODEL_FINGERPRINT: model.fingerprint}
    base = tags.get(TAG_BASE)
    parents = [v for v in registry.versions(config.name) if base and v.tags.get(TAG_MODEL_FINGERPRINT) == base]
    tags |= {TAG_PARENT: parents[-1].uri} if parents else {}
    return registry.register(config.name, directory, tags, model.mlflow_run_id)


def _registered(registry: Registry, text: str) -> ResolvedModel:
    version = _version(registry, text)
    directory = registry.directory_of(version)
    fingerprint = model_fingerprint(directory)
    expected = version.tags.get(TAG_MODEL_FINGERPRINT, fingerprint)
    if fingerprint != expected:
        raise RegistryError(
            f"{version.uri} expected weights {expected}, found {fingerprint} in {directory}: the files changed after"
            " they were registered; restore them or promote another run"
        )
    run_id = version.tags.get(TAG_RUN)
    return ResolvedModel(directory, run_id, version.number, fingerprint, version.name, dict(version.tags))


def _version(registry: Registry, text: str) -> Version:
    name, at, alias = text.removeprefix(REGISTERED).partition("@")
    if at:
        version = registry.by_alias(name, alias)
        if version is None:
            have = ", ".join(f"{REGISTERED}{name}/{v.number}" for v in registry.versions(name)) or "no version of it"
            raise RegistryError(
                f"{text} expected in the registry {registry.uri}, found {have}; set the alias with: fresco promote"
                " RUN_ID"
            )
        return version
    name, slash, number = name.rpartition("/")
    if not slash or not number.isdigit():
        raise InputError(f"model expected as models:/NAME@ALIAS or models:/NAME/VERSION, found {text!r}")
    return registry.by_number(name, int(number))


def _directory(workspace: Workspace, directory: Path) -> ResolvedModel:
    run = directory.parent
    if run.parent == workspace.runs and directory.name == "pipeline" and read_record(run) is not None:
        return _run(workspace, run.name)
    return ResolvedModel(directory, None, None, model_fingerprint(directory), directory.name)


def _run(workspace: Workspace, run_id: str) -> ResolvedModel:
    record = read_record(workspace.run_dir(run_id)) or {}
    directory = workspace.run_dir(run_id) / record.get("pipeline", "pipeline")
    fetch_whole(directory)
    lineage = {TAG_RUN: run_id, **_lineage(record)}
    mlflow_run_id = record.get("mlflow_run_id")
    return ResolvedModel(directory, run_id, None, model_fingerprint(directory), run_id, lineage, mlflow_run_id)


def _lineage(record: dict[str, Any]) -> dict[str, str]:
    inputs = record.get("inputs", {})
    known = {
        TAG_DATASET: inputs.get("dataset"),
        TAG_BASE: inputs.get("base"),
        TAG_FINGERPRINT: record.get("fingerprint"),
        TAG_COMMIT: record.get("provenance", {}).get("commit"),
    }
    return {tag: str(value) for tag, value in known.items() if value}


def _download(workspace: Workspace, uri: str) -> Path:
    """Copy a diffusers directory from S3, once for each content: the folder is named by names, sizes and etags."""
    files = _pipeline_files(uri)
    if "model_index.json" not in files:
        found = ", ".join(sorted(files)[:5]) or "nothing"
        raise InputError(f"model expected a diffusers directory (with model_index.json) at {uri}, found {found}")
    listing = "\n".join(f"{name} {file.size_bytes} {file.etag}" for name, file in sorted(files.items()))
    directory = workspace.root / "models" / f"s3-{hashlib.sha256(listing.encode()).hexdigest()[:12]}"
    if not directory.is_dir():
        say(f"downloading {sum(file.size_bytes for file in files.values()) / 2**20:.1f} MiB from {uri}")
        _copy(files, directory)
    return directory


def _pipeline_files(uri: str) -> dict[str, FileEntry]:
    """List what makes a pipeline below a folder or prefix, by relative name."""
    root = uri.rstrip("/") + "/"
    files = {file.uri.removeprefix(root): file for file in list_files(uri, PIPELINE_SUFFIXES)}
    return {name: file for name, file in files.items() if name.endswith(PIPELINE_SUFFIXES)}


def _copy(files: dict[str, FileEntry], directory: Path) -> None:
    """Copy files by relative name into a new directory, whole or not at all."""
    unfinished = directory.with_name(f".unfinished-{uuid.uuid4().hex}")
    try:
        for name, file in files.items():
            if ".." in Path(name).parts or Path(name).is_absolute():
                raise InputError(f"model expected file names inside {directory.name}, found {name!r}; it was not read")
            (unfinished / name).parent.mkdir(parents=True, exist_ok=True)
            with open_input(file.uri) as source, (unfinished / name).open("wb") as target:
                shutil.copyfileobj(source, target, COPY_BYTES)
        family_of(unfinished)
        if not directory.is_dir():  # somebody else may have placed the same content meanwhile
            unfinished.rename(directory)
    except OSError as error:
        raise StorageError(disk_message(directory, error)) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _not_found(workspace: Workspace, text: str) -> str:
    directory = Path(text).expanduser()
    if text and directory.is_dir():
        return (
            f"model expected a diffusers directory (with model_index.json) at {text!r}, found a folder without it; pass"
            " a folder written by `pipeline.save_pretrained`"
        )
    runs = sorted(path.name for path in finished(workspace.runs))
    if text and workspace.run_dir(text).is_dir():
        return (
            f"run {text!r} expected to be finished, found no record.json in {workspace.run_dir(text)}; give the same"
            " `fresco train` command again: it continues"
        )
    near = difflib.get_close_matches(text, runs, n=3, cutoff=0.3) or runs[-3:]
    return (
        "model expected as a diffusers directory, a run id, models:/NAME@ALIAS, models:/NAME/VERSION or s3://...;"
        f" found {text!r}, which is no folder here and no run in {workspace.runs}; runs there:"
        f" {', '.join(near) or 'none (fresco train makes one)'}"
    )
