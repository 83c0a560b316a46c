"""Bound the run-length codes of a BMP by its pixels."""

from __future__ import annotations

from ovserve.pixels.counts.walk import FileWalk, check_count

__all__ = ["walk_bmp"]

MAX_BMP_RLE_BYTES_PER_PIXEL = 2  # a run of one pixel
MIN_BMP_RLE_BYTES = 4096

_BMP_RLE = (1, 2)


def walk_bmp(found: FileWalk) -> None:
    """Read the size, and bound run-length codes, each of which is a step of Pillow's decoder, by the pixels."""
    offset, size = found.unpack("<II", 10)
    if size == 12:
        found.width, found.height = found.unpack("<HH", 18)
        return
    width, height, _, _, compression = found.unpack("<iiHHI", 18)
    found.width, found.height = max(width, 0), abs(height)
    if compression in _BMP_RLE:
        limit = MIN_BMP_RLE_BYTES + MAX_BMP_RLE_BYTES_PER_PIXEL * (found.width + 1) * found.height
        check_count(
            len(found.data) - offset, limit, f"bytes of run-length codes for {found.width}x{found.height} pixels"
        )
