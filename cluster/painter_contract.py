"""What the routes ask of the model behind them, and what comes back: plain values, neither side knows the other.

The painter is made by an importable factory. It draws in threads of its own and calls back from them. Encoding a
picture takes time, so an event comes as a function that makes it, called where it holds nobody up.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from cluster.images_schema import Order

if TYPE_CHECKING:
    from PIL.Image import Image

    from cluster.capture import Encoder
    from cluster.uploads import Upload


@dataclass(frozen=True)
class Job:
    """One checked request."""

    request_id: str
    order: Order
    key: str = ""
    """Name of the API key that asks: keys share the model fairly."""
    upload: "Upload | None" = None
    """The picture to edit."""
    version: int | None = None
    """The version that was asked for by number; None lets the painter choose."""
    timed: bool = False
    """Somebody wants to know when each of its phases began and ended."""
    arrived: float = field(default_factory=time.monotonic)
    """By time.monotonic; the order's `deadline_s` counts from then, whatever it waits for on the way to the model."""


class Phase(NamedTuple):
    """A part of a request's way; times of time.monotonic."""

    name: str
    """waiting, denoising, decoding or encoding."""
    began: float
    ended: float


@dataclass(frozen=True)
class Partial:
    """An unfinished picture, encoded."""

    row: int
    index: int
    """Counts from 0 within one picture of the request."""
    content: bytes


@dataclass(frozen=True)
class Finished:
    """The last event of a request that was drawn: its pictures, encoded, in the order of its rows."""

    contents: tuple[bytes, ...]
    size: str
    """WIDTHxHEIGHT of what is handed out; retouching may enlarge."""
    facts: Mapping[str, Any]
    """model_version, dataset and run_id of the weights that drew it."""
    drawn: "Sequence[Image]"
    """As the model drew them, for capture."""
    phases: tuple[Phase, ...] = ()
    """Of a timed job."""


PaintEvent = Partial | Finished
MakeEvent = Callable[[], PaintEvent | None]
"""Encodes an event; ApiError is how a request ends that was not drawn; None is an event that nobody should see."""
Receiver = Callable[[MakeEvent], None]


class SwappingError(Exception):
    """New requests wait while one model is exchanged for another; ask again when `Painter.swapping` is empty."""


class Painter(Protocol):
    """What the factory returns: the model behind an endpoint."""

    @property
    def encoder(self) -> "Encoder":
        """Features of prompts and pictures, for capture; loaded by the thread that first asks."""
        ...

    def warm_up(self) -> None:
        """Draw a first picture; raises what is wrong with the model."""
        ...

    def info(self, version: int | None = None) -> dict[str, Any]:
        """What `images_schema` must know of the champion, with model_version, dataset and run_id; or of a version.

        A version that is not loaded (any more) raises ApiError 404.
        """
        ...

    def versions(self) -> Sequence[int]:
        """The versions that requests may name, the champion first."""
        ...

    def check(self, job: Job) -> None:
        """Raise the ApiError that `submit` would raise now for the job without its picture; accepts nothing."""
        ...

    def submit(self, job: Job, receive: Receiver) -> None:
        """Accept a job or raise ApiError; takes the time of encoding its prompt. SwappingError: not just now."""
        ...

    def swapping(self) -> str:
        """Why new requests wait; empty while they do not."""
        ...

    def cancel(self, request_id: str) -> bool:
        """End a request; its last event is an ApiError. False when it has ended already."""
        ...

    def numbers(self) -> Mapping[str, Any]:
        """What it does and has done, by the keys that `serve_metrics` reads."""
        ...

    def problem(self) -> str:
        """Why nothing is drawn any more; empty while all is well."""
        ...

    def swap(self, arguments: Mapping[str, Any]) -> None:
        """Make the models of these arguments, a factory's, those that draw new requests; what is loaded stays.

        No request fails for it. Models that cannot be loaded raise, and what drew before goes on.
        """
        ...

    def close(self) -> None:
        """Finish what was accepted and end."""
        ...
