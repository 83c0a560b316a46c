"""Count the chunks of a WebP."""

from __future__ import annotations

from ovserve.pixels.counts.walk import MAX_EXIF_BYTES, FileWalk, check_count

__all__ = ["walk_webp"]

MAX_WEBP_CHUNKS = 10_000  # an animation has one for each frame


def walk_webp(found: FileWalk) -> None:
    """Count the chunks, frames of an animation included (RFC 9649 section 2.3)."""
    data, at, chunks = found.data, 12, 0
    size = int.from_bytes(data[4:8], "little")
    found.end = min(len(data), 8 + size + (size & 1))
    while at + 8 <= found.end:
        kind, length = bytes(data[at : at + 4]), int.from_bytes(data[at + 4 : at + 8], "little")
        chunks += 1
        check_count(chunks, MAX_WEBP_CHUNKS, "chunks")
        if at == 12:
            found.width, found.height = _webp_size(found, kind)
        if kind == b"EXIF":
            check_count(length, MAX_EXIF_BYTES, "bytes of EXIF data")
        if kind not in (b"VP8 ", b"VP8L", b"VP8X", b"ALPH", b"ANMF", b"ANIM"):
            found.add_metadata(length)
        at += 8 + length + (length & 1)


def _webp_size(found: FileWalk, kind: bytes) -> tuple[int, int]:
    if kind == b"VP8X":
        low_w, high_w, low_h, high_h = found.unpack("<HBHB", 24)
        return (high_w << 16 | low_w) + 1, (high_h << 16 | low_h) + 1
    if kind == b"VP8 ":
        width, height = found.unpack("<HH", 26)
        return width & 0x3FFF, height & 0x3FFF
    if kind == b"VP8L":
        (bits,) = found.unpack("<I", 21)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    return 0, 0
