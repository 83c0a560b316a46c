"""HEIC files, read by libheif through the package pi-heif of the extra `heic`, where it is installed.

A photograph is a grid of tiles, each an item of the file. What the boxes make the decoder repeat is counted before
anything is decoded; libheif's own limits apply too. Runs in: worker (counts), the decoding process (pixels).
"""

from __future__ import annotations

import base64
import importlib
import importlib.util
import struct
from dataclasses import dataclass, field

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
MAX_LEVELS = 4  # of items made of other items; a photograph has one, or two with a rotation


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
            sources = _references(found, b"dimg", at, end)
            limit = _SPARE_TILES + width * height // _TILE_PIXELS
            what = f"tiles for {width}x{height} pixels"
            check_count(sum(len(items) for items in sources.values()), limit, what)
            tree = _Sources(sources, limit)
            for item in sources:
                check_count(tree.count(item)[0], limit, what)
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


def _references(found: FileWalk, kind: bytes, at: int, end: int) -> dict[int, list[int]]:
    """Return the items with references of a kind, and the items that they name (ISO/IEC 14496-12 section 8.11.12).

    Raises:
        ValueError: a reference is cut off.
    """
    letter = "H" if found.data[at] == 0 else "I"
    sources: dict[int, list[int]] = {}
    for begin, stop in boxes_of(found.data, kind, at + 4, end):
        names = begin + struct.calcsize(f">{letter}H")
        if stop < names:
            raise ValueError("a reference is cut off")
        item, count = found.unpack(f">{letter}H", begin)
        if stop < names + count * struct.calcsize(letter):
            raise ValueError("a reference is cut off")
        sources.setdefault(item, []).extend(found.unpack(f">{count}{letter}", names))
    return sources


@dataclass(slots=True)
class _Sources:
    """The items of which items are made: a grid may consist of grids, each of the same tiles.

    Attributes:
        items: by the number of the item that is made of them.
        limit: a count above it is not exact.
        seen: the results so far.
    """

    items: dict[int, list[int]]
    limit: int
    seen: dict[int, tuple[int, int]] = field(default_factory=dict)

    def count(self, item: int, levels: int = MAX_LEVELS) -> tuple[int, int]:
        """Return how many pictures are decoded for an item, and how many levels of items it has.

        Raises:
            TooMuch: it has more than `levels`, or is made of itself.
        """
        if item not in self.items:
            return 1, 0
        if item not in self.seen:
            total = height = 0
            for source in self.items[item] if levels else ():
                pictures, below = self.count(source, levels - 1)
                total, height = total + pictures, max(height, below)
                if total > self.limit:
                    break
            self.seen[item] = total, height + 1
        found = self.seen[item]
        check_count(found[1], levels, "levels of items in one another")
        return found
