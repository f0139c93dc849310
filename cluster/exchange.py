"""Where jobs, reports and decisions meet: one small Ray actor between a search and its worker groups.

A search `offer`s a run; a group that has nothing to do `take`s it; at every evaluation the group's rank 0 `report`s and
waits there until the search either asks for the next report (`advance`: go on) or lets the run go (`release`: leave a
checkpoint and come back for other work). So all ranks stop at the same step, and groups outlive the runs they execute.

A group that died comes back and `take`s: it gets the same run again, up to `max_failures` times. Evaluations that the
search has already seen and answered are answered the same way again, without telling it twice.
"""

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

TAKE_WAIT_S = 30.0  # collectives of idle ranks must not outlast their time limit
POLL_S = 0.01
STEP = "step"
OVER = "over"  # in a report: it is the last one of its run
FAILURE = "failure"  # in an event: the run cannot go on, and why
FATAL = "fatal"  # in a failure: no other run can go on either
ENDED = "ended"  # instead of a task: go home


@dataclass
class Offered:
    """One run on its way through a group."""

    task: Any
    past: deque[dict[str, Any]]
    """Reports of an earlier attempt, told again without computing."""
    finished: bool
    """Nothing is left to compute: only the past is told."""
    max_failures: int
    events: asyncio.Queue[dict[str, Any]] = field(default_factory=asyncio.Queue)
    decision: asyncio.Event = field(default_factory=asyncio.Event)
    told_step: float = -1
    """Step of the newest report that the search was told."""
    answered_step: float = -1
    """Step of the newest report after which the search said to go on."""
    released: bool = False
    queued: bool = False
    left: asyncio.Event = field(default_factory=asyncio.Event)
    attempts: int = 0
    last_words: str = ""


class Exchange:
    """The actor's class; every method runs on one event loop, so nothing here needs a lock."""

    def __init__(self) -> None:
        self._runs: dict[str, Offered] = {}
        self._queue: deque[str] = deque()
        self._at: dict[int, str] = {}
        self._closed = False
        self._broken = ""

    # What the search calls.

    def offer(self, run_id: str, task: Any, past: Sequence[dict[str, Any]], finished: bool, max_failures: int) -> None:
        """Make a run known; a group computes it once its past is told, unless it is finished."""
        self._runs[run_id] = Offered(task, deque(past), finished, max_failures)

    async def advance(self, run_id: str) -> dict[str, Any]:
        """Let the run go on; return its next report, or `{FAILURE: ...}` when there will be none."""
        run = self._runs[run_id]
        if run.past:
            report = run.past.popleft()
            run.told_step = run.answered_step = report[STEP]
            return report
        if run.finished:
            return {STEP: run.told_step, OVER: 1.0}
        if self._broken:
            return self._gone()
        self._go_on(run)
        if not run.queued:
            run.queued, run.released = True, False
            run.left.clear()
            self._queue.append(run_id)
        return await run.events.get()

    async def conclude(self, run_id: str) -> dict[str, Any]:
        """Let a run whose last report was told do what is left (its export); return `{}`, or `{FAILURE: ...}`."""
        run = self._runs[run_id]
        self._go_on(run)
        await run.left.wait()
        return run.events.get_nowait() if run.events.qsize() else {}

    async def release(self, run_id: str) -> None:
        """End the run at its present or next report; return when its group has left it, with a checkpoint."""
        run = self._runs[run_id]
        run.released = True
        run.decision.set()
        if run.queued and not self._broken:
            await run.left.wait()

    def close(self) -> None:
        """Send every group home: from its next `take`, or from its next report where a run is under way."""
        self._closed = True
        for run in self._runs.values():
            run.released = True
            run.decision.set()

    def break_down(self, reason: str) -> None:
        """The groups are gone and will not come back: say so to whoever waits."""
        self._broken = self._broken or reason
        for run in self._runs.values():
            if run.queued:
                run.events.put_nowait(self._gone())
                run.left.set()

    # What rank 0 of a group calls.

    async def take(self, group: int) -> Any:
        """Return the next task, None after a while without one, ENDED when there will be no more."""
        if group in self._at:  # it died and came back
            run = self._runs[self._at[group]]
            run.attempts += 1
            if run.attempts <= run.max_failures and not run.released:
                return run.task
            words = f"; the last error was: {run.last_words}" if run.last_words else ""
            message = f"its worker group failed more than placement.max_failures={run.max_failures} times{words}"
            self.failed(group, {"module": "cluster.errors", "name": "WorkerError", "message": message})
        for _ in range(int(TAKE_WAIT_S / POLL_S)):
            if self._closed:
                return ENDED
            if self._queue:
                run_id = self._queue.popleft()
                self._at[group] = run_id
                if not self._runs[run_id].released:
                    return self._runs[run_id].task
                self.done(group)
            await asyncio.sleep(POLL_S)
        return None

    async def report(self, group: int, metrics: dict[str, float]) -> bool:
        """Hand a report to the search and wait for its answer: whether to go on."""
        run = self._runs[self._at[group]]
        if metrics[STEP] > run.answered_step and not run.released:
            run.decision.clear()
            if metrics[STEP] > run.told_step:
                run.told_step = metrics[STEP]
                run.events.put_nowait(metrics)
            await run.decision.wait()
        return not run.released

    def note(self, group: int, last_words: str) -> None:
        """Keep the error of an attempt; another may follow."""
        if group in self._at:
            self._runs[self._at[group]].last_words = last_words

    def failed(self, group: int, failure: dict[str, Any]) -> None:
        """The run at this group cannot go on."""
        if group in self._at:
            run = self._runs[self._at[group]]
            if not run.released:
                run.events.put_nowait({FAILURE: failure})
            self.done(group)

    def done(self, group: int) -> None:
        """The group has left its run, which ended or was released."""
        run = self._runs[self._at.pop(group)]
        run.queued = False
        run.left.set()

    def _go_on(self, run: Offered) -> None:
        run.answered_step = run.told_step
        run.decision.set()

    def _gone(self) -> dict[str, Any]:
        failure = {"module": "cluster.errors", "name": "WorkerError", "message": self._broken, FATAL: True}
        return {FAILURE: failure}
