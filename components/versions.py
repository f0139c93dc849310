"""One set of weights behind the engine: its denoiser, its text states of repeated prompts, its step tables, its rows.

A row belongs to the version that made it from the first noise to the decoded picture. Everything here that may be asked
from several threads holds a lock of its own.

Shape letters: B rows, L tokens, D width, C channels, H, W latent height and width, S steps, K columns.
"""

import threading
import time
from collections import OrderedDict
from dataclasses import dataclass, field

import torch
from torch import Tensor

from components.draw_requests import DrawRequest, StartPicture
from components.errors import InputError
from components.models import Parts, TextStates, encode_text, family_named, latent_factor, size_multiple_px
from components.row_batch import Repair, RowBatch
from components.sampler import PictureRequest, initial_latents
from components.solvers import StepTable

MAX_TEXT_BYTES = 512 * 1024 * 1024
MAX_TABLES = 256
"""Step tables kept; each is a few kilobytes."""


@dataclass
class TextCounts:
    """What text caches did, all that share it: an engine's counts outlive its versions."""

    hits: int = 0
    misses: int = 0
    encoding_s: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, hits: int = 0, misses: int = 0, encoding_s: float = 0.0) -> None:
        """Add, from any thread."""
        with self._lock:
            self.hits += hits
            self.misses += misses
            self.encoding_s += encoding_s


class TextCache:
    """Text states of the last prompts, one row each: so many prompts and so many bytes of them."""

    def __init__(
        self, parts: Parts, max_prompts: int, counts: TextCounts | None = None, max_bytes: int = MAX_TEXT_BYTES
    ) -> None:
        self.parts, self.max_prompts, self.max_bytes = parts, max_prompts, max_bytes
        self.num_bytes = 0
        self.counts = counts or TextCounts()
        self._states: OrderedDict[str, TextStates] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._states)

    def states(self, prompt: str) -> TextStates:
        """Return a prompt's states; always encoded alone, so they do not depend on other prompts."""
        with self._lock:
            found = self._states.get(prompt)
            if found is not None:
                self._states.move_to_end(prompt)
        if found is not None:
            self.counts.add(hits=1)
            return found
        start = time.perf_counter()
        # Counting tokens reads the mask on the host, so on a GPU the seconds hold its work too.
        states = encode_text(self.parts, [prompt]).counted()
        self.counts.add(misses=1, encoding_s=time.perf_counter() - start)
        with self._lock:
            before = self._states.pop(prompt, None)
            self._states[prompt] = states
            self.num_bytes += _num_bytes(states) - (_num_bytes(before) if before is not None else 0)
            while len(self._states) > self.max_prompts or self.num_bytes > self.max_bytes:
                self.num_bytes -= _num_bytes(self._states.popitem(last=False)[1])
        return states


def _num_bytes(states: TextStates) -> int:
    return states.states_BLD.nbytes + states.mask_BL.nbytes


class Version:
    """One model in memory under a name."""

    def __init__(
        self,
        name: str,
        parts: Parts,
        max_prompts: int,
        counts: TextCounts | None = None,
        max_text_bytes: int = MAX_TEXT_BYTES,
    ) -> None:
        """`counts` are those of the engine's text caches together."""
        self.name, self.parts = name, parts
        self.family = family_named(parts.family)
        self.text = TextCache(parts, max_prompts, counts, max_text_bytes)
        self.num_requests = 0
        """Requests that wait, draw or decode with these weights; the engine counts under its lock."""
        self.retired = False
        """No request starts on it any more."""
        self._tables: dict[tuple[object, ...], StepTable] = {}
        self._lock = threading.Lock()

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.parts.denoiser.parameters()).device
        return device

    def predict(self, latents_BCHW: Tensor, timestep_B: Tensor, text: TextStates) -> Tensor:
        """Call the denoiser with latents in its own precision, compiled where this shape of call was compiled."""
        parts, latents_BCHW = self.parts, latents_BCHW.to(self.parts.denoiser.dtype)
        fits = parts.compiled is not None and parts.compiled.fits(latents_BCHW, text)
        denoiser = parts.compiled.denoiser if fits else parts.denoiser
        prediction_BCHW: Tensor = self.family.call_denoiser(denoiser, latents_BCHW, timestep_B, text)
        return prediction_BCHW

    def table(self, steps: int, latent_cells: int, solver: str | None, start: int) -> StepTable:
        """Return a step table; each is made once."""
        name = (steps, latent_cells, solver, start)
        with self._lock:
            if name not in self._tables:
                while len(self._tables) >= MAX_TABLES:
                    self._tables.pop(next(iter(self._tables)))
                self._tables[name] = self.family.step_table(self.parts, steps, latent_cells, solver, start)
            return self._tables[name]

    @torch.inference_mode()
    def prepare(self, request: DrawRequest) -> list[RowBatch]:
        """Make each row's state before its first step: its own noise, texts and table, on the model's device.

        InputError for a size that this model does not draw: another may have been asked.
        """
        multiple_px = size_multiple_px(self.parts)
        for row in request.rows:
            if row.width_px % multiple_px or row.height_px % multiple_px:
                raise InputError(
                    f"size expected multiples of {multiple_px} px, as the model that serves now draws, found"
                    f" {row.width_px}x{row.height_px}; ask for one of those"
                )
        return [self._prepare_row(row, request.solver, request.start) for row in request.rows]

    def _prepare_row(self, row: PictureRequest, solver: str | None, start: StartPicture | None) -> RowBatch:
        noise_1CHW = initial_latents(self.parts, [row])
        first = start.first_step(row.steps) if start is not None else 0
        table = self.table(row.steps, noise_1CHW.shape[-1] * noise_1CHW.shape[-2], solver, first)
        latents_1CHW, repair = table.noise_scale * noise_1CHW, None
        if start is not None:
            self._check_start(start, noise_1CHW)
            picture_1CHW = start.latents_1CHW.float()
            # All steps and a mask: nothing of the picture shows through, as in diffusers' inpainting.
            if first > 0 or start.mask_11HW is None:
                latents_1CHW = table.start_signal * picture_1CHW + table.start_spread * noise_1CHW
            if start.mask_11HW is not None:
                repair = Repair(*(t.to(self.device) for t in (start.mask_11HW.float(), picture_1CHW, noise_1CHW)))
        return RowBatch(
            latents_BCHW=latents_1CHW.to(self.device),
            clean_BCHW=torch.zeros_like(latents_1CHW, device=self.device),
            columns_BSK=table.columns_SK.unsqueeze(0).to(self.device),
            step_B=torch.zeros(1, dtype=torch.int64, device=self.device),
            scale_B111=torch.full((1, 1, 1, 1), row.guidance_scale, dtype=torch.float32, device=self.device),
            text=self.text.states(row.prompt),
            negative=self.text.states(row.negative_prompt),
            guided=(self.family.uses_guidance(row.guidance_scale),),
            repair=repair,
        )

    def _check_start(self, start: StartPicture, noise_1CHW: Tensor) -> None:
        mask = start.mask_11HW
        same_mask = mask is None or mask.shape == noise_1CHW[:, :1].shape
        if start.latents_1CHW.shape == noise_1CHW.shape and same_mask:
            return
        factor = latent_factor(self.parts)
        raise InputError(
            f"start expected latents {tuple(noise_1CHW.shape)} and a mask of one channel beside them (a latent cell is"
            f" {factor} px wide), found {tuple(start.latents_1CHW.shape)} and {mask is not None and tuple(mask.shape)};"
            " give rows the size of the picture they start from"
        )
