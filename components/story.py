"""What there is to tell of a model: looks, waits, cycles with their stages, judgements, reigns, dataset versions.

Plain values for a page or a file; `timeline.py` reads them from the journal. Times are Unix seconds.
"""

from dataclasses import dataclass, field

DRIFT, NO_DRIFT, NOT_ENOUGH = "drift", "no_drift", "not_enough_data"
PROMOTE, ROLLBACK, FOUND = "promote", "rollback", "champion_found"
RETRAIN, WAIT = "retrain", "wait"


@dataclass(frozen=True)
class Stream:
    """What one look measured on one stream; None where it did not."""

    effect: float | None
    threshold: float | None
    p_value: float | None
    verdict: str


@dataclass(frozen=True)
class Look:
    """One look of the monitor."""

    time: float
    verdict: str
    reasons: tuple[str, ...]
    streams: dict[str, Stream]
    new_images: int | None
    report: str


@dataclass(frozen=True)
class Waits:
    """Decisions not to train with nothing else between them; `reasons` are the newest that differ, oldest first."""

    first: float
    last: float
    number: int
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Stage:
    """A part of a cycle; state is began, done or failed."""

    name: str
    state: str
    seconds: float | None = None
    report: str = ""
    error: str = ""


@dataclass
class Cycle:
    """One retraining, from its trigger to its decision; `decision` is empty and `ended` None while it is at work."""

    id: str
    began: float
    trigger: tuple[str, ...] = ()
    ended: float | None = None
    decision: str = ""
    reasons: tuple[str, ...] = ()
    champion_before: int | None = None
    champion_after: int | None = None
    dataset: str = ""
    run_id: str = ""
    stages: dict[str, Stage] = field(default_factory=dict)


@dataclass(frozen=True)
class Judgement:
    """A decision of the gate."""

    time: float
    version: int | None
    decision: str
    forced: bool
    reasons: tuple[str, ...]
    run_id: str
    dataset: str
    report: str


@dataclass(frozen=True)
class Reign:
    """Who served from when to when (`until` is None for who serves now), and by which event that began."""

    version: int | None
    since: float
    until: float | None
    event: str
    reasons: tuple[str, ...]
    run_id: str
    dataset: str
    report: str


@dataclass(frozen=True)
class Dataset:
    """A dataset version as it was made; `added` is None where the journal does not know its parent."""

    time: float
    id: str
    images: int | None
    parent: str
    added: int | None


@dataclass(frozen=True)
class Entry:
    """Any line in short."""

    time: float
    event: str
    text: str


@dataclass
class Story:
    """Everything that the journal tells of one model, oldest first."""

    name: str
    looks: list[Look] = field(default_factory=list)
    waits: list[Waits] = field(default_factory=list)
    cycles: list[Cycle] = field(default_factory=list)
    judgements: list[Judgement] = field(default_factory=list)
    reigns: list[Reign] = field(default_factory=list)
    datasets: list[Dataset] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    """One for each line that was read, but for waits, which are grouped."""
    lines: int = 0
    unread: int = 0
    """Lines without a time, an event or their numbers; those that were no JSON at all are not among them."""
    went_back: int = 0
    """How often a line is older than the one before it: a clock was set back, or two machines' clocks differ."""

    @property
    def span(self) -> tuple[float, float]:
        """First and last time of all; (0, 0) when there is none."""
        times = [entry.time for entry in self.entries]
        return (min(times), max(times)) if times else (0.0, 0.0)
