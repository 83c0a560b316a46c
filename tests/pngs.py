"""PNG files chunk by chunk, for what Pillow does not write."""

from __future__ import annotations

import struct
import zlib

import numpy as np
from numpy.typing import NDArray

from ovserve.pixels.png import SIGNATURE

__all__ = ["chunk", "png_file"]


def chunk(kind: bytes, data: bytes, *, damaged: bool = False) -> bytes:
    """Return a chunk; with a wrong checksum if it is damaged."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data) ^ damaged)


def png_file(samples: NDArray[np.generic], depth: int, colour_type: int, *chunks: bytes, after: bytes = b"") -> bytes:
    """Return a PNG of samples (H, W) or (H, W, planes), packed to `depth` bits, with `chunks` before the pixel data."""
    height, width = samples.shape[:2]
    rows = samples.reshape(height, -1).astype(np.uint32)
    bits = (rows[..., None] >> np.arange(depth - 1, -1, -1)) & 1
    lines = np.packbits(bits.reshape(height, -1).astype(np.uint8), axis=1)
    data = b"".join(b"\0" + line.tobytes() for line in lines)
    head = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    parts = (chunk(b"IHDR", head), *chunks, chunk(b"IDAT", zlib.compress(data)), after, chunk(b"IEND", b""))
    return SIGNATURE + b"".join(parts)
