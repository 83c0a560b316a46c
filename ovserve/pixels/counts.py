"""Counts what an image file makes a decoder repeat, from the file's bytes, before anything is decoded.

A small file can repeat work: a progressive JPEG of 108 kB with 100 scans takes two seconds of CPU time, and a TIFF of
1 MB with far more strips than its size needs took 13 s and 486 MB. `inspect` walks the structure of a file, decodes
nothing, and rejects a file that exceeds one of the limits below. It reads each byte of a file at most once.

A walk ends where a file is damaged; what was counted until there is checked, and the decoder finds the damage. So a
passed check does not bound a decoder that reads a damaged file in another way: only a file with `is_baseline`, where
nothing was unusual, is decoded without a limit of CPU time (see `ovserve.pixels.decoder`). Runs in: worker.
"""

from __future__ import annotations

import contextlib
import re
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ovserve.errors import ImageError
from ovserve.pixels.avif import avif_size, is_avif

__all__ = ["FileFacts", "inspect"]

# --- limits -----------------------------------------------------------------------------------------------------------

# Bytes that the first image needs. An animation or a document of several pages is one file.
MIN_FILE_BYTES, MAX_FILE_BYTES_PER_PIXEL = 28 << 20, 16
MAX_METADATA_BYTES = 16 << 20  # a photograph with a depth map has 10 MB
MAX_EXIF_BYTES = 256 << 10  # a segment of a JPEG holds 64 kB; Pillow makes an object of each rational number

# Times the blocks of a JPEG are visited. libjpeg's progressive script visits each 5 to 6 times, mozjpeg's up to 8.
MAX_JPEG_PASSES = 16
MAX_JPEG_SEGMENTS = 2048  # depth maps come in 500 segments
MAX_JPEG_JUNK_BYTES = 64 << 10  # between segments; Pillow reads these byte by byte

MAX_PNG_CHUNKS = 4096  # without IDAT and fdAT
MAX_PNG_COMPRESSED_CHUNKS = 16  # iCCP, of which one counts; text is never inflated
# IDAT chunks of less than this size on average are rejected, after the first MIN_PNG_DATA_CHUNKS. libpng writes 8192.
MIN_PNG_DATA_CHUNK_BYTES = 512
MIN_PNG_DATA_CHUNKS = 1024

MAX_GIF_BLOCKS = 8192  # sub-blocks of 255 bytes before the first frame: 2 MB
MIN_GIF_BLOCK_BYTES = 32  # sub-blocks of pixels of less than this on average are rejected, after the first ones
MAX_GIF_BYTES_PER_PIXEL = 4  # a code takes at most 12 bits and stands for at least one pixel
MIN_GIF_BYTES = 64 << 10

MAX_WEBP_CHUNKS = 10_000  # an animation has one for each frame

MAX_BMP_RLE_BYTES_PER_PIXEL = 2  # a run of one pixel
MIN_BMP_RLE_BYTES = 4096

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


@dataclass(frozen=True, slots=True)
class FileFacts:
    """What `inspect` found.

    Attributes:
        format: the format as Pillow names it.
        width, height: in pixels, before any EXIF orientation.
        end: number of bytes from the start of the file that the first image needs.
        is_baseline: a JPEG with one pass or an ordinary PNG without anything unusual: its decoder's work is known.
    """

    format: str
    width: int
    height: int
    end: int
    is_baseline: bool = False


class _TooMuch(ValueError):
    """A count is over its limit."""


def _check(found: int, limit: int, what: str) -> None:
    if found > limit:
        raise _TooMuch(f"{found} {what}; this server allows at most {limit}")


def inspect(data: memoryview, name: str) -> FileFacts:
    """Walk the structure of an image file.

    Args:
        data: the whole file.
        name: the field to name in an error.

    Raises:
        ImageError: in no known format, without a readable size, or a count is over its limit.
    """
    start = bytes(data[:64])
    for form, is_start, walk in _FORMATS:
        if is_start(start):
            found = _Walk(data, form)
            try:
                walk(found)
                found.check_size(min(found.end, len(data)))
            except _TooMuch as error:
                raise ImageError(f"{name}: the {form} file has {error}. Save the image again.", param=name) from None
            except (struct.error, ValueError, KeyError, IndexError, ArithmeticError):
                found.is_baseline = False  # damaged; the decoder gets all of it
                found.end = len(data)
            if found.width and found.height:
                return FileFacts(form, found.width, found.height, min(found.end, len(data)), found.is_baseline)
            break
    raise ImageError(f"{name}: not a readable PNG, JPEG, WebP, AVIF, GIF, BMP or TIFF image", param=name)


class _Walk:
    """A file that is being walked, and what was found so far."""

    def __init__(self, data: memoryview, form: str) -> None:
        self.data = data
        self.format = form
        self.width = self.height = 0
        self.end = len(data)
        self.is_baseline = False
        self.metadata_bytes = 0

    def unpack(self, form: str, at: int) -> tuple[int, ...]:
        """Return the values of a `struct` format at an offset. Raises struct.error beyond the end of the file."""
        if at > len(self.data):  # an offset of 64 bits may be too large for unpack_from
            raise struct.error
        return struct.unpack_from(form, self.data, at)

    def check_size(self, size: int) -> None:
        """Check the bytes that the first image needs, or those of it that were walked."""
        limit = MIN_FILE_BYTES + MAX_FILE_BYTES_PER_PIXEL * self.width * self.height
        _check(size, limit, f"or more bytes for {self.width}x{self.height} pixels")

    def add_metadata(self, size: int) -> None:
        """Count bytes of metadata."""
        self.metadata_bytes += size
        _check(self.metadata_bytes, MAX_METADATA_BYTES, "bytes of metadata")


# --- colour profiles --------------------------------------------------------------------------------------------------

_MAX_PLAIN_PROFILE_BYTES = 1 << 20  # as colour.MAX_KEPT_PROFILE_BYTES


def _is_plain_profile(profile: bytes) -> bool:
    """Return whether a profile is for RGB and of ordinary size: then no native code reads it to convert samples."""
    return len(profile) <= _MAX_PLAIN_PROFILE_BYTES and profile[16:20] == b"RGB "


# --- JPEG -------------------------------------------------------------------------------------------------------------

_JPEG_MARK = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # the marker of a segment; see api/parameters/imagehead.py
_SOI, _EOI, _SOS, _TEM = 0xD8, 0xD9, 0xDA, 0x01
_SOF = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_CMYK_COMPONENTS = 4
_SEQUENTIAL_SOF = (0xC0, 0xC1)  # Huffman codes, one pass
_PARAMETERLESS = frozenset(range(0x01, 0xC0))


def _walk_jpeg(found: _Walk) -> None:
    """Count the visits of blocks in all scans of the first image (ITU-T T.81, sections A.2 and B.2)."""
    data, at, junk, segments, exif_bytes, profile_bytes = found.data, 2, 0, 0, 0, 0
    has_plain_profile = True
    blocks: dict[int, tuple[int, int]] = {}  # by component: blocks of a scan of it alone, and of an interleaved scan
    visits = frame_visits = 0
    while match := _JPEG_MARK.search(data, at):
        kind = data[match.start() + 1]
        if not visits:
            junk += match.start() - at
            _check(junk, MAX_JPEG_JUNK_BYTES, "bytes between its segments")
        at = match.end()
        segments += 1
        _check(segments, MAX_JPEG_SEGMENTS, "segments")
        if kind == _EOI:
            found.end = at
            is_plain = has_plain_profile and profile_bytes <= _MAX_PLAIN_PROFILE_BYTES
            is_plain = is_plain and not (profile_bytes and len(blocks) == _CMYK_COMPONENTS)
            found.is_baseline = found.is_baseline and is_plain and visits == frame_visits and not junk
            return
        if kind in _PARAMETERLESS:
            found.is_baseline = False
            continue
        if kind == _SOI:
            break  # libjpeg ends with an error
        (length,) = found.unpack(">H", at)
        if length < 2:
            break
        if kind in _SOF:
            if blocks:
                break  # libjpeg ends with an error
            _, found.height, found.width, count = found.unpack(">BHHB", at + 2)
            blocks = _jpeg_blocks(found, at + 8, count)
            frame_visits = sum(interleaved for _, interleaved in blocks.values())
            found.is_baseline = kind in _SEQUENTIAL_SOF
        elif kind == _SOS:
            (count,) = found.unpack("B", at + 2)
            scan = [blocks.get(found.unpack("B", at + 3 + 2 * k)[0], (0, 0)) for k in range(count)]
            visits += scan[0][0] if len(scan) == 1 else sum(interleaved for _, interleaved in scan)
            if visits > MAX_JPEG_PASSES * frame_visits:
                passes = -(-visits // max(1, frame_visits))
                _check(passes, MAX_JPEG_PASSES, "passes over its blocks in its scans")
        elif kind >= 0xE0:
            found.add_metadata(length)
            if kind == 0xE1 and bytes(data[at + 2 : at + 6]) == b"Exif":
                exif_bytes += length
                _check(exif_bytes, MAX_EXIF_BYTES, "bytes of EXIF data")
            elif kind == 0xE2 and bytes(data[at + 2 : at + 14]) == b"ICC_PROFILE\0":
                # ICC.1:2022 annex B.4: 14 bytes of marker, number and count before each part of the profile.
                profile_bytes += length
                is_first = data[at + 14] == 1
                is_plain = not is_first or _is_plain_profile(bytes(data[at + 16 : at + length]))
                has_plain_profile = has_plain_profile and is_plain
        at += length
    found.is_baseline = False


def _jpeg_blocks(found: _Walk, at: int, count: int) -> dict[int, tuple[int, int]]:
    """Return the blocks of each component: in a scan of that component alone, and in a scan of several."""
    parts = [found.unpack("BB", at + 3 * k) for k in range(count)]
    wide, high = max(part >> 4 for _, part in parts), max(part & 15 for _, part in parts)
    across, down = -(-found.width // (8 * wide)), -(-found.height // (8 * high))
    blocks = {}
    for name, part in parts:
        alone = -(-found.width * (part >> 4) // (8 * wide)) * -(-found.height * (part & 15) // (8 * high))
        # A frame of one component is never interleaved, whatever its sampling factors are.
        interleaved = alone if count == 1 else across * down * (part >> 4) * (part & 15)
        # A component with few blocks still costs the decoder a walk over the rows.
        blocks[name] = (max(alone, 1), max(interleaved, 1))
    return blocks


# --- PNG --------------------------------------------------------------------------------------------------------------

_PNG_COMPRESSED = (b"iCCP",)
_PNG_DATA = (b"IDAT", b"fdAT", b"fcTL")
# In files of ordinary programs; with others, or with more metadata than this, a file is not baseline.
_PNG_ORDINARY = frozenset(
    b"IHDR PLTE tRNS IDAT IEND gAMA cHRM sRGB pHYs tIME sBIT bKGD cICP tEXt iCCP iTXt zTXt eXIf".split()
)
_PNG_BASELINE_METADATA_BYTES = 1 << 20
_PNG_BASELINE_CHUNKS = 64


def _walk_png(found: _Walk) -> None:
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
                _check(data_chunks, allowed, f"chunks for {data_bytes} bytes of compressed pixels")
                found.check_size(at)
        else:
            chunks += 1
            _check(chunks, MAX_PNG_CHUNKS, "chunks besides IDAT")
            if kind == b"IHDR" and not found.width:
                found.width, found.height = found.unpack(">II", at + 8)
            else:
                found.metadata_bytes += length  # no limit: a decoder gets none of it (`ovserve.pixels.png`)
            if kind == b"iCCP":
                profiles += 1  # the first one counts
                is_ordinary = (
                    is_ordinary and profiles == 1 and _is_plain_profile(_inflate_profile(data, at + 8, length))
                )
            elif kind == b"eXIf":
                _check(length, MAX_EXIF_BYTES, "bytes of EXIF data")
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
    _, _, stored = bytes(data[at : at + min(length, _MAX_PLAIN_PROFILE_BYTES)]).partition(b"\0")
    try:
        return zlib.decompressobj().decompress(stored[1:], _MAX_PLAIN_PROFILE_BYTES + 1)
    except zlib.error:
        return b""


# --- GIF --------------------------------------------------------------------------------------------------------------


def _walk_gif(found: _Walk) -> None:
    """Count the blocks before the first frame, and that frame's bytes (GIF89a sections 15 to 26)."""
    data = found.data
    width, height, flags = found.unpack("<HHB", 6)
    at, blocks = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0), 0
    while (kind := data[at]) != 0x2C:
        blocks += 1
        _check(blocks, MAX_GIF_BLOCKS, "blocks before its first frame")
        at += 1
        if kind == 0x21:
            at += 1
            while length := data[at]:
                blocks += 1
                _check(blocks, MAX_GIF_BLOCKS, "blocks before its first frame")
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
            _check(blocks, allowed, f"blocks for {at - first} bytes of pixels")
        _check(at - first, limit, f"or more bytes in its first frame of {wide}x{high}")
    found.end = at + 1


# --- WebP -------------------------------------------------------------------------------------------------------------


def _walk_webp(found: _Walk) -> None:
    """Count the chunks, frames of an animation included (RFC 9649 section 2.3)."""
    data, at, chunks = found.data, 12, 0
    size = int.from_bytes(data[4:8], "little")
    found.end = min(len(data), 8 + size + (size & 1))
    while at + 8 <= found.end:
        kind, length = bytes(data[at : at + 4]), int.from_bytes(data[at + 4 : at + 8], "little")
        chunks += 1
        _check(chunks, MAX_WEBP_CHUNKS, "chunks")
        if at == 12:
            found.width, found.height = _webp_size(found, kind)
        if kind == b"EXIF":
            _check(length, MAX_EXIF_BYTES, "bytes of EXIF data")
        if kind not in (b"VP8 ", b"VP8L", b"VP8X", b"ALPH", b"ANMF", b"ANIM"):
            found.add_metadata(length)
        at += 8 + length + (length & 1)


def _webp_size(found: _Walk, kind: bytes) -> tuple[int, int]:
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


# --- BMP --------------------------------------------------------------------------------------------------------------

_BMP_RLE = (1, 2)


def _walk_bmp(found: _Walk) -> None:
    """Read the size, and bound run-length codes, each of which is a step of Pillow's decoder, by the pixels."""
    offset, size = found.unpack("<II", 10)
    if size == 12:
        found.width, found.height = found.unpack("<HH", 18)
        return
    width, height, _, _, compression = found.unpack("<iiHHI", 18)
    found.width, found.height = max(width, 0), abs(height)
    if compression in _BMP_RLE:
        limit = MIN_BMP_RLE_BYTES + MAX_BMP_RLE_BYTES_PER_PIXEL * (found.width + 1) * found.height
        _check(len(found.data) - offset, limit, f"bytes of run-length codes for {found.width}x{found.height} pixels")


# --- TIFF -------------------------------------------------------------------------------------------------------------

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

    def __init__(self, found: _Walk) -> None:
        self.found = found
        self.order: Literal["<", ">"] = "<" if found.data[0] == 0x49 else ">"
        self.is_big = 43 in bytes(found.data[2:4])
        self.word, self.word_size = ("Q", 8) if self.is_big else ("I", 4)

    def directory(self, at: int, what: str) -> dict[int, _Tag]:
        """Return the tags of a directory; the first of several equal ones counts, as in Pillow."""
        (count,) = self.found.unpack(self.order + ("Q" if self.is_big else "H"), at)
        _check(count, MAX_TIFF_TAGS, f"tags in its {what}")
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
                    _check(values, MAX_TIFF_VALUES, f"numbers in the tags of its {what}")
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


def _walk_tiff(found: _Walk) -> None:
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
            _check(len(visited), MAX_TIFF_DIRECTORIES, "directories or more")
            at = tiff.next_directory(at)


def _check_strips(tiff: _Tiff, tags: dict[int, _Tag]) -> None:
    """Compare number, area and bytes of strips or tiles with what the size of the image needs (sections 8 and 15)."""
    width, height = tiff.found.width, tiff.found.height
    planes = tiff.value(tags, _SAMPLES, 1) if tiff.value(tags, _PLANAR, 1) == 2 else 1
    tiled = _TILE_OFFSETS in tags and _STRIP_OFFSETS not in tags
    if tiled:
        wide, high = tiff.value(tags, _TILE_WIDTH), tiff.value(tags, _TILE_HEIGHT)
        if min(wide, high) < MIN_TIFF_TILE_PX:
            raise _TooMuch(f"tiles of {wide}x{high}; this server allows at least {MIN_TIFF_TILE_PX} pixels on a side")
    else:
        wide, high = width, max(1, min(height, tiff.value(tags, _ROWS_PER_STRIP, height)))
    needed = -(-width // wide) * -(-height // high) * planes
    noun = "tiles" if tiled else "strips"
    _check(needed, max(MAX_TIFF_STRIPS, width * height // MIN_TIFF_TILE_PX**2 * planes), noun)
    area = MIN_TIFF_TILE_PIXELS + MAX_TIFF_TILE_WASTE * width * height * planes
    _check(needed * wide * high, area, f"pixels in its {noun}")
    offsets, sizes = (
        tags.get(_TILE_OFFSETS if tiled else _STRIP_OFFSETS),
        tags.get(_TILE_SIZES if tiled else _STRIP_SIZES),
    )
    for tag in _TIFF_LISTS:
        if tag in tags and tag != _COLOUR_MAP:
            _check(tags[tag].count, needed + MAX_TIFF_SPARE_STRIPS, f"{noun} where its size needs {needed}")
    if _COLOUR_MAP in tags:
        _check(tags[_COLOUR_MAP].count, _MAX_COLOUR_MAP, "numbers in its colour map")
    if _JPEG_TABLES in tags:
        _check(tags[_JPEG_TABLES].count * needed, MAX_TIFF_TABLES_BYTES, "bytes of JPEG tables for all strips")
    if offsets and sizes and needed > 1:
        starts, lengths = tiff.values(offsets), tiff.values(sizes)
        count = min(len(starts), len(lengths), needed)
        size = np.uint64(len(tiff.found.data))
        left = size - np.minimum(starts[:count], size)
        total = int(np.minimum(lengths[:count], left).sum())
        _check(total, MAX_TIFF_OVERLAP * int(size), f"bytes in its {noun}, which overlap")


# --- the formats ------------------------------------------------------------------------------------------------------

# --- AVIF -------------------------------------------------------------------------------------------------------------


def _walk_avif(found: _Walk) -> None:
    """Read the size. Never baseline: AV1 is decoded under a limit of CPU time."""
    found.width, found.height = avif_size(found.data)


_FORMATS: tuple[tuple[str, Callable[[bytes], bool], Callable[[_Walk], None]], ...] = (
    ("PNG", lambda start: start.startswith(b"\x89PNG\r\n\x1a\n"), _walk_png),
    ("JPEG", lambda start: start.startswith(b"\xff\xd8\xff"), _walk_jpeg),
    ("WEBP", lambda start: start.startswith(b"RIFF") and start[8:12] == b"WEBP", _walk_webp),
    ("AVIF", is_avif, _walk_avif),
    ("GIF", lambda start: start.startswith((b"GIF87a", b"GIF89a")), _walk_gif),
    ("BMP", lambda start: start.startswith(b"BM"), _walk_bmp),
    ("TIFF", lambda start: start.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")), _walk_tiff),
)
