"""Latents to pictures beside the denoising loop: one thread, batches of one shape, a failure stays with its row.

Final pictures come first; early ones are decoded when no final one waits, and dropped when too many wait. In strict
mode every row is decoded alone, so that its bits do not depend on its neighbours.

Shape letters: B rows, C channels, H, W height and width.
"""

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
MAX_WAITING_PARTIAL = 16

Deliver = Callable[[Image.Image | Exception], None]


@dataclass(frozen=True)
class DecodeJob:
    """One row's latents on their way to a picture; `deliver` is called once, from the stage's thread."""

    vae: Any
    latents_CHW: Tensor
    deliver: Deliver
    final: bool = True

    @property
    def shape(self) -> tuple[int, ...]:
        return (id(self.vae), *self.latents_CHW.shape)


class DecodeStage:
    """Owns the decoding thread; `put` never waits."""

    def __init__(self, strict: bool = False) -> None:
        self.max_rows = 1 if strict else MAX_BATCH_ROWS
        self.picture_s = 0.0
        """Seconds a picture, over the last batches."""
        self.decoding_s = 0.0
        """Seconds of all batches; this thread alone writes it."""
        self.num_dropped = 0
        """Early pictures that were not decoded because others waited."""
        self._final: deque[DecodeJob] = deque()
        self._partial: deque[DecodeJob] = deque()
        self._wake = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="decode", daemon=True)
        self._thread.start()

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
        while jobs := self._next():
            start = time.perf_counter()
            results = self._decode_each(jobs)
            # Pictures are on the host by now, so on a GPU the seconds hold its work too.
            seconds = time.perf_counter() - start
            self.decoding_s += seconds
            self.picture_s += 0.2 * (seconds / len(jobs) - self.picture_s)
            while jobs:
                # Nothing is held on to: a job kept while the next is awaited would keep weights that were let go.
                jobs.pop(0).deliver(results.pop(0))

    def _next(self) -> list[DecodeJob]:
        """Wait for work; returns jobs of one shape, the oldest first, or none at the end."""
        with self._wake:
            self._wake.wait_for(lambda: self._final or self._partial or self._closing)
            queue = self._final or self._partial
            chosen = [job for job in queue if job.shape == queue[0].shape][: self.max_rows]
            taken = {id(job) for job in chosen}
            rest = [job for job in queue if id(job) not in taken]
            queue.clear()
            queue.extend(rest)
            return chosen

    def _decode_each(self, jobs: list[DecodeJob]) -> list[Image.Image | Exception]:
        try:
            return _decode(jobs)
        except Exception as error:  # whatever a decoder raises concerns the row that makes it
            if len(jobs) == 1:
                return [error]
            return [result for job in jobs for result in self._decode_each([job])]


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
