"""Latents to pictures beside the denoising loop: one thread, batches of one shape, a failure stays with its row.

Final pictures come first; early ones are decoded when no final one waits, and dropped when too many wait. In strict
mode every row is decoded alone, so that its bits do not depend on its neighbours.

Shape letters: B rows, C channels, H, W height and width.
"""

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from components.errors import NonFiniteError
from components.models import decode_latents
from components.sampler import to_images

MAX_BATCH_ROWS = 8
MAX_BATCH_PIXELS = 8 * 512 * 512
"""Of one call of the decoder, whose memory grows with them; a larger picture is decoded alone."""
MAX_WAITING_PARTIAL = 16
MAX_WAITING_FINAL = 4 * MAX_BATCH_ROWS
"""From so many on no row starts: what is drawn faster than it can be decoded waits where admission sees it."""

logger = logging.getLogger(__name__)

Deliver = Callable[[Image.Image | Exception], None]


@dataclass(frozen=True)
class DecodeJob:
    """One row's latents on their way to a picture; `deliver` is called once, from the stage's thread."""

    vae: Any
    latents_CHW: Tensor
    deliver: Deliver
    final: bool = True
    wanted: Callable[[], bool] = lambda: True
    """Asked before decoding, from the stage's thread; a job that is not wanted is dropped."""
    pixels: int = 0
    """Of its picture."""

    @property
    def shape(self) -> tuple[int, ...]:
        return (id(self.vae), *self.latents_CHW.shape)


class DecodeStage:
    """Owns the decoding thread; `put` never waits."""

    def __init__(
        self,
        strict: bool = False,
        on_taken: Callable[[], None] = lambda: None,
        on_fault: Callable[[Exception], None] = lambda error: None,
    ) -> None:
        """`on_taken` is told when fewer jobs wait, `on_fault` what ended the thread; both from that thread."""
        self.max_rows = 1 if strict else MAX_BATCH_ROWS
        self.picture_s = 0.0
        """Seconds a picture, over the last batches."""
        self.decoding_s = 0.0
        """Seconds of all batches; this thread alone writes it."""
        self.num_dropped = 0
        """Early pictures that were not decoded because others waited."""
        self._on_taken, self._on_fault = on_taken, on_fault
        self._final: deque[DecodeJob] = deque()
        self._partial: deque[DecodeJob] = deque()
        self._num_in_hand = 0
        self._wake = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="decode", daemon=True)
        self._thread.start()

    @property
    def num_waiting(self) -> int:
        """Final pictures that are not decoded yet."""
        return len(self._final) + self._num_in_hand

    @property
    def full(self) -> bool:
        return self.num_waiting >= MAX_WAITING_FINAL

    def expected_s(self, num_rows: int = 0) -> float:
        """Seconds until so many more pictures would be decoded."""
        return self.picture_s * (self.num_waiting + num_rows)

    def put(self, job: DecodeJob) -> None:
        with self._wake:
            queue = self._final if job.final else self._partial
            queue.append(job)
            if len(self._partial) > MAX_WAITING_PARTIAL:
                self._partial.popleft()
                self.num_dropped += 1
            self._wake.notify()

    def close(self) -> None:
        """Decode what waits, then end the thread."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()

    def _run(self) -> None:
        try:
            while (jobs := self._next()) is not None:
                self._on_taken()
                if jobs:
                    self._decode_jobs(jobs)
        except Exception as error:  # a fault of the stage itself: nobody may wait for ever, and health must show it
            logger.exception("the decoding thread ended")
            self._on_fault(error)

    def _decode_jobs(self, jobs: list[DecodeJob]) -> None:
        start = time.perf_counter()
        results = self._decode_each(jobs)
        # Pictures are on the host by now, so on a GPU the seconds hold its work too.
        seconds = time.perf_counter() - start
        self.decoding_s += seconds
        picture_s = seconds / len(jobs)
        self.picture_s += 0.2 * (picture_s - self.picture_s) if self.picture_s else picture_s
        while jobs:
            # Nothing is held on to: a job kept while the next is awaited would keep weights that were let go.
            jobs.pop(0).deliver(results.pop(0))

    def _next(self) -> list[DecodeJob] | None:
        """Wait for work; returns jobs of one shape, the oldest first (none where all were dropped), None at the end."""
        with self._wake:
            self._num_in_hand = 0
            self._wake.wait_for(lambda: self._final or self._partial or self._closing)
            queue = self._final or self._partial
            if not queue:
                return None
            waiting = [job for job in queue if job.wanted()]
            chosen = _one_call([job for job in waiting if job.shape == waiting[0].shape][: self.max_rows])
            taken = {id(job) for job in chosen}
            self._num_in_hand = len(chosen) if queue is self._final else 0
            queue.clear()
            queue.extend(job for job in waiting if id(job) not in taken)
            return chosen

    def _decode_each(self, jobs: list[DecodeJob]) -> list[Image.Image | Exception]:
        try:
            return _decode(jobs)
        except Exception as error:  # whatever a decoder raises concerns the row that makes it
            if len(jobs) == 1:
                return [error]
            return [result for job in jobs for result in self._decode_each([job])]


def _one_call(jobs: list[DecodeJob]) -> list[DecodeJob]:
    """Return as many of the first jobs as one call has memory for, at least one."""
    pixels = itertools.accumulate(job.pixels for job in jobs)
    return [
        job
        for number, (job, sum_) in enumerate(zip(jobs, pixels, strict=True))
        if not number or sum_ <= MAX_BATCH_PIXELS
    ]


@torch.inference_mode()
def _decode(jobs: list[DecodeJob]) -> list[Image.Image | Exception]:
    vae = jobs[0].vae
    latents_BCHW = torch.stack([job.latents_CHW for job in jobs])
    pixels_BCHW = decode_latents(vae, latents_BCHW.to(vae.dtype))
    sound_latents = torch.isfinite(latents_BCHW).flatten(1).all(1).tolist()
    sound_pixels = torch.isfinite(pixels_BCHW).flatten(1).all(1).tolist()
    pictures = to_images(pixels_BCHW.float().nan_to_num())
    return [
        picture if latents and pixels else _not_finite("pixels" if latents else "latents")
        for picture, latents, pixels in zip(pictures, sound_latents, sound_pixels, strict=True)
    ]


def _not_finite(what: str) -> NonFiniteError:
    return NonFiniteError(
        f"expected finite {what}, found NaN or infinity in a picture; check the weights of the model"
        " (half-precision autoencoders are known to overflow) and the guidance scale"
    )
