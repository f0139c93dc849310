"""Show a run's progress from its log: a live line on a terminal, JSON lines elsewhere.

The worker group writes `metrics.jsonl`; this reads what is new twice a second in a thread of the driver.
"""

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

from cluster import telemetry
from cluster.workers import read_lines
from flows.console import live, say

POLL_S = 0.5


class RunProgress:
    """Context manager: follows `directory`/metrics.jsonl until the block ends."""

    def __init__(self, directory: Path, total_steps: int) -> None:
        self.path = directory / "metrics.jsonl"
        self.total_steps = total_steps
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._inode, self._position, self._muted = 0, 0, True
        # The worker groups of earlier attempts: their lines may still be in the file.
        self._groups = [line["pids"] for line in read_lines(self.path) if "pids" in line]
        self._first: tuple[float, int] | None = None
        self._said_s = 0.0

    def __enter__(self) -> "RunProgress":
        say("starting workers (processes and imports take 20 to 40 s on two cores)")
        self._thread.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stop.set()
        self._thread.join()
        self._read()
        live("")

    def _follow(self) -> None:
        while not self._stop.wait(POLL_S):
            self._read()

    def _read(self) -> None:
        """Show the whole lines written since the last look; lines of an earlier attempt are passed over."""
        try:
            with self.path.open("rb") as file:
                if os.fstat(file.fileno()).st_ino != self._inode:  # every attempt begins by replacing the file
                    self._inode, self._position, self._muted = os.fstat(file.fileno()).st_ino, 0, True
                file.seek(self._position)
                text = file.read()
        except FileNotFoundError:
            return
        whole = text[: text.rfind(b"\n") + 1]
        self._position += len(whole)
        for line in map(json.loads, whole.splitlines()):
            pids = line.get("pids")
            if pids is not None and pids not in self._groups:
                self._groups.append(pids)
                self._muted = False
            if not self._muted:
                self._show(line)

    def _show(self, line: dict[str, Any]) -> None:
        if line.get("event") == "start":
            self._first = None
            how = f"resumed at step {line['step']}" if line["resumed"] else "from the start"
            say(
                f"workers up, {how}: {line['trained']:,} parameters train, {line['frozen']:,} frozen, on"
                f" {line['device']}, pids {line['pids']}"
            )
            for row in line["memory"]:
                say("  " + row)
        elif telemetry.EVAL_LOSS in line:
            bands = ", ".join(f"{line[f'{telemetry.EVAL_LOSS}_band_{k}']:.4f}" for k in range(4))
            say(f"step {line['step']:>6}  eval loss {line[telemetry.EVAL_LOSS]:.5f}  (by noise: {bands})")
        elif telemetry.TRAIN_LOSS in line:
            self._show_step(line)

    def _show_step(self, line: dict[str, Any]) -> None:
        now = time.monotonic()
        self._first = self._first or (now, line["step"])
        done = line["step"] - self._first[1]
        left_s = (now - self._first[0]) / done * (self.total_steps - line["step"]) if done else 0.0
        left = f"{left_s:.0f} s left" if done else "measuring speed"
        text = (
            f"step {line['step']:>6}/{self.total_steps}  loss {line[telemetry.TRAIN_LOSS]:.4f}"
            f"  {line[telemetry.IMAGES_PER_S]:.1f} images/s  data {line[telemetry.DATA_WAIT]:.0%}"
            f"  {line[telemetry.MEMORY_PEAK]:.0f} MiB  {left}"
        )
        live(text)
        if not sys.stderr.isatty() and now - self._said_s > 15:
            say(text)
            self._said_s = now
