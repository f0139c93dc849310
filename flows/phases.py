"""When a request waited, was denoised, decoded and encoded: read off the engine's events, for those who trace."""

import time

from cluster.painter_contract import Phase
from components.draw_requests import Done, Event, Progress


class Stopwatch:
    """Hears the events of one request, from whatever thread; the request must ask for progress."""

    def __init__(self) -> None:
        self._denoised: float | None = None
        self._ended: list[float] = []

    def hear(self, event: Event) -> None:
        now = time.monotonic()
        if isinstance(event, Progress):
            self._denoised = now
        elif isinstance(event, Done):
            started = now - event.drawn_s
            self._ended = [started - event.waited_s, started, self._denoised or now, now]

    def stop(self) -> tuple[Phase, ...]:
        """Return the phases of a request whose Done was heard and whose pictures are encoded now."""
        accepted, started, denoised, decoded = self._ended
        return (
            Phase("waiting", accepted, started),
            Phase("denoising", started, denoised),
            Phase("decoding", denoised, decoded),
            Phase("encoding", decoded, time.monotonic()),
        )
