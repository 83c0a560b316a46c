"""Count strips or tiles, tags, values and directories of a TIFF."""

from __future__ import annotations

import contextlib
import struct
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ovserve.pixels.counts.walk import FileWalk, TooMuch, check_count

__all__ = ["walk_tiff"]

MAX_TIFF_DIRECTORIES = 1024  # pages of a scanned document
MAX_TIFF_TAGS = 1024
MAX_TIFF_VALUES = 8192  # numbers of all tags of a directory, without offsets and sizes of strips and colour maps
MAX_TIFF_SPARE_STRIPS = 16  # some writers list more strips than the image has
MIN_TIFF_TILE_PX = 16  # TIFF 6.0 section 15: sides of tiles are multiples of 16
MAX_TIFF_TILE_WASTE = 4  # pixels of all tiles for each pixel of the image,
MIN_TIFF_TILE_PIXELS = 1 << 20  # where the tiles have more than this many
MAX_TIFF_STRIPS = 1 << 16
MAX_TIFF_OVERLAP = 2  # bytes of all strips for each byte of the file
MAX_TIFF_TABLES_BYTES = 64 << 20  # JPEG tables, which are read again for each strip

_TIFF_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_TIFF_BYTES = (1, 2, 6, 7)  # types whose values stay bytes
_TIFF_NUMBERS = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i", 13: "I", 16: "Q", 17: "q", 18: "Q"}
_WIDTH, _HEIGHT, _STRIP_OFFSETS, _SAMPLES, _ROWS_PER_STRIP = 256, 257, 273, 277, 278
_STRIP_SIZES, _PLANAR, _COLOUR_MAP, _TILE_WIDTH, _TILE_HEIGHT = 279, 284, 320, 322, 323
_TILE_OFFSETS, _TILE_SIZES, _JPEG_TABLES = 324, 325, 347
_SUB_DIRECTORIES = (34665, 34853, 40965)  # EXIF, GPS, interoperability: Pillow reads all their values
_TIFF_LISTS = (_STRIP_OFFSETS, _STRIP_SIZES, _TILE_OFFSETS, _TILE_SIZES, _COLOUR_MAP)
_MAX_COLOUR_MAP = 3 << 16


@dataclass(frozen=True, slots=True)
class _Tag:
    kind: int
    count: int
    at: int  # of the value


class _Tiff:
    """Byte order and width of offsets of a TIFF file (6.0 section 2; BigTIFF)."""

    def __init__(self, found: FileWalk) -> None:
        self.found = found
        self.order: Literal["<", ">"] = "<" if found.data[0] == 0x49 else ">"
        self.is_big = 43 in bytes(found.data[2:4])
        self.word, self.word_size = ("Q", 8) if self.is_big else ("I", 4)

    def directory(self, at: int, what: str) -> dict[int, _Tag]:
        """Return the tags of a directory; the first of several equal ones counts, as in Pillow."""
        (count,) = self.found.unpack(self.order + ("Q" if self.is_big else "H"), at)
        check_count(count, MAX_TIFF_TAGS, f"tags in its {what}")
        at += 8 if self.is_big else 2
        tags: dict[int, _Tag] = {}
        values = 0
        for _ in range(count):
            tag, kind, length = self.found.unpack(self.order + "HH" + self.word, at)
            at += 4 + self.word_size
            if kind in _TIFF_SIZES and tag not in tags:
                is_inside = length * _TIFF_SIZES[kind] <= self.word_size
                tags[tag] = _Tag(kind, length, at if is_inside else self.found.unpack(self.order + self.word, at)[0])
                if kind in _TIFF_BYTES:
                    self.found.add_metadata(0 if is_inside else length)
                elif tag not in _TIFF_LISTS:
                    values += length
                    check_count(values, MAX_TIFF_VALUES, f"numbers in the tags of its {what}")
            at += self.word_size
        return tags

    def next_directory(self, at: int) -> int:
        """Return the offset of the directory after the one at `at`; 0 after the last."""
        (count,) = self.found.unpack(self.order + ("Q" if self.is_big else "H"), at)
        at += (8 + 20 * count) if self.is_big else (2 + 12 * count)
        return self.found.unpack(self.order + self.word, at)[0]

    def value(self, tags: dict[int, _Tag], tag: int, default: int | None = None) -> int:
        """Return the first value of a tag.

        Raises:
            KeyError: there is none, and no default; or it is not an integer.
            ValueError: it is negative.
        """
        if tag not in tags:
            if default is None:
                raise KeyError(tag)
            return default
        (found,) = self.found.unpack(self.order + _TIFF_NUMBERS[tags[tag].kind], tags[tag].at)
        if found < 0:
            raise ValueError(f"tag {tag} is negative")
        return found

    def values(self, tag: _Tag) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
        """Return all values of a tag; fewer where the file ends."""
        kind = np.dtype(_TIFF_NUMBERS[tag.kind]).newbyteorder(self.order)
        count = min(tag.count, max(0, len(self.found.data) - tag.at) // kind.itemsize)
        return np.frombuffer(self.found.data, kind, count, tag.at).astype(np.uint64)


def walk_tiff(found: FileWalk) -> None:
    """Count strips or tiles, tags, values and directories."""
    tiff = _Tiff(found)
    (first,) = found.unpack(tiff.order + tiff.word, 8 if tiff.is_big else 4)
    tags = tiff.directory(first, "first directory")
    found.width, found.height = tiff.value(tags, _WIDTH), tiff.value(tags, _HEIGHT)
    _check_strips(tiff, tags)
    _count_directories(tiff, first)
    for tag in _SUB_DIRECTORIES:
        if tag in tags:
            with contextlib.suppress(struct.error, KeyError):  # damaged: Pillow ignores it
                tiff.directory(tiff.value(tags, tag), "directory of EXIF data")


def _count_directories(tiff: _Tiff, at: int) -> None:
    visited: set[int] = set()
    with contextlib.suppress(struct.error):  # the chain leaves the file
        while at and at not in visited:
            visited.add(at)
            check_count(len(visited), MAX_TIFF_DIRECTORIES, "directories or more")
            at = tiff.next_directory(at)


def _check_strips(tiff: _Tiff, tags: dict[int, _Tag]) -> None:
    """Compare number, area and bytes of strips or tiles with what the size of the image needs (sections 8 and 15)."""
    width, height = tiff.found.width, tiff.found.height
    planes = tiff.value(tags, _SAMPLES, 1) if tiff.value(tags, _PLANAR, 1) == 2 else 1
    tiled = _TILE_OFFSETS in tags and _STRIP_OFFSETS not in tags
    if tiled:
        wide, high = tiff.value(tags, _TILE_WIDTH), tiff.value(tags, _TILE_HEIGHT)
        if min(wide, high) < MIN_TIFF_TILE_PX:
            raise TooMuch(f"tiles of {wide}x{high}; this server allows at least {MIN_TIFF_TILE_PX} pixels on a side")
    else:
        wide, high = width, max(1, min(height, tiff.value(tags, _ROWS_PER_STRIP, height)))
    needed = -(-width // wide) * -(-height // high) * planes
    noun = "tiles" if tiled else "strips"
    check_count(needed, max(MAX_TIFF_STRIPS, width * height // MIN_TIFF_TILE_PX**2 * planes), noun)
    area = MIN_TIFF_TILE_PIXELS + MAX_TIFF_TILE_WASTE * width * height * planes
    check_count(needed * wide * high, area, f"pixels in its {noun}")
    offsets, sizes = (
        tags.get(_TILE_OFFSETS if tiled else _STRIP_OFFSETS),
        tags.get(_TILE_SIZES if tiled else _STRIP_SIZES),
    )
    for tag in _TIFF_LISTS:
        if tag in tags and tag != _COLOUR_MAP:
            check_count(tags[tag].count, needed + MAX_TIFF_SPARE_STRIPS, f"{noun} where its size needs {needed}")
    if _COLOUR_MAP in tags:
        check_count(tags[_COLOUR_MAP].count, _MAX_COLOUR_MAP, "numbers in its colour map")
    if _JPEG_TABLES in tags:
        check_count(tags[_JPEG_TABLES].count * needed, MAX_TIFF_TABLES_BYTES, "bytes of JPEG tables for all strips")
    if offsets and sizes and needed > 1:
        starts, lengths = tiff.values(offsets), tiff.values(sizes)
        count = min(len(starts), len(lengths), needed)
        size = np.uint64(len(tiff.found.data))
        left = size - np.minimum(starts[:count], size)
        total = int(np.minimum(lengths[:count], left).sum())
        check_count(total, MAX_TIFF_OVERLAP * int(size), f"bytes in its {noun}, which overlap")
