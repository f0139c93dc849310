"""How do we list, read and write bytes in a folder and in an S3 bucket alike?

A URI is a local path or `s3://bucket/key`; AWS_ENDPOINT_URL points at another S3 server. What faults of the network
do is `s3`'s matter; every failure that is left is a StorageError without credentials in it, save a missing object,
which is FileNotFoundError as for any file. A write is whole or not there, also when its writer is killed.
Refused here: other schemes, following a link out of a listed folder, unpickling.
"""

import fcntl
import hashlib
import os
import posixpath
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from cluster import s3, s3_ranges
from cluster.errors import StorageError
from cluster.redaction import redacted
from cluster.s3 import aws_environment as aws_environment  # workers adopt it, see `adopt_environment`

S3_SCHEME = "s3://"
GUARD_LIMIT_S = 30.0
POLL_S = 0.05


@dataclass(frozen=True)
class FileEntry:
    """One listed file."""

    uri: str
    size_bytes: int
    etag: str
    """Changes when the content does: S3's ETag, or the times of a local file."""
    outside: bool = False
    """A local link (to a file or a folder) whose target is not below the listed folder."""


def is_s3(uri: str) -> bool:
    return uri.startswith(S3_SCHEME)


def join(uri: str, *parts: str) -> str:
    """Append path parts to a folder or prefix."""
    return posixpath.join(uri, *parts)


def list_files(uri: str, suffixes: Iterable[str] | None = None) -> list[FileEntry]:
    """Return the files below a folder or prefix (or the one file that `uri` names), sorted by uri.

    `suffixes` (lower case, with the dot) keeps files so named, in any case; links out of the folder are always listed.
    Hidden files and folders (leading dot) are left out. Nothing there is an empty list; a bucket that is not there is
    a BucketError.
    """
    wanted = tuple(suffixes or ())
    entries = iter_files(uri)
    kept = [entry for entry in entries if not wanted or entry.outside or entry.uri.lower().endswith(wanted)]
    return sorted(kept, key=lambda entry: entry.uri)


def iter_files(uri: str) -> Iterator[FileEntry]:
    """Yield what `list_files` returns, one by one in the order of their uris; of a folder at most one level is held."""
    return _list_s3(uri) if is_s3(uri) else _list_local(_local(uri))


def exists(uri: str) -> bool:
    """Say whether a file, a folder, or a prefix with at least one object is there."""
    if is_s3(uri):
        return next(_list_s3(uri), None) is not None
    return _local(uri).exists()


def open_input(uri: str) -> BinaryIO:
    """Open a file for reading with seek; FileNotFoundError when it is missing, StorageError on other failures."""
    with _as_storage_error("read", uri):
        if not is_s3(uri):
            return _local(uri).open("rb")
        return s3_ranges.open_seekable(*_bucket_and_key(uri))


def read_bytes(uri: str) -> bytes:
    """Return the whole content; FileNotFoundError when it is missing, StorageError on other failures."""
    return read_tagged(uri)[0]


def read_tagged(uri: str) -> tuple[bytes, str]:
    """Return the whole content and the tag that `replace_if` compares; raises as `read_bytes` does."""
    with _as_storage_error("read", uri):
        if is_s3(uri):
            return s3.read(*_bucket_and_key(uri))
        content = _local(uri).read_bytes()
        return content, _tag(content)


def write_bytes_atomic(uri: str, content: bytes) -> None:
    """Write a whole file or none, replacing what was there."""
    with _as_storage_error("write", uri):
        if is_s3(uri):
            s3.write(*_bucket_and_key(uri), content)
            return
    write_local(_local(uri), content)


def write_local(path: Path, content: bytes) -> os.stat_result:
    """Do so on a disk; return the facts of the file that was written, whoever replaces it a moment later."""
    with _as_storage_error("write", str(path)), _temporary_beside(path, content) as temporary:
        facts = temporary.stat()
        os.replace(temporary, path)
        return facts


def put_if_absent(uri: str, content: bytes) -> bool:
    """Create the file if nobody else has; False when it was already there. Of many writers exactly one gets True."""
    with _as_storage_error("write", uri):
        if is_s3(uri):
            return s3.write_if(*_bucket_and_key(uri), content, etag=None)
        with _temporary_beside(_local(uri), content) as temporary:
            try:
                os.link(temporary, _local(uri))
            except FileExistsError:
                # A network file system may say so of the link that it made itself, when its answer was lost.
                return temporary.stat().st_nlink > 1
            return True


def replace_if(uri: str, content: bytes, tag: str | None) -> bool:
    """Write the file if it still is what `read_tagged` returned `tag` for (None: not there); say whether it was.

    On a disk writers wait for each other with flock, up to GUARD_LIMIT_S; then StorageError.
    """
    if tag is None:
        return put_if_absent(uri, content)
    if is_s3(uri):
        with _as_storage_error("write", uri):
            return s3.write_if(*_bucket_and_key(uri), content, tag)
    with _guard(_local(uri)):
        try:
            if read_tagged(uri)[1] != tag:
                return False
        except FileNotFoundError:
            return False
        write_bytes_atomic(uri, content)
    return True


def delete(uri: str) -> None:
    """Remove a file; nothing there is fine."""
    with _as_storage_error("delete", uri):
        if is_s3(uri):
            s3.delete(*_bucket_and_key(uri))
        else:
            _local(uri).unlink(missing_ok=True)


def adopt_environment(variables: dict[str, str]) -> None:
    """Set AWS_* variables in this process (a worker's); given as an argument because Ray logs a runtime environment."""
    os.environ.update(variables)


def _local(uri: str) -> Path:
    if "://" in uri:
        shown = redacted(uri)
        raise StorageError(
            f"expected a local path or s3://bucket/key, found {shown!r}; other schemes are not supported"
        )
    return Path(uri).expanduser()


def _list_local(root: Path) -> Iterator[FileEntry]:
    if root.is_file():
        # Named outright, so wherever a link leads is meant.
        yield _file_entry(root)
    elif root.is_dir():
        with _as_storage_error("list", str(root)):
            yield from _below(root, root.resolve())


def _below(folder: Path, inside: Path) -> Iterator[FileEntry]:
    """Yield the files below a folder in the order of their whole paths, so "a-b" comes before "a/b"."""
    try:
        with os.scandir(folder) as found:
            shown = [one for one in found if not one.name.startswith(".")]
    except FileNotFoundError:
        return  # removed since its own folder was listed
    for name in sorted(f"{one.name}/" if one.is_dir() else one.name for one in shown):
        path = folder / name.removesuffix("/")
        if not name.endswith("/"):
            entry = _entry(path, inside)
            if entry is not None:
                yield entry
        elif not path.is_symlink():
            yield from _below(path, inside)
        elif not path.resolve().is_relative_to(inside):
            yield FileEntry(str(path), 0, "", outside=True)


def _entry(path: Path, inside: Path) -> FileEntry | None:
    """Describe one local file; None for a link to nothing."""
    if path.is_symlink() and not path.resolve().is_relative_to(inside):
        return FileEntry(str(path), 0, "", outside=True)
    try:
        return _file_entry(path)
    except FileNotFoundError:
        return None


def _file_entry(path: Path) -> FileEntry:
    found = path.stat()
    return FileEntry(str(path), found.st_size, f"{found.st_mtime_ns:x}-{found.st_ctime_ns:x}")


def _list_s3(uri: str) -> Iterator[FileEntry]:
    bucket, key = _bucket_and_key(uri)
    folder = key.rstrip("/") + "/" if key else ""
    with _as_storage_error("list", uri):
        for item in s3.pages(bucket, key.rstrip("/")):
            name = item["Key"]
            hidden = any(part.startswith(".") for part in name.removeprefix(folder).split("/"))
            if (name == key or name.startswith(folder)) and not name.endswith("/") and not hidden:
                yield FileEntry(f"{S3_SCHEME}{bucket}/{name}", item["Size"], item["ETag"].strip('"'))


def _bucket_and_key(uri: str) -> tuple[str, str]:
    bucket, _, key = uri.removeprefix(S3_SCHEME).partition("/")
    if not bucket:
        raise StorageError(f"expected s3://bucket/key, found {redacted(uri)!r}; name a bucket")
    return bucket, key


@contextmanager
def _temporary_beside(path: Path, content: bytes) -> Iterator[Path]:
    """Hold a flushed file with `content` beside `path`; whatever is left of it is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


@contextmanager
def _guard(path: Path) -> Iterator[None]:
    """Serialise the few operations of one change; the system frees it when its holder dies."""
    with _as_storage_error("write", str(path)):
        descriptor = os.open(path.with_name(f".{path.name}.guard"), os.O_RDWR | os.O_CREAT, 0o644)
    try:
        deadline = time.monotonic() + GUARD_LIMIT_S
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise StorageError(
                        f"{path} expected to be free for a change within {GUARD_LIMIT_S:.0f} s, found another process"
                        " in the middle of one (stopped?); let that process go on, or end it"
                    ) from None
                time.sleep(POLL_S)
        yield
    finally:
        os.close(descriptor)


def _tag(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@contextmanager
def _as_storage_error(verb: str, uri: str) -> Iterator[None]:
    if is_s3(uri):
        with s3.worded(verb, uri):
            yield
        return
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StorageError(s3.message(verb, uri, error)) from error
