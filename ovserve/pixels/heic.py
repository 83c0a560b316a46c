"""HEIC files, read by libheif through the package pi-heif of the extra `heic`, where it is installed.

A photograph is a grid of tiles, each an item of the file. What the boxes make the decoder repeat is counted before
anything is decoded; libheif's own limits apply too. Runs in: worker (counts), the decoding process (pixels).
"""

from __future__ import annotations

import base64
import importlib
import importlib.util
import struct

from ovserve.pixels.avif import avif_size, boxes_of, properties_of
from ovserve.pixels.counts.walk import FileWalk, check_count

__all__ = ["FORMAT", "SAMPLE", "is_heic", "reads_heic", "register_heic", "walk_heic"]

FORMAT = "HEIF"  # as the package names it to Pillow
PACKAGE = "pi_heif"
_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"}  # ISO/IEC 23008-12, annex B
MAX_ITEMS = 4096  # a photograph of 48 megapixels has about 200
# 16 x 16 pixels, for the warm-up of the decoding process: the package has no encoder.
SAMPLE = base64.b64decode(
    "AAAAHGZ0eXBoZWljAAAAAG1pZjFoZWljbWlhZgAAAXxtZXRhAAAAAAAAACFoZGxyAAAAAAAAAABwaWN0AAAAAAAAAAAAAAAAAAAA"
    "ACJpbG9jAAAAAERAAAEAAQAAAAABoAABAAAAAAAAACIAAAAjaWluZgAAAAAAAQAAABVpbmZlAgAAAAABAABodmMxAAAAAA5waXRt"
    "AAAAAAABAAAA/GlwcnAAAADcaXBjbwAAAHVodmNDAQNwAAAAkAAAAAAAHvAA/P34+AAADwNgAAEAGEABDAH//wNwAAADAJAAAAMA"
    "AAMAHroCQGEAAQApQgEBA3AAAAMAkAAAAwAAAwAeoCCBBZbqrprm4CGgwIAAAAyAAAADAIRiAAEABkQBwXPBiQAAABNjb2xybmNs"
    "eAABAA0ABoAAAAAUaXNwZQAAAAAAAABAAAAAQAAAAChjbGFwAAAAEAAAAAEAAAAQAAAAAf///9AAAAAC////0AAAAAIAAAAQcGl4"
    "aQAAAAADCAgIAAAAGGlwbWEAAAAAAAAAAQABBYECAwWEAAAAKm1kYXQAAAAeKAGvGSElDu4j81/+1yJwWQqnp+TJ4Jn+MpeOhyCY"
)
BLOCK_PX = 64  # the largest coding block of HEVC: a picture is padded to whole blocks
_TILE_PIXELS = 64 * 64  # the smallest tiles that a grid may consist of
_SPARE_TILES = 64


def reads_heic() -> bool:
    """Return whether the package is installed."""
    return importlib.util.find_spec(PACKAGE) is not None


def register_heic() -> None:
    """Give Pillow the decoder. Thumbnails and auxiliary pictures are not read, and it starts no threads."""
    package = importlib.import_module(PACKAGE)
    package.register_heif_opener(thumbnails=False, depth_images=False, aux_images=False, decode_threads=1)


def is_heic(start: bytes) -> bool:
    """Return whether a file begins with the brands of HEIC (ISO/IEC 14496-12 section 4.3), and can be read."""
    if start[4:8] != b"ftyp":
        return False
    end = min(int.from_bytes(start[:4], "big"), len(start))
    brands = {start[8:12], *(start[at : at + 4] for at in range(16, end - 3, 4))}
    return bool(brands & _BRANDS) and reads_heic()


def walk_heic(found: FileWalk) -> None:
    """Read the size, and count items and tiles. Never baseline: HEVC is decoded under a limit of CPU time.

    Raises:
        TooMuch: a count is over its limit.
        ValueError: there is no size.
    """
    data = found.data
    width, height = _size(data)
    for meta, meta_end in boxes_of(data, b"meta", 0, len(data)):
        inner = meta + 4  # meta is a FullBox: version and flags come first
        for at, _ in boxes_of(data, b"iinf", inner, meta_end):
            check_count(found.unpack(">xxxxH" if data[at] == 0 else ">xxxxI", at)[0], MAX_ITEMS, "items")
        for at, end in boxes_of(data, b"iref", inner, meta_end):
            tiles = _references(found, b"dimg", at, end)
            limit = _SPARE_TILES + width * height // _TILE_PIXELS
            check_count(tiles, limit, f"tiles for {width}x{height} pixels")
    found.width, found.height = width, height  # last: a file whose boxes are damaged has no size, and is rejected


def _size(data: bytes | memoryview) -> tuple[int, int]:
    """Return width and height: the largest size among the properties, without the margin that fills coding blocks.

    The margin is what the largest clean aperture leaves out (ISO/IEC 14496-12 section 12.1.4). A smaller aperture is
    that of a thumbnail.
    """
    width, height = avif_size(data)
    for at, _ in properties_of(data, b"clap"):
        across, across_parts, down, down_parts = struct.unpack_from(">4I", data, at)
        inner = across // max(1, across_parts), down // max(1, down_parts)
        if 0 <= width - inner[0] < BLOCK_PX and 0 <= height - inner[1] < BLOCK_PX:
            return inner
    return width, height


def _references(found: FileWalk, kind: bytes, at: int, end: int) -> int:
    """Return the number of references of a kind (ISO/IEC 14496-12 section 8.11.12)."""
    form = ">HH" if found.data[at] == 0 else ">IH"
    total = 0
    for begin, stop in boxes_of(found.data, kind, at + 4, end):
        if stop - begin < struct.calcsize(form):
            raise ValueError("a reference is cut off")
        total += found.unpack(form, begin)[1]
    return total
