"""What a verb says while it works: plain lines on stderr, so that stdout stays free for the one JSON object."""

import os
import shutil
import sys
import time
import traceback
from pathlib import Path

_STARTED = time.monotonic()


def say(text: str) -> None:
    """Write one line to stderr."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def step(title: str) -> None:
    """Write a section heading with the seconds since the command started."""
    say(f"\n[{time.monotonic() - _STARTED:5.0f} s] {title}")


def live(text: str) -> None:
    """Rewrite the current line on a terminal; elsewhere do nothing (the caller logs whole lines now and then)."""
    if sys.stderr.isatty():
        sys.stderr.write("\r\x1b[2K" + text)
        sys.stderr.flush()


def program() -> str:
    """Return how this command is called again: by its name where the shell finds it, else by its path from here."""
    called = Path(sys.argv[0])
    if called.name != "fresco" or shutil.which("fresco") == str(called.absolute()):
        return "fresco"
    return os.path.relpath(called)


def explain(error: Exception) -> int:
    """Print one message for an error made on purpose, the whole trace for a bug; return the exit code."""
    code = getattr(type(error), "exit_code", None)
    if code is None and ("no space left" in str(error).lower() or "disk is full" in str(error).lower()):
        say(f"\nerror: the disk is full: {error}\nfree some space or choose another --workspace, then run it again")
        return 1
    if code is None:
        traceback.print_exception(error)
        say("\nerror: this is a bug in Fresco; please report it with the trace above")
        return 1
    say(f"\nerror: {error}")
    return int(code)


def keep_stdout_clean() -> int:
    """Send whatever libraries print to stderr; return a descriptor of the real stdout for the one JSON object."""
    sys.stdout.flush()
    real = os.dup(1)
    os.dup2(2, 1)
    return real
