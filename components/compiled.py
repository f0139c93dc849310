"""The denoiser compiled for the calls that a replica makes, beside the plain one for any other.

A compiled denoiser is quick for shapes it was compiled for and stands still for seconds at any other: so every shape
(number of rows, picture size, text length class) is compiled and called before the model serves, and a call of another
shape takes the plain denoiser. Both hold the same weights. What cannot be compiled is drawn with the plain denoiser: a
slower replica draws, one that refuses to start does not, and a new champion must not end an endpoint.

Shape letters: B rows, C channels, H, W latent height and width, L tokens, D width.
"""

import copy
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from components.models import Parts, TextStates, encode_text, family_named
from components.row_batch import TOKENS_PER_CLASS, text_length_classes
from components.sampler import PictureRequest, initial_latents

logger = logging.getLogger(__name__)

MAX_TEXT_CLASSES = 4
"""Text length classes that are compiled where captions keep their length: up to 128 tokens, about 90 words."""
LARGEST_ERROR = 0.1
"""Relative difference (L2) of compiled and plain predictions: bf16 makes about 0.01, wrong code far more than 0.1."""
HARMLESS = ("Dynamo detected a call to a `functools.lru_cache`", "Torchinductor does not support code generation")
"""Beginnings of warnings about what is as it should be: a cached look at a version, rotations that stay uncompiled."""
MAX_TOLD_CHARS = 300
"""Of a compiler's error: its message comes first, pages of advice after it."""
MANY = 1_000_000
"""PyTorch counts compiled shapes for each function, over all models of a process; beyond a limit (8, and 256 in all) it
goes on uncompiled and says so in a log alone. Here shapes are few by construction, and swaps without end."""

Backend = str | Callable[..., Any]
CallShape = tuple[tuple[int, ...], int]
"""Shape of latents_BCHW and text length class."""


@dataclass(frozen=True)
class CompiledDenoiser:
    """A denoiser that is quick for `shapes`; it shares its weights with the plain one."""

    denoiser: Any
    shapes: frozenset[CallShape]

    def fits(self, latents_BCHW: Tensor, text: TextStates) -> bool:
        """Whether a call has a shape that was compiled; reads no value of a tensor."""
        classes = set(text_length_classes(text))
        return len(classes) == 1 and (tuple(latents_BCHW.shape), *classes) in self.shapes


def with_compiled(
    parts: Parts, row_counts: Sequence[int], sizes_px: Sequence[tuple[int, int]], backend: Backend = "inductor"
) -> Parts:
    """Return the parts with a compiled denoiser for calls of so many rows and sizes (width_px, height_px).

    Compiles and calls every shape, which takes seconds to minutes for each. When something fails the parts come back as
    they are, and one warning says why.
    """
    start = time.perf_counter()
    for harmless in HARMLESS:
        warnings.filterwarnings("ignore", message=harmless)
    try:
        denoiser = _twin(parts.denoiser)
        torch._dynamo.config.accumulated_recompile_limit = MANY
        family_named(parts.family).compile_denoiser(denoiser, dynamic=False, backend=backend, recompile_limit=MANY)
        # Code holds for the number of threads it was compiled with, and each thread has a number of its own: a new one
        # has what those will have that draw.
        with ThreadPoolExecutor(1, thread_name_prefix="compile") as compiling:
            shapes = compiling.submit(_warm_up, parts, denoiser, row_counts, sizes_px).result()
    except Exception as error:  # compilers raise anything: whatever it is, the plain denoiser draws
        told = " ".join(line.strip() for line in str(error).splitlines() if line.strip())[:MAX_TOLD_CHARS]
        logger.warning(
            "the denoiser is not compiled: expected code for calls of %s rows, found %s: %s; pictures are drawn"
            " without it, more slowly. On a CPU a C++ compiler (g++) must be installed; serve.compile=false turns"
            " this off",
            list(row_counts),
            type(error).__name__,
            told,
        )
        return parts
    logger.info("compiled the denoiser for %d shapes of calls in %.0f s", len(shapes), time.perf_counter() - start)
    return parts.with_modules(compiled=CompiledDenoiser(denoiser, shapes))


def _twin(denoiser: Any) -> Any:
    """Return modules of their own around the same tensors: what is compiled must not change the plain denoiser."""
    shared = {id(tensor): tensor for tensor in chain(denoiser.parameters(), denoiser.buffers())}
    return copy.deepcopy(denoiser, shared)


@torch.inference_mode()  # as in the engine's steps: code that was compiled without it is not taken there
def _warm_up(
    parts: Parts, denoiser: Any, row_counts: Sequence[int], sizes_px: Sequence[tuple[int, int]]
) -> frozenset[CallShape]:
    shapes: set[CallShape] = set()
    call = family_named(parts.family).call_denoiser
    dtype, device = parts.denoiser.dtype, next(parts.denoiser.parameters()).device
    for width_px, height_px in sizes_px:
        one = initial_latents(parts, [PictureRequest("", width_px=width_px, height_px=height_px)])
        for text in _texts(parts):
            for num_rows in sorted(row_counts):
                latents_BCHW = one.to(device, dtype).repeat(num_rows, 1, 1, 1)
                timestep_B = torch.full((num_rows,), 500.0, device=device)
                texts = text.rows([0] * num_rows)
                found_BCHW = call(denoiser, latents_BCHW, timestep_B, texts)
                _check(found_BCHW, call(parts.denoiser, latents_BCHW, timestep_B, texts))
                shapes.add((tuple(latents_BCHW.shape), text_length_classes(text)[0]))
    return frozenset(shapes)


def _texts(parts: Parts) -> Iterator[TextStates]:
    """Yield one row of text for each length class that is compiled."""
    text = encode_text(parts, [""]).counted()
    longest = text.mask_BL.shape[1]
    if text.num_tokens is None or text.num_tokens[0] == longest:  # captions are padded, and the padding is read
        yield text
        return
    for length in range(1, min(MAX_TEXT_CLASSES, -(-longest // TOKENS_PER_CLASS)) + 1):
        yield replace(text, num_tokens=(min(longest, TOKENS_PER_CLASS * length),))


def _check(found_BCHW: Tensor, plain_BCHW: Tensor) -> None:
    """Raise where compiled code computes something else; waits for the device."""
    plain = plain_BCHW.float()
    error = float((found_BCHW.float() - plain).norm() / plain.norm())
    if torch.isfinite(plain).all() and not error <= LARGEST_ERROR:
        raise ArithmeticError(f"compiled predictions differ by {error:.3f} of their size, at most {LARGEST_ERROR}")
