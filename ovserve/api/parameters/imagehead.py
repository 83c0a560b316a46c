"""Format and dimensions of an upload from its header alone: no pixel is decoded in the front end."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import IO, cast

from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    JpegImagePlugin,
    MpoImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,
)

from ovserve.config import Settings
from ovserve.errors import ImageError

__all__ = ["FORMATS", "ImageHead", "read_head"]

# Each plugin is imported by name: Pillow registers the rarer ones late, and knows no format before that.
_PLUGINS = (
    PngImagePlugin.PngImageFile,
    JpegImagePlugin.JpegImageFile,
    MpoImagePlugin.MpoImageFile,  # phones write it as .jpg
    WebPImagePlugin.WebPImageFile,
    GifImagePlugin.GifImageFile,
    BmpImagePlugin.BmpImageFile,
    TiffImagePlugin.TiffImageFile,
)
# An MPO is opened by the JPEG plugin, and has no entry of its own to open by.
FORMATS = tuple(plugin.format for plugin in _PLUGINS if plugin.format != "MPO")
_TOLD = "PNG, JPEG, WebP, GIF, BMP and TIFF"

# Pillow's own limit warns and raises by a number of its own; ours is in the settings, and is checked before any decode.
Image.MAX_IMAGE_PIXELS = None

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
    """What the header says. Width and height in pixels, before any EXIF orientation."""

    format: str
    width: int
    height: int
    mode: str


class _View(io.RawIOBase):
    """A file over memory: Pillow seeks in it as it likes, and nothing is copied but what it reads."""

    def __init__(self, view: memoryview) -> None:
        self._view = view
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: len(self._view)}[whence]
        self._at = max(0, base + offset)
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        end = len(self._view) if size is None or size < 0 else self._at + size
        data = bytes(self._view[self._at : end])
        self._at += len(data)
        return data


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
    _check_webp(data, param, settings)
    with _View(data) as stream:
        try:
            with Image.open(cast("IO[bytes]", stream), formats=FORMATS) as image:
                head = ImageHead(image.format or "", image.width, image.height, image.mode)
        except UnidentifiedImageError:
            raise ImageError(
                f"Invalid image file in '{param}': {_name(data)}. {_TOLD} are taken.", param=param
            ) from None
        except Exception as error:  # noqa: BLE001 - Pillow's plugins raise whatever a hostile header makes them raise
            told = type(error).__name__
            raise ImageError(
                f"Invalid image file in '{param}': its header cannot be read ({told}).", param=param
            ) from None
    _check_size(head.width, head.height, param, settings)
    if min(head.width, head.height) < 1:
        raise ImageError(f"Image '{param}' is {head.width}x{head.height}: it has no pixels.", param=param)
    return head


def _check_size(width: int, height: int, param: str, settings: Settings) -> None:
    if max(width, height) > settings.max_image_side_px or width * height > settings.max_image_pixels:
        raise ImageError(
            f"Image '{param}' is {width}x{height}; at most {settings.max_image_pixels} pixels and "
            f"{settings.max_image_side_px} on a side are taken.",
            param=param,
        )


def _check_webp(data: memoryview, param: str, settings: Settings) -> None:
    """Refuse a WebP by the canvas its first bytes declare: Pillow makes room for all of it before it tells its size.

    The three forms of RFC 9649: extended (section 2.7), lossy (RFC 6386 section 9.1), lossless (section 3.4).
    """
    head = bytes(data[:30])
    if len(head) < 30 or head[:4] != b"RIFF" or head[8:12] != b"WEBP":
        return
    width = height = 0
    if head[12:16] == b"VP8X":
        width, height = (int.from_bytes(head[at : at + 3], "little") + 1 for at in (24, 27))
    elif head[12:16] == b"VP8 ":
        width, height = (int.from_bytes(head[at : at + 2], "little") & 0x3FFF for at in (26, 28))
    elif head[12:16] == b"VP8L":
        bits = int.from_bytes(head[21:25], "little")
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    _check_size(width, height, param, settings)


def _name(data: memoryview) -> str:
    start = bytes(data[:64])
    for mark, name in _FOREIGN:
        if mark in start:
            return f"it looks like {name}"
    return "it is no image in a known format"
