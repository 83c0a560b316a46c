"""Count the blocks of a GIF before and in its first frame."""

from __future__ import annotations

from ovserve.pixels.counts.walk import FileWalk, check_count

__all__ = ["walk_gif"]

MAX_GIF_BLOCKS = 8192  # sub-blocks of 255 bytes before the first frame: 2 MB
MIN_GIF_BLOCK_BYTES = 32  # sub-blocks of pixels of less than this on average are rejected, after the first ones
MAX_GIF_BYTES_PER_PIXEL = 4  # a code takes at most 12 bits and stands for at least one pixel
MIN_GIF_BYTES = 64 << 10


def walk_gif(found: FileWalk) -> None:
    """Count the blocks before the first frame, and that frame's bytes (GIF89a sections 15 to 26)."""
    data = found.data
    width, height, flags = found.unpack("<HHB", 6)
    at, blocks = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0), 0
    while (kind := data[at]) != 0x2C:
        blocks += 1
        check_count(blocks, MAX_GIF_BLOCKS, "blocks before its first frame")
        at += 1
        if kind == 0x21:
            at += 1
            while length := data[at]:
                blocks += 1
                check_count(blocks, MAX_GIF_BLOCKS, "blocks before its first frame")
                at += length + 1
            at += 1
        elif kind == 0x3B:
            return
    left, top, wide, high, flags = found.unpack("<HHHHB", at + 1)
    found.width, found.height = max(width, left + wide), max(height, top + high)
    at += 11 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    first, limit, blocks = at, MIN_GIF_BYTES + MAX_GIF_BYTES_PER_PIXEL * wide * high, 0
    while length := data[at]:
        at += length + 1
        blocks += 1
        if blocks > MAX_GIF_BLOCKS:
            allowed = MAX_GIF_BLOCKS + (at - first) // MIN_GIF_BLOCK_BYTES
            check_count(blocks, allowed, f"blocks for {at - first} bytes of pixels")
        check_count(at - first, limit, f"or more bytes in its first frame of {wide}x{high}")
    found.end = at + 1
