"""What a client may ask of the images routes, and the check of it: every limit comes from the config and is named.

Specification followed: CreateImageRequest, CreateImageEditRequest and ImagesResponse of OpenAI's published schema; null
means the default. Fields beyond it (seed, steps, guidance_scale, negative_prompt, scheduler, deadline_s, priority,
postprocess, strength) come through the client's `extra_body`. An unknown field is refused, as OpenAI does.
What the model can do (size, schedulers, retouching) comes with its `info`.
"""

import json
import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from cluster.api_errors import ApiError
from cluster.placement import ServeSection

LARGEST_SEED = 2**53 - 1
"""The largest whole number that every JSON reader keeps exactly."""
RANDOM_SEEDS = 2**32
MOST_PRIORITY = 9
USUAL_PRIORITY = 5
LEAST_STRENGTH = 0.01
"""Below, not a single step would be drawn."""
WITHOUT_EFFECT = "accepted, without effect"
NOT_TEXT = frozenset(
    {"n", "output_compression", "stream", "partial_images", "seed", "steps", "guidance_scale", "deadline_s", "priority"}
    | {"strength"}
)
"""Form fields whose text is read as JSON."""


def _whole(value: Any) -> Any:
    """Read 2.0 as 2: JSON has one kind of number, and JSON Schema calls it an integer."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, Field(strict=True), BeforeValidator(_whole)] | None
Real = Annotated[float, Field(strict=True, allow_inf_nan=False)] | None
Flag = Annotated[bool, Field(strict=True)] | None
Output = Literal["png", "jpeg", "webp"]


class ImageOptions(BaseModel):
    """The fields that both routes take."""

    model_config = ConfigDict(extra="forbid")

    prompt: str = Field(description="what to draw")
    model: str | None = Field(None, description="as /v1/models names it")
    n: Whole = Field(None, description="number of pictures")
    size: str | None = Field(None, description="WIDTHxHEIGHT in pixels, or auto")
    response_format: Literal["b64_json", "url"] | None = Field(None, description="b64_json, or a url that expires")
    output_format: Output | None = Field(None, description="png keeps every pixel")
    output_compression: Whole = Field(None, description="quality of jpeg and webp, 0 to 100 (the default)")
    stream: Flag = Field(None, description="answer with server-sent events as pictures take shape")
    partial_images: Whole = Field(None, description="unfinished pictures to send while streaming")
    user: str | None = Field(None, description=WITHOUT_EFFECT)
    seed: Whole = Field(None, description="picture i is drawn from seed + i")
    steps: Whole = Field(None, description="denoising steps")
    guidance_scale: Real = Field(None, description="how strongly the prompt is followed; up to 1 turns guidance off")
    negative_prompt: str | None = Field(None, description="what not to draw")
    scheduler: str | None = Field(None, description="solver of the denoising equation, by name")
    deadline_s: Real = Field(None, description="seconds from now after which the pictures are of no use")
    priority: Whole = Field(None, description="0 to 9, higher first; a key has an upper limit")
    postprocess: list[str] | str | None = Field(None, description="retouching steps by name, applied in order")
    background: Literal["auto", "opaque"] | None = Field(None, description=WITHOUT_EFFECT)
    quality: str | None = Field(None, description=WITHOUT_EFFECT)
    complexity: str | None = Field(None, description=WITHOUT_EFFECT)
    safety_identifier: str | None = Field(None, description=WITHOUT_EFFECT)


class ImagesRequest(ImageOptions):
    """Body of POST /v1/images/generations."""

    style: str | None = Field(None, description=WITHOUT_EFFECT)
    moderation: str | None = Field(None, description=WITHOUT_EFFECT)


class EditsRequest(ImageOptions):
    """Form fields of POST /v1/images/edits beside its files `image` and `mask`; forms hold text, read as JSON is."""

    strength: Real = Field(None, description="0.01 to 1: how much of the picture is redrawn; 1 keeps nothing")
    input_fidelity: str | None = Field(None, description=WITHOUT_EFFECT)

    @model_validator(mode="before")
    @classmethod
    def _read_texts(cls, fields: Any) -> Any:
        return {key: _from_text(key, value) for key, value in fields.items()} if isinstance(fields, dict) else fields


class Picture(BaseModel):
    b64_json: str | None = None
    url: str | None = None
    revised_prompt: str | None = None
    seed: int


class ImagesResponse(BaseModel):
    """The answer of both routes; the last five fields are beyond OpenAI's."""

    created: int
    data: list[Picture]
    output_format: Output
    size: str
    seed: int
    seeds: list[int]
    model_version: int | None = None
    dataset: str | None = None
    run_id: str | None = None


@dataclass(frozen=True)
class Order:
    """A checked request: what to draw, row by row, when, and how to hand it over."""

    rows: list[dict[str, Any]]
    """prompt, negative_prompt, steps, guidance_scale, width_px, height_px, seed."""
    scheduler: str | None
    """None: the model's own."""
    priority: int
    deadline_s: float | None
    strength: float
    """How much of an edited picture is redrawn, above 0 and up to 1."""
    postprocess: tuple[str, ...]
    output_format: Output
    quality: int
    """Of jpeg and webp, 0 to 100."""
    as_url: bool
    stream: bool
    partial_images: int

    @property
    def weight(self) -> float:
        """Share of the engine against other requests: 1 at the usual priority, each step up doubles it."""
        return 2.0 ** (self.priority - USUAL_PRIORITY)

    @property
    def size(self) -> str:
        return f"{self.rows[0]['width_px']}x{self.rows[0]['height_px']}"


def make_order(
    body: ImageOptions,
    limits: ServeSection,
    info: Mapping[str, Any],
    key_priority: int | None = None,
    own_size: tuple[int, int] | None = None,
) -> Order:
    """Check a request against every limit; ApiError names the field, what was expected and what was found.

    `key_priority` is the most that the caller's key allows, and what is usual for it; None without keys. `own_size`
    (width_px, height_px) is that of the picture to edit.
    """
    output = body.output_format or "png"
    quality = _within("output_compression", body.output_compression, 0, 100, default=100)
    if output == "png" and quality < 100:
        message = f"output_compression expected 100 for png, which keeps every pixel, found {quality}; ask for jpeg"
        raise ApiError(f"{message} or webp", "output_compression", "invalid_value")
    if body.stream and body.response_format == "url":
        message = "response_format expected b64_json with stream=true, found 'url': events carry pictures"
        raise ApiError(message, "response_format", "unsupported_value")
    most = limits.max_partial_images
    partial_images = _within("partial_images", body.partial_images, 0, most, 0, "serve.max_partial_images")
    rows = make_rows(body, limits, info, own_size)
    postprocess = _postprocess(body.postprocess, info.get("postprocess", ()))
    _check_output(postprocess, rows[0], limits, info.get("enlarges", {}))
    return Order(
        rows=rows,
        scheduler=_chosen("scheduler", body.scheduler, info.get("schedulers", ())),
        priority=_priority(body.priority, key_priority),
        deadline_s=_within("deadline_s", body.deadline_s, 0.001, limits.max_deadline_s, None, "serve.max_deadline_s"),
        strength=_within(
            "strength", getattr(body, "strength", None), LEAST_STRENGTH, 1, default=limits.default_strength
        ),
        postprocess=postprocess,
        output_format=output,
        quality=quality,
        as_url=body.response_format == "url",
        stream=bool(body.stream),
        partial_images=partial_images,
    )


def _priority(asked: int | None, key_priority: int | None) -> int:
    most, usual = (MOST_PRIORITY, USUAL_PRIORITY) if key_priority is None else (key_priority, key_priority)
    priority: int = _within("priority", asked, 0, most, usual)
    return priority


def make_rows(
    body: ImageOptions, limits: ServeSection, info: Mapping[str, Any], own_size: tuple[int, int] | None = None
) -> list[dict[str, Any]]:
    """Turn a request into one row a picture, every limit checked; ApiError names the field and the limit."""
    _check_text("prompt", body.prompt, 1, limits.max_prompt_chars)
    _check_text("negative_prompt", body.negative_prompt or "", 0, limits.max_prompt_chars)
    num_images = _within("n", body.n, 1, limits.max_images, 1, "serve.max_images")
    seed = _within("seed", body.seed, 0, LARGEST_SEED, default=secrets.randbelow(RANDOM_SEEDS))
    steps = _within("steps", body.steps, 1, limits.max_steps, limits.default_steps, "serve.max_steps")
    most = limits.max_guidance_scale
    usual = limits.default_guidance_scale
    scale = _within("guidance_scale", body.guidance_scale, 0, most, usual, "serve.max_guidance_scale")
    width_px, height_px = _size(body.size, limits, info, own_size)
    shared = {"prompt": body.prompt, "negative_prompt": body.negative_prompt or "", "steps": steps}
    shape = {"guidance_scale": scale, "width_px": width_px, "height_px": height_px}
    return [{**shared, **shape, "seed": seed + index} for index in range(num_images)]


def _from_text(key: str, value: Any) -> Any:
    """Read a form's text as the JSON value the field has elsewhere; what cannot be read is left for the check."""
    if key not in NOT_TEXT or not isinstance(value, str):
        return value
    try:
        return json.loads(value.lower())
    except (ValueError, RecursionError):
        return value


def _check_text(param: str, text: str, least: int, most: int) -> None:
    if not least <= len(text) <= most:
        message = f"{param} expected {least} to {most} characters (serve.max_prompt_chars), found {len(text)}"
        raise ApiError(message, param, "string_above_max_length" if len(text) > most else "empty_string")
    if "\x00" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ApiError(f"{param} expected Unicode text, found a NUL or half a surrogate pair", param, "invalid_value")


def _within(param: str, value: Any, least: float, most: float, default: Any, key: str = "") -> Any:
    if value is None:
        return default
    if not least <= value <= most:
        limit = f" (the limit is {key})" if key else ""
        raise ApiError(f"{param} expected {least} to {_plain(most)}, found {value}{limit}", param, "invalid_value")
    return value


def _plain(number: float) -> str:
    return str(int(number)) if number == int(number) else str(number)


def _chosen(param: str, name: str | None, offered: Any) -> str | None:
    if name is not None and name not in offered:
        named = ", ".join(offered) or "nothing: this endpoint has one choice"
        raise ApiError(f"{param} expected one of: {named}; found {name[:80]!r}", param, "invalid_value")
    return name


def _postprocess(names: list[str] | str | None, offered: Any) -> tuple[str, ...]:
    asked = [names] if isinstance(names, str) else names or []
    if len(asked) > len(set(asked)):
        raise ApiError("postprocess expected each step once, found one repeated", "postprocess", "invalid_value")
    for name in asked:
        _chosen("postprocess", name, offered)
    return tuple(asked)


def _check_output(
    names: tuple[str, ...], row: Mapping[str, Any], limits: ServeSection, enlarges: Mapping[str, int]
) -> None:
    factor = math.prod(enlarges.get(name, 1) for name in names)
    side_px = factor * max(row["width_px"], row["height_px"])
    if factor > 1 and side_px > limits.max_output_side_px:
        message = (
            f"postprocess expected pictures of up to {limits.max_output_side_px} px a side"
            f" (serve.max_output_side_px), found {side_px}: {factor} times {row['width_px']}x{row['height_px']}"
        )
        raise ApiError(message, "postprocess", "invalid_value")


def _size(
    size: str | None, limits: ServeSection, info: Mapping[str, Any], own_size: tuple[int, int] | None
) -> tuple[int, int]:
    """Read a size; auto is that of the picture to edit where the model can draw it, else the model's own."""
    multiple, least = info["size_multiple_px"], info["min_side_px"]

    def can_draw(sides: tuple[int, ...]) -> bool:
        return all(least <= side <= limits.max_side_px and side % multiple == 0 for side in sides)

    if size in (None, "auto"):
        return own_size if own_size and can_draw(own_size) else (info["width_px"], info["height_px"])
    texts = str(size).split("x")
    if len(texts) == 2 and all(text.isascii() and text.isdigit() and len(text) < 6 for text in texts):
        width_px, height_px = int(texts[0]), int(texts[1])
        if can_draw((width_px, height_px)):
            return width_px, height_px
    message = (
        f"size expected to be auto or WIDTHxHEIGHT, both multiples of {multiple} from {least} to {limits.max_side_px}"
        f" (serve.max_side_px), found {str(size)[:80]!r}; the model's own size is"
        f" {info['width_px']}x{info['height_px']}"
    )
    raise ApiError(message, "size", "invalid_value")
