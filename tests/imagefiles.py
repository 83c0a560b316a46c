"""Builds image files by hand, with parts that no library writes: repeated scans, empty chunks, overlapping strips."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence

import numpy as np
from PIL import Image

__all__ = [
    "bmp_rle",
    "encoded",
    "gif",
    "jpeg",
    "jpeg_scans",
    "png",
    "png_chunk",
    "segment",
    "tiff",
    "webp",
    "webp_chunk",
]

GRAY = np.full((16, 16, 3), 90, np.uint8)


def encoded(form: str, image: Image.Image | None = None, **options: object) -> bytes:
    """Encode an image with Pillow; a small gray one by default."""
    buffer = io.BytesIO()
    (image or Image.fromarray(GRAY)).save(buffer, form, **options)
    return buffer.getvalue()


# --- JPEG (ITU-T T.81, annex B) ---------------------------------------------------------------------------------------


def segment(kind: int, content: bytes) -> bytes:
    """Return a segment with its marker and length."""
    return bytes((0xFF, kind)) + struct.pack(">H", len(content) + 2) + content


def jpeg(*, before: bytes = b"", after: bytes = b"", progressive: bool = False) -> bytes:
    """Return a small JPEG with bytes after its SOI and before its EOI."""
    data = encoded("JPEG", progressive=progressive)
    return data[:2] + before + data[2:-2] + after + data[-2:]


def jpeg_scans(count: int, size: int = 16) -> bytes:
    """Return a progressive JPEG of one component with `count` scans, all but the first empty refinements."""
    data = encoded("JPEG", Image.new("L", (size, size), 90), progressive=True)
    first = data.index(b"\xff\xda")
    second = data.index(b"\xff\xda", first + 2)
    # The AC band from coefficient 1 to 63, high bits first; a code table with one code for "end of band".
    table = segment(0xC4, bytes((0x10, 1, *[0] * 15, 0xE0)))
    head = segment(0xDA, bytes((1, 1, 0x00, 1, 63, 0)))
    return data[:second].rstrip(b"\0") + (table + (head + b"\0\0\0\0") * (count - 1)) + b"\xff\xd9"


# --- PNG (third edition, section 5) -----------------------------------------------------------------------------------


def png_chunk(kind: bytes, content: bytes = b"") -> bytes:
    """Return a chunk with its length and CRC."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(*, before: bytes = b"", between: bytes = b"", after: bytes = b"", width: int = 16, height: int = 16) -> bytes:
    """Return a small PNG with chunks before, between and after its two IDAT chunks."""
    pixels = zlib.compress((b"\0" + b"\x5a" * (3 * width)) * height)
    head = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    first, second = png_chunk(b"IDAT", pixels[:9]), png_chunk(b"IDAT", pixels[9:])
    return b"\x89PNG\r\n\x1a\n" + head + before + first + between + second + after + png_chunk(b"IEND")


# --- GIF, WebP, BMP ---------------------------------------------------------------------------------------------------


def gif(*, before: bytes = b"", more: bytes = b"") -> bytes:
    """Return a small GIF with blocks before its first frame, and sub-blocks at the end of that frame's pixels."""
    data = encoded("GIF", Image.new("P", (16, 16), 1))
    at = data.index(b"\x2c\0\0\0\0\x10\0\x10\0")
    return data[:at] + before + data[at:-2] + more + data[-2:]


def webp_chunk(kind: bytes, content: bytes) -> bytes:
    """Return a RIFF chunk."""
    return kind + struct.pack("<I", len(content)) + content + bytes(len(content) & 1)


def webp(*chunks: bytes) -> bytes:
    """Return a small extended WebP with more chunks after its picture."""
    picture = encoded("WEBP", lossless=True)[12:]
    head = webp_chunk(b"VP8X", struct.pack("<IBHBH", 0, 15, 0, 15, 0)[:4] + b"\x0f\0\0\x0f\0\0")
    body = b"WEBP" + head + picture + b"".join(chunks)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def bmp_rle(codes: bytes, width: int = 16, height: int = 16) -> bytes:
    """Return a BMP of 8 bits with these run-length codes."""
    palette = b"".join(bytes((index, index // 2, index, 0)) for index in range(256))
    offset = 54 + len(palette)
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(codes), 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", offset + len(codes), 0, 0, offset) + info + palette + codes


# --- TIFF (6.0) -------------------------------------------------------------------------------------------------------

_CODES = {1: "B", 2: "B", 3: "H", 4: "I", 5: "I", 7: "B", 16: "Q"}


def tiff(
    tags: dict[int, tuple[int, Sequence[int]]] | None = None,
    *,
    size: tuple[int, int] = (16, 16),
    directories: int = 1,
    is_big: bool = False,
) -> bytes:
    """Return an uncompressed gray TIFF of one strip at offset 16.

    Args:
        tags: more tags, or others than the defaults: type and values by number.
        size: width and height.
        directories: number of directories; those after the first have no tags.
        is_big: write a BigTIFF.
    """
    width, height = size
    pixels = b"\x5a" * (width * height)
    entries: dict[int, tuple[int, Sequence[int]]] = {
        256: (4, [width]),
        257: (4, [height]),
        258: (3, [8]),
        259: (3, [1]),
        262: (3, [1]),
        273: (4, [16]),
        277: (3, [1]),
        278: (4, [height]),
        279: (4, [len(pixels)]),
        **(tags or {}),
    }
    word, word_bytes, count = ("Q", 8, "Q") if is_big else ("I", 4, "H")
    values_at = 16 + len(pixels)
    values, table = b"", b""
    for tag, (kind, numbers) in sorted(entries.items()):
        length = len(numbers) // 2 if kind == 5 else len(numbers)
        raw = struct.pack(f"<{len(numbers)}{_CODES[kind]}", *numbers)
        if len(raw) > word_bytes:
            raw, values = struct.pack("<" + word, values_at + len(values)), values + raw
        table += struct.pack("<HH" + word, tag, kind, length) + raw.ljust(word_bytes, b"\0")
    at = values_at + len(values)
    chain = struct.pack("<" + count, len(entries)) + table
    for index in range(1, directories):
        chain += struct.pack("<" + word, at + len(chain) + word_bytes) + struct.pack("<" + count, 0)
        assert index
    chain += bytes(word_bytes)
    head = struct.pack("<2sHHHQ", b"II", 43, 8, 0, at) if is_big else struct.pack("<2sHI", b"II", 42, at)
    return head.ljust(16, b"\0") + pixels + values + chain
