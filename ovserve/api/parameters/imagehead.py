"""Format and dimensions of an upload from its header alone: no pixel is decoded in the front end, nor anything else of a file.

What a library reads before it tells a picture's size, a stranger decides: comments, profiles and tags without end. So the few
numbers are taken here where they lie. Nothing is copied, and whoever puts them behind more than STEPS other things is refused.
A worker decodes with Pillow, under the same limits: if the two ever read a file differently, that is what counts.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from ovserve.errors import ImageError
from ovserve.settings.options import Settings

__all__ = ["STEPS", "ImageHead", "read_head"]

# Looks at a header: a few for each segment, block, chunk or tag. Ordinary files need 3 to 40, one with a comment of 60 kB 250, a
# photograph with a depth map of 10 MB in its metadata 500. So many take 10 ms.
STEPS = 20_000
PIECE_BYTES = 64 * 1024  # of what is passed over in one step
MAX_JUNK_BYTES = 1024 * 1024  # in one place: a worker's library reads it byte by byte, a second for some MB
_TOLD = "PNG, JPEG, WebP, GIF, BMP and TIFF"
_WITH_ALPHA = ("RGBA", "LA", "P")  # a GIF tells of its clear colour behind what is looked at, so a palette may have one
_FOREIGN = (
    (b"ftypheic", "HEIC"),
    (b"ftypheix", "HEIC"),
    (b"ftypmif1", "HEIF"),
    (b"ftypavif", "AVIF"),
    (b"<svg", "SVG"),
    (b"%PDF", "PDF"),
)


@dataclass(frozen=True, slots=True)
class ImageHead:
    """What the header says. Width and height in pixels, before any EXIF orientation; the mode as Pillow names it.

    `may_be_clear`: some pixels may be transparent.
    """

    format: str
    width: int
    height: int
    mode: str
    may_be_clear: bool = False


class _Size(NamedTuple):
    width: int
    height: int
    mode: str
    has_clear_colour: bool = False


class _Look:
    """A file of which a bounded number of places is looked at."""

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self._left = STEPS

    def __call__(self, form: str, at: int) -> tuple[Any, ...]:
        """What lies at an offset, by the letters of `struct`. Raises ValueError after STEPS, and struct.error beyond the end."""
        self._left -= 1
        if self._left < 0:
            raise ValueError("it is made of too many pieces")
        return struct.unpack_from(form, self._data, at)

    def find(self, pattern: re.Pattern[bytes], at: int) -> int:
        """Where the pattern, of up to two bytes, is found next. Raises as a look does, and counts one for each PIECE_BYTES."""
        first = at
        while True:
            self("B", at)
            if at - first > MAX_JUNK_BYTES:
                raise ValueError(f"more than {MAX_JUNK_BYTES} bytes of it are none")
            if found := pattern.search(self._data, at, at + PIECE_BYTES + 1):
                return found.start()
            at += PIECE_BYTES


def read_head(data: memoryview, param: str, settings: Settings) -> ImageHead:
    """Read an upload's header.

    Args:
        data: the whole upload.
        param: the field's name, for messages.
        settings: bounds the pixels and the sides.

    Raises:
        ImageError: empty, no image, a format that is not taken, or larger than the limits.
    """
    if not data:
        raise ImageError(f"Invalid image file in '{param}': the file is empty.", param=param)
    start = bytes(data[:64])
    known = next((entry for entry in _FORMATS if entry.is_start(start)), None)
    if known is None:
        raise ImageError(f"Invalid image file in '{param}': {_name(start)}. {_TOLD} are taken.", param=param)
    try:
        width, height, mode, has_clear_colour = known.read(_Look(data))
    except (ValueError, KeyError, struct.error) as error:
        told = error if isinstance(error, ValueError) else "it is damaged, or cut short"
        raise ImageError(f"Invalid image file in '{param}': its header cannot be read ({told}).", param=param) from None
    if max(width, height) > settings.max_image_side_px or width * height > settings.max_image_pixels:
        raise ImageError(
            f"Image '{param}' is {width}x{height}; at most {settings.max_image_pixels} pixels and "
            f"{settings.max_image_side_px} on a side are taken.",
            param=param,
        )
    if min(width, height) < 1:
        raise ImageError(f"Image '{param}' is {width}x{height}: it has no pixels.", param=param)
    may_be_clear = has_clear_colour or mode in _WITH_ALPHA
    return ImageHead(known.format, width, height, mode, may_be_clear)


def _name(start: bytes) -> str:
    for mark, name in _FOREIGN:
        if mark in start:
            return f"it looks like {name}"
    return "it is no image in a known format"


# --- the formats ------------------------------------------------------------------------------------------------------

_PNG_MODES = {0: "L", 2: "RGB", 3: "P", 4: "LA", 6: "RGBA"}  # by colour type


def _read_png(look: _Look) -> _Size:
    """PNG third edition, sections 5.3 and 11.2.1: chunks, of which the first is IHDR, up to the first with pixels."""
    at, found = 8, None
    while True:
        length, kind = look(">I4s", at)
        if (kind == b"IHDR") == (found is not None):
            raise ValueError("IHDR is not its first chunk, and no other")
        if kind == b"IHDR":
            width, height, _, colour = look(">IIBB", at + 8)
            found = _Size(width, height, _PNG_MODES[colour])
        elif kind == b"tRNS" and found:
            found = found._replace(has_clear_colour=True)
        elif kind == b"IDAT" and found:
            return found
        at += length + 12


# Of a segment: fill bytes 0xFF may stand before it, and none follows a stuffed byte (00) and restarts (D0 to D7).
_JPEG_MARK = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # SOF
_JPEG_SEGMENTS = frozenset((*range(0xC0, 0xD0), *range(0xDA, 0xF0), 0xFE)) - {0xC8}
_JPEG_SCAN = 0xDA  # SOS
_JPEG_MODES = {1: "L", 3: "RGB", 4: "CMYK"}  # by number of components


def _read_jpeg(look: _Look) -> _Size:
    """ITU-T T.81 section B.1.1 and B.2: segments, one of which is the frame's, up to the first scan. Junk in between is passed over."""
    at, found = 2, None
    while True:
        at = look.find(_JPEG_MARK, at) + 2
        (kind,) = look("B", at - 1)
        if kind == _JPEG_SCAN and found:
            return found
        (length,) = look(">H", at)
        if kind not in _JPEG_SEGMENTS or length < 2:
            raise ValueError(f"segment 0x{kind:02x} of {length} bytes")
        if kind in _JPEG_FRAMES:
            depth, height, width, components = look(">BHHB", at + 2)
            if found or depth != 8:
                raise ValueError(f"{depth} bits" if depth != 8 else "two frames")
            found = _Size(width, height, _JPEG_MODES[components])
        at += length


def _read_webp(look: _Look) -> _Size:
    """The three forms of RFC 9649: extended (section 2.7), lossy (RFC 6386 section 9.1), lossless (section 3.4)."""
    (kind,) = look("4s", 12)
    if kind == b"VP8X":
        flags, width, height = look("B3x3s3s", 20)
        width, height = (int.from_bytes(side, "little") + 1 for side in (width, height))
        return _Size(width, height, "RGBA" if flags & 0x10 else "RGB")
    if kind == b"VP8 ":
        start, width, height = look("<3sHH", 23)
        if start == b"\x9d\x01\x2a":
            return _Size(width & 0x3FFF, height & 0x3FFF, "RGB")
    if kind == b"VP8L":
        start, bits = look("<cI", 20)
        if start == b"\x2f":
            return _Size((bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1, "RGBA" if bits >> 28 & 1 else "RGB")
    raise ValueError("neither VP8, VP8L nor VP8X")


def _read_gif(look: _Look) -> _Size:
    """GIF89a sections 18 to 26: the screen, grown by the first image where that is larger; extensions in between are passed over."""
    width, height, flags = look("<HHB", 6)
    at = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    while True:
        (kind,) = look("B", at)
        at += 1
        if kind == 0x2C:
            left, top, wide, high = look("<HHHH", at)
            return _Size(max(width, left + wide), max(height, top + high), "P")
        if kind == 0x3B:
            raise ValueError("no image in it")
        if kind == 0x21:
            at += 1
            size = -1
            while size:
                (size,) = look("B", at)
                at += size + 1


_BMP_HEADERS = (40, 52, 56, 64, 108, 124)
_BMP_BITFIELDS = 3


def _read_bmp(look: _Look) -> _Size:
    """The headers of OS/2 1.x (12 bytes) and of Windows 3 and later. A negative height means the first row is on top."""
    (size,) = look("<I", 14)
    if size == 12:
        width, height, _, bits = look("<HHHH", 18)
        compression = alpha = 0
    elif size in _BMP_HEADERS:
        width, height, _, bits, compression = look("<iiHHI", 18)
        alpha = look("<I", 66)[0] if size >= 56 else 0
    else:
        raise ValueError(f"a header of {size} bytes")
    if bits <= 8:
        return _Size(width, abs(height), "P")
    return _Size(width, abs(height), "RGBA" if compression == _BMP_BITFIELDS and alpha else "RGB")


_TIFF_NUMBERS = {1: "B", 3: "H", 4: "I", 9: "i", 16: "Q"}  # BYTE, SHORT, LONG, SLONG, LONG8
_WIDTH, _HEIGHT, _PHOTOMETRIC, _EXTRA_SAMPLES = 256, 257, 262, 338
_TIFF_MODES = {0: "L", 1: "L", 2: "RGB", 3: "P", 5: "CMYK"}  # by photometric interpretation; the others are colours


def _read_tiff(look: _Look) -> _Size:
    """TIFF 6.0 section 2, and its form with 64-bit offsets: the numbers that lie in the first directory itself.

    Of a tag that is there twice the first counts, as with Pillow.
    """
    (mark,) = look("4s", 0)
    order = "<" if mark[:1] == b"I" else ">"
    is_big = 43 in mark
    (at,) = look(order + ("Q" if is_big else "I"), 8 if is_big else 4)
    (count,) = look(order + ("Q" if is_big else "H"), at)
    at += 8 if is_big else 2
    entry = order + ("HHQ" if is_big else "HHI")
    found: dict[int, int] = {}
    for _ in range(count):
        tag, kind, values = look(entry, at)
        at += struct.calcsize(entry)
        if tag in (_WIDTH, _HEIGHT, _PHOTOMETRIC, _EXTRA_SAMPLES):
            if values != 1 and tag in (_WIDTH, _HEIGHT):
                raise ValueError(f"{values} values for a side")
            found.setdefault(tag, *look(order + _TIFF_NUMBERS[kind], at))
        at += 8 if is_big else 4
    mode = _TIFF_MODES.get(found.get(_PHOTOMETRIC, 1), "RGB")
    if found.get(_EXTRA_SAMPLES):
        mode = "LA" if mode == "L" else "RGBA"
    return _Size(found[_WIDTH], found[_HEIGHT], mode)


class _Format(NamedTuple):
    format: str
    is_start: Callable[[bytes], bool]
    read: Callable[[_Look], _Size]


_FORMATS = (
    _Format("PNG", lambda start: start.startswith(b"\x89PNG\r\n\x1a\n"), _read_png),
    _Format("JPEG", lambda start: start.startswith(b"\xff\xd8\xff"), _read_jpeg),  # MPO too, which phones write as .jpg
    _Format("WEBP", lambda start: start.startswith(b"RIFF") and start[8:12] == b"WEBP", _read_webp),
    _Format("GIF", lambda start: start.startswith((b"GIF87a", b"GIF89a")), _read_gif),
    _Format("BMP", lambda start: start.startswith(b"BM"), _read_bmp),
    _Format("TIFF", lambda start: start.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")), _read_tiff),
)
