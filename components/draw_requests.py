"""What is asked of the engine and what it answers: requests of rows, and the events of each.

Every request that was accepted ends with exactly one of Done, Failed and Cancelled, and nothing follows it. Events come
from the engine's threads; a receiver returns at once (put it on a queue, or `loop.call_soon_threadsafe`).

Shape letters: C channels, H, W latent height and width.
"""

from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image
from torch import Tensor

from components.errors import InputError
from components.sampler import PictureRequest


@dataclass(frozen=True)
class StartPicture:
    """A picture to start from: image to image, and repair of a part where there is a mask."""

    latents_1CHW: Tensor
    """As the denoiser sees them (`models.encode_images`)."""
    strength: float = 0.8
    """Share of the steps that is drawn, in (0, 1]: how far the result may move away."""
    mask_11HW: Tensor | None = None
    """1 where the picture is drawn anew, 0 where it is kept; None draws all of it."""

    def first_step(self, steps: int) -> int:
        """Return the step at which the row starts, counted as diffusers does; at least one is left."""
        return steps - max(1, min(int(steps * self.strength), steps))


@dataclass(frozen=True)
class DrawRequest:
    """Rows that are answered together; each has its own prompt, seed, steps, guidance and size."""

    request_id: str
    rows: tuple[PictureRequest, ...]
    solver: str | None = None
    """ddim, euler or dpm++2m, as the model's prediction allows; None takes the family's own."""
    start: StartPicture | None = None
    """All rows start from it; their sizes must be its size."""
    key: str = ""
    """Whose request it is: keys share queue and steps fairly, whatever they send; the empty key may fill the queue."""
    priority: float = 1.0
    """Its key's share of the engine against other keys; 2 gets twice the steps of 1."""
    deadline_s: float | None = None
    """Seconds within which the pictures must be ready; refused early when the measured speed says no."""
    waited_s: float = 0.0
    """Of those, the seconds that had passed when it got here (a swap of models, a long body)."""
    partial_images: int = 0
    """How many early pictures to decode on the way, evenly spaced; fewer come when the decoder is busy."""
    background: bool = False
    """Nobody waits for it: not counted in the backlog, which others are told and replicas are added for."""
    progress: bool = False
    """Send a Progress event for every row and step."""

    def check(self) -> None:
        """Raise InputError for what can never be drawn."""
        if not self.rows:
            raise InputError("rows expected at least one picture, found none")
        for row in self.rows:
            if row.steps < 1:
                raise InputError(f"steps expected at least 1, found {row.steps}")
        if not self.priority > 0:
            raise InputError(f"priority expected a positive number, found {self.priority}")
        if self.start is not None and not 0 < self.start.strength <= 1:
            raise InputError(f"strength expected above 0 and at most 1, found {self.start.strength}")


@dataclass(frozen=True)
class Progress:
    request_id: str
    row: int
    step: int
    """Steps done, from 1."""
    steps: int


@dataclass(frozen=True)
class PartialPicture:
    """What the final picture looks like from here: the decoded clean estimate."""

    request_id: str
    row: int
    index: int
    """Counts a row's partial pictures from 0."""
    picture: Image.Image
    version: str
    """Name of the weights that draw it."""


@dataclass(frozen=True)
class Done:
    request_id: str
    pictures: tuple[Image.Image, ...]
    version: str
    """Name of the weights that drew all of them."""
    waited_s: float
    """From the request to its first row's start."""
    drawn_s: float
    """From there to the last picture."""


@dataclass(frozen=True)
class Failed:
    request_id: str
    error: Exception


@dataclass(frozen=True)
class Cancelled:
    request_id: str
    steps_saved: int
    """Steps of its rows that were not made."""


Event = Progress | PartialPicture | Done | Failed | Cancelled
Receiver = Callable[[Event], None]


def partial_steps(num_partial: int, first_step: int, steps: int) -> tuple[int, ...]:
    """Return after how many steps the early pictures are decoded, evenly spaced, none of them the last."""
    left = steps - first_step
    spaced = (first_step + round(left * (index + 1) / (num_partial + 1)) for index in range(num_partial))
    return tuple(sorted({step for step in spaced if first_step < step < steps}))
