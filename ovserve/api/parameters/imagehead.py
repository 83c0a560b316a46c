"""Format and dimensions of an uploaded image, read from its header alone. The front end decodes no image.

A sender decides how many comments, profiles and tags an image library reads before it knows the size. So this module
reads only the few numbers it needs, at their offsets, without copying; a file that has them behind too many other items
is rejected after MAX_READS reads. A worker decodes with Pillow under the same limits; if the two disagree about a file,
Pillow's result counts.
"""

from __future__ import annotations

import importlib.util
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from ovserve.errors import ImageError
from ovserve.settings.options import Settings

__all__ = ["MAX_READS", "ImageHead", "read_head"]

# Reads of a header: a few for each segment, block, chunk or tag. Ordinary files need 3 to 40, one with a comment of 60
# kB 250, a photograph with a depth map of 10 MB in its metadata 500. This many take 10 ms.
MAX_READS = 20_000
SEARCH_WINDOW_BYTES = 64 * 1024  # searched for a JPEG marker in one read
MAX_JUNK_BYTES = 1024 * 1024  # between two JPEG segments: Pillow reads junk byte by byte, which takes 1 s for a few MB
_ACCEPTED = "PNG, JPEG, WebP, AVIF, GIF, BMP or TIFF"
_WITH_ALPHA = ("RGBA", "LA", "P")  # P: a GIF names its transparent colour behind the part that is read here
_OTHER_FORMATS = ((b"<svg", "SVG"), (b"%PDF", "PDF"), (b"\0\0\0\x0cJXL ", "JPEG XL"), (b"\xff\x0a", "JPEG XL"))
# Brands of ISO/IEC 23008-12 and of AVIF, by the major brand or a compatible one in the first bytes of the file.
_AVIF_BRANDS = (b"avif", b"avis")
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs")
_BLOCK_PX = 64  # the largest coding block of HEVC
_HEIC_PACKAGE = "pi_heif"  # a worker decodes with it
_HEIF_BRANDS = (b"mif1", b"mif2", b"msf1")


@dataclass(frozen=True, slots=True)
class ImageHead:
    """The content of a header.

    Attributes:
        format: the format as Pillow names it.
        width, height: in pixels, before any EXIF orientation.
        mode: the mode as Pillow names it for 8 bits per sample, whatever the file has.
        may_be_transparent: whether some pixels may be transparent.
    """

    format: str
    width: int
    height: int
    mode: str
    may_be_transparent: bool = False


class _Size(NamedTuple):
    width: int
    height: int
    mode: str
    has_transparent_colour: bool = False


class _HeaderReader:
    """A file with a bounded number of reads."""

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self._reads_left = MAX_READS

    def unpack(self, form: str, at: int) -> tuple[Any, ...]:
        """Return the values of a `struct` format at an offset.

        Raises:
            ValueError: more than MAX_READS reads.
            struct.error: the offset is beyond the end of the file.
        """
        self._reads_left -= 1
        if self._reads_left < 0:
            raise ValueError(f"too many chunks, segments or tags: more than {MAX_READS} reads")
        if at > len(self._data):  # an offset of 64 bits may be too large for unpack_from
            raise struct.error
        return struct.unpack_from(form, self._data, at)

    def find(self, pattern: re.Pattern[bytes], at: int) -> int:
        """Return the offset of the next match of a pattern of at most two bytes.

        Counts one read for each SEARCH_WINDOW_BYTES. Raises as `unpack` does, and ValueError after MAX_JUNK_BYTES.
        """
        first = at
        while True:
            self.unpack("B", at)
            if at - first > MAX_JUNK_BYTES:
                raise ValueError(f"more than {MAX_JUNK_BYTES} bytes between two segments")
            if found := pattern.search(self._data, at, at + SEARCH_WINDOW_BYTES + 1):
                return found.start()
            at += SEARCH_WINDOW_BYTES


def read_head(data: memoryview, param: str, settings: Settings) -> ImageHead:
    """Read the header of an uploaded image.

    Args:
        data: the whole upload.
        param: the field's name, for messages.
        settings: limits of pixels and sides.

    Raises:
        ImageError: the file is empty, not an image, damaged, in another format, or larger than the limits.
    """
    if not data:
        raise ImageError(f"{param} is an empty file; send {_ACCEPTED}.", param=param)
    start = bytes(data[:64])
    known = next((entry for entry in _FORMATS if entry.is_start(start)), None)
    if known is None:
        raise ImageError(f"{param} {_describe_unknown(start)}; send {_ACCEPTED}.", param=param)
    try:
        width, height, mode, has_transparent_colour = known.read(_HeaderReader(data))
    except (ValueError, KeyError, struct.error) as error:
        reason = error if isinstance(error, ValueError) else "damaged or truncated"
        raise ImageError(
            f"{param} is a {known.format} file whose header cannot be read ({reason}); send an intact file.",
            param=param,
        ) from None
    if max(width, height) > settings.max_image_side_px or width * height > settings.max_image_pixels:
        raise ImageError(
            f"{param} is {width}x{height}; this server allows at most {settings.max_image_pixels} pixels and "
            f"{settings.max_image_side_px} pixels on a side. Send a smaller image.",
            param=param,
        )
    if min(width, height) < 1:
        raise ImageError(f"{param} is {width}x{height}; both sides must be at least 1 pixel.", param=param)
    may_be_transparent = has_transparent_colour or mode in _WITH_ALPHA
    return ImageHead(known.format, width, height, mode, may_be_transparent)


def _describe_unknown(start: bytes) -> str:
    brands = _brands(start)
    if any(brand in brands for brand in _HEIC_BRANDS):
        return (
            f"is HEIC, which this server cannot read: the package {_HEIC_PACKAGE} of the extra heic is not installed "
            "(iPhones send JPEG with the camera setting Most Compatible)"
        )
    if any(brand in brands for brand in _HEIF_BRANDS):
        return "is HEIF, which is not supported"
    for mark, name in _OTHER_FORMATS:
        if mark in start:
            return f"is {name}, which is not supported"
    return "has an unrecognised image format"


def _brands(start: bytes) -> tuple[bytes, ...]:
    """Return the brands of an ISO base media file (ISO/IEC 14496-12 section 4.3), those that fit into `start`."""
    if start[4:8] != b"ftyp":
        return ()
    end = min(int.from_bytes(start[:4], "big"), len(start))
    return (start[8:12], *(start[at : at + 4] for at in range(16, end - 3, 4)))


def _is_avif(start: bytes) -> bool:
    brands = _brands(start)
    return any(brand in brands for brand in _AVIF_BRANDS) and not any(brand in brands for brand in _HEIC_BRANDS)


def _is_readable_heic(start: bytes) -> bool:
    is_heic = any(brand in _HEIC_BRANDS for brand in _brands(start))
    return is_heic and importlib.util.find_spec(_HEIC_PACKAGE) is not None


# --- the formats ------------------------------------------------------------------------------------------------------

_PNG_MODES = {0: "L", 2: "RGB", 3: "P", 4: "LA", 6: "RGBA"}  # by colour type


def _read_png(reader: _HeaderReader) -> _Size:
    """Read PNG (third edition, sections 5.3 and 11.2.1): the chunks from IHDR, the first one, to the first IDAT."""
    at, found = 8, None
    while True:
        length, kind = reader.unpack(">I4s", at)
        if (kind == b"IHDR") == (found is not None):
            raise ValueError("IHDR must be the first chunk and occur once")
        if kind == b"IHDR":
            width, height, _, colour = reader.unpack(">IIBB", at + 8)
            found = _Size(width, height, _PNG_MODES[colour])
        elif kind == b"tRNS" and found:
            found = found._replace(has_transparent_colour=True)
        elif kind == b"IDAT" and found:
            return found
        at += length + 12


# The marker of a segment. Fill bytes 0xFF may precede it; stuffed bytes (00) and restart markers (D0 to D7) begin no
# segment.
_JPEG_MARK = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # SOF
_JPEG_SEGMENTS = frozenset((*range(0xC0, 0xD0), *range(0xDA, 0xF0), 0xFE)) - {0xC8}
_JPEG_SCAN = 0xDA  # SOS
_JPEG_MODES = {1: "L", 3: "RGB", 4: "CMYK"}  # by number of components


def _read_jpeg(reader: _HeaderReader) -> _Size:
    """Read JPEG (ITU-T T.81 sections B.1.1 and B.2): segments up to the first scan, junk between them is skipped."""
    at, found = 2, None
    while True:
        at = reader.find(_JPEG_MARK, at) + 2
        (kind,) = reader.unpack("B", at - 1)
        if kind == _JPEG_SCAN and found:
            return found
        (length,) = reader.unpack(">H", at)
        if kind not in _JPEG_SEGMENTS or length < 2:
            raise ValueError(f"invalid segment 0x{kind:02x} of {length} bytes")
        if kind in _JPEG_FRAMES:
            depth, height, width, components = reader.unpack(">BHHB", at + 2)
            if found or depth != 8:
                raise ValueError(f"{depth} bits per sample, expected 8" if depth != 8 else "two frames")
            found = _Size(width, height, _JPEG_MODES[components])
        at += length


def _read_webp(reader: _HeaderReader) -> _Size:
    """Read WebP (RFC 9649): extended (section 2.7), lossy (RFC 6386 section 9.1) or lossless (section 3.4)."""
    (kind,) = reader.unpack("4s", 12)
    if kind == b"VP8X":
        flags, width, height = reader.unpack("B3x3s3s", 20)
        width, height = (int.from_bytes(side, "little") + 1 for side in (width, height))
        return _Size(width, height, "RGBA" if flags & 0x10 else "RGB")
    if kind == b"VP8 ":
        start, width, height = reader.unpack("<3sHH", 23)
        if start == b"\x9d\x01\x2a":
            return _Size(width & 0x3FFF, height & 0x3FFF, "RGB")
    if kind == b"VP8L":
        start, bits = reader.unpack("<cI", 20)
        if start == b"\x2f":
            return _Size((bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1, "RGBA" if bits >> 28 & 1 else "RGB")
    raise ValueError("the first chunk is not VP8, VP8L or VP8X")


def _read_gif(reader: _HeaderReader) -> _Size:
    """Read GIF (GIF89a sections 18 to 26): the screen size, enlarged to the first image if that is larger."""
    width, height, flags = reader.unpack("<HHB", 6)
    at = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    while True:
        (kind,) = reader.unpack("B", at)
        at += 1
        if kind == 0x2C:
            left, top, wide, high = reader.unpack("<HHHH", at)
            return _Size(max(width, left + wide), max(height, top + high), "P")
        if kind == 0x3B:
            raise ValueError("the file contains no image")
        if kind == 0x21:
            at += 1
            size = -1
            while size:
                (size,) = reader.unpack("B", at)
                at += size + 1


_BMP_HEADERS = (40, 52, 56, 64, 108, 124)
_BMP_BITFIELDS = 3


def _read_bmp(reader: _HeaderReader) -> _Size:
    """Read BMP: headers of OS/2 1.x (12 bytes), Windows 3 and later; a negative height means top row first."""
    (size,) = reader.unpack("<I", 14)
    if size == 12:
        width, height, _, bits = reader.unpack("<HHHH", 18)
        compression = alpha = 0
    elif size in _BMP_HEADERS:
        width, height, _, bits, compression = reader.unpack("<iiHHI", 18)
        alpha = reader.unpack("<I", 66)[0] if size >= 56 else 0
    else:
        raise ValueError(f"unknown header size of {size} bytes")
    if bits <= 8:
        return _Size(width, abs(height), "P")
    return _Size(width, abs(height), "RGBA" if compression == _BMP_BITFIELDS and alpha else "RGB")


_TIFF_NUMBERS = {1: "B", 3: "H", 4: "I", 9: "i", 16: "Q"}  # BYTE, SHORT, LONG, SLONG, LONG8
_WIDTH, _HEIGHT, _PHOTOMETRIC, _EXTRA_SAMPLES = 256, 257, 262, 338
_TIFF_MODES = {0: "L", 1: "L", 2: "RGB", 3: "P", 5: "CMYK"}  # by photometric interpretation; others count as RGB


def _read_tiff(reader: _HeaderReader) -> _Size:
    """Read TIFF (6.0 section 2) and BigTIFF (64-bit offsets): the values stored in the first directory itself.

    If a tag occurs twice, the first counts, as in Pillow.
    """
    (mark,) = reader.unpack("4s", 0)
    order = "<" if mark[:1] == b"I" else ">"
    is_big = 43 in mark
    (at,) = reader.unpack(order + ("Q" if is_big else "I"), 8 if is_big else 4)
    (count,) = reader.unpack(order + ("Q" if is_big else "H"), at)
    at += 8 if is_big else 2
    entry = order + ("HHQ" if is_big else "HHI")
    found: dict[int, int] = {}
    for _ in range(count):
        tag, kind, values = reader.unpack(entry, at)
        at += struct.calcsize(entry)
        if tag in (_WIDTH, _HEIGHT, _PHOTOMETRIC, _EXTRA_SAMPLES):
            if values != 1 and tag in (_WIDTH, _HEIGHT):
                raise ValueError(f"{values} values for width or height, expected 1")
            found.setdefault(tag, *reader.unpack(order + _TIFF_NUMBERS[kind], at))
        at += 8 if is_big else 4
    mode = _TIFF_MODES.get(found.get(_PHOTOMETRIC, 1), "RGB")
    if found.get(_EXTRA_SAMPLES):
        mode = "LA" if mode == "L" else "RGBA"
    return _Size(found[_WIDTH], found[_HEIGHT], mode)


def _read_avif(reader: _HeaderReader) -> _Size:
    """Read AVIF (ISO/IEC 23008-12 section 9.3): the largest size among the properties, which is that of the picture.

    The other sizes are those of tiles, thumbnails and auxiliary pictures. An auxiliary picture may be the alpha.
    """
    at, end = _find_box(reader, b"meta", 0, None)
    at, end = _find_box(reader, b"iprp", at + 4, end)  # meta is a FullBox: version and flags come first
    at, end = _find_box(reader, b"ipco", at, end)
    sizes: list[tuple[int, int]] = []
    apertures: list[tuple[int, int]] = []
    has_alpha = False
    while end - at >= 8:
        size, kind = reader.unpack(">I4s", at)
        if size < 8 or at + size > end:
            raise ValueError("a property has a wrong size")
        if kind == b"ispe":
            sizes.append(reader.unpack(">II", at + 12))
        elif kind == b"clap":
            across, across_parts, down, down_parts = reader.unpack(">4I", at + 8)
            apertures.append((across // max(1, across_parts), down // max(1, down_parts)))
        has_alpha = has_alpha or kind == b"auxC"
        at += size
    if not sizes:
        raise ValueError("the size is missing")
    width, height = max(sizes, key=lambda pair: pair[0] * pair[1])
    for across, down in apertures:  # without the margin that fills HEVC's coding blocks
        if 0 <= width - across < _BLOCK_PX and 0 <= height - down < _BLOCK_PX:
            width, height = across, down
    return _Size(width, height, "RGBA" if has_alpha else "RGB")


def _find_box(reader: _HeaderReader, kind: bytes, at: int, end: int | None) -> tuple[int, int]:
    """Return begin and end of the content of the first box of a kind. Raises ValueError if there is none."""
    while end is None or end - at >= 8:
        size, found = reader.unpack(">I4s", at)
        head = 8
        if size == 1:
            (size,), head = reader.unpack(">Q", at + 8), 16
        if size < head:
            raise ValueError("a box has a wrong size")
        if found == kind:
            return at + head, at + size
        at += size
    raise ValueError(f"box {kind.decode('ascii')} is missing")


class _Format(NamedTuple):
    format: str
    is_start: Callable[[bytes], bool]
    read: Callable[[_HeaderReader], _Size]


_FORMATS = (
    _Format("PNG", lambda start: start.startswith(b"\x89PNG\r\n\x1a\n"), _read_png),
    _Format("JPEG", lambda start: start.startswith(b"\xff\xd8\xff"), _read_jpeg),  # MPO too, which phones write as .jpg
    _Format("WEBP", lambda start: start.startswith(b"RIFF") and start[8:12] == b"WEBP", _read_webp),
    _Format("AVIF", _is_avif, _read_avif),
    _Format("HEIC", _is_readable_heic, _read_avif),  # the same boxes
    _Format("GIF", lambda start: start.startswith((b"GIF87a", b"GIF89a")), _read_gif),
    _Format("BMP", lambda start: start.startswith(b"BM"), _read_bmp),
    _Format("TIFF", lambda start: start.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")), _read_tiff),
)
