"""Signed pictures: what was drawn is valid, and every way to alter it that we could think of is found out."""

import io
import json
import struct
import zlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from components.picture_segments import Parts, jpeg_parts, jpeg_with, webp_parts, webp_with
from components.provenance import RECORD, Kind, encode, verify
from components.signing_key import Signer, key_id_of

FACTS = {"model_version": 7, "dataset": "emblèmes@0123", "run_id": None, "seed": 5, "request_id": "req-1"}
KINDS: list[Kind] = ["png", "jpeg", "webp"]


def make_signer() -> Signer:
    key = Ed25519PrivateKey.generate()
    return Signer(key, key_id_of(key.public_key()))


SIGNER = make_signer()
KEYS = {SIGNER.key_id: SIGNER.key.public_key()}


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (21, 33, 3), dtype=np.uint8))


def signed(kind: Kind, drawn: int = 0, **facts: Any) -> bytes:
    return encode(picture(drawn), kind, 90, {**FACTS, **facts}, SIGNER)


def opened(content: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(content))
    image.load()
    return image


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind.upper(), **options)
    return file.getvalue()


def png_texts(content: bytes, **changed: str) -> PngInfo:
    """The texts of a PNG file, for another file to carry."""
    texts = PngInfo()
    for key, value in {**opened(content).text, **changed}.items():
        texts.add_text(key, value)
    return texts


def with_chunk(content: bytes, kind: bytes, data: bytes) -> bytes:
    """Put a chunk behind a PNG file's header."""
    chunk = struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return content[:33] + chunk + content[33:]


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_drawn_is_valid_and_tells_its_facts(kind: Kind) -> None:
    verdict = verify(signed(kind), KEYS)
    assert (verdict.status, verdict.facts, verdict.key) == ("valid", FACTS, SIGNER.key_id)
    image = opened(signed(kind))
    assert image.size == (33, 21) and image.format == kind.upper()
    if kind == "png":
        assert image.tobytes() == picture().tobytes()
        assert image.text["seed"] == "5" and image.text["dataset"] == "emblèmes@0123" and image.text["run_id"] == ""
    else:
        assert json.loads(image.getexif()[0x010E])["facts"] == FACTS


@pytest.mark.parametrize("kind", KINDS)
def test_grey_pictures_and_odd_sizes_are_signed_too(kind: Kind) -> None:
    for image in (Image.new("L", (1, 1), 9), Image.new("RGBA", (255, 8), "red")):
        assert verify(encode(image, kind, 0, FACTS, SIGNER), KEYS).status == "valid"


@pytest.mark.parametrize("kind", KINDS)
def test_picture_of_another_key_is_of_an_unknown_key(kind: Kind) -> None:
    verdict = verify(encode(picture(), kind, 90, FACTS, make_signer()), KEYS)
    assert verdict.status == "unknown key" and verify(signed(kind), {}).status == "unknown key"


@pytest.mark.parametrize("kind", KINDS)
def test_claiming_a_trusted_key_with_the_signature_of_another_is_a_change(kind: Kind) -> None:
    forged = Signer(make_signer().key, SIGNER.key_id)
    assert verify(encode(picture(), kind, 90, FACTS, forged), KEYS).status == "changed"


@pytest.mark.parametrize("kind", KINDS)
def test_unsigned_and_stripped_files_are_not_signed(kind: Kind) -> None:
    assert verify(saved(picture(), kind), KEYS).status == "not signed"
    stripped = Image.fromarray(np.asarray(opened(signed(kind))))
    assert verify(saved(stripped, kind), KEYS).status == "not signed"
    exif = Image.Exif()
    exif[0x010E] = "a holiday"
    assert verify(saved(picture(), kind, exif=exif), KEYS).status == "not signed"


@pytest.mark.parametrize("kind", ["jpeg", "webp"])
def test_lossy_file_that_is_saved_again_with_its_record_is_a_change(kind: Kind) -> None:
    image = opened(signed(kind))
    again = saved(image, kind, quality=80, exif=image.info["exif"])
    assert verify(again, KEYS).status == "changed"


def test_lossless_copy_of_a_png_stays_valid() -> None:
    content = signed("png")
    copy = saved(opened(content), "png", pnginfo=png_texts(content), compress_level=1)
    assert copy != content and verify(copy, KEYS).status == "valid"


def altered(image: Image.Image, how: str) -> Image.Image:
    if how == "one pixel by one step":
        red, green, blue = image.getpixel((4, 4))
        image.putpixel((4, 4), (red ^ 1, green, blue))
    return {"cropped": image.crop((0, 0, 32, 20)), "turned": image.rotate(180), "grey": image.convert("L")}.get(
        how, image
    )


@pytest.mark.parametrize("how", ["one pixel by one step", "cropped", "turned", "grey"])
def test_png_of_other_pixels_with_the_same_record_is_a_change(how: str) -> None:
    content = signed("png")
    assert verify(saved(altered(opened(content), how), "png", pnginfo=png_texts(content)), KEYS).status == "changed"


@pytest.mark.parametrize("how", ["one pixel by one step", "cropped", "turned", "grey"])
@pytest.mark.parametrize("kind", ["jpeg", "webp"])
def test_lossy_file_of_other_pixels_with_the_same_record_is_a_change(kind: Kind, how: str) -> None:
    image = opened(signed(kind))
    exif = image.info["exif"]
    assert verify(saved(altered(image, how), kind, quality=90, exif=exif), KEYS).status == "changed"


@pytest.mark.parametrize("kind", KINDS)
def test_metadata_swapped_between_two_signed_files_are_found_out_in_both(kind: Kind) -> None:
    first, second = signed(kind, 1, seed=1), signed(kind, 2, seed=2)
    for mine, other in ((first, second), (second, first)):
        if kind == "png":
            swapped = saved(opened(mine), "png", pnginfo=png_texts(other))
        else:
            start = mine.index(b"MM\0*")
            other_start = other.index(b"MM\0*")
            length = mine.index(b"}\0", start) - start
            assert other.index(b"}\0", other_start) - other_start == length
            swapped = mine[:start] + other[other_start : other_start + length] + mine[start + length :]
        verdict = verify(swapped, KEYS)
        assert (verdict.status, verdict.reason) == ("changed", "the picture is not the one that was signed")


@pytest.mark.parametrize("changed", [{"seed": "6"}, {"prompt": "added"}, {"model_version": ""}])
def test_readable_png_texts_that_differ_from_the_record_are_a_change(changed: dict[str, str]) -> None:
    content = signed("png")
    verdict = verify(saved(opened(content), "png", pnginfo=png_texts(content, **changed)), KEYS)
    assert verdict.status == "changed" and "metadata" in verdict.reason


def test_text_that_is_there_twice_is_a_change() -> None:
    assert verify(with_chunk(signed("png"), b"tEXt", b"seed\x006"), KEYS).status == "changed"


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        (b"tRNS", b"\0\1\0\1\0\1"),
        (b"gAMA", struct.pack(">I", 20_000)),
        (b"eXIf", b"MM\0*\0\0\0\x08\0\1\x01\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0"),
        (b"acTL", struct.pack(">II", 1, 0)),
    ],
)
def test_png_chunk_that_changes_how_pixels_look_is_a_change(kind: bytes, data: bytes) -> None:
    assert verify(with_chunk(signed("png"), kind, data), KEYS).status == "changed"


@pytest.mark.parametrize("kind", ["jpeg", "webp"])
def test_exif_tags_beside_the_record_or_another_canvas_are_a_change(kind: Kind) -> None:
    content = signed(kind)
    text = opened(content).getexif()[0x010E].encode()
    exif = Image.Exif()
    exif[0x010E], exif[0x0112] = text.decode(), 6
    turned = exif.tobytes().removeprefix(b"Exif\0\0")
    if kind == "jpeg":
        forged = jpeg_with(jpeg_parts(content), turned)
        twice = jpeg_with(Parts(content, []), opened(content).info["exif"].removeprefix(b"Exif\0\0"))
    else:
        forged = webp_with(webp_parts(content), turned)
        wider = replace(webp_parts(content), size_px=(34, 21))
        twice = webp_with(wider, opened(content).info["exif"])
    assert opened(forged).getexif()[0x0112] == 6
    assert verify(forged, KEYS).status != "valid" and verify(twice, KEYS).status == "changed"


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_behind_the_end_are_a_change(kind: Kind) -> None:
    assert verify(signed(kind) + b"more", KEYS).status == "changed"


FILES = {kind: signed(kind) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_no_single_byte_can_be_changed_or_lost_unnoticed(kind: Kind, data: Any) -> None:
    content = bytearray(FILES[kind])
    at = data.draw(st.integers(12, len(content) - 1))
    content[at] ^= data.draw(st.integers(1, 255))
    if kind != "png":
        assert verify(bytes(content), KEYS).status != "valid"
    elif verify(bytes(content), KEYS).status == "valid":
        # Unused bits of the compressed stream and checksums of texts carry nothing.
        image = opened(bytes(content))
        assert image.tobytes() == picture().tobytes() and image.text == opened(FILES["png"]).text
    assert verify(bytes(FILES[kind][:at]), KEYS).status != "valid"


@given(st.binary(max_size=200), st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF\x10\0\0\0WEBP"]))
def test_any_bytes_are_judged_or_refused(content: bytes, magic: bytes) -> None:
    try:
        assert verify(magic + content, KEYS).status in ("not signed", "changed")
    except ValueError as error:
        assert "expected a PNG, JPEG or WebP file" in str(error)


@pytest.mark.parametrize(
    "record", ["", "{}", "[]", "null", '{"signature": 1}', "[" * 9999, '{"signature": "AA==", "key": []}']
)
def test_damaged_record_is_a_change(record: str) -> None:
    content = signed("png")
    assert (
        verify(saved(opened(content), "png", pnginfo=png_texts(content, **{RECORD: record})), KEYS).status == "changed"
    )


def test_prompt_is_never_written() -> None:
    with pytest.raises(ValueError, match="'prompt'"):
        encode(picture(), "png", 90, {**FACTS, "prompt": "a secret"}, SIGNER)
