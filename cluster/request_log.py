"""One line of JSON for each request: when, which, what came of it, how long it took. Never a prompt, never a key.

Lines go to stderr, where a container's log collector finds them, or to a file that is rotated by size. A file has one
replica, which holds a lock on it: two writers would rotate it under each other, and files without one were left by
replicas that ended; the newest of those are kept. A thread writes, so a slow disk holds no request up; a full one loses
lines, which are counted.
"""

import fcntl
import json
import os
import queue
import sys
import threading
import time
from contextlib import suppress
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import IO

from cluster.request_watch import EndedRequest

QUIET_ROUTES = frozenset({"/healthz", "/readyz", "/metrics"})
"""Asked every few seconds by machines: told only when they fail."""
MAX_BYTES = 20_000_000
KEEP_FILES = 5
KEEP_ENDED = 8
"""Replicas that ended and whose files are kept: every restart is another replica."""
MOST_WAITING = 10_000
"""Lines; a disk that does not answer must not fill the memory."""
CLOSE_LIMIT_S = 10.0
FILES = "requests-*.jsonl"
DIGITS = 4


class RequestLog:
    """Writes to `path`, or to stderr where it is None; files beyond `keep_files` rotated ones are removed."""

    def __init__(self, path: Path | None = None, max_bytes: int = MAX_BYTES, keep_files: int = KEEP_FILES) -> None:
        self.path, self.max_bytes, self.keep_files = path, max_bytes, keep_files
        self.lost = 0
        """Lines that could not be written."""
        self._lock = threading.Lock()
        self._file: IO[bytes] | None = None
        self._lines: queue.Queue[bytes | None] = queue.Queue(MOST_WAITING)
        self._thread = threading.Thread(target=self._run, name="request-log", daemon=True)
        self._thread.start()

    def ended(self, served: EndedRequest) -> None:
        """Write the line of a request that has ended, soon; returns at once."""
        if served.route in QUIET_ROUTES and served.status < 400:
            return
        try:
            self._lines.put_nowait(line_of(served, time.time()))
        except queue.Full:
            self._lose("a disk that does not answer")

    def close(self) -> None:
        """Write what waits, and end; a disk that does not answer is not waited for."""
        try:
            self._lines.put(None, timeout=CLOSE_LIMIT_S)
        except queue.Full:
            return
        self._thread.join(CLOSE_LIMIT_S)

    def _run(self) -> None:
        if self.path is not None:
            with suppress(OSError):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                remove_ended(self.path.parent)
        while (line := self._lines.get()) is not None:
            try:
                self._write(line)
            except OSError as error:
                self._close()
                self._lose(str(error))
        self._close()

    def _lose(self, why: str) -> None:
        with self._lock:
            self.lost += 1
            first = self.lost == 1
        if first:
            print(f"request log expected to be writable, found: {why}; lines are lost", file=sys.stderr)

    def _write(self, line: bytes) -> None:
        if self.path is None:
            sys.stderr.write(line.decode("ascii"))
            sys.stderr.flush()
            return
        if self._file is None or os.fstat(self._file.fileno()).st_nlink == 0:
            self._open(self.path)
        assert self._file is not None
        if self._file.tell() and self._file.tell() + len(line) > self.max_bytes:
            self._close()
            self._rotate(self.path)
            self._open(self.path)
        self._file.write(line)

    def _open(self, path: Path) -> None:
        self._close()
        self._file = path.open("ab", buffering=0)
        with suppress(OSError):  # a file system without locks: nobody takes the file for one that was left
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _rotate(self, path: Path) -> None:
        """Name the file NAME.1, the one before NAME.2, and so on; the oldest is replaced."""
        names = [path, *(path.with_name(f"{path.name}.{number}") for number in range(1, self.keep_files + 1))]
        for newer, older in reversed(list(pairwise(names))):
            if newer.exists():
                newer.replace(older)
        if not self.keep_files:
            path.unlink()

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def remove_ended(folder: Path, keep: int = KEEP_ENDED) -> None:
    """Remove the files of replicas that ended, but for those of the `keep` that wrote last."""
    ended: list[tuple[float, Path]] = []
    for path in folder.glob(FILES):
        with suppress(OSError), path.open("rb") as file:  # BlockingIOError: its replica lives
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ended.append((path.stat().st_mtime, path))
    for _, path in sorted(ended)[: max(0, len(ended) - keep)]:
        for left in (*folder.glob(f"{path.name}.*"), path):
            left.unlink(missing_ok=True)


def line_of(served: EndedRequest, now: float) -> bytes:
    """Return the line; `now` in seconds since 1970. ASCII JSON, so a line never holds another line."""
    when = datetime.fromtimestamp(now, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    told = {
        "time": when,
        "request_id": served.request_id,
        "method": served.method,
        "route": served.route,
        "status": served.status,
        "seconds": round(served.seconds, DIGITS),
        "rows": served.rows,
        "version": served.version,
        "key": served.key,
        "bytes_in": served.bytes_in,
        "bytes_out": served.bytes_out,
        "code": served.code,
        "gone": served.gone or None,
    }
    known = {name: value for name, value in told.items() if value is not None}
    return (json.dumps(known, separators=(",", ":")) + "\n").encode("ascii")
