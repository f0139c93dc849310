"""Does a second model fit in memory beside the one that serves? Sizes of weights, and a plan made of them.

What a model takes is known before it is loaded: its safetensors files say how many numbers of which type they hold, and
each becomes a number of the precision it is loaded in. Pure arithmetic besides reading the files' headers; how much
memory is free is for others to say.
"""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from components.errors import InputError
from components.models import Parts, family_of

ALLOWANCE = 0.2
"""Share added to the weights: buffers, text states, step tables and a first picture (a guess; nothing was measured)."""
BYTES_OF = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
"""Bytes of a number, by safetensors' name of its type; all others have one."""
HEADER_LIMIT_BYTES = 100_000_000
"""Of safetensors itself."""

Plan = Literal["beside", "drain", "refuse"]


def num_values(directory: Path | str) -> dict[str, int]:
    """Return how many numbers the weights of a diffusers directory hold, for denoiser, text_encoder and vae.

    Counted are the files that are loaded: variants such as `*.fp16.safetensors` are copies of them. InputError for
    files that are damaged.
    """
    directory = Path(directory)
    folders = {"denoiser": family_of(directory).DENOISER_FOLDER, "text_encoder": "text_encoder", "vae": "vae"}
    return {part: sum(map(_values_of, _weights_in(directory / folder))) for part, folder in folders.items()}


def needed_bytes(num_values: Mapping[str, int], value_bytes: Mapping[str, int]) -> int:
    """Return the memory a model takes when each number of a part is loaded in so many bytes; same keys in both."""
    return round(sum(count * value_bytes[part] for part, count in num_values.items()) * (1 + ALLOWANCE))


def held_bytes(parts: Parts) -> int:
    """Return the memory that letting go of a model's weights would free."""
    modules = [module for module in (parts.denoiser, parts.text_encoder, parts.vae) if module is not None]
    return sum(tensor.nbytes for module in modules for tensor in module.parameters())


def plan_swap(needed_bytes: int, free_bytes: int, held_bytes: int, headroom_bytes: int) -> Plan:
    """Say how a model comes in: `beside` what is loaded, after that was let go (`drain`), or not at all (`refuse`).

    `held_bytes` is what letting go would free. The headroom is wanted beside both models; it never refuses a model that
    fits alone.
    """
    if needed_bytes + headroom_bytes <= free_bytes:
        return "beside"
    return "drain" if needed_bytes <= free_bytes + held_bytes else "refuse"


def _weights_in(folder: Path) -> list[Path]:
    files = sorted(folder.glob("*.safetensors"))
    return [path for path in files if "." not in path.name.removesuffix(".safetensors")]


def _values_of(path: Path) -> int:
    with path.open("rb") as file:
        try:
            length = struct.unpack("<Q", file.read(8))[0]
            if length > HEADER_LIMIT_BYTES:
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(file.read(length))
            entries = [entry for name, entry in header.items() if name != "__metadata__"]
            return sum(_values_in(entry) for entry in entries)
        except (struct.error, ValueError, KeyError, AttributeError, TypeError) as error:
            raise InputError(
                f"safetensors expected in {str(path)!r}, found {type(error).__name__}: {error}; copy the file again"
            ) from error


def _values_in(entry: Mapping[str, list[int]]) -> int:
    start, end = entry["data_offsets"]
    return (end - start) // BYTES_OF.get(str(entry["dtype"]), 1)
