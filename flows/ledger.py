"""What does the standing loop know after any death of its process? Its state, and which lines the journal has.

The state is one fenced JSON file, changed only under the lease's token: a loop that was replaced can write nothing
more. It is saved before the journal is told, and the journal is told again after a death; a line that is there already,
by its key, is not written twice. So a line is neither lost nor doubled wherever the process ends.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from typing import Any

from cluster import stage
from cluster.artifacts import Workspace, append_journal, read_journal
from cluster.errors import StorageError
from cluster.fencing import peek_fenced, read_fenced, write_fenced
from cluster.lease import Lease

FOLDER = "retrain"
KEPT_REFUSALS = 1000
MANUAL = "asked.json"
PROMOTED = "promoted"
"""How a cycle that made a new champion ended."""
BY_HAND = "version {} was rolled back by hand"
METER_S = 60.0
"""GPU time is charged so far ahead while it is used."""


@dataclass
class Cycle:
    """One retraining under way; what its finished stages returned."""

    id: str
    turn: int
    """Counts the cycles that trained, from 1: what anchors and searches go by."""
    began: float
    trigger: dict[str, Any]
    """Kinds, reasons and numbers of the decision that began it."""
    champion_before: int | None = None
    drift: float = 0.0
    run_id: str = ""
    """Of the training, once it is known: recipe, base and data in one."""
    look: dict[str, Any] | None = None
    """What the endpoint's metrics were when the cycle began."""
    before: dict[str, Any] | None = None
    """What the former champion did until the alias moved: what the new one is compared with."""
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass
class State:
    """What is kept between looks; times are Unix seconds."""

    cycles: int = 0
    turns: int = 0
    cycle: Cycle | None = None
    last: dict[str, Any] | None = None
    """The last finished cycle, as its line in the journal tells it."""
    ended: float | None = None
    last_tick: float | None = None
    cursor: dict[str, Any] | None = None
    told: list[str] = field(default_factory=list)
    """Kinds of the last decision that was journaled: the same `wait` is told once."""
    heeded: str = ""
    """The last request by hand that became a cycle."""
    recipe: dict[str, Any] = field(default_factory=dict)
    """Overrides that the last search found best."""
    searched: int = 0
    """Turn of that search; 0: there was none."""
    spent: list[dict[str, Any]] = field(default_factory=list)
    """Steps and GPU hours of cycles: {cycle, at, steps, gpu_hours}."""
    refused: list[dict[str, Any]] = field(default_factory=list)
    """Attempts that must not be made again: {cycle, parent, new, run_id, dataset, reasons}, one without a champion also
    `first`, what it was made of."""
    short: dict[str, Any] | None = None
    """The last cycle that ended to wait for more pictures, and what it counted: {cycle, parent, fractions, splits}."""


class Ledger:
    """State and journal of the one loop that holds the lease."""

    def __init__(
        self,
        workspace: Workspace,
        confirm: Callable[[], Lease],
        notify: Callable[[dict[str, Any]], None] = lambda line: None,
    ) -> None:
        """Read the state and seal it against holders before us; LeaseLostError when we are one of those."""
        self.workspace, self.confirm, self._notify = workspace, confirm, notify
        self._token = confirm().token
        self.state = _read(read_fenced(state_uri(workspace), self._token))

    def save(self) -> None:
        self.confirm()
        write_fenced(state_uri(self.workspace), stage.portable(asdict(self.state), self.workspace.root), self._token)

    def tell(self, event: str, key: Mapping[str, Any], **numbers: Any) -> dict[str, Any]:
        """Journal a line unless one with this event and key is there; return it, as it is there."""
        found = self.told(event, key)
        return found if found is not None else self.add(event, **key, **numbers)

    def add(self, event: str, **numbers: Any) -> dict[str, Any]:
        """Journal a line and notify of it."""
        self.confirm()
        line = append_journal(self.workspace, event, **numbers)
        self._notify(line)
        return line

    def told(self, event: str, key: Mapping[str, Any]) -> dict[str, Any] | None:
        for line in reversed(read_journal(self.workspace)):
            if line["event"] == event and all(line.get(name) == value for name, value in key.items()):
                return line
        return None

    def spend(self, cycle: str, what: str, steps: int, gpu_hours: float) -> None:
        """Note what a cycle's search or training costs; a later note of the same replaces it. Not saved yet."""
        entry = {"cycle": cycle, "what": what, "at": time.time(), "steps": steps, "gpu_hours": gpu_hours}
        others = [one for one in self.state.spent if (one["cycle"], one["what"]) != (cycle, what)]
        self.state.spent = [*others, entry]

    @contextmanager
    def charging(self, cycle: str, what: str, steps: int, gpus: float) -> Iterator[None]:
        """Charge for the block: `steps` when it begins, the hours of `gpus` as they pass, beside those noted before.

        The hours are saved METER_S ahead, so whoever is killed has paid for all that was used, and hardly for more.
        A block that ends, in whatever way, pays for what it took.
        """
        before, began, ended = self.gpu_hours_of(cycle, what), time.monotonic(), threading.Event()

        def note(ahead_s: float) -> None:
            self.spend(cycle, what, steps, before + (time.monotonic() - began + ahead_s) / 3600 * gpus)

        def count() -> None:
            while not ended.wait(METER_S):
                note(METER_S)
                with suppress(StorageError):  # one that lost the lease is ended by its guard
                    self.save()

        note(METER_S)
        self.save()
        meter = threading.Thread(target=count, name=f"meter of {what}", daemon=True)
        if gpus:
            meter.start()
        try:
            yield
        finally:
            ended.set()
            if gpus:
                meter.join()
            note(0.0)
            with suppress(StorageError):  # then what was paid ahead stands
                self.save()

    def gpu_hours_of(self, cycle: str, what: str) -> float:
        """What was noted of a cycle's search or training so far."""
        return sum(one["gpu_hours"] for one in self.state.spent if (one["cycle"], one["what"]) == (cycle, what))

    def refuse(self, attempt: dict[str, Any]) -> None:
        """Remember an attempt that must not be made again. Not saved yet."""
        self.state.refused = [*self.state.refused, attempt][-KEPT_REFUSALS:]


def lease_place(workspace: Workspace) -> str:
    return workspace.place(FOLDER, "lease")


def state_uri(workspace: Workspace) -> str:
    return workspace.place(FOLDER, "state.json")


def asked_uri(workspace: Workspace) -> str:
    return workspace.place(FOLDER, MANUAL)


def look_at(workspace: Workspace) -> State:
    """Return the loop's state for those who only look."""
    return _read(peek_fenced(state_uri(workspace)))


def saved_listing(workspace: Workspace) -> str:
    """Return the listing that the saved cursor names, where a loop that is killed now goes on; empty without one."""
    return str((look_at(workspace).cursor or {}).get("listing", ""))


def _read(value: Any) -> State:
    try:
        state = State(**(value or {}))
        if state.cycle is not None:
            state.cycle = Cycle(**state.cycle)  # type: ignore[arg-type]
    except TypeError as error:
        raise StorageError(
            f"retrain/state.json expected as this version of Fresco writes it, found: {error}; use the version that"
            " wrote it, or remove the file: the loop then begins anew and loses only its budget and refusals"
        ) from error
    return state
