"""How is a program of the user's told something, so that whatever it does cannot hold the teller up?

It gets its message on standard input, has a time limit, and ends with everything it started. What it prints goes
nowhere: of a failure, the first line is told, without secrets.
"""

import os
import shlex
import shutil
import signal
import subprocess
import tempfile
import threading
from contextlib import suppress
from typing import IO

import psutil

from cluster import s3
from cluster.errors import PlacementError
from cluster.redaction import redacted

LIMIT_S = 30.0
KEPT_BYTES = 4096
"""Of the output; the rest is read and dropped, so that a program that says much is not held up either."""
MOST_CHARS = 200


def check_command(command: str, look: bool = True) -> list[str]:
    """Return the program and its arguments; PlacementError when quotes are open or, with `look`, no program is found.

    No shell is involved: `sh -c '...'` is how one asks for it.
    """
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise PlacementError(f"command expected a program and arguments as in a shell, found: {error}") from None
    if not words:
        raise PlacementError("command expected a program and arguments, found only white space")
    if look and shutil.which(words[0]) is None:
        raise PlacementError(f"command expected a program that can be run, found none called {words[0]!r}")
    return words


def run_command(command: str, message: bytes, limit_s: float = LIMIT_S) -> str:
    """Run a command with `message` on its standard input; return "" when it ended with 0, else what was found."""
    try:
        words = check_command(command)
        with tempfile.TemporaryFile() as told:
            told.write(message)
            told.seek(0)
            process = subprocess.Popen(
                words, stdin=told, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
            )
    except PlacementError as error:
        return str(error)
    except (OSError, ValueError) as error:
        return f"command {words[0]!r} expected to start, found: {error}"
    said = _Said(process.stdout)
    try:
        code: int | None = process.wait(limit_s)
    except subprocess.TimeoutExpired:
        code = None
    _end(process)
    line = said.first_line()
    if code == 0:
        return ""
    found = f"still running after {limit_s:g} s, and ended it" if code is None else f"exit code {code}"
    return f"command {words[0]!r} expected to end with 0, found: {found}" + (f"; it said: {line}" if line else "")


class _Said:
    """Reads what a program prints, keeps the beginning, and never lets it wait."""

    def __init__(self, output: IO[bytes] | None) -> None:
        assert output is not None
        self._output = output
        self._kept = b""
        self._thread = threading.Thread(target=self._run, name="command's output", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        with self._output as output:
            while chunk := os.read(output.fileno(), 65536):
                self._kept += chunk[: KEPT_BYTES - len(self._kept)]

    def first_line(self) -> str:
        """Return the first line that says something, safe to show; call it when the program has ended."""
        self._thread.join(1.0)
        lines = [line.strip() for line in self._kept.decode("utf-8", "replace").splitlines()]
        first = redacted(next(filter(None, lines), ""), s3.secrets())
        return "".join(character for character in first if character.isprintable())[:MOST_CHARS]


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End a program and all it started: those in its session, and those that left it while it still ran."""
    left: list[psutil.Process] = []
    if process.poll() is None:
        with suppress(psutil.Error):
            left = psutil.Process(process.pid).children(recursive=True)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    for child in left:
        with suppress(psutil.Error):  # it checks that the number still is the process that was seen
            child.kill()
    process.wait()
