"""The multipart body of an edit, read with limits: fields as the schema has them, picture and mask as pixels.

A picture is judged by its header before it is decoded, so a small file that holds an enormous picture costs nothing.
The mask follows OpenAI: where it is transparent, the picture is drawn anew; a mask without transparency says so in
white. Without a mask, the picture's own transparent pixels are meant; without those, the whole picture is redrawn.
"""

import asyncio
import io
import logging
import struct
import threading
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageOps
from pydantic import ValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request

from cluster.api_errors import STATUS_CODES, ApiError, invalid_value, later
from cluster.images_schema import NOT_TEXT, EditsRequest
from cluster.placement import ServeSection

FORMATS = ("PNG", "JPEG", "WEBP")
MOST_FIELDS = 64
MOST_SCANS = 100
"""Of a progressive JPEG; usual ones have 10. Each is decoded at full size, and 20 MB can hold tens of thousands."""
BUSY_RETRY_S = 1
THREADS = ThreadPoolExecutor(4, thread_name_prefix="decode-upload")
SLOTS = threading.BoundedSemaphore(32)
"""Uploads that wait for a thread or have one: each holds its file, and one in a thread its pixels too."""
START_OF_SCAN = b"\xff\xda"
FILES = ("image", "mask")
LISTS = ("postprocess",)
"""Fields that a form may repeat, as OpenAPI has it; clients write `name[]` too."""
FORM = "multipart/form-data"
EIGHT_BIT = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
DECODER_ERRORS = (
    *(OSError, EOFError, SyntaxError, ValueError, LookupError, TypeError, AttributeError),
    *(RuntimeError, ArithmeticError, struct.error, zlib.error),
)
"""What Pillow's decoders raise on damaged files."""
TOO_LARGE = (Image.DecompressionBombError, Image.DecompressionBombWarning)


@dataclass(frozen=True)
class Upload:
    """A picture to edit."""

    picture: Image.Image
    """Upright RGB; what was transparent lies on white."""
    mask: Image.Image | None
    """Same size, mode L: 255 where the picture is drawn anew, 0 where it is kept; None redraws everything."""


def scaled(upload: Upload, size: tuple[int, int]) -> Upload:
    """Return the upload at the size (width_px, height_px) that is drawn, as the model would scale it itself."""
    images = (upload.picture, upload.mask)
    picture, mask = (
        image if image is None or image.size == size else image.resize(size, Image.Resampling.LANCZOS)
        for image in images
    )
    assert picture is not None
    return Upload(picture, mask)


def describe_body() -> dict[str, Any]:
    """Return what OpenAPI says of the body: the route reads it by hand, to stop at its limits."""
    schema = EditsRequest.model_json_schema()
    file = {"type": "string", "format": "binary"}
    told = {
        "image": {**file, "description": "PNG, JPEG or WebP"},
        "mask": {**file, "description": "of the image's size; drawn anew where it is transparent, else where white"},
    }
    listed = schema["properties"].items()
    own = {name: field if name in NOT_TEXT else _without_null(field) for name, field in listed}
    fields = {**schema, "properties": {**told, **own}, "required": ["image", "prompt"]}
    return {"requestBody": {"required": True, "content": {FORM: {"schema": fields}}}}


def _without_null(field: dict[str, Any]) -> dict[str, Any]:
    """Describe a form's field of text: what would be null elsewhere is left out of a form."""
    kinds = [kind for kind in field.get("anyOf", []) if kind["type"] != "null"]
    rest = {key: value for key, value in field.items() if key not in ("anyOf", "default")}
    return {**rest, **(kinds[0] if len(kinds) == 1 else {"anyOf": kinds} if kinds else {})}


@dataclass(frozen=True)
class Files:
    """The files of an edit as they came: nothing of them has been looked at."""

    image: bytes
    mask: bytes | None

    async def decode(self, max_pixels: int) -> Upload:
        """Return them as pixels; ApiError says which of them is wrong and how."""
        return await decode_soon(self.image, self.mask, max_pixels)


async def read_edit(request: Request, limits: ServeSection) -> tuple[EditsRequest, Files]:
    """Read one edit's body and check its fields; ApiError (400, 413, 415) names the field."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != FORM:
        message = f"Content-Type expected to be {FORM} with a file named image, found {kind or 'none'!r}"
        raise ApiError(message, code=STATUS_CODES[415], status=415)
    # It writes a line for every damaged body, which anybody can send.
    logging.getLogger("python_multipart").setLevel(logging.ERROR)
    try:
        form = await request.form(max_files=len(FILES) + 1, max_fields=MOST_FIELDS, max_part_size=limits.max_body_bytes)
    except HTTPException as error:
        if error.status_code != 400:
            raise
        raise ApiError(f"body expected to be {FORM}, found: {error.detail}", code="invalid_form") from None
    try:
        fields, files = await _split(form)
    finally:
        await form.close()
    try:
        body = EditsRequest.model_validate(fields)
    except ValidationError as error:
        raise invalid_value(error.errors()[0], [*EditsRequest.model_fields, *FILES]) from None
    if "image" not in files:
        raise ApiError("image expected as a file, found nothing", "image", "missing_required_parameter")
    return body, Files(files["image"], files.get("mask"))


async def decode_soon(image: bytes, mask: bytes | None, max_pixels: int) -> Upload:
    """Do `make_upload` in a thread, as it keeps a core busy for up to a second; ApiError 429 when too many wait."""
    if not SLOTS.acquire(blocking=False):
        raise later(
            429, "as many uploaded pictures are being decoded as may be; ask again", "uploads_full", BUSY_RETRY_S
        )
    decoding = THREADS.submit(make_upload, image, mask, max_pixels)
    # Not when the caller leaves: a thread that has begun goes on.
    decoding.add_done_callback(lambda _: SLOTS.release())
    return await asyncio.wrap_future(decoding)


def make_upload(image: bytes, mask: bytes | None, max_pixels: int) -> Upload:
    """Decode a picture and its mask; ApiError says which of them is wrong and how."""
    picture = decode("image", image, max_pixels)
    asked = None if mask is None else decode("mask", mask, max_pixels)
    if asked is not None and asked.size != picture.size:
        found = f"{asked.width}x{asked.height} for an image of {picture.width}x{picture.height}"
        raise ApiError(f"mask expected to have the image's size, found {found}", "mask", "invalid_value")
    return Upload(_on_white(picture), _where_transparent(picture) if asked is None else _mask(asked))


def decode(param: str, content: bytes, max_pixels: int) -> Image.Image:
    """Return the upright picture with its transparency; ApiError when it is none, damaged, or too large."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(content), formats=FORMATS)
            if image.width * image.height > max_pixels:
                raise _too_many_pixels(param, max_pixels, f"{image.width}x{image.height}")
            if image.mode not in EIGHT_BIT:
                raise ApiError(f"{param} expected 8 bits a channel, found mode {image.mode}", param, "invalid_image")
            # In the data of a scan 0xff is followed by 0 or a marker that is none of these.
            if image.format == "JPEG" and content.count(START_OF_SCAN) > MOST_SCANS:
                message = (
                    f"{param} expected a JPEG of at most {MOST_SCANS} scans, found more; save it as a baseline JPEG"
                )
                raise ApiError(message, param, "invalid_image")
            image.load()
            upright = ImageOps.exif_transpose(image)
    except TOO_LARGE:
        raise _too_many_pixels(param, max_pixels, "many more") from None
    except DECODER_ERRORS as error:
        known = ", ".join(FORMATS)
        message = f"{param} expected a whole picture as one of {known}, found {len(content)} bytes that are not"
        raise ApiError(message, param, "invalid_image") from error
    return upright.convert("RGBA") if upright.has_transparency_data else upright.convert("RGB")


def _too_many_pixels(param: str, max_pixels: int, found: str) -> ApiError:
    message = f"{param} expected at most {max_pixels} pixels (serve.max_upload_pixels), found {found}"
    return ApiError(message, param, "image_too_large")


async def _split(form: FormData) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Separate files from fields; `name[]`, as clients send lists, means `name`."""
    fields: dict[str, Any] = {}
    files: dict[str, bytes] = {}
    for key, value in form.multi_items():
        name = key.removesuffix("[]")
        if isinstance(value, UploadFile) != (name in FILES):
            expected, found = ("a file", "text") if name in FILES else ("text", "a file")
            raise ApiError(f"{name[:80]} expected {expected}, found {found}", name[:80], "invalid_value")
        if isinstance(value, UploadFile):
            if name in files:
                raise ApiError(f"{name} expected one file, found several", name, "too_many_images")
            files[name] = await value.read()
        elif key.endswith("[]") or name in LISTS:
            fields.setdefault(name, []).append(value)
        elif name in fields:
            raise ApiError(f"{name[:80]} expected once, found twice", name[:80], "invalid_value")
        else:
            fields[name] = value
    return fields, files


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode != "RGBA":
        return image
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _where_transparent(image: Image.Image) -> Image.Image | None:
    """255 where a picture is fully transparent, 0 elsewhere; None when it is so nowhere."""
    if image.mode != "RGBA":
        return None
    mask = image.getchannel("A").point(lambda alpha: 255 if alpha == 0 else 0)
    return mask if mask.getbbox() else None


def _mask(image: Image.Image) -> Image.Image:
    if image.mode == "RGBA":
        return image.getchannel("A").point(lambda alpha: 255 - alpha)
    return image.convert("L")
