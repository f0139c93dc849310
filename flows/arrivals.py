"""What has arrived at `data.source` since a dataset version was made? One look, and a cursor for the next.

List the source as a stream, note what changed since the look before, set it against what the version was made of, pair
pictures with captions, read what is new once to know its bytes. Nothing is added to a dataset here; `flows.grow` does.
Looking needs two looks at least `settle_s` apart: a file that is still being written changes between them.
"""

import hashlib
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from cluster import artifacts, stage, storage
from cluster.errors import StorageError
from cluster.redaction import redacted
from components import arrivals as rules
from components.arrivals import Arrival, Arrivals, Pending, State, Whole
from components.dataset import DatasetVersion
from components.errors import DataError, InputError
from components.images import TRUNCATED, ZERO_BYTES, PictureError, decode
from components.listings import LISTING, Seen, draft_listing, read_listing, write_listing
from components.sources import MISSING_FILE, NO_CAPTION, Candidate, Listed, find_candidates
from flows.config import Config
from flows.console import say
from flows.ledger import saved_listing
from flows.look import Look
from flows.prepare import SourceFiles, source_root

SETTLE_S = 60.0
LIMIT = 10_000
"""New files that one look reads and one cycle takes; stated in docs/user-guide.md."""
COUNTED = ("new", "pending", "repeated", "missing", "later", "unread", "refused", "unsure")
PLACE = "arrivals"
READERS = 8


def look(
    config: Config,
    parent: DatasetVersion,
    cursor: dict[str, Any] | None = None,
    settle_s: float = SETTLE_S,
    limit: int = LIMIT,
    at: float | None = None,
    wanted: Callable[[Whole], bool] = lambda whole: True,
    place: str = PLACE,
    refused: Collection[str] = (),
) -> Arrivals:
    """Return what `data.source` holds that `parent` does not; `cursor` is that of the look before, from any machine.

    At most `limit` new files are read in one look, `counts["later"]` are left for the next ones; new ones that are not
    `wanted` are never read and only counted, as "unread". `at` is the time of the look (default: now; Unix seconds).
    What is `refused` (by `snapshot.key_of`) is new too, but comes after all else: it fills what room is left below
    `limit`. All of it that was found is counted as "refused", and as "unsure" what of the "later" may be of it.
    Whoever keeps a cursor of its own needs a `place` (folder of the workspace) of its own: a look there clears away
    what only others' cursors name; in PLACE, the standing loop's, what its saved one names stays. InputError when there
    is no source, StorageError when it cannot be listed: a source that does not answer is never taken for an empty one.
    """
    root = source_root(config)
    at = time.time() if at is None else at
    workspace = artifacts.open_workspace(config.workspace)
    folder = workspace.root / place / hashlib.sha256(root.encode()).hexdigest()[:12]
    previous = cursor["listing"] if cursor is not None and cursor.get("source") == root else ""
    found = Look(SourceFiles(_base(root), _environment(root)), {item.sha256 for item in parent.items}, limit, wanted)
    found.refused.update(refused)
    stage.fetch(folder / f"{previous}.parquet")
    listed = rules.carried_over(_listed(root, found), read_listing(folder / f"{previous}.parquet"), at)
    try:
        with draft_listing(folder) as draft:
            digest, number = write_listing(draft, listed)
            held = (row for row in read_listing(parent.directory / LISTING) if _below(row.uri, root))
            _sort(found, rules.states(read_listing(draft), held, at, settle_s), draft)
            _read(found)
            _keep(found, draft, folder / f"{digest}.parquet")
            stage.keep(folder / f"{digest}.parquet")
        _clear(folder, {digest, previous, saved_listing(workspace) if place == PLACE else ""})
    except OSError as error:
        raise StorageError(artifacts.disk_message(folder, error)) from error
    looked_at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at))
    cursor = {"source": root, "parent": parent.id, "listing": digest, "files": number, "looked_at": looked_at}
    new = (*found.new, *found.again)[:limit]
    found.counts["unsure"] = min(found.counts["later"], len(found.refused))
    return Arrivals(
        new,
        tuple(found.pending),
        tuple(found.repeated),
        tuple(found.missing),
        counts={kind: found.counts[kind] for kind in COUNTED},
        cursor=cursor,
    )


def _sort(found: Look, states: Iterator[State | str], draft: Path) -> None:
    """Deal the files out to pending, missing, and arrivals whose bytes are known or still to be read."""

    def present() -> Iterator[State]:
        for state in states:
            if isinstance(state, str):
                found.note("missing", state)
            else:
                metadata.extend([state] if rules.is_metadata(state.seen.uri) else [])
                yield state

    metadata: list[State] = []
    layout = rules.layout_of(row.uri for row in read_listing(draft))
    if layout == rules.CAPTIONS:
        judged = rules.pairs(present())
    else:
        judged = rules.singles(present(), rules.is_picture if layout == rules.METADATA else rules.is_table)
    wholes = _whole(found, judged)
    if layout == rules.METADATA:
        _named(found, list(wholes), metadata, draft)
        return
    for whole in wholes:
        if layout == rules.CAPTIONS:
            picture, caption = (found.path(file.uri) for file in whole.files)
            _take(found, Arrival(Candidate(picture, picture, caption_path=caption), whole.files))
        else:
            _take_table(found, whole.files[0])


def _whole(found: Look, judged: Iterable[Whole | Pending]) -> Iterator[Whole]:
    """Yield what is whole; a picture whose bytes are known to be in the dataset needs no place among `limit`."""
    places = found.limit
    for one in judged:
        if isinstance(one, Pending):
            found.note("pending", one)
        elif one.files[0].sha256 in found.known:
            name = found.path(one.files[0].uri)
            found.note("repeated", Arrival(Candidate(name, name), one.files, one.files[0].sha256))
        elif not found.wanted(one):
            found.counts["unread"] += 1
        elif one.files[0].sha256 in found.refused:
            yield one
        elif places > 0:
            places -= 1
            yield one
        else:
            found.counts["later"] += 1


def _take(found: Look, arrival: Arrival) -> None:
    picture = arrival.files[0]
    if picture.sha256:
        found.note_picture(replace(arrival, sha256=picture.sha256))
    else:
        found.unread.append(arrival)


def _take_table(found: Look, table: Seen) -> None:
    path = found.path(table.uri)
    try:
        groups = find_candidates(path, [Listed(path)], found.files.read, found.files.open_file)
        with found.files.open_file(path) as file:
            rows = pq.ParquetFile(file).metadata
            sizes = [rows.row_group(group.row_group).num_rows for group in groups]
    except FileNotFoundError:
        return
    except (InputError, DataError):
        found.note("pending", Pending(table.uri, rules.DAMAGED))
        return
    for group, size in zip(groups, sizes, strict=True):
        found.note_new(Arrival(group, (table,), pictures=size))


def _named(found: Look, wholes: list[Whole], metadata: list[State], draft: Path) -> None:
    """Join new pictures with the metadata files that may name them; those are read whole, as `prepare` does."""
    changing = [state for state in metadata if state.problem]
    for state in changing:
        found.note("pending", Pending(state.seen.uri, state.problem))
    folders = {str(parent) for whole in wholes for parent in Path(found.path(whole.files[0].uri)).parents}
    at_rest = [state for state in metadata if not state.problem]
    wanted = [
        state.seen for state in at_rest if not state.held or str(Path(found.path(state.seen.uri)).parent) in folders
    ]
    pictures = {found.path(whole.files[0].uri): whole.files[0] for whole in wholes}
    why = rules.CAPTIONS_CHANGING if changing else rules.NO_CAPTION_YET
    candidates: list[Candidate] = []
    if wanted:
        listing = [Listed(found.path(file.uri)) for file in wanted] + [Listed(path) for path in pictures]
        try:
            candidates = find_candidates(found.files.root, listing, found.files.read, found.files.open_file)
        except (InputError, FileNotFoundError) as error:
            say(f"captions of {redacted(found.files.root)} cannot be read yet: {error}")
            why = rules.DAMAGED
    absent = {}
    for candidate in candidates:
        picture = pictures.pop(candidate.path, None)
        if candidate.problem == MISSING_FILE:
            absent[candidate.path] = candidate
        elif picture is not None and not candidate.problem:
            _take(found, Arrival(candidate, (picture, *wanted)))
        elif picture is not None:
            reason = why if candidate.problem == NO_CAPTION else candidate.problem
            found.note("pending", Pending(picture.uri, reason))
    for picture in pictures.values():
        found.note("pending", Pending(picture.uri, why))
    if absent and any(not state.held for state in at_rest):
        for row in read_listing(draft):
            absent.pop(found.path(row.uri), None)
        for path in sorted(absent):
            found.note("pending", Pending(found.files.uri(path), rules.NO_PICTURE_YET))


def _read(found: Look) -> None:
    """Read every new picture once: its hash, and whether it came whole."""

    def read(arrival: Arrival) -> tuple[Arrival, str, str]:
        try:
            content = found.files.read(arrival.candidate.path)
            decode(content)
        except FileNotFoundError:
            return arrival, "", MISSING_FILE
        except PictureError as error:
            if str(error) in (TRUNCATED, ZERO_BYTES):
                return arrival, "", rules.DAMAGED
            # Whatever else is wrong with it, waiting will not cure: `prepare` rejects and counts it.
        return arrival, hashlib.sha256(content).hexdigest(), ""

    with ThreadPoolExecutor(READERS, thread_name_prefix="arrivals") as pool:
        for arrival, sha256, problem in pool.map(read, found.unread):
            picture = arrival.files[0]
            if problem == MISSING_FILE:
                continue  # gone again before anybody had it
            if problem:
                found.note("pending", Pending(picture.uri, problem))
                continue
            found.hashes[picture.uri] = sha256
            found.note_picture(replace(arrival, sha256=sha256))


def _listed(root: str, found: Look) -> Iterator[Seen]:
    for entry in storage.iter_files(root):
        try:
            entry.uri.encode()
        except UnicodeEncodeError:
            found.note("pending", Pending(entry.uri.encode("utf-8", "backslashreplace").decode(), rules.ODD_NAME))
            continue
        if not entry.outside:
            yield Seen(entry.uri, entry.size_bytes, entry.etag)


def _keep(found: Look, draft: Path, path: Path) -> None:
    """Put the listing in its place, with the hashes that are known now."""
    if found.hashes:
        rows = (replace(row, sha256=found.hashes.get(row.uri, row.sha256)) for row in read_listing(draft))
        with draft_listing(path.parent) as filled:
            write_listing(filled, rows)
            os.replace(filled, path)
    else:
        os.replace(draft, path)


def _clear(folder: Path, keep: set[str]) -> None:
    for path in stage.files(folder, ".parquet"):
        if path.stem not in keep:
            stage.remove(path)


def _below(uri: str, root: str) -> bool:
    return uri == root or uri.startswith(f"{root}/")


def _base(root: str) -> str:
    first = next(storage.iter_files(root), None)
    return root.rpartition("/")[0] if first is not None and first.uri == root else root


def _environment(root: str) -> dict[str, str]:
    return storage.aws_environment() if storage.is_s3(root) else {}
