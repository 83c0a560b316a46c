"""Reads the chunks of a PNG file: what the pixels need, for the decoder, and what their samples mean.

A decoder gets a file of the critical chunks and tRNS only. So text of any size costs nothing, no text chunk can refuse
a sound picture, and a wrong checksum in an ancillary chunk has the effect it has in browsers: the chunk is ignored.
Runs in: worker.

References are to PNG, third edition (W3C, 2025).
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass, field

__all__ = ["MAX_CHUNKS", "SIGNATURE", "Png", "read_png"]

SIGNATURE = b"\x89PNG\r\n\x1a\n"
MAX_CHUNKS = 200_000  # chunks of 8 kB, the usual size, of a file of 1.6 GB; read in 0.2 s
_CRITICAL = (b"IHDR", b"PLTE", b"IDAT", b"IEND")
_KEPT_ANCILLARY = (b"tRNS", b"cICP", b"iCCP", b"sRGB", b"gAMA", b"cHRM", b"eXIf")
_TRNS_BYTES = {0: (2,), 2: (6,), 3: range(1, 257)}  # by colour type (section 11.3.1.1)


@dataclass(frozen=True, slots=True)
class Png:
    """The chunks of a file.

    Attributes:
        stream: a PNG file of the same pixels, for a decoder.
        depth: bits of a sample.
        colour_type: 0 gray, 2 RGB, 3 palette, 4 gray with alpha, 6 RGBA.
        ancillary: content of each of the chunks tRNS, cICP, iCCP, sRGB, gAMA, cHRM and eXIf that the file has.
    """

    stream: bytes
    depth: int
    colour_type: int
    ancillary: dict[bytes, bytes] = field(default_factory=dict)


def read_png(data: bytes, *, needs_pixels: bool = True) -> Png:
    """Read the chunks of a file that begins with SIGNATURE, up to IEND (section 5).

    Args:
        data: the file.
        needs_pixels: False: end at the pixel data, which then is not checked, and `stream` is empty.

    Raises:
        ValueError: the file is truncated, a critical chunk is damaged or missing, or there are more than MAX_CHUNKS.
    """
    view = memoryview(data)
    parts: list[bytes | memoryview] = [SIGNATURE]
    ancillary: dict[bytes, bytes] = {}
    head = b""
    at, is_in_pixels, has_pixels = len(SIGNATURE), False, False
    for _ in range(MAX_CHUNKS):
        if at + 12 > len(data):
            raise ValueError("the file is truncated")
        length, kind = struct.unpack_from(">I4s", data, at)
        end = at + 12 + length
        if end > len(data):
            raise ValueError("the file is truncated")
        if kind == b"IDAT" and head and not needs_pixels:
            return Png(b"", head[8], head[9], ancillary)
        if kind in _CRITICAL:
            _check(view[at:end], kind)
        if not head:
            if kind != b"IHDR" or length != 13:
                raise ValueError("the first chunk is not a header")
            head = bytes(view[at + 8 : end - 4])
        if kind == b"IDAT":
            is_in_pixels = is_in_pixels or not has_pixels
            has_pixels = True
            if is_in_pixels:
                parts.append(view[at:end])
        else:
            is_in_pixels = False  # a decoder stops here: pixel data is one run of chunks (section 5.6)
            if kind in (b"IHDR", b"PLTE", b"IEND"):
                parts.append(view[at:end])
            elif _counts(kind, view[at:end], head, has_pixels=has_pixels) and kind not in ancillary:
                ancillary[kind] = bytes(view[at + 8 : end - 4])
                if kind == b"tRNS":
                    parts.append(view[at:end])
        if kind == b"IEND":
            if not has_pixels:
                raise ValueError("the file has no pixel data")
            return Png(b"".join(parts), head[8], head[9], ancillary)
        at = end
    raise ValueError(f"the file has more than {MAX_CHUNKS} chunks")


def _check(chunk: memoryview, kind: bytes) -> None:
    if zlib.crc32(chunk[4:-4]) != int.from_bytes(chunk[-4:], "big"):
        raise ValueError(f"the checksum of a chunk {kind.decode('ascii')} is wrong")


def _counts(kind: bytes, chunk: memoryview, head: bytes, *, has_pixels: bool) -> bool:
    """Return whether an ancillary chunk has an effect: it is needed, in its place, and has the right checksum.

    tRNS also needs the size that its colour type requires.
    """
    if kind not in _KEPT_ANCILLARY or (has_pixels and kind != b"eXIf"):
        return False
    if zlib.crc32(chunk[4:-4]) != int.from_bytes(chunk[-4:], "big"):
        return False
    return kind != b"tRNS" or len(chunk) - 12 in _TRNS_BYTES.get(head[9], ())
