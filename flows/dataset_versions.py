"""Where do the dataset versions of a workspace lie, and how does one become whole?

`<workspace>/data/<name>@<fingerprint>/` holds manifest, card, listing (the files of the source it was made of) and,
last, the record. The pixels of its pictures lie beside, under the hash of their bytes, and serve all versions.
"""

import io
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa

from cluster import artifacts, stage
from cluster.artifacts import Workspace
from components import dataset as versions
from components import encode
from components.dataset import DatasetVersion
from components.errors import InputError
from components.listings import LISTING, Seen, write_listing
from components.store import ShardStore
from flows.config import Config


def complete_versions(config: Config, workspace: Workspace) -> list[Path]:
    named = [path for path in stage.folders(workspace.data) if path.name.startswith(f"{config.name}@")]
    return [directory for directory in named if artifacts.read_json(directory / artifacts.RECORD) is not None]


def first_seen(config: Config, workspace: Workspace) -> dict[str, str]:
    """Return when each picture of any complete version was first seen, by sha256."""
    manifests = [path / versions.MANIFEST for path in complete_versions(config, workspace)]
    return versions.load_first_seen(path for path in manifests if stage.fetch(path))


def pixel_store(config: Config, workspace: Workspace) -> ShardStore:
    """Return the store of all pictures at the config's resolution, with what is stored by now."""
    store = ShardStore(workspace.encoded / encode.pixels_name(config.data.resolution_px))
    stage.fetch_tree(store.directory)
    return store


def discard_pixels(config: Config, workspace: Workspace, shards: set[str]) -> None:
    """Remove pixel shards of a dataset that was refused."""
    store = pixel_store(config, workspace)
    for name in shards:
        stage.remove(store.directory / name)
    store.discard(shards)


def store_version(
    config: Config, workspace: Workspace, parts: tuple[pa.Table, dict[str, Any], Iterable[Seen]], inputs: dict[str, Any]
) -> DatasetVersion:
    """Write manifest, card and listing (the files it was made of), then the record that makes them a version."""
    manifest, card, seen = parts
    directory = workspace.dataset_dir(card["dataset"])
    artifacts.write_bytes_atomic(directory / versions.MANIFEST, versions.manifest_bytes(manifest))
    artifacts.write_json_atomic(directory / versions.CARD, card)
    store_listing(directory, seen)
    summary = {key: card[key] for key in ("images", "splits", "rejected", "created")}
    facts = {"fingerprint": card["fingerprint"], "config": config.data.model_dump(), "results": summary}
    artifacts.write_record(directory, {**facts, "source": config.data.source, **inputs})
    parent = {key: inputs[key] for key in ("parent",) if key in inputs}
    numbers = {"images": card["images"], "rejected": len(card["rejected_items"]), **parent}
    artifacts.append_journal(workspace, "dataset", dataset=card["dataset"], **numbers)
    return versions.load_dataset(directory)


def store_listing(directory: Path, seen: Iterable[Seen]) -> None:
    """Write the listing of a version whole or not at all."""
    buffer = io.BytesIO()
    write_listing(buffer, seen)
    artifacts.write_bytes_atomic(directory / LISTING, buffer.getvalue())


def named_version(workspace: Workspace, wanted: str) -> tuple[DatasetVersion, dict[str, Any]]:
    """Return a complete version and its record; InputError, with those there are, when it is not here."""
    directory = workspace.dataset_dir(wanted)
    record = artifacts.read_record(directory)
    if record is None:
        known = sorted(path.name for path in artifacts.finished(workspace.data))
        raise InputError(
            f"expected dataset version {wanted!r} in {str(workspace.data)!r}, found {', '.join(known) or 'none'};"
            " name one of those"
        )
    return versions.load_dataset(directory), record


def now_text() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
