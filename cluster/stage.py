"""How do the files of a workspace on S3 get to this machine and back?

Such a workspace has a *stage*: a local folder with the same names (`stage_names`). S3 holds the truth: what is written
goes there first, what is read is compared with what is there, and a stage may be deleted at any time. Every function
takes a local workspace's paths too, and then does what a disk does.
"""

import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from cluster import s3, s3_files, storage
from cluster.stage_names import SEEN, split
from cluster.stage_names import address_of as address_of  # so that one module is enough for those who use a stage
from cluster.stage_names import here as here
from cluster.stage_names import portable as portable
from cluster.stage_names import root_address as root_address
from cluster.stage_names import root_of as root_of
from cluster.stage_names import shared as shared
from cluster.stage_names import uri_of as uri_of

GROWS = ".jsonl"
LINES = ".lines"
"""How the folders of `event_lines` end."""
AT_ONCE = 8


def write(path: Path, content: bytes) -> None:
    """Write a whole file or none, on S3 and then in the stage."""
    bucket, key = _place(path)
    with s3.worded("write", str(address_of(path))):
        etag = s3_files.upload(bucket, key, content)
    # By its facts of before the rename: another process may have replaced it since.
    _remember(path, etag, storage.write_local(path, content))


def keep(path: Path) -> None:
    """Bring a file that was written in the stage (a log that grows, a picture) to S3 as it is now."""
    if address_of(path) is None or _is_seen(path):
        return
    bucket, key = _place(path)
    before = path.stat()
    with s3.worded("write", str(address_of(path))):
        etag = s3_files.upload_file(bucket, key, path)
    _remember(path, etag, before)


def keep_tree(folder: Path, without: Collection[str] = ()) -> None:
    """Bring what is in a folder and not yet on S3 there; hidden files, and the parts named in `without`, stay."""
    if address_of(folder) is None or not folder.is_dir():
        return
    there = _listed(folder, without)
    # What is as it was when it was kept or fetched is never newer than what S3 has.
    _each(keep_anew, [path for path in _below(folder, without) if path not in there or not _is_seen(path)])


def keep_new(folder: Path, without: Collection[str] = ()) -> None:
    """Bring what was written in a folder since it was kept or fetched to S3; looks at the disk alone."""
    if address_of(folder) is not None and folder.is_dir():
        _each(keep, [path for path in _below(folder, without) if not _is_seen(path)])


def keep_anew(path: Path) -> None:
    """Bring a file to S3 even if it was there once."""
    _seen(path).unlink(missing_ok=True)
    keep(path)


def fetch(path: Path) -> bool:
    """Have the file here as S3 has it; False when there is none. A file of a local workspace is or is not there.

    A log (*.jsonl) that went on growing here since it was kept stays, as long as nobody else has written it.
    """
    if address_of(path) is None:
        return path.is_file()
    bucket, key = _place(path)
    with s3.worded("fetch", str(address_of(path))):
        found = s3_files.describe(bucket, key)
        if found is None:
            if path.suffix != GROWS and _is_seen(path):
                _forget(path)
            return False
        return _is_current(path, s3.tag_of(found)) or _download(path)


def fetch_tree(folder: Path, without: Collection[str] = ()) -> None:
    """Have every file of a folder here as S3 has it, but for hidden ones and the parts named in `without`.

    What was fetched or kept once and is not there any more goes here too; what never was on S3 stays.
    """
    if address_of(folder) is None:
        return
    there = _listed(folder, without)
    wanted = [path for path, etag in there.items() if not _is_current(path, etag)]
    with s3.worded("fetch", str(address_of(folder))):
        _each(_download, wanted)
    for path in _below(folder, without) if folder.is_dir() else ():
        if path not in there and path.suffix != GROWS and _is_seen(path):
            _forget_if_gone(path)


def remove(path: Path) -> None:
    """Remove a file everywhere; nothing there is fine."""
    address = address_of(path)
    if address is not None:
        storage.delete(address)
        _seen(path).unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def remove_tree(folder: Path) -> None:
    """Remove a folder everywhere; nothing there is fine."""
    if address_of(folder) is not None:
        for entry in storage.list_files(str(address_of(folder))):
            storage.delete(entry.uri)
    shutil.rmtree(folder, ignore_errors=True)


def files(folder: Path, suffix: str = "") -> dict[Path, int]:
    """Return the files of a folder (not those below its folders) with their sizes, by name, wherever they lie now."""
    address = address_of(folder)
    sizes: dict[Path, int] = {}
    if address is not None:
        for entry in storage.iter_files(f"{address}/"):
            sizes[folder / entry.uri.removeprefix(f"{address}/")] = entry.size_bytes
    else:
        for path in folder.glob("[!.]*"):
            with suppress(FileNotFoundError):  # removed since its folder was listed
                sizes |= {path: path.stat().st_size} if path.is_file() else {}
    return {path: sizes[path] for path in sorted(sizes) if path.parent == folder and path.name.endswith(suffix)}


def folders(folder: Path) -> list[Path]:
    """Return the folders in a folder by name, wherever they lie now."""
    address = address_of(folder)
    if address is None:
        return sorted(path for path in folder.glob("[!.]*") if path.is_dir())
    bucket, key = _place(folder)
    with s3.worded("list", address):
        return sorted(folder / name for name in s3_files.folders(bucket, f"{key}/") if not name.startswith("."))


def changed_at(path: Path) -> float | None:
    """Return when a file was last written (Unix seconds, by the storage's clock); None when there is none."""
    address = address_of(path)
    if address is None:
        return path.stat().st_mtime if path.is_file() else None
    with s3.worded("fetch", address):
        found = s3_files.describe(*_place(path))
    return None if found is None else float(found["LastModified"].timestamp())


def paths(folder: Path) -> list[Path]:
    """Return every file below a folder, wherever they lie now."""
    return sorted(_below(folder, ()) if address_of(folder) is None else _listed(folder))


def size_bytes(folder: Path) -> int | None:
    """Return the size of a folder's files, wherever they lie now; None when there is no such folder."""
    address = address_of(folder)
    if address is not None:
        sizes = [entry.size_bytes for entry in storage.iter_files(f"{address}/")]
        return sum(sizes) if sizes else None
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else None


def _download(path: Path) -> bool:
    bucket, key = _place(path)
    found = s3_files.download(bucket, key, path)
    if found is not None:
        _remember(path, *found)
    return found is not None


def _each(work: Callable[[Path], object], paths: Collection[Path]) -> None:
    if paths:
        with ThreadPoolExecutor(min(AT_ONCE, len(paths)), thread_name_prefix="stage") as pool:
            list(pool.map(work, paths))


def _listed(folder: Path, without: Collection[str] = ()) -> dict[Path, str]:
    """Return what S3 has below a folder with its ETags."""
    address = f"{address_of(folder)}/"
    found = {}
    for entry in storage.iter_files(address):
        parts = entry.uri.removeprefix(address).split("/")
        odd = any(part in ("", "..") or part.endswith(LINES) for part in parts)
        path = folder.joinpath(*parts)
        if not odd and parts[0] not in without and address_of(path) is not None:
            found[path] = entry.etag
    return found


def _below(folder: Path, without: Collection[str]) -> Iterator[Path]:
    remote = address_of(folder) is not None
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        left_out = parts[0] in without or any(part.startswith(".") for part in parts)
        if not left_out and path.is_file() and not (remote and address_of(path) is None):
            yield path


def _place(path: Path) -> tuple[str, str]:
    bucket, _, key = str(address_of(path)).removeprefix(storage.S3_SCHEME).partition("/")
    return bucket, key


def _seen(path: Path) -> Path:
    found = split(path)
    assert found is not None
    return found[0] / SEEN / Path(*found[1])


def _remember(path: Path, etag: str, facts: os.stat_result | None = None) -> None:
    facts = facts or path.stat()
    known = {"etag": etag, "size": facts.st_size, "changed_ns": facts.st_mtime_ns}
    storage.write_bytes_atomic(str(_seen(path)), json.dumps(known).encode())


def _forget_if_gone(path: Path) -> None:
    """Forget a file that a listing lacked; another process here may have brought it to S3 since."""
    with s3.worded("fetch", str(address_of(path))):
        if s3_files.describe(*_place(path)) is None:
            _forget(path)


def _forget(path: Path) -> None:
    """Remove a file of the stage that S3 has no more."""
    _seen(path).unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def _is_current(path: Path, etag: str) -> bool:
    """Whether a local file need not be fetched, where S3 has the version `etag`."""
    if path.suffix == GROWS:
        return path.is_file() and _known(path).get("etag") == etag
    return _is_seen(path, etag)


def _is_seen(path: Path, etag: str | None = None) -> bool:
    """Whether a local file is unchanged since it was kept or fetched, as the version `etag` where that is given."""
    known = _known(path)
    if not known or not path.is_file():
        return False
    facts = path.stat()
    same = (known["size"], known["changed_ns"]) == (facts.st_size, facts.st_mtime_ns)
    return same and etag in (None, known["etag"])


def _known(path: Path) -> dict[str, Any]:
    """Return what was remembered of a local file when it was kept or fetched."""
    try:
        known: dict[str, Any] = json.loads(_seen(path).read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return known
