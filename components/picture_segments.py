"""Where the EXIF data of a JPEG or WebP file lie, what is around them, and which chunks a PNG holds.

Byte layouts only; nothing is decoded and nothing is trusted: a length that does not fit raises SegmentError.
Layouts: JPEG (ITU T.81) annex B.1.1, WebP container RFC 9649, TIFF 6.0 section 2, PNG 1.2 section 3.
"""

import struct
from dataclasses import dataclass

EXIF = b"Exif\0\0"
IMAGE_DESCRIPTION = 0x010E
ASCII = 2
TIFF_HEADER = b"MM\0*" + struct.pack(">I", 8)
MOST_EXIF_BYTES = 65_000
"""A JPEG segment's length has 16 bits."""
APP0, APP1, START_OF_SCAN = 0xE0, 0xE1, 0xDA
WEBP_HAS_EXIF = 0x08
VP8_START_CODE = b"\x9d\x01\x2a"


class SegmentError(ValueError):
    """The file's parts do not fit together."""


@dataclass(frozen=True)
class Parts:
    """A file cut into what is signed and its EXIF data (TIFF bytes, without any prefix)."""

    signed: bytes
    exif: list[bytes]
    size_px: tuple[int, int] = (0, 0)
    """(width_px, height_px) of a WebP file by its bitstream; not read from a JPEG."""

    def description(self) -> str | None:
        """The text of ImageDescription where the first EXIF data are of the form that `exif_of` writes."""
        data = self.exif[0] if self.exif else b""
        start = len(exif_of(b"")) - 1
        if len(data) < start or not data.startswith(TIFF_HEADER):
            return None
        tag, kind, count, offset = struct.unpack_from(">HHII", data, len(TIFF_HEADER) + 2)
        if (tag, kind) != (IMAGE_DESCRIPTION, ASCII) or offset + count > len(data):
            return None
        return data[offset : offset + count].rstrip(b"\0").decode("ascii", "replace")


def exif_of(description: bytes) -> bytes:
    """TIFF bytes with one directory of one entry: ImageDescription, big-endian."""
    if len(description) > MOST_EXIF_BYTES:
        raise SegmentError(f"description expected up to {MOST_EXIF_BYTES} bytes, found {len(description)}")
    text = description + b"\0"
    offset = len(TIFF_HEADER) + 2 + 12 + 4
    entry = struct.pack(">HHII", IMAGE_DESCRIPTION, ASCII, max(len(text), 5), offset)
    # A value of up to four bytes would have to stand in the entry itself.
    return TIFF_HEADER + struct.pack(">H", 1) + entry + struct.pack(">I", 0) + text.ljust(5, b"\0")


def jpeg_parts(content: bytes) -> Parts:
    """Cut out every EXIF segment before the first scan; all other bytes, to the last one, are what is signed."""
    kept: list[bytes] = [content[:2]]
    exif: list[bytes] = []
    at = 2
    while True:
        if at + 4 > len(content) or content[at] != 0xFF:
            raise SegmentError("a JPEG segment was expected before the first scan")
        marker, length = content[at + 1], struct.unpack_from(">H", content, at + 2)[0]
        if marker == START_OF_SCAN:
            return Parts(b"".join([*kept, content[at:]]), exif)
        segment = content[at : at + 2 + length]
        if length < 2 or len(segment) < 2 + length:
            raise SegmentError("a JPEG segment is cut short")
        if marker == APP1 and segment[4:].startswith(EXIF):
            exif.append(segment[4 + len(EXIF) :])
        else:
            kept.append(segment)
        at += 2 + length


def jpeg_with(parts: Parts, exif: bytes) -> bytes:
    """Put EXIF data behind the start, or behind the JFIF header, which has to be first."""
    payload = EXIF + exif
    segment = struct.pack(">BBH", 0xFF, APP1, len(payload) + 2) + payload
    at = 2
    if parts.signed[2:4] == bytes([0xFF, APP0]):
        at += 2 + struct.unpack_from(">H", parts.signed, 4)[0]
    return parts.signed[:at] + segment + parts.signed[at:]


def webp_parts(content: bytes) -> Parts:
    """Cut out EXIF chunks and the extended header, which `webp_with` makes anew; the rest is signed."""
    if len(content) < 12 or struct.unpack_from("<I", content, 4)[0] + 8 != len(content):
        raise SegmentError("the WebP file does not have the length it says")
    kept: list[bytes] = []
    exif: list[bytes] = []
    size_px = (0, 0)
    at = 12
    while at < len(content):
        if at + 8 > len(content):
            raise SegmentError("a WebP chunk is cut short")
        kind, length = content[at : at + 4], struct.unpack_from("<I", content, at + 4)[0]
        chunk = content[at : at + 8 + length + length % 2]
        if len(chunk) < 8 + length + length % 2:
            raise SegmentError("a WebP chunk is cut short")
        if kind == b"EXIF":
            exif.append(chunk[8 : 8 + length])
        elif kind != b"VP8X":
            kept.append(chunk)
        if kind == b"VP8 ":
            size_px = _vp8_size(chunk[8:])
        at += len(chunk)
    return Parts(b"".join(kept), exif, size_px)


def _vp8_size(bitstream: bytes) -> tuple[int, int]:
    """Read (width_px, height_px) of a lossy key frame (RFC 6386 section 9.1): 14 bits each, 2 bits of scaling above."""
    if bitstream[3:6] != VP8_START_CODE or len(bitstream) < 10:
        raise SegmentError("a WebP key frame was expected")
    width, height = struct.unpack_from("<HH", bitstream, 6)
    return width & 0x3FFF, height & 0x3FFF


def webp_with(parts: Parts, exif: bytes) -> bytes:
    """Make an extended WebP file: header with the canvas of its bitstream, the signed chunks, EXIF data."""
    if not all(parts.size_px):
        raise SegmentError("a lossy WebP picture was expected")
    width, height = ((side - 1).to_bytes(3, "little") for side in parts.size_px)
    header = b"VP8X" + struct.pack("<II", 10, WEBP_HAS_EXIF) + width + height
    trailer = b"EXIF" + struct.pack("<I", len(exif)) + exif + b"\0" * (len(exif) % 2)
    body = b"WEBP" + header + parts.signed + trailer
    return b"RIFF" + struct.pack("<I", len(body)) + body


def png_chunk_kinds(content: bytes) -> list[bytes]:
    """The types of all chunks in order; SegmentError when the file goes on after its end."""
    kinds = []
    at = 8
    while at < len(content):
        if at + 12 > len(content):
            raise SegmentError("a PNG chunk is cut short")
        kinds.append(content[at + 4 : at + 8])
        at += 12 + struct.unpack_from(">I", content, at)[0]
        if kinds[-1] == b"IEND":
            break
    if at != len(content):
        raise SegmentError("the PNG file does not end with its last chunk")
    return kinds
