"""An engine whose steps a test makes itself, an inbox for its events, and a comparison with the sampler."""

import threading
from typing import Any

import numpy as np
from PIL import Image

from components.draw_requests import Cancelled, Done, DrawRequest, Event, Failed
from components.engine_status import EngineLimits
from components.models import Parts, make_tiny
from components.sampler import PictureRequest, draw
from components.step_batch import StepBatchEngine

LIMIT_S = 60.0
"""For a picture of a tiny model on a loaded machine; nothing here sleeps that long."""
SIDE = {"width_px": 16, "height_px": 16}
RED, BLUE = "a red circle", "a blue square"


def make(kind: str) -> Parts:
    return make_tiny("z_image") if kind == "z_image" else make_tiny("stable_diffusion", prediction=kind)


class Inbox:
    """Receives events in the engine's threads and waits for the last one of a request in the test's."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._arrived = threading.Condition()

    def __call__(self, event: Event) -> None:
        with self._arrived:
            self.events.append(event)
            self._arrived.notify_all()

    def end_of(self, request_id: str) -> Done | Failed | Cancelled:
        def found() -> list[Any]:
            return [e for e in self.of(request_id) if isinstance(e, Done | Failed | Cancelled)]

        with self._arrived:
            assert self._arrived.wait_for(found, LIMIT_S), f"{request_id} has no end, events: {self.events}"
            return found()[0]

    def of(self, request_id: str) -> list[Event]:
        return [event for event in self.events if event.request_id == request_id]

    def pictures(self, request_id: str) -> tuple[Image.Image, ...]:
        end = self.end_of(request_id)
        assert isinstance(end, Done), end
        return end.pictures


class Desk:
    """An engine without its loop thread: the test makes the steps."""

    def __init__(self, *models: Parts, **limits: Any) -> None:
        self.dropped: list[str] = []
        self.inbox = Inbox()
        self.engine = StepBatchEngine(EngineLimits(**limits), self.dropped.append)
        for number, model in enumerate(models):
            self.engine.load(f"v{number + 1}", model)

    def ask(self, request_id: str, *rows: PictureRequest, **options: Any) -> None:
        version = options.pop("version", None)
        self.engine.submit(DrawRequest(request_id, rows, **options), self.inbox, version)

    def finish(self) -> None:
        # Rows that wait for the decoder make no step, and are not finished.
        while self.engine.step() or self.engine._loop.busy:
            pass


def picture(prompt: str = RED, **options: Any) -> PictureRequest:
    return PictureRequest(prompt, **{"steps": 4, **SIDE, **options})


def difference(left: Image.Image, right: Image.Image) -> int:
    return int(np.abs(np.asarray(left).astype(int) - np.asarray(right).astype(int)).max())


def check_alike(found: tuple[Image.Image, ...], parts: Parts, *rows: PictureRequest) -> None:
    """Compare with each row drawn alone by the sampler: other batch sizes move fp32 latents by about 1e-6."""
    for own, row in zip(found, rows, strict=True):
        assert difference(own, draw(parts, [row])[0]) <= 1, row
    assert all(np.asarray(own).std() > 1 for own in found), "a flat picture would equal anything"
