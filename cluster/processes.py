"""Which process is this? Boot and process namespace of its machine, its number, and the tick in which it started."""

import socket
import uuid
from functools import lru_cache
from pathlib import Path


@lru_cache(maxsize=1)
def this_machine() -> str:
    """Name this boot of this host and its process namespace: two containers of one host number processes apart."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:
        return f"{socket.gethostname()}/{uuid.getnode():x}"


def start_ticks(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None where it does not run, and without /proc.

    psutil's `create_time` adds the boot's time by the clock to it, and so moves with every step of the clock.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat.rpartition(b")")[2].split()  # from the third on: the second, the name, may hold anything
    return None if fields[0] in (b"Z", b"X") else int(fields[19])
