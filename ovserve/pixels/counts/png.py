"""Count the chunks of a PNG."""

from __future__ import annotations

import zlib

from ovserve.pixels.counts.walk import MAX_EXIF_BYTES, MAX_PLAIN_PROFILE_BYTES, FileWalk, check_count, is_plain_profile

__all__ = ["walk_png"]

MAX_PNG_CHUNKS = 4096  # without IDAT and fdAT
# IDAT chunks of less than this size on average are rejected, after the first MIN_PNG_DATA_CHUNKS. libpng writes 8192.
MIN_PNG_DATA_CHUNK_BYTES = 512
MIN_PNG_DATA_CHUNKS = 1024

_PNG_DATA = (b"IDAT", b"fdAT", b"fcTL")
# In files of ordinary programs; with others, or with more metadata than this, a file is not baseline.
_PNG_ORDINARY = frozenset(
    b"IHDR PLTE tRNS IDAT IEND gAMA cHRM sRGB pHYs tIME sBIT bKGD cICP tEXt iCCP iTXt zTXt eXIf".split()
)
_PNG_BASELINE_METADATA_BYTES = 1 << 20
_PNG_BASELINE_CHUNKS = 64


def walk_png(found: FileWalk) -> None:
    """Count the chunks (PNG, third edition, section 5.3)."""
    data, at, size = found.data, 8, len(found.data)
    chunks = profiles = data_chunks = data_bytes = 0
    is_ordinary = True
    while at + 8 <= size:
        length = int.from_bytes(data[at : at + 4], "big")
        kind = bytes(data[at + 4 : at + 8])
        if kind in _PNG_DATA:
            data_chunks += 1
            data_bytes += length
            is_ordinary &= kind == b"IDAT"
            if data_chunks > MIN_PNG_DATA_CHUNKS:
                allowed = MIN_PNG_DATA_CHUNKS + data_bytes // MIN_PNG_DATA_CHUNK_BYTES
                check_count(data_chunks, allowed, f"chunks for {data_bytes} bytes of compressed pixels")
                found.check_size(at)
        else:
            chunks += 1
            check_count(chunks, MAX_PNG_CHUNKS, "chunks besides IDAT")
            if kind == b"IHDR" and not found.width:
                found.width, found.height = found.unpack(">II", at + 8)
            else:
                found.metadata_bytes += length  # no limit: a decoder gets none of it (`ovserve.pixels.png`)
            if kind == b"iCCP":
                profiles += 1  # the first one counts
                is_ordinary = is_ordinary and profiles == 1 and is_plain_profile(_inflate_profile(data, at + 8, length))
            elif kind == b"eXIf":
                check_count(length, MAX_EXIF_BYTES, "bytes of EXIF data")
            is_ordinary &= kind in _PNG_ORDINARY
        at += length + 12
        if kind == b"IEND":
            found.end = at
            found.is_baseline = (
                is_ordinary and chunks <= _PNG_BASELINE_CHUNKS and found.metadata_bytes <= _PNG_BASELINE_METADATA_BYTES
            )
            return


def _inflate_profile(data: memoryview, at: int, length: int) -> bytes:
    """Return the profile of an iCCP chunk, and at most one byte more than a plain one has."""
    _, _, stored = bytes(data[at : at + min(length, MAX_PLAIN_PROFILE_BYTES)]).partition(b"\0")
    try:
        return zlib.decompressobj().decompress(stored[1:], MAX_PLAIN_PROFILE_BYTES + 1)
    except zlib.error:
        return b""
