"""The colour space that an AVIF file declares; Pillow returns its samples without it. Runs in: worker."""

from __future__ import annotations

import struct
from collections.abc import Iterator

from ovserve.pixels.colour import Codes

__all__ = ["avif_codes"]

_MAX_BOXES = 1000  # read at most in one box; an ordinary file has 5 to 20
_FULL_BOX_BYTES = 4  # version and flags of a FullBox (ISO/IEC 14496-12 section 4.2)


def avif_codes(data: bytes) -> Codes | None:
    """Return the code points of the first colour property (colr, nclx); None without one.

    ISO/IEC 14496-12 section 12.1.5 (colr), ISO/IEC 23008-12 section 9.3 (iprp, ipco).
    """
    for meta, end in _boxes(data, b"meta", 0, len(data)):
        for properties, properties_end in _boxes(data, b"iprp", meta + _FULL_BOX_BYTES, end):
            for container, container_end in _boxes(data, b"ipco", properties, properties_end):
                for at, colr_end in _boxes(data, b"colr", container, container_end):
                    if data[at : at + 4] == b"nclx" and colr_end - at >= 10:
                        primaries, transfer = struct.unpack_from(">HH", data, at + 4)
                        return Codes(primaries, transfer)  # the range is the decoder's business: RGB is in full range
    return None


def _boxes(data: bytes, kind: bytes, at: int, end: int) -> Iterator[tuple[int, int]]:
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
