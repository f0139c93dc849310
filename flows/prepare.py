"""`fresco prepare`: captioned pictures in, a validated, split, encoded and versioned dataset out.

List the source, examine every candidate on Ray Data actors, decide what is accepted, write the dataset version, encode
its pictures (and captions, where the freezing plan leaves the text encoder alone), pack the tables that training maps
into memory. Each step finds what is already there: the same command after a kill goes on from the last whole shard.
"""

import hashlib
import json
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from cluster import artifacts, stage, storage
from cluster.artifacts import Workspace
from cluster.carry import Carry
from cluster.errors import BucketError
from cluster.redaction import redacted
from cluster.session import local_session
from cluster.shards import ActorPool, map_blocks
from components import dataset as versions
from components import examine, sources
from components.dataset import SPLITS, DatasetVersion, Found
from components.errors import DataError, InputError
from components.images import Limits
from components.listings import LISTING, Seen, read_listing, union
from components.recipe import trains_text
from components.sources import Candidate, Listed
from flows.config import Config
from flows.console import say, step
from flows.dataset_versions import (
    complete_versions,
    discard_pixels,
    first_seen,
    named_version,
    now_text,
    pixel_store,
    store_listing,
    store_version,
)
from flows.encode import block_rows, ensure_encoded, progress_of


@dataclass(frozen=True)
class SourceFiles:
    """Reads the source's files by relative path, also in a worker that was started with other AWS_* variables."""

    root: str
    environment: dict[str, str] = field(repr=False)
    """Holds credentials, so it shows nowhere."""

    def uri(self, name: str) -> str:
        return name if name.startswith(sources.EMBLEMS_SCHEME) else storage.join(self.root, name)

    def read(self, path: str) -> bytes:
        storage.adopt_environment(self.environment)
        return storage.read_bytes(self.uri(path))

    def open_file(self, path: str) -> BinaryIO:
        storage.adopt_environment(self.environment)
        return storage.open_input(self.uri(path))


@dataclass(frozen=True)
class Source:
    """What the source holds now."""

    files: SourceFiles
    listing: list[Listed]
    seen: list[Seen]
    """The same files as `Seen`, in the order of their uris; what the version was made of."""
    snapshot: str
    """Hash over names, sizes and times (or ETags), and over what decides acceptance; equal means nothing to do."""


def run(config: Config) -> dict[str, Any]:
    """Make the dataset version and everything training reads, or say that it is there."""
    from components.models import component_fingerprint, embedded_base

    base = Path(config.model.base).expanduser() if config.model.base else embedded_base()
    component_fingerprint(base, "vae")  # a base that cannot encode is refused before anything is read
    with nullcontext() if find_dataset(config) else local_session(config.placement):
        dataset = ensure_dataset(config)
        ensure_encoded(config, dataset, base, with_text=not trains_text(config.train.freezing))
    card = artifacts.read_json(dataset.directory / versions.CARD) or {}
    numbers = {split: len(dataset.split(split)) for split in SPLITS}
    return {"dataset": dataset.id, "images": len(dataset.items), **numbers, "rejected": card.get("rejected", {})}


def plan(config: Config) -> list[str]:
    """Return the steps that `run` would take, touching nothing."""
    data, placement = config.data, config.placement
    what = {"cpu": placement.cpus_per_worker, "gpu": placement.gpus_per_worker}
    text = " (captions stay live: the text encoder trains)" if trains_text(config.train.freezing) else " and captions"
    return [
        f"list {data.source} and examine every candidate on up to {placement.workers} Ray Data actors",
        f"fail if more than {data.max_rejected_fraction:.0%} are rejected",
        f"write {config.workspace}/data/{config.name}@<fingerprint> (validation {data.validation_fraction:.0%},"
        f" test {data.test_fraction:.0%} by hash of the bytes)",
        f"encode pictures at {data.resolution_px} px{text} on up to {placement.workers} actors with"
        f" {what['cpu']:g} CPU and {what['gpu']:g} GPU each, and pack the tables that training maps into memory",
    ]


def source_snapshot(config: Config) -> str:
    """Hash what the source holds now and what decides acceptance; InputError when it is not there."""
    return config.data.version or _read_source(config).snapshot


def find_dataset(config: Config) -> DatasetVersion | None:
    """Return the complete dataset version of what the source holds now; None when there is none, or pixels are gone.

    With `data.version` it is that one, whatever the source holds; InputError when it is not there, or of another size.
    """
    if config.data.version:
        return _named(config)
    return _find(config, _read_source(config))


def ensure_dataset(config: Config) -> DatasetVersion:
    """Return the dataset version of what the source holds now, making it when there is none.

    InputError when the source cannot be used, DataError (and nothing written) when too much of it is rejected.
    """
    if config.data.version:
        return _named(config)
    source = _read_source(config)
    found = _find(config, source)
    if found is not None:
        say(f"dataset {found.id}: complete for this source, nothing to do")
        return found
    candidates = _candidates(config, source)
    workspace = artifacts.open_workspace(config.workspace)
    step(f"prepare: examining {len(candidates)} candidates of {config.data.source}")
    found_rows, new_shards = examine_all(config, workspace, source.files, candidates)
    accepted, rejected = versions.resolve_duplicates(found_rows)
    try:
        check_rejections(config, accepted, rejected)
        _check_splits(config, accepted, len(accepted) + len(rejected))
    except DataError:
        discard_pixels(config, workspace, new_shards)
        raise
    dataset = _write_version(config, workspace, source, accepted, rejected)
    numbers = ", ".join(f"{len(dataset.split(split))} {split}" for split in SPLITS)
    say(f"dataset {dataset.id}: {len(accepted)} pictures ({numbers}), {len(rejected)} rejected")
    if rejected:
        say(versions.rejection_table(rejected, len(found_rows)))
    return dataset


def _named(config: Config) -> DatasetVersion:
    dataset, record = named_version(artifacts.open_workspace(config.workspace), config.data.version)
    size = record["config"]["resolution_px"]
    if size != config.data.resolution_px:
        raise InputError(
            f"data.resolution_px expected to be {size} as in data.version {dataset.id}, found"
            f" {config.data.resolution_px}; set it to {size}"
        )
    return dataset


def _read_source(config: Config) -> Source:
    """List the source; InputError when it is not there."""
    text = config.data.source
    rules = config.data.model_dump(exclude={"source", "version"})
    if text.startswith(sources.EMBLEMS_SCHEME):
        from components.emblems import example
        from components.images import to_png

        emblems = sources.parse_emblems(text)
        first, caption = example(emblems.world, emblems.seed, 0)  # stands for the code that draws
        sample = hashlib.sha256(to_png(first) + caption.encode()).hexdigest()
        return Source(SourceFiles(text, {}), [], [], _hash([rules, text, sample]))
    root = source_root(config)
    entries = storage.list_files(root)
    if [entry.uri for entry in entries] == [root]:
        root = root.rpartition("/")[0]
    listing = [Listed(entry.uri.removeprefix(root).lstrip("/"), entry.outside) for entry in entries]
    facts = [[file.path, entry.size_bytes, entry.etag] for file, entry in zip(listing, entries, strict=True)]
    environment = storage.aws_environment() if storage.is_s3(root) else {}
    seen = [Seen(entry.uri, entry.size_bytes, entry.etag) for entry in entries if _can_be_written(entry)]
    return Source(SourceFiles(root, environment), listing, seen, _hash([rules, facts]))


def source_root(config: Config) -> str:
    """Return the folder or prefix where pictures arrive; InputError when it is none, or nothing is there."""
    text, shown = config.data.source, repr(redacted(config.data.source))
    if not storage.is_s3(text) and "://" in text:
        raise InputError(f"data.source expected a folder, s3://bucket/prefix or emblems://WORLD, found {shown}")
    root = text.rstrip("/") if storage.is_s3(text) else str(Path(text).expanduser().absolute())
    expected = f"data.source expected captioned pictures at {shown}, found"
    try:
        if storage.exists(root):
            return root
    except BucketError as error:
        raise InputError(f"{expected}: {error}") from error
    raise InputError(f"{expected} nothing there; check the path")


def _can_be_written(entry: storage.FileEntry) -> bool:
    """Say whether a listing can hold a file: in the source, with a name in Unicode (others are rejected anyway)."""
    return not entry.outside and not any(0xD800 <= ord(letter) <= 0xDFFF for letter in entry.uri)


def _candidates(config: Config, source: Source) -> list[Candidate]:
    text = config.data.source
    if text.startswith(sources.EMBLEMS_SCHEME):
        return [Candidate(f"{text}#{index}", index=index) for index in range(sources.parse_emblems(text).count)]
    return sources.find_candidates(text, source.listing, source.files.read, source.files.open_file)


def _find(config: Config, source: Source) -> DatasetVersion | None:
    workspace = artifacts.workspace_at(config.workspace)
    for directory in complete_versions(config, workspace):
        record = artifacts.read_json(directory / artifacts.RECORD) or {}
        if source.snapshot in record["snapshots"] and artifacts.read_record(directory) is not None:
            dataset = versions.load_dataset(directory)
            stored = pixel_store(config, workspace).keys()
            if all(item.sha256 in stored for item in dataset.items):
                return dataset
    return None


def examine_all(
    config: Config, workspace: Workspace, files: SourceFiles, candidates: list[Candidate]
) -> tuple[list[Found], set[str]]:
    """Return what every candidate turned out to be, and the pixel shards that were written on the way."""
    data = config.data
    found = [Found(files.uri(one.name), one.caption or "", reason=one.problem) for one in candidates if one.problem]
    readable = [one for one in candidates if not one.problem]
    job = examine.ExamineJob(
        source=data.source,
        files=files,
        limits=Limits(data.min_side_px, data.max_pixels),
        resolution_px=data.resolution_px,
        pixels=pixel_store(config, workspace).directory,
    )
    blocks = examine.candidate_blocks(readable, block_rows(len(readable), config.placement))
    pool = ActorPool(config.placement.workers, cpus=1)
    shards: set[str] = set()
    progress = progress_of("examined", len(candidates))
    with local_session(config.placement) if blocks else nullcontext():
        for report in map_blocks(blocks, examine.make_examiner, job, pool, Carry.of(keep=[job.pixels])):
            found += examine.read_found(report)
            shards.update(report["shard"].to_pylist())
            progress(len(found))
    stage.keep_tree(job.pixels)
    return found, shards - {""}


def check_rejections(config: Config, accepted: list[Found], rejected: list[Found]) -> None:
    """DataError, with the table, when too much was rejected."""
    total, limit = len(accepted) + len(rejected), config.data.max_rejected_fraction
    if not accepted or len(rejected) > limit * total:
        raise DataError(
            f"data.max_rejected_fraction expected at most {limit:.0%} of {config.data.source} rejected, found"
            f" {len(rejected) / total:.1%} ({len(accepted)} usable):\n{versions.rejection_table(rejected, total)}\n"
            "repair the data, or raise data.max_rejected_fraction if the rest is enough"
        )


def _check_splits(config: Config, accepted: list[Found], total: int) -> None:
    """DataError when a split that training needs is empty."""
    fractions = (config.data.validation_fraction, config.data.test_fraction)
    splits = {versions.split_of(one.sha256, *fractions) for one in accepted}
    empty = [split for split in (versions.TRAIN, versions.VALIDATION) if split not in splits]
    if empty:
        raise DataError(
            f"data expected pictures in the train and the validation split, found none in {' and '.join(empty)}"
            f" ({total} candidates, {len(accepted)} accepted); add pictures or change data.validation_fraction"
        )


def _write_version(
    config: Config, workspace: Workspace, source: Source, accepted: list[Found], rejected: list[Found]
) -> DatasetVersion:
    """Write the version; one that is complete only learns of one more snapshot and the files it can be made of."""
    data = config.data
    fractions = (data.validation_fraction, data.test_fraction)
    fingerprint = versions.dataset_fingerprint(accepted, data.resolution_px, *fractions)
    dataset_id = f"{config.name}@{fingerprint}"
    directory = workspace.dataset_dir(dataset_id)
    record = artifacts.read_record(directory)
    if record is not None:
        say(f"dataset {dataset_id}: the same pictures and captions as before")
        store_listing(directory, union(read_listing(directory / LISTING), source.seen))
        record["snapshots"] = sorted({*record["snapshots"], source.snapshot})
        artifacts.write_record(directory, record)
        return versions.load_dataset(directory)
    now = now_text()
    seen = first_seen(config, workspace)
    manifest = versions.make_manifest(accepted, fractions, data.source, seen, now)
    card = versions.make_card(dataset_id, data.source, manifest, rejected, now)
    return store_version(config, workspace, (manifest, card, source.seen), {"snapshots": [source.snapshot]})


def _hash(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]
