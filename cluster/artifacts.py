"""Where a workspace keeps things, and how a file or record becomes whole in one move.

A directory counts as complete when its `record.json` is there: it is written last, by rename. Readers ignore the rest.
The journal is append-only: every decision and alias move, one JSON object a line, with its numbers.
"""

import errno
import json
import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import PlacementError, StorageError

RECORD = "record.json"


@dataclass(frozen=True)
class Workspace:
    """One folder that holds everything Fresco writes."""

    root: Path

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
        return f"sqlite:///{self.root / 'mlflow.db'}"

    def dataset_dir(self, dataset_id: str) -> Path:
        return self.data / dataset_id

    def run_dir(self, run_id: str) -> Path:
        return self.runs / run_id


def open_workspace(uri: str) -> Workspace:
    """Return the workspace at `uri`, making the folder; PlacementError when it cannot be one."""
    if "://" in uri:
        raise PlacementError(
            f"workspace expected to be a folder, found {uri!r}: workspaces on object storage are not supported yet;"
            " use a local or shared folder (data.source may be s3://)"
        )
    root = Path(uri).expanduser().resolve()
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PlacementError(f"workspace expected to be a writable folder, found {uri!r}: {error}") from error
    return Workspace(root)


def write_bytes_atomic(path: Path, content: bytes) -> None:
    """Write a whole file or none: temporary name, flush to disk, rename. StorageError names the file and the reason."""
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
    write_bytes_atomic(path, (json.dumps(content, indent=2, ensure_ascii=False, sort_keys=True) + "\n").encode())


def read_json(path: Path) -> Any | None:
    """Return the parsed file, or None when it is missing."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None


def write_record(directory: Path, record: dict[str, Any]) -> None:
    """Mark `directory` complete; call it after everything else in it is on disk."""
    write_json_atomic(directory / RECORD, record)


def read_record(directory: Path) -> dict[str, Any] | None:
    """Return the record of a complete directory, None for a missing or unfinished one."""
    return read_json(directory / RECORD)


def append_journal(workspace: Workspace, event: str, **numbers: Any) -> dict[str, Any]:
    """Append one event with its numbers to the workspace's journal."""
    return append_line(workspace.journal, event, **numbers)


def append_line(path: Path, event: str, **numbers: Any) -> dict[str, Any]:
    """Append one JSON line to a file; a single write, so that concurrent writers never interleave."""
    line = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "event": event, **numbers}
    content = (json.dumps(line, ensure_ascii=False) + "\n").encode()
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
