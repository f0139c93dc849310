"""One line of JSON for each request: when, which, what came of it, how long it took. Never a prompt, never a key.

Lines go to stderr, where a container's log collector finds them, or to a file that is rotated by size. A file has one
replica: two writers would rotate it under each other. A full disk loses lines, which are counted, and no request.
"""

import json
import sys
import threading
import time
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import IO

from cluster.request_watch import EndedRequest

QUIET_ROUTES = frozenset({"/healthz", "/readyz", "/metrics"})
"""Asked every few seconds by machines: told only when they fail."""
MAX_BYTES = 20_000_000
KEEP_FILES = 5
DIGITS = 4


class RequestLog:
    """Writes to `path`, or to stderr where it is None; files beyond `keep_files` rotated ones are removed."""

    def __init__(self, path: Path | None = None, max_bytes: int = MAX_BYTES, keep_files: int = KEEP_FILES) -> None:
        self.path, self.max_bytes, self.keep_files = path, max_bytes, keep_files
        self.lost = 0
        """Lines that could not be written."""
        self._lock = threading.Lock()
        self._file: IO[bytes] | None = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)

    def ended(self, served: EndedRequest) -> None:
        """Write the line of a request that has ended."""
        if served.route in QUIET_ROUTES and served.status < 400:
            return
        line = line_of(served, time.time())
        with self._lock:
            try:
                self._write(line)
            except OSError as error:
                self.lost += 1
                self._close()
                if self.lost == 1:
                    print(f"request log expected to be writable, found: {error}; lines are lost", file=sys.stderr)

    def close(self) -> None:
        with self._lock:
            self._close()

    def _write(self, line: bytes) -> None:
        if self.path is None:
            sys.stderr.write(line.decode("ascii"))
            sys.stderr.flush()
            return
        if self._file is None:
            self._file = self.path.open("ab", buffering=0)
        if self._file.tell() and self._file.tell() + len(line) > self.max_bytes:
            self._close()
            self._rotate(self.path)
            self._file = self.path.open("ab", buffering=0)
        self._file.write(line)

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
