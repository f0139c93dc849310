"""Where does this picture come from, and is it still what was drawn? A signed record inside the file answers.

The record holds facts (model version, dataset version, run, seed, request; never the prompt), a hash of the content and
an Ed25519 signature over both (RFC 8032). What is hashed: of a PNG the pixels, so that a lossless copy stays valid; of
JPEG and WebP, whose pixels depend on the decoder, every byte outside the EXIF segment. All metadata is checked too:
what the record does not account for counts as a change. A file says nothing when its metadata was stripped.
Layouts: PNG 1.2 sections 3 and 11, JPEG (ITU T.81) annex B, WebP container RFC 9649, TIFF 6.0 section 2.
"""

import base64
import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from components.picture_segments import (
    SegmentError,
    exif_of,
    jpeg_parts,
    jpeg_with,
    png_chunk_kinds,
    webp_parts,
    webp_with,
)
from components.signing_key import Signer

Status = Literal["valid", "changed", "not signed", "unknown key"]
Kind = Literal["png", "jpeg", "webp"]
RECORD = "fresco-provenance"
"""The PNG text chunk that holds the record; JPEG and WebP hold it as EXIF ImageDescription."""
FORMAT = 1
PURPOSE = b"fresco provenance 1\n"
"""Prefixed to what is signed, so that a signature never means anything else."""
PNG_COMPRESSION = 3
"""zlib's level: half the time of the usual 6 for files a few percent larger."""
PRIVATE = ("prompt", "negative_prompt")
PNG_CHUNKS = {b"IHDR", b"IDAT", b"IEND", b"tEXt", b"zTXt", b"iTXt", b"tIME", b"sRGB"}
"""Chunks that cannot change how pixels look; any other (transparency, gamma, animation, EXIF turn) is a change."""
PNG_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
MAGIC: dict[Kind, bytes] = {"png": b"\x89PNG\r\n\x1a\n", "jpeg": b"\xff\xd8\xff", "webp": b"RIFF"}
DECODER_ERRORS = (OSError, EOFError, SyntaxError, ValueError, LookupError, TypeError, RuntimeError)


@dataclass(frozen=True)
class Verdict:
    """What `verify` found; facts are those that were signed, and only to be believed when the status is valid."""

    status: Status
    reason: str
    facts: Mapping[str, Any]
    key: str | None = None


def encode(picture: Image.Image, kind: Kind, quality: int, facts: Mapping[str, Any], signer: Signer) -> bytes:
    """Encode an RGB picture with its facts and their signature; `quality` (0 to 100) means nothing for png.

    ValueError when a fact would publish a prompt: files travel further than answers.
    """
    if private := [key for key in PRIVATE if key in facts]:
        raise ValueError(f"facts expected without what people wrote, found {private[0]!r}")
    rgb = picture.convert("RGB")
    if kind == "png":
        return _encode_png(rgb, facts, signer)
    plain = io.BytesIO()
    rgb.save(plain, format=kind.upper(), quality=max(1, quality))
    content = plain.getvalue()
    parts = jpeg_parts(content) if kind == "jpeg" else webp_parts(content)
    text = _sign(facts, hashlib.sha256(parts.signed).hexdigest(), signer)
    exif = exif_of(text.encode("ascii"))
    return jpeg_with(parts, exif) if kind == "jpeg" else webp_with(parts, exif)


def verify(content: bytes, keys: Mapping[str, Ed25519PublicKey]) -> Verdict:
    """Judge a file by the public keys that are trusted, by key id.

    ValueError when it is no PNG, JPEG or WebP, or claims to hold more pixels than anybody should decode.
    """
    kind = next((kind for kind, magic in MAGIC.items() if content.startswith(magic)), None)
    if kind is None or (kind == "webp" and content[8:12] != b"WEBP"):
        raise ValueError("expected a PNG, JPEG or WebP file, found neither")
    try:
        text, found = _read_png(content) if kind == "png" else _read_exif(content, kind)
    except Image.DecompressionBombError as error:
        raise ValueError(f"expected a picture that can be decoded safely, found: {error}") from error
    except DECODER_ERRORS as error:
        signed = RECORD.encode() in content or b'"signature"' in content
        return Verdict("changed" if signed else "not signed", f"the file is damaged: {error}", {})
    if text is None:
        return Verdict("not signed", "the file holds no provenance record", {})
    return _judge(text, found, keys)


def _encode_png(rgb: Image.Image, facts: Mapping[str, Any], signer: Signer) -> bytes:
    texts = PngInfo()
    for key, value in facts.items():
        texts.add_text(key, _text_of(value))
    texts.add_text(RECORD, _sign(facts, _pixel_hash(rgb), signer))
    file = io.BytesIO()
    rgb.save(file, format="PNG", pnginfo=texts, compress_level=PNG_COMPRESSION)
    return file.getvalue()


def _sign(facts: Mapping[str, Any], content_hash: str, signer: Signer) -> str:
    record = {"format": FORMAT, "key": signer.key_id, "content": content_hash, "facts": dict(facts)}
    signature = base64.b64encode(signer.key.sign(_signed_bytes(record))).decode("ascii")
    return json.dumps({**record, "signature": signature}, sort_keys=True, separators=(",", ":"))


def _signed_bytes(record: Mapping[str, Any]) -> bytes:
    return PURPOSE + json.dumps(record, sort_keys=True, separators=(",", ":")).encode("ascii")


@dataclass(frozen=True)
class _Found:
    """What a file holds beside its record."""

    content_hash: str
    texts: Mapping[str, str] | None
    """The readable copies of the facts in a PNG; None where the record is the only copy."""
    oddity: str = ""
    """What the record cannot account for."""


def _judge(text: str, found: _Found, keys: Mapping[str, Ed25519PublicKey]) -> Verdict:
    try:
        record = json.loads(text)
        signature = base64.b64decode(record.pop("signature"), validate=True)
        key_id, facts, content_hash = str(record["key"]), dict(record["facts"]), record["content"]
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return Verdict("changed", "the provenance record is damaged", {})
    key = keys.get(key_id)
    if key is None:
        return Verdict("unknown key", f"signed with key {key_id[:40]!r}, which is not among the trusted", facts, key_id)
    try:
        key.verify(signature, _signed_bytes(record))
    except (InvalidSignature, ValueError):
        return Verdict("changed", "the provenance record was altered after it was signed", facts, key_id)
    if content_hash != found.content_hash:
        return Verdict("changed", "the picture is not the one that was signed", facts, key_id)
    if found.texts is not None and found.texts != {name: _text_of(value) for name, value in facts.items()}:
        return Verdict("changed", "the readable metadata differ from the signed facts", facts, key_id)
    if found.oddity:
        return Verdict("changed", found.oddity, facts, key_id)
    return Verdict("valid", "picture and facts are as they were signed", facts, key_id)


def _read_png(content: bytes) -> tuple[str | None, _Found]:
    kinds = png_chunk_kinds(content)
    with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
        image.load()
        texts = {str(key): str(value) for key, value in getattr(image, "text", {}).items()}
        pixel_hash = _pixel_hash(image)
    strange = sorted({kind.decode("latin-1") for kind in kinds if kind not in PNG_CHUNKS})
    oddity = f"chunks were added that change how pixels look: {', '.join(strange)}" if strange else ""
    if sum(kind in PNG_TEXTS for kind in kinds) != len(texts):
        oddity = "a text is there twice"
    record = texts.pop(RECORD, None)
    return record, _Found(pixel_hash, texts, oddity)


def _read_exif(content: bytes, kind: Kind) -> tuple[str | None, _Found]:
    parts = jpeg_parts(content) if kind == "jpeg" else webp_parts(content)
    found = hashlib.sha256(parts.signed).hexdigest()
    text = parts.description()
    if text is None or not text.startswith("{"):
        return None, _Found(found, None)
    try:
        # Byte for byte: an orientation tag or a thumbnail beside the record would show another picture.
        oddity = "" if parts.exif == [exif_of(text.encode("ascii"))] else "EXIF data were added"
        expected = jpeg_with(parts, parts.exif[0]) if kind == "jpeg" else webp_with(parts, parts.exif[0])
    except (UnicodeEncodeError, SegmentError):
        return text, _Found(found, None, "EXIF data were altered")
    return text, _Found(found, None, oddity or ("" if content == expected else "the file's structure was altered"))


def _pixel_hash(image: Image.Image) -> str:
    """The mode is hashed too: the same bytes mean other colours under another."""
    return hashlib.sha256(f"{image.mode} {image.width}x{image.height}\n".encode() + image.tobytes()).hexdigest()


def _text_of(value: Any) -> str:
    return "" if value is None else str(value)
