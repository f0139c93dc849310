"""How do we list, read and write bytes in a folder and in an S3 bucket alike?

A URI is a local path or `s3://bucket/key`. S3 listings and conditional writes go through boto3, bytes through pyarrow;
AWS_ENDPOINT_URL points both at another S3 server. Retries are those of the two clients, bounded; every failure that is
left is a StorageError, save a missing object, which is FileNotFoundError as for any file.
Refused here: other schemes, following a link out of a listed folder, unpickling.
"""

import os
import posixpath
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from cluster.errors import StorageError

S3_SCHEME = "s3://"
MAX_ATTEMPTS = 4
CONNECT_TIMEOUT_S = 10
READ_TIMEOUT_S = 60
NOT_THERE = ("404", "NoSuchKey", "NoSuchBucket", "NotFound")
LOST_THE_RACE = ("PreconditionFailed", "ConditionalRequestConflict", "412", "409")


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
    Hidden files and folders (leading dot) are left out. Nothing there is an empty list.
    """
    entries = _list_s3(uri) if is_s3(uri) else _list_local(_local(uri))
    wanted = tuple(suffixes or ())
    kept = [entry for entry in entries if not wanted or entry.outside or entry.uri.lower().endswith(wanted)]
    return sorted(kept, key=lambda entry: entry.uri)


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
        import pyarrow as pa

        source: Any = pa.PythonFile(_arrow_s3().open_input_file(uri.removeprefix(S3_SCHEME)), mode="r")
        return source


def read_bytes(uri: str) -> bytes:
    """Return the whole content; FileNotFoundError when it is missing, StorageError on other failures."""
    with _as_storage_error("read", uri):
        if not is_s3(uri):
            return _local(uri).read_bytes()
        with _arrow_s3().open_input_stream(uri.removeprefix(S3_SCHEME)) as stream:
            return bytes(stream.read())


def write_bytes_atomic(uri: str, content: bytes) -> None:
    """Write a whole file or none, replacing what was there."""
    with _as_storage_error("write", uri):
        if is_s3(uri):
            bucket, key = _bucket_and_key(uri)
            _boto_s3().put_object(Bucket=bucket, Key=key, Body=content)
            return
        with _temporary_beside(_local(uri), content) as temporary:
            os.replace(temporary, _local(uri))


def put_if_absent(uri: str, content: bytes) -> bool:
    """Create the file if nobody else has; False when it was already there. Of many writers exactly one gets True."""
    with _as_storage_error("write", uri):
        if not is_s3(uri):
            with _temporary_beside(_local(uri), content) as temporary:
                try:
                    os.link(temporary, _local(uri))
                except FileExistsError:
                    return False
                return True
        from botocore.exceptions import ClientError

        bucket, key = _bucket_and_key(uri)
        try:
            _boto_s3().put_object(Bucket=bucket, Key=key, Body=content, IfNoneMatch="*")
        except ClientError as error:
            if error.response["Error"]["Code"] in LOST_THE_RACE:
                return False
            raise
        return True


def aws_environment() -> dict[str, str]:
    """Return this process's AWS_* variables, so that a worker started earlier or elsewhere can adopt them."""
    return {name: value for name, value in os.environ.items() if name.startswith("AWS_")}


def adopt_environment(variables: dict[str, str]) -> None:
    """Set AWS_* variables in this process (a worker's); given as an argument because Ray logs a runtime environment."""
    os.environ.update(variables)


def _local(uri: str) -> Path:
    if "://" in uri:
        raise StorageError(f"expected a local path or s3://bucket/key, found {uri!r}; other schemes are not supported")
    return Path(uri).expanduser()


def _list_local(root: Path) -> Iterator[FileEntry]:
    if root.is_file():
        # Named outright, so wherever a link leads is meant.
        yield _file_entry(root)
        return
    inside = root.resolve()
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in folders:
            linked = Path(folder, name)
            if linked.is_symlink() and not linked.resolve().is_relative_to(inside):
                yield FileEntry(str(linked), 0, "", outside=True)
        for name in files:
            if not name.startswith("."):
                entry = _entry(Path(folder, name), inside)
                if entry is not None:
                    yield entry


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
    from botocore.exceptions import ClientError

    bucket, key = _bucket_and_key(uri)
    folder = key.rstrip("/") + "/" if key else ""
    with _as_storage_error("list", uri):
        pages = _boto_s3().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=key.rstrip("/"))
        try:
            for page in pages:
                for item in page.get("Contents", ()):
                    name = item["Key"]
                    hidden = any(part.startswith(".") for part in name.removeprefix(folder).split("/"))
                    if (name == key or name.startswith(folder)) and not name.endswith("/") and not hidden:
                        yield FileEntry(f"{S3_SCHEME}{bucket}/{name}", item["Size"], item["ETag"].strip('"'))
        except ClientError as error:
            if error.response["Error"]["Code"] not in NOT_THERE:
                raise


def _bucket_and_key(uri: str) -> tuple[str, str]:
    bucket, _, key = uri.removeprefix(S3_SCHEME).partition("/")
    if not bucket:
        raise StorageError(f"expected s3://bucket/key, found {uri!r}; name a bucket")
    return bucket, key


def _boto_s3() -> Any:
    import boto3
    from botocore.config import Config

    return boto3.session.Session().client(
        "s3",
        config=Config(
            retries={"mode": "standard", "max_attempts": MAX_ATTEMPTS},
            connect_timeout=CONNECT_TIMEOUT_S,
            read_timeout=READ_TIMEOUT_S,
        ),
    )


def _arrow_s3() -> Any:
    return _arrow_s3_with(tuple(sorted(aws_environment().items())))


@lru_cache(maxsize=4)
def _arrow_s3_with(environment: tuple[tuple[str, str], ...]) -> Any:
    """Make the client once for each set of AWS_* variables (credentials are read from them when it is made)."""
    from pyarrow.fs import AwsStandardS3RetryStrategy, S3FileSystem

    setting = dict(environment)
    return S3FileSystem(
        endpoint_override=setting.get("AWS_ENDPOINT_URL_S3") or setting.get("AWS_ENDPOINT_URL") or None,
        region=setting.get("AWS_REGION") or setting.get("AWS_DEFAULT_REGION") or None,
        retry_strategy=AwsStandardS3RetryStrategy(max_attempts=MAX_ATTEMPTS),
        connect_timeout=CONNECT_TIMEOUT_S,
        request_timeout=READ_TIMEOUT_S,
    )


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
def _as_storage_error(verb: str, uri: str) -> Iterator[None]:
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except FileNotFoundError:
        raise
    except (OSError, BotoCoreError, ClientError) as error:
        where = f" at {os.environ['AWS_ENDPOINT_URL']}" if is_s3(uri) and "AWS_ENDPOINT_URL" in os.environ else ""
        raise StorageError(
            f"could not {verb} {uri}{where}: {error}; check that it exists, that you may {verb} it,"
            " and that there is room and network"
        ) from error
