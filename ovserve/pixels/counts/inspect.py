"""Counts what an image file makes a decoder repeat, from the file's bytes, before anything is decoded.

A small file can repeat work: a progressive JPEG of 108 kB with 100 scans takes two seconds of CPU time, and a TIFF of
1 MB with far more strips than its size needs took 13 s and 486 MB. `inspect` walks the structure of a file, decodes
nothing, and rejects a file that exceeds one of the limits below. It reads each byte of a file at most once.

A walk ends where a file is damaged; what was counted until there is checked, and the decoder finds the damage. So a
passed check does not bound a decoder that reads a damaged file in another way: only a file with `is_baseline`, where
nothing was unusual, is decoded without a limit of CPU time (see `ovserve.pixels.decoder`). Runs in: worker.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

from ovserve.errors import ImageError
from ovserve.pixels.avif import avif_size, is_avif
from ovserve.pixels.counts.bmp import walk_bmp
from ovserve.pixels.counts.gif import walk_gif
from ovserve.pixels.counts.jpeg import walk_jpeg
from ovserve.pixels.counts.png import walk_png
from ovserve.pixels.counts.tiff import walk_tiff
from ovserve.pixels.counts.walk import FileWalk, TooMuch
from ovserve.pixels.counts.webp import walk_webp
from ovserve.pixels.heic import FORMAT as HEIF
from ovserve.pixels.heic import is_heic, walk_heic

__all__ = ["FileFacts", "inspect"]


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
            found = FileWalk(data, form)
            try:
                walk(found)
                found.check_size(min(found.end, len(data)))
            except TooMuch as error:
                raise ImageError(f"{name}: the {form} file has {error}. Save the image again.", param=name) from None
            except (struct.error, ValueError, KeyError, IndexError, ArithmeticError):
                found.is_baseline = False  # damaged; the decoder gets all of it
                found.end = len(data)
            if found.width and found.height:
                return FileFacts(form, found.width, found.height, min(found.end, len(data)), found.is_baseline)
            break
    raise ImageError(f"{name}: not a readable PNG, JPEG, WebP, AVIF, GIF, BMP or TIFF image", param=name)


def walk_avif(found: FileWalk) -> None:
    """Read the size. Never baseline: AV1 is decoded under a limit of CPU time."""
    found.width, found.height = avif_size(found.data)


_FORMATS: tuple[tuple[str, Callable[[bytes], bool], Callable[[FileWalk], None]], ...] = (
    ("PNG", lambda start: start.startswith(b"\x89PNG\r\n\x1a\n"), walk_png),
    ("JPEG", lambda start: start.startswith(b"\xff\xd8\xff"), walk_jpeg),
    ("WEBP", lambda start: start.startswith(b"RIFF") and start[8:12] == b"WEBP", walk_webp),
    (HEIF, is_heic, walk_heic),  # before AVIF: a file may have the brands of both
    ("AVIF", is_avif, walk_avif),
    ("GIF", lambda start: start.startswith((b"GIF87a", b"GIF89a")), walk_gif),
    ("BMP", lambda start: start.startswith(b"BM"), walk_bmp),
    ("TIFF", lambda start: start.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")), walk_tiff),
)
