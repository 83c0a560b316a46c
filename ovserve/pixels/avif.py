"""What the boxes of an AVIF file declare: its size, and the colour space, which Pillow ignores. Runs in: worker."""

from __future__ import annotations

import struct
from collections.abc import Iterator

from ovserve.pixels.colour import Codes

__all__ = ["avif_codes", "avif_size", "boxes_of", "is_avif", "properties_of"]

_MAX_BOXES = 1000  # read at most in one box; an ordinary file has 5 to 20
_FULL_BOX_BYTES = 4  # version and flags of a FullBox (ISO/IEC 14496-12 section 4.2)


def is_avif(start: bytes) -> bool:
    """Return whether a file begins with the brands of AVIF (ISO/IEC 14496-12 section 4.3)."""
    if start[4:8] != b"ftyp":
        return False
    end = min(int.from_bytes(start[:4], "big"), len(start))
    brands = {start[8:12], *(start[at : at + 4] for at in range(16, end - 3, 4))}
    return bool(brands & {b"avif", b"avis"})


def avif_size(data: bytes | memoryview) -> tuple[int, int]:
    """Return width and height: the largest size among the properties. The others are those of tiles and thumbnails.

    Raises:
        ValueError: there is none.
    """
    sizes = [struct.unpack_from(">II", data, at + _FULL_BOX_BYTES) for at, _ in properties_of(data, b"ispe")]
    return max(sizes, key=lambda size: size[0] * size[1])


def avif_codes(data: bytes | memoryview) -> Codes | None:
    """Return the code points of the first colour property (colr, nclx: ISO/IEC 14496-12 section 12.1.5), or None."""
    for at, end in properties_of(data, b"colr"):
        if data[at : at + 4] == b"nclx" and end - at >= 10:
            primaries, transfer = struct.unpack_from(">HH", data, at + 4)
            return Codes(primaries, transfer)  # the range is the decoder's business: RGB is in full range
    return None


def properties_of(data: bytes | memoryview, kind: bytes) -> Iterator[tuple[int, int]]:
    """Yield begin and end of each property of a kind (ISO/IEC 23008-12 section 9.3)."""
    for meta, end in boxes_of(data, b"meta", 0, len(data)):
        for properties, properties_end in boxes_of(data, b"iprp", meta + _FULL_BOX_BYTES, end):
            for container, container_end in boxes_of(data, b"ipco", properties, properties_end):
                yield from boxes_of(data, kind, container, container_end)


def boxes_of(data: bytes | memoryview, kind: bytes, at: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield begin and end of the content of each box of a kind."""
    for _ in range(_MAX_BOXES):
        if at + 8 > end:
            return
        size, found = struct.unpack_from(">I4s", data, at)
        begin = at + 8
        if size == 1 and begin + 8 <= end:
            size = int.from_bytes(data[begin : begin + 8], "big")
            begin += 8
        elif size == 0:
            size = end - at
        if size < begin - at or at + size > end:
            return
        if found == kind:
            yield begin, at + size
        at += size
