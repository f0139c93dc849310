"""A dataset version and what has arrived since, in; a new version that names its parent, out.

Every picture of the parent stays, in its split, with its caption: what trained once never becomes a test picture, also
when fractions were changed meanwhile. Arrivals are examined and split as `prepare` does it. What the source lost since
stays in the dataset, and the card counts it. The same parent and arrivals make the same version, so a killed growth is
simply done again.
"""

from dataclasses import replace
from itertools import chain

import pyarrow.parquet as pq

from cluster import artifacts, storage
from components import dataset as versions
from components.arrivals import Arrivals
from components.dataset import DUPLICATE, SPLITS, DatasetVersion, Found
from components.errors import DataError, InputError
from components.listings import LISTING, Seen, read_listing, union
from components.sources import MISSING_FILE
from flows.config import Config
from flows.console import say
from flows.dataset_versions import (
    discard_pixels,
    first_seen,
    named_version,
    now_text,
    pixel_store,
    store_version,
)
from flows.prepare import SourceFiles, check_rejections, examine_all


def grow(config: Config, parent: DatasetVersion, arrivals: Arrivals) -> DatasetVersion:
    """Return the version of `parent` and `arrivals`; `parent` itself when none of them is a picture that it lacks.

    InputError when the parent was made at another resolution or its pixels are gone; DataError (and nothing written)
    when more than data.max_rejected_fraction of the arrivals cannot be used.
    """
    workspace = artifacts.open_workspace(config.workspace)
    _check_parent(config, parent)
    if not arrivals.new:
        return parent
    root = arrivals.cursor["source"]

    base = _base_of(arrivals, root)
    files = SourceFiles(base, storage.aws_environment() if storage.is_s3(root) else {})
    say(f"examining {len(arrivals.new)} arrivals of {config.data.source}")
    found, shards = examine_all(config, workspace, files, [arrival.candidate for arrival in arrivals.new])
    accepted, rejected = versions.resolve_duplicates(found)
    gone = {one.uri for one in rejected if one.reason == MISSING_FILE}
    # The listing of the new version must not name what is gone: if it comes back, it is an arrival.
    arrivals = replace(arrivals, new=tuple(one for one in arrivals.new if files.uri(one.candidate.name) not in gone))
    held = {item.sha256 for item in parent.items}
    added = [one for one in accepted if one.sha256 not in held]
    known = [Found(one.uri, one.caption, one.sha256, reason=DUPLICATE) for one in accepted if one.sha256 in held]
    try:
        # Copies of what is there already, and what was taken away again, do no harm: they do not count as bad.
        bad = [one for one in rejected if one.reason not in (DUPLICATE, MISSING_FILE)]
        if bad:
            check_rejections(config, accepted, bad)
    except DataError:
        discard_pixels(config, workspace, shards)
        raise
    if not added:
        return parent
    return _write(config, parent, arrivals, added, [*rejected, *known])


def _write(
    config: Config, parent: DatasetVersion, arrivals: Arrivals, added: list[Found], rejected: list[Found]
) -> DatasetVersion:
    workspace = artifacts.open_workspace(config.workspace)
    data, now = config.data, now_text()
    before = first_seen(config, workspace)
    fractions = (data.validation_fraction, data.test_fraction)
    new = versions.make_manifest(added, fractions, data.source, before, now)
    manifest = versions.grow_manifest(pq.read_table(parent.directory / versions.MANIFEST), new)
    fingerprint = versions.grown_fingerprint(parent.fingerprint, manifest, data.resolution_px)
    dataset_id = f"{config.name}@{fingerprint}"
    directory = workspace.dataset_dir(dataset_id)
    if artifacts.read_record(directory) is not None:
        say(f"dataset {dataset_id}: complete, nothing to do")
        return versions.load_dataset(directory)
    card = versions.make_card(dataset_id, data.source, manifest, rejected, now)
    counts = {kind: arrivals.counts[kind] for kind in ("repeated", "missing", "pending", "later")}
    card |= {"parent": parent.id, "arrivals": {"new": len(added), **counts}}
    taken = sorted({file.uri: file for file in _files(arrivals)}.values(), key=lambda file: file.uri)
    listing = union(read_listing(parent.directory / LISTING), taken)
    inputs = {"parent": parent.id, "snapshots": [], "arrivals": card["arrivals"]}
    dataset = store_version(config, workspace, (manifest, card, listing), inputs)
    numbers = ", ".join(f"{len(dataset.split(split))} {split}" for split in SPLITS)
    say(f"dataset {dataset.id}: {len(added)} pictures more than {parent.id} ({numbers})")
    return dataset


def _files(arrivals: Arrivals) -> list[Seen]:
    """Return the files that the new version was made of, and those that repeat what it has."""
    return list(chain.from_iterable(one.files for one in (*arrivals.new, *arrivals.repeated)))


def _base_of(arrivals: Arrivals, root: str) -> str:
    """Return what the candidates' paths are relative to: the folder of a source that is a single file."""
    return root.rpartition("/")[0] if arrivals.new[0].files[0].uri == root else root


def _check_parent(config: Config, parent: DatasetVersion) -> None:
    workspace = artifacts.open_workspace(config.workspace)
    record = artifacts.read_record(parent.directory) or named_version(workspace, parent.id)[1]
    size = record["config"]["resolution_px"]
    if size != config.data.resolution_px:
        raise InputError(
            f"data.resolution_px expected to be {size} as in {parent.id}, found {config.data.resolution_px}; set it to"
            f" {size}, or begin a new line of versions with: fresco prepare"
        )
    stored = pixel_store(config, workspace).keys()
    gone = sum(item.sha256 not in stored for item in parent.items)
    if gone:
        raise InputError(
            f"{parent.id} expected its {len(parent.items)} pictures under {pixel_store(config, workspace).directory},"
            f" found {gone} missing; bring that folder back, or begin a new line of versions with: fresco prepare"
        )
