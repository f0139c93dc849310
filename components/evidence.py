"""What the gate looks at: plain numbers and arrays about a candidate and the champion, and why some are missing.

Made by `flows/promote.py` from measurements, judged by `policy.py`. Shape letters: N test pictures, P prompts.
"""

from dataclasses import dataclass

from components.metrics import Array, Estimate


@dataclass(frozen=True)
class NewData:
    """The new data as the gate sees it."""

    dataset: str
    pictures: int
    seen: int = 0
    """Test pictures that the candidate or the champion trained on."""


@dataclass(frozen=True)
class Served:
    """What the candidate did on the real serving path; `problem` says why it did not answer."""

    problem: str = ""
    ready_s: float = 0.0
    answer_s: float = 0.0
    pictures: int = 0
    largest_difference: int = 0
    """Between a served and a sampled picture, in levels of 255."""
    memory_bytes: int = 0


@dataclass(frozen=True)
class Champion:
    """The version that serves now; `problem` says why its weights cannot be loaded."""

    version: int
    dataset: str | None = None
    problem: str = ""
    same_weights: bool = False


@dataclass(frozen=True)
class Losses:
    """Loss of each picture under both models, same noise; `missing` says why there are none."""

    dataset: str
    candidate_N: Array | None = None
    champion_N: Array | None = None
    missing: str = ""


@dataclass(frozen=True)
class Scores:
    """A number for each prompt, or a share with its interval, of both models, and the encoders they rest on."""

    candidate: Array | Estimate
    champion: Array | Estimate
    encoders: tuple[str, str] = ("", "")


@dataclass(frozen=True)
class Evidence:
    data: NewData
    served: Served
    champion: Champion | None = None
    new: Losses | None = None
    own: Losses | None = None
    """On the champion's own test pictures; None where its data is the new data."""
    prompts: Scores | None = None
    anchors: Scores | None = None
    coverage: Scores | None = None
