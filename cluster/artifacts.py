"""Where a workspace keeps things, and how a file or record becomes whole in one move.

A directory counts as complete when its `record.json` is there: it is written last, by rename. Readers ignore the rest.
The journal is append-only: every decision and alias move, one JSON object a line, with its numbers. A workspace on S3
has the same paths in its stage (`stage.py`): here is where its files go there and come back.
"""

import errno
import json
import os
import shutil
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster import event_lines, s3, stage, storage
from cluster.errors import PlacementError, StorageError
from cluster.redaction import redacted

RECORD = "record.json"
LOOKS_AT_ONCE = 8
BY_THEMSELVES = ("checkpoints", "best", "pipeline", "groups", "tune", "tables")
"""Parts of a folder with a record that are kept and fetched on their own, when somebody needs them."""
NEEDS_TRACKING = (
    "placement.tracking_uri expected the address of a tracking server with workspace {uri}, found none: a database"
    " needs a disk; start one (mlflow server --backend-store-uri ...) and set placement.tracking_uri=http://HOST:PORT"
)
REFUSALS = {
    "NoSuchBucket": "there is no such bucket; create it, or correct the name or AWS_ENDPOINT_URL",
    "InvalidBucketName": "that is no name of a bucket",
    "AccessDenied": "access is denied; the credentials need s3:ListBucket, GetObject, PutObject and DeleteObject",
    "AllAccessDisabled": "access is denied",
    "InvalidAccessKeyId": "the access key is not known there; check the credentials of the AWS chain",
    "SignatureDoesNotMatch": "the secret key is wrong; check the credentials of the AWS chain",
    "InvalidToken": "the session token is wrong; get a new one",
    "ExpiredToken": "the session token has expired; get a new one",
}
_answered: set[str] = set()
"""Addresses that were looked at in this process."""


@dataclass(frozen=True)
class Workspace:
    """One folder that holds everything Fresco writes; on S3, the stage of it."""

    root: Path

    @property
    def uri(self) -> str:
        """Its address, as `open_workspace` takes it on any machine."""
        return stage.uri_of(self.root)

    def place(self, *parts: str) -> str:
        """Return the address of a lease or a fenced file, which are never copied: a path, or s3://."""
        return storage.join(self.uri, *parts)

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def encoded(self) -> Path:
        return self.root / "encoded"

    @property
    def runs(self) -> Path:
        return self.root / "runs"

    @property
    def searches(self) -> Path:
        return self.root / "searches"

    @property
    def reports(self) -> Path:
        return self.root / "reports"

    @property
    def keys(self) -> Path:
        return self.root / "keys"

    @property
    def captured(self) -> Path:
        return self.root / "captured"

    @property
    def pictures(self) -> Path:
        return self.root / "pictures"

    @property
    def journal(self) -> Path:
        return self.root / "journal.jsonl"

    @property
    def mlflow_uri(self) -> str:
        """The database of a workspace without a tracking server; PlacementError on S3, where there can be none."""
        if storage.is_s3(self.uri):
            raise PlacementError(NEEDS_TRACKING.format(uri=redacted(self.uri)))
        return f"sqlite:///{self.root / 'mlflow.db'}"

    def dataset_dir(self, dataset_id: str) -> Path:
        return self.data / dataset_id

    def run_dir(self, run_id: str) -> Path:
        return self.runs / run_id


def open_workspace(uri: str) -> Workspace:
    """Return the workspace at `uri`, making the folder; PlacementError when it cannot be one.

    On S3 the bucket must be there and let us look; StorageError when it does not answer.
    """
    workspace = workspace_at(uri)
    try:
        workspace.root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PlacementError(f"workspace expected to be a writable folder, found {uri!r}: {error}") from error
    return workspace


def workspace_at(uri: str) -> Workspace:
    """Return the workspace at `uri` as `open_workspace` does, without making anything."""
    if storage.is_s3(uri):
        root = stage.root_of(uri)
        if uri not in _answered:
            _check_bucket(uri)
            _answered.add(uri)
        return Workspace(root)
    if "://" in uri:
        raise PlacementError(f"workspace expected to be a folder or s3://BUCKET/PREFIX, found {redacted(uri)!r}")
    return Workspace(Path(uri).expanduser().resolve())


def _check_bucket(uri: str) -> None:
    """Look into the bucket; PlacementError when it is not there or refuses us: nothing was touched then."""
    from botocore.exceptions import ClientError, NoCredentialsError

    bucket, _, prefix = uri.removeprefix(storage.S3_SCHEME).partition("/")
    with s3.worded("open", uri):
        try:
            s3.client().list_objects_v2(Bucket=bucket, Prefix=prefix, MaxKeys=1)
            return
        except NoCredentialsError:
            reason = "no credentials of the usual AWS chain (AWS_ACCESS_KEY_ID, a profile, a role)"
        except ClientError as error:
            code = error.response["Error"]["Code"]
            if code not in REFUSALS:
                raise
            reason = REFUSALS[code]
    raise PlacementError(
        f"workspace expected as s3://BUCKET/PREFIX in a bucket that may be listed, read and written, found"
        f" {redacted(uri)!r}: {reason}; nothing was touched"
    )


def finished(folder: Path) -> list[Path]:
    """Return the folders in `folder` that have a record, the oldest record first."""
    folders = stage.folders(folder)
    with ThreadPoolExecutor(LOOKS_AT_ONCE, thread_name_prefix="records") as pool:
        times = pool.map(stage.changed_at, [path / RECORD for path in folders])
    found = [(at, path) for at, path in zip(times, folders, strict=True) if at is not None]
    return [path for _, path in sorted(found)]


def write_bytes_atomic(path: Path, content: bytes) -> None:
    """Write a whole file or none: temporary name, flush to disk, rename. StorageError names the file and the reason."""
    if stage.address_of(path) is not None:
        stage.write(path, content)
        return
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise StorageError(disk_message(path, error)) from error


def disk_message(path: Path, error: OSError) -> str:
    """Say what could not be written, how much room is left, and what to do."""
    try:
        free = shutil.disk_usage(next(p for p in (path, *path.parents) if p.exists())).free
        room = f"{free / 2**20:.0f} MiB free there"
    except OSError:
        room = "free space unknown"
    return (
        f"could not write {path}: {error.strerror or error} ({room}); free some space or choose another --workspace,"
        " then run the same command again: finished work is kept"
    )


def write_json_atomic(path: Path, content: Any) -> None:
    if stage.address_of(path) is not None:
        content = stage.portable(content, path)
    write_bytes_atomic(path, (json.dumps(content, indent=2, ensure_ascii=False, sort_keys=True) + "\n").encode())


def read_json(path: Path) -> Any | None:
    """Return the parsed file, or None when it is missing."""
    if stage.address_of(path) is not None and not stage.fetch(path):
        return None
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None


def write_record(directory: Path, record: dict[str, Any]) -> None:
    """Mark `directory` complete; call it after everything else in it is on disk."""
    stage.keep_tree(directory, without=(RECORD, *BY_THEMSELVES))
    write_json_atomic(directory / RECORD, record)


def read_record(directory: Path) -> dict[str, Any] | None:
    """Return the record of a complete directory, None for a missing or unfinished one; its files are here then."""
    record: dict[str, Any] | None = read_json(directory / RECORD)
    if record is not None:
        fetch_parts(directory)
    return record


def fetch_parts(directory: Path) -> None:
    """Have the files of a folder with a record here, but for those that are fetched on their own."""
    stage.fetch_tree(directory, without=(RECORD, *BY_THEMSELVES))


def append_journal(workspace: Workspace, event: str, **numbers: Any) -> dict[str, Any]:
    """Append one event with its numbers to the workspace's journal."""
    return append_line(workspace.journal, event, **numbers)


def append_line(path: Path, event: str, **numbers: Any) -> dict[str, Any]:
    """Append one JSON line to a file; a single write, so that concurrent writers never interleave."""
    line = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "event": event, **numbers}
    content = (json.dumps(line, ensure_ascii=False) + "\n").encode()
    if stage.address_of(path) is not None:
        portable: dict[str, Any] = stage.portable(line, path)
        event_lines.append(path, json.dumps(portable, ensure_ascii=False).encode())
        return portable
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":  # a line cut short by a crash must not take ours
                content = b"\n" + content
            if os.write(descriptor, content) < len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise StorageError(disk_message(path, error)) from error
    return line


def read_journal(workspace: Workspace) -> list[dict[str, Any]]:
    """Return every whole line of the workspace's journal, oldest first."""
    return read_events(workspace.journal)


def read_events(path: Path) -> list[dict[str, Any]]:
    """Return every whole line of a file, oldest first; a line cut short by a crash is skipped."""
    if stage.address_of(path) is not None:
        return event_lines.read(path)
    if not path.exists():
        return []
    events = []
    # Bytes, since a crash may cut a letter in two; and not splitlines: a prompt may hold a Unicode line separator.
    for line in path.read_bytes().split(b"\n"):
        try:
            events.append(json.loads(line))
        except (json.JSONDecodeError, UnicodeDecodeError):
            continue
    return events
