"""How much the engine takes on, what it has done, and how it stands: plain values for a server to read and show."""

from collections.abc import Sequence
from dataclasses import dataclass

from components.draw_requests import Cancelled, Done, Failed
from components.errors import InputError


@dataclass(frozen=True)
class EngineLimits:
    """How much the engine takes on."""

    max_batch_rows: int = 64
    """Denoiser rows of one step; a guided picture needs two. On a CPU core 64 make 11 % more rows a second than 32."""
    max_live_pixels: int = 64 * 1024 * 1024
    """Pixels of all pictures at work, of any size: what bounds the memory of steps, but not of what waits."""
    max_waiting_rows: int = 256
    """Pictures that may wait before requests are refused."""
    max_cached_prompts: int = 1024
    """Prompts whose text states are kept, for each version."""
    max_cached_text_bytes: int = 512 * 1024 * 1024
    """Of those states, for each version; the prompts used last are kept."""
    strict: bool = False
    """Every call has `max_batch_rows` rows: bit-identical pictures, at the price of a full call for every step.

    Tested in fp32 on CPUs. On GPUs and in bf16 no picture is promised to be the same in any company.
    """
    row_buckets: Sequence[int] = ()
    """Numbers of rows a denoiser call may have, ascending; spare rows fill it up to the next. Empty: any number."""
    calls_at_once: int = 0
    """Parts that a call of many rows is cut into, made side by side; 0: as `threads.calls_at_once` says."""

    def check(self) -> None:
        """Raise InputError for limits that no engine can keep."""
        if self.max_batch_rows < 2:
            raise InputError(f"max_batch_rows expected at least 2, found {self.max_batch_rows}: guidance needs two")
        sizes = self.row_buckets
        in_order = all(1 <= size <= self.max_batch_rows for size in sizes) and sorted(set(sizes)) == list(sizes)
        if not in_order or (sizes and self.strict):
            raise InputError(
                f"row_buckets expected different numbers from 1 to max_batch_rows ({self.max_batch_rows}), the smallest"
                f" first, and none in strict mode (which has one size), found {sizes}, strict {self.strict}"
            )

    @property
    def buckets(self) -> tuple[int, ...]:
        """Sizes of denoiser calls; strict mode is the case of a single one."""
        return (self.max_batch_rows,) if self.strict else tuple(self.row_buckets)


@dataclass
class EngineCounters:
    """What has happened since the start."""

    steps: int = 0
    row_steps: int = 0
    call_rows: int = 0
    """Rows of all denoiser calls, without the spare ones that fill a bucket."""
    stepping_s: float = 0.0
    done: int = 0
    failed: int = 0
    cancelled: int = 0
    refused: int = 0
    steps_saved: int = 0
    """Steps of cancelled and failed requests that were not made."""

    def ended(self, event: Done | Failed | Cancelled, steps_left: int) -> None:
        self.done += isinstance(event, Done)
        self.failed += isinstance(event, Failed)
        self.cancelled += isinstance(event, Cancelled)
        self.steps_saved += steps_left


@dataclass(frozen=True)
class EngineStatus:
    """The engine at one moment."""

    live_rows: int
    waiting_rows: int
    backlog_pixel_steps: int
    """Pixels times denoiser evaluations that are still to be made, waiting rows included."""
    backlog_s: float | None
    """Seconds of that at the measured speed and of what waits to be decoded; None before anything was measured."""
    rate: float | None
    """Measured pixel-steps a second."""
    versions: dict[str, int]
    """Requests of each loaded version."""
    text_hits: int
    text_misses: int
    encoding_s: float
    """Seconds in which prompts were encoded since the start, of all threads together."""
    decoding_s: float
    """Seconds in which latents became pictures since the start."""
    decode_s: float
    """Seconds to decode a picture, over the last ones."""
    compiled_shapes: int
    """Shapes of denoiser calls for which the newest version has compiled code."""
