"""The body of an edit: files and fields as the real client sends them, bombs and damage refused."""

import asyncio
import io
import struct
import threading
import zlib
from typing import Any

import httpx
import httpx2
import openai
import pytest
from fastapi import FastAPI, Request
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from starlette.testclient import TestClient

from cluster import uploads
from cluster.api_errors import ApiError, install_handlers
from cluster.images_schema import EditsRequest
from cluster.placement import ServeSection
from cluster.uploads import Upload, describe_body, make_upload, read_edit, scaled

LIMITS = ServeSection(max_upload_pixels=4096)
ROUTE = "/v1/images/edits"


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


RED = encoded(Image.new("RGB", (24, 16), "red"))


class Edits:
    """An application that reads edits and remembers the last."""

    def __init__(self) -> None:
        self.body: EditsRequest | None = None
        self.upload: Upload | None = None
        self.app = FastAPI()
        install_handlers(self.app, EditsRequest.model_fields)

        @self.app.post(ROUTE)
        async def edit(request: Request) -> dict[str, Any]:
            self.body, files = await read_edit(request, LIMITS)
            self.upload = await files.decode(LIMITS.max_upload_pixels)
            return {"created": 1, "data": []}

    def ask(self, **content: Any) -> httpx.Response:
        with TestClient(self.app, raise_server_exceptions=False) as client:
            return client.post(ROUTE, **content)

    def error(self, status: int = 400, **content: Any) -> dict[str, Any]:
        answer = self.ask(**content)
        assert answer.status_code == status, answer.text
        return dict(answer.json()["error"])


def test_openai_client_sends_what_is_read() -> None:
    edits = Edits()
    inside = TestClient(edits.app, base_url="http://test")

    def answer(request: httpx2.Request) -> httpx2.Response:
        given = inside.request(request.method, request.url.path, content=request.read(), headers=dict(request.headers))
        return httpx2.Response(given.status_code, headers=dict(given.headers), content=given.content)

    transport = httpx2.Client(transport=httpx2.MockTransport(answer))
    client = openai.OpenAI(base_url="http://test/v1", api_key="k", max_retries=0, http_client=transport)
    mask = encoded(Image.new("L", (24, 16), 255))
    extra = {"strength": 0.5, "seed": 3, "postprocess": ["sharpen"]}
    client.images.edit(image=[RED], mask=mask, prompt="blue", n=2, size="auto", stream=False, extra_body=extra)
    assert edits.body is not None and edits.upload is not None and edits.upload.mask is not None
    assert (edits.body.prompt, edits.body.n, edits.body.seed, edits.body.strength) == ("blue", 2, 3, 0.5)
    assert edits.body.postprocess == ["sharpen"] and edits.body.stream is False
    assert edits.upload.picture.getpixel((3, 3)) == (255, 0, 0)
    with pytest.raises(openai.BadRequestError, match="nearest: 'strength'"):
        client.images.edit(image=RED, prompt="blue", extra_body={"strenght": 1})


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_each_format_is_read(kind: str) -> None:
    edits = Edits()
    assert edits.ask(files={"image": encoded(Image.new("RGB", (8, 8), "blue"), kind)}, data={"prompt": "x"}).is_success
    assert edits.upload is not None and edits.upload.picture.mode == "RGB" and edits.upload.mask is None


def test_photograph_taken_sideways_is_turned_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    upload = make_upload(encoded(Image.new("RGB", (24, 16)), "JPEG", exif=exif), None, 4096)
    assert upload.picture.size == (16, 24)


def with_hole(colour: str = "red") -> Image.Image:
    image = Image.new("RGBA", (8, 8), colour)
    image.paste((0, 0, 0, 0), (0, 0, 4, 8))
    return image


def test_transparent_part_of_mask_or_picture_is_what_is_redrawn() -> None:
    plain = encoded(Image.new("RGB", (8, 8), "red"))
    by_mask = make_upload(plain, encoded(with_hole()), 4096).mask
    by_picture = make_upload(encoded(with_hole()), None, 4096)
    white = Image.new("L", (8, 8), 0)
    white.paste(255, (0, 0, 4, 8))
    by_white = make_upload(plain, encoded(white), 4096).mask
    assert by_mask is not None and by_white is not None and by_picture.mask is not None
    assert by_mask.tobytes() == by_white.tobytes() == by_picture.mask.tobytes() == white.tobytes()
    assert by_picture.picture.getpixel((0, 0)) == (255, 255, 255)
    assert make_upload(encoded(Image.new("RGBA", (8, 8), "red")), None, 4096).mask is None


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header promises width x height pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("side", [65, 10_000, 60_000, 2**31 - 1])
def test_picture_of_too_many_pixels_is_refused_by_its_header(side: int) -> None:
    error = Edits().error(files={"image": bomb(side, side)}, data={"prompt": "x"})
    assert (error["param"], error["code"]) == ("image", "image_too_large")
    assert "4096 pixels (serve.max_upload_pixels)" in error["message"]
    assert Edits().error(files={"image": RED, "mask": bomb(side, side)}, data={"prompt": "x"})["param"] == "mask"


@pytest.mark.parametrize(
    ("files", "data", "param", "code"),
    [
        ({"image": b""}, {"prompt": "x"}, "image", "invalid_image"),
        ({"image": b"hello"}, {"prompt": "x"}, "image", "invalid_image"),
        ({"image": RED[:60]}, {"prompt": "x"}, "image", "invalid_image"),
        ({"image": encoded(Image.new("RGB", (8, 8)), "GIF")}, {"prompt": "x"}, "image", "invalid_image"),
        ({"image": encoded(Image.new("I;16", (8, 8)))}, {"prompt": "x"}, "image", "invalid_image"),
        ({"image": RED, "mask": encoded(Image.new("L", (8, 8)))}, {"prompt": "x"}, "mask", "invalid_value"),
        ([("image[]", RED), ("image[]", RED)], {"prompt": "x"}, "image", "too_many_images"),
        ({"mask": RED}, {"prompt": "x"}, "image", "missing_required_parameter"),
        ({"image": RED}, {}, "prompt", "missing_required_parameter"),
        ({"image": RED}, {"prompt": "x", "n": "two"}, "n", "invalid_value"),
        ({"image": RED}, {"prompt": "x", "guidance_scale": "NaN"}, "guidance_scale", "invalid_value"),
        ({"image": RED}, {"prompt": ["x", "y"]}, "prompt", "invalid_value"),
        ({"image": RED, "prompt": b"x"}, {}, "prompt", "invalid_value"),
        ({"image": RED}, {"prompt": "x", "mask": "text"}, "mask", "invalid_value"),
        ({"image": RED}, {"prompt": "x", "..": "y"}, "..", "unknown_parameter"),
        ({"image": RED}, {"prompt": "x" * 10} | {f"f{i}": "" for i in range(70)}, None, "invalid_form"),
    ],
)
def test_wrong_part_is_named(files: Any, data: dict[str, Any], param: str | None, code: str) -> None:
    error = Edits().error(files=files, data=data)
    assert (error["param"], error["code"]) == (param, code)


@pytest.mark.parametrize(
    ("kind", "content", "status"),
    [
        ("application/json", b"{}", 415),
        ("", b"", 415),
        ("multipart/form-data", b"x", 400),
        ("multipart/form-data; boundary=b", b"", 400),
        ("multipart/form-data; boundary=b", b"--b\r\nContent-Disposition: form-data\r\n\r\nx\r\n--b--\r\n", 400),
        ("multipart/form-data; boundary=b", b"\r\n\r\n\x00\xff" * 50, 400),
    ],
)
def test_body_that_is_no_form_is_refused(kind: str, content: bytes, status: int) -> None:
    error = Edits().error(status, content=content, headers={"content-type": kind})
    assert error["type"] == "invalid_request_error"


def test_openapi_describes_every_part() -> None:
    content = describe_body()["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert set(content["properties"]) == {"image", "mask", *EditsRequest.model_fields}
    assert content["required"] == ["image", "prompt"] and content["additionalProperties"] is False
    assert "$defs" not in content, "references would lead outside of the document"


def test_jpeg_of_many_scans_is_refused_before_they_are_decoded() -> None:
    whole = encoded(Image.new("RGB", (16, 16), "red"), "JPEG", progressive=True)
    assert make_upload(whole, None, 4096).picture.size == (16, 16)
    first = whole.rindex(b"\xff\xda")
    many = whole[:first] + whole[first:-2] * 200 + whole[-2:]
    with pytest.raises(ApiError, match="at most 100 scans"):
        make_upload(many, None, 4096)


def test_upload_is_kept_at_the_size_that_is_drawn() -> None:
    upload = Upload(Image.new("RGB", (4000, 3000), "red"), Image.new("L", (4000, 3000), 255))
    small = scaled(upload, (32, 16))
    assert small.mask is not None and small.picture.size == small.mask.size == (32, 16)
    assert scaled(small, (32, 16)) == small, "scaling again changes nothing"


def test_more_pictures_than_can_be_decoded_are_429(monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()
    monkeypatch.setattr(uploads, "SLOTS", threading.BoundedSemaphore(1))
    monkeypatch.setattr(uploads, "make_upload", lambda *_: go.wait(30))

    async def ask() -> None:
        first = asyncio.ensure_future(uploads.decode_soon(RED, None, 4096))
        await asyncio.sleep(0)
        with pytest.raises(ApiError) as refused:
            await uploads.decode_soon(RED, None, 4096)
        assert (refused.value.status, refused.value.code) == (429, "uploads_full")
        go.set()
        await first
        await uploads.decode_soon(RED, None, 4096)

    asyncio.run(ask())


@settings(max_examples=60, deadline=None)
@given(st.integers(0, len(RED) - 1), st.integers(0, 255), st.integers(0, len(RED)))
def test_damaged_picture_is_read_or_refused(position: int, value: int, length: int) -> None:
    damaged = bytearray(RED[:length] + RED[length:][::-1])
    damaged[position] = value
    try:
        make_upload(bytes(damaged), None, 4096)
    except ApiError as error:
        assert error.code in ("invalid_image", "image_too_large")
