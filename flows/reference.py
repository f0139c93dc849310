"""What the champion knows, pinned: its held-out pictures and captions as the monitor's encoder sees them.

Pinned once for each version, when it becomes champion (or by the first monitor after that), and never changed: arrays
in Parquet under the hash of their content, the record last. Who reads it checks the hash and the encoder's identity.
Drift is measured against this, so a reference that could change would hide it.
"""

import hashlib
import io
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster import stage, storage
from cluster.artifacts import RECORD, Workspace, open_workspace, read_json, read_record, write_bytes_atomic
from cluster.errors import DamagedError, RegistryError
from cluster.registry import CHAMPION, TAG_DATASET, Registry, Version
from components import dataset as versions
from components.dataset import DUPLICATE, TEST, TRAIN, VALIDATION, DatasetVersion
from components.drift_items import Captioned, flags, item_table, word_counts
from components.errors import DataError, InputError
from components.images import TRUNCATED, ZERO_BYTES
from components.reservoir import Reservoir, add, key_of
from components.sources import MISSING_FILE, NO_CAPTION
from flows.config import Config, with_overrides
from flows.console import say
from flows.dataset_versions import named_version
from flows.features import Eye, ensure_features, monitor_eye

WAITED_FOR = (DUPLICATE, NO_CAPTION, MISSING_FILE, TRUNCATED, ZERO_BYTES)
"""Reasons that do not count as rejected: an arrival in that state is waited for, or has been seen before."""
SEED = 0
"""Of the sample of held-out pictures, where there are more than `monitor.window`."""


@dataclass(frozen=True)
class Reference:
    """A pinned reference; `read` gives its content."""

    version: int
    dataset: str
    sha256: str
    """Over pictures, captions, features and words."""
    encoder: str
    """`ClipEncoder.identity`."""
    pinned_s: float
    held_out: int
    """Test and validation pictures of the dataset version."""
    size: int
    """Those of them that are kept: a seeded sample where there were more."""
    resolution_px: int
    candidates: int
    """Pictures that were offered to the dataset, and of those the rejected ones."""
    rejected: int
    files: dict[str, str]
    """sha256 of the two files by name."""
    directory: Path

    def read(self) -> tuple[pa.Table, dict[str, int]]:
        """Return (items, training captions by word); DamagedError when the bytes are not those that were pinned."""
        items, words = (pq.read_table(io.BytesIO(self._checked(name))) for name in self.files)
        return items, dict(zip(words["word"].to_pylist(), words["captions"].to_pylist(), strict=True))

    def rejected_flags(self) -> Any:
        """1 or 0 for each candidate of the champion's data, or for a sample of a thousand or more of them."""
        return flags(self.rejected, self.candidates, max(self.size, 1000), SEED)

    def _checked(self, name: str) -> bytes:
        path = self.directory / name
        try:
            content = storage.read_bytes(str(path))
            found = hashlib.sha256(content).hexdigest()
        except FileNotFoundError:
            content, found = b"", "nothing"
        if found != self.files[name]:
            raise DamagedError(
                f"{path} expected to be as it was pinned for version {self.version} (sha256 {self.files[name][:12]}),"
                f" found {found[:12]}; restore it from a backup, or remove {self.directory} to pin the reference anew"
            )
        return content


def pin(config: Config, version: int) -> Reference:
    """Return the reference of this version of the model, pinning it when there is none.

    InputError when the version's data, or its pixels, are gone, when it has no held-out pictures, and when the
    reference was pinned with another encoder than `monitor.encoder`; DamagedError when its record cannot be read.
    """
    workspace = open_workspace(config.workspace)
    eye = monitor_eye(config)
    directory = workspace.root / "monitor" / "reference" / config.name / f"version-{version}"
    reference = _pinned(directory, version)
    if reference is None:
        registered = Registry(workspace, config.placement.tracking_uri).by_number(config.name, version)
        reference = Reference(**_pin(config, workspace, eye, registered, directory), directory=directory)
    if reference.encoder != eye.identity:
        raise InputError(
            f"monitor.encoder expected the encoder {reference.encoder}, with which the reference of version {version}"
            f" was pinned, found {eye.identity} in {eye.directory}: rows of two encoders cannot be compared; set it"
            f" back, or remove {directory} to pin that version anew"
        )
    return reference


def _pinned(directory: Path, version: int) -> Reference | None:
    try:
        record = read_record(directory)
        return None if record is None else Reference(**record, directory=directory)
    except (ValueError, TypeError) as error:
        raise DamagedError(
            f"{directory / RECORD} expected to describe the reference of version {version}, found: {error}; restore it"
            f" from a backup, or remove {directory} to pin the reference anew"
        ) from error


def champion_data(config: Config, workspace: Workspace, champion: Version) -> DatasetVersion:
    """Return the dataset version that a registered version was trained on; InputError when it is gone or unknown."""
    named = champion.tags.get(TAG_DATASET)
    if not named:
        raise InputError(
            f"{champion.uri} expected to name the dataset version it was trained on, found none: it was promoted from a"
            " folder, and drift can only be told from known data; promote a run (fresco train, fresco promote RUN_ID)"
        )
    directory = workspace.dataset_dir(named)
    if read_record(directory) is None:
        raise InputError(
            f"{champion.uri} expected its data {named} in {workspace.data}, found it gone: what is new cannot be told"
            " without it; restore that folder, or prepare, train and promote on data that is there"
        )
    return versions.load_dataset(directory)


def _pin(config: Config, workspace: Workspace, eye: Eye, version: Version, directory: Path) -> dict[str, Any]:
    """Write the reference whole, its record last; of several at once the first counts."""
    dataset = champion_data(config, workspace, version)
    resolution_px = int(named_version(workspace, dataset.id)[1]["config"]["resolution_px"])
    config = with_overrides(config, {"data.resolution_px": resolution_px})
    held_out = [*dataset.split(TEST), *dataset.split(VALIDATION)]
    if not held_out:
        raise InputError(
            f"{dataset.id} expected test or validation pictures to compare arrivals with, found none; raise"
            " data.test_fraction and prepare, train and promote again"
        )
    kept = _sample({item.sha256: item.caption for item in held_out}, dataset, config.monitor.window)
    say(f"pinning the reference of {version.uri}: {len(kept)} of {len(held_out)} held-out pictures of {dataset.id}")
    captions = {item.caption for item in kept}
    try:
        job = ensure_features(config, workspace, eye, {item.sha256 for item in kept}, captions)
    except DataError as error:
        raise InputError(
            f"{version.uri} expected the pixels of its held-out pictures below {workspace.encoded}, found them gone"
            f" ({error}); restore that folder, or prepare, train and promote again"
        ) from error
    words = word_counts(item.caption for item in dataset.split(TRAIN))
    files = {}
    for kind, table in (("items", item_table(kept, job)), ("words", words)):
        content = _parquet(table)
        digest = hashlib.sha256(content).hexdigest()
        files[f"{kind}-{digest[:12]}.parquet"] = digest
        write_bytes_atomic(directory / f"{kind}-{digest[:12]}.parquet", content)
    rejected, candidates = _offered(workspace, dataset)
    record = {
        "version": version.number,
        "dataset": dataset.id,
        "sha256": hashlib.sha256(json.dumps([eye.identity, *files.values()]).encode()).hexdigest(),
        "encoder": eye.identity,
        "pinned_s": time.time(),
        "held_out": len(held_out),
        "size": len(kept),
        "resolution_px": resolution_px,
        "candidates": candidates,
        "rejected": rejected,
        "files": files,
    }
    content = (json.dumps(record, indent=2, sort_keys=True) + "\n").encode()
    if not storage.put_if_absent(stage.shared(directory / RECORD), content):
        record = read_record(directory) or record
    return record


def _sample(captions: dict[str, str], dataset: DatasetVersion, size: int) -> list[Captioned]:
    """Return at most `size` pictures, a uniform sample that depends on their bytes alone."""
    by_key = {key_of(sha256): sha256 for sha256 in captions}
    chosen = {by_key[int(key)] for key in add(Reservoir(size, SEED), list(by_key), {}).keys}
    manifest = pq.read_table(dataset.directory / versions.MANIFEST, columns=["sha256", "width_px", "height_px"])
    sizes = {row["sha256"]: row for row in manifest.to_pylist() if row["sha256"] in chosen}
    return [Captioned(caption=captions[one], **sizes[one]) for one in sorted(chosen)]


def _offered(workspace: Workspace, dataset: DatasetVersion) -> tuple[int, int]:
    """Return (rejected, all) candidates of a version and the versions it grew from; repeated pictures are neither."""
    rejected, directory = 0, dataset.directory
    seen: set[str] = set()
    while (card := read_json(directory / versions.CARD)) is not None and card["dataset"] not in seen:
        seen.add(card["dataset"])
        rejected += sum(number for reason, number in card["rejected"].items() if reason not in WAITED_FOR)
        if not card.get("parent"):
            break
        directory = workspace.dataset_dir(card["parent"])
    return rejected, rejected + len(dataset.items)


def _parquet(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def champion_of(config: Config, workspace: Workspace) -> Version:
    """Return the champion; RegistryError when there is none yet."""
    champion = Registry(workspace, config.placement.tracking_uri).by_alias(config.name, CHAMPION)
    if champion is None:
        raise RegistryError(
            f"monitor expected a champion of {config.name} to compare arrivals with, found none in"
            f" {config.workspace}; make one with: fresco train, then fresco promote RUN_ID"
        )
    return champion


def told(reference: Reference) -> dict[str, Any]:
    """What the journal and the JSON say of a reference."""
    return {
        key: value for key, value in asdict(reference).items() if key in ("version", "dataset", "sha256", "encoder")
    }
