"""How does a cancellation reach the replica that draws, when the proxy hands it to another? By a file in their folder.

Who is asked and does not know the request leaves a file with its name; every replica looks for such files, and the one
that has the request ends it and marks the file. Nobody marks it: the request has ended, or never was. Requests by other
keys are not marked either, so a name alone tells nothing.
"""

import json
import secrets
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from cluster.artifacts import write_bytes_atomic
from cluster.request_ids import NAME

ASKED, DONE = ".asked", ".done"
LOOK_EVERY_S = 0.25
ANSWER_LIMIT_S = 2.0
ABANDONED_S = 60.0
"""A file so old belongs to a replica that ended while it waited."""


class CancelFiles:
    """One replica's part; `cancel` ends a request by id and name of key, and says whether there was one."""

    def __init__(self, folder: Path, cancel: Callable[[str, str], bool]) -> None:
        self.folder, self._cancel = folder, cancel
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="cancel-files", daemon=True)

    def start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._thread.start()

    def close(self) -> None:
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join()

    def ask(self, request_id: str, key: str) -> bool:
        """Ask all replicas to end a request; waits for the one that has it, at most ANSWER_LIMIT_S."""
        if not NAME.fullmatch(request_id.encode()):
            return False
        asked = self.folder / f"{request_id}.{secrets.token_hex(4)}{ASKED}"
        done = asked.with_suffix(DONE)
        write_bytes_atomic(asked, json.dumps({"id": request_id, "key": key}).encode())
        try:
            deadline = time.monotonic() + ANSWER_LIMIT_S
            while time.monotonic() < deadline:
                if done.exists():
                    return True
                time.sleep(LOOK_EVERY_S / 4)
            return False
        finally:
            for path in (asked, done):
                path.unlink(missing_ok=True)

    def _run(self) -> None:
        while not self._closing.wait(LOOK_EVERY_S):
            for path in self.folder.glob(f"*{ASKED}"):
                with suppress(OSError, ValueError):  # another replica, or the one that asked, was first
                    asked = json.loads(path.read_bytes())
                    if self._cancel(asked["id"], asked["key"]):
                        path.rename(path.with_suffix(DONE))
                    elif time.time() - path.stat().st_mtime > ABANDONED_S:
                        path.unlink()
